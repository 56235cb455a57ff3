"""rope_append_ and compact_ against their reference: odd sizes, strides, page sizes, poison."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from compare import COMPILE_BACKEND, assert_accurate, assert_equal
from nld_cuda import _library, ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Case:
    tokens: int
    heads: int
    kv_heads: int
    dim: int
    page_size: int
    freqs: int | None = None  # None: all of head_dim
    hnd: bool = False  # pages stored [num_pages, heads, page_size, dim]
    scale_len: int = 0


CASES = [
    Case(1, 1, 1, 2, 1),
    Case(33, 8, 2, 64, 16),
    Case(113, 3, 1, 96, 5),
    Case(17, 4, 4, 128, 64, hnd=True),
    Case(7, 6, 2, 40, 3, freqs=7),
    Case(5, 2, 2, 128, 16, scale_len=16384),
    Case(0, 4, 2, 64, 16),
    Case(48, 4, 1, 32, 16),  # as many tokens as three pages hold
    Case(9, 1, 1, 5, 4, freqs=2),
    Case(6, 2, 1, 512, 7),
    Case(3, 2, 2, 16, 2, freqs=0),
    Case(4, 3, 3, 66, 1, hnd=True),
    Case(700, 32, 8, 128, 16),  # CUDA: more than one item a thread
    Case(5600, 1, 2, 64, 33, freqs=24),  # and several tokens a CTA
]


def make(case: Case, dtype: torch.dtype, device: str) -> dict:
    def cache() -> torch.Tensor:
        pages = case.tokens // case.page_size + 3
        shape = (pages, case.page_size, case.kv_heads, case.dim)
        if case.hnd:
            return (
                torch.full((pages, case.kv_heads, case.page_size, case.dim), torch.nan)
                .to(dtype)
                .transpose(1, 2)
            )
        return torch.full(shape, torch.nan, dtype=dtype)

    # q, k and v as views of one projection: strided, and k and v must stay as they are
    total = case.heads + 2 * case.kv_heads
    qkv = torch.randn(case.tokens, total, case.dim).to(dtype)
    k_cache = cache()
    num_slots = k_cache.shape[0] * case.page_size
    slots = torch.randperm(num_slots)[: case.tokens].int()
    slots[::4] = -1
    freqs = case.dim // 2 if case.freqs is None else case.freqs
    return {
        "qkv": qkv.to(device),
        "k_cache": k_cache.to(device),
        "v_cache": cache().to(device),
        "positions": torch.randint(0, 40000, (case.tokens,), dtype=torch.int32, device=device),
        "slot_mapping": slots.to(device),
        "inv_freq": (1e4 ** -(torch.arange(freqs) / max(freqs, 1))).float().to(device),
    }


def run(fn, case: Case, data: dict, **kw) -> dict:
    q, k, v = data["qkv"].split([case.heads, case.kv_heads, case.kv_heads], dim=1)
    fn(
        q,
        k,
        v,
        *(data[n] for n in ("k_cache", "v_cache", "positions", "slot_mapping", "inv_freq")),
        **kw,
    )
    return data


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rope_append(case: Case, dtype: torch.dtype, backend) -> None:
    data = make(case, dtype, backend.device)
    copies = [{n: t.cpu().clone() for n, t in data.items()} for _ in range(2)]
    for name in ("qkv", "k_cache", "v_cache"):
        copies[0][name] = copies[0][name].double()
    kw = dict(attention_scaling=1.25, query_scale_beta=0.1, query_scale_len=case.scale_len)
    exact = run(reference.rope_append_, case, copies[0], **kw)
    plain = run(reference.rope_append_, case, copies[1], **kw)
    actual = run(ops.rope_append_, case, data, **kw)
    assert_accurate(actual["qkv"], exact["qkv"], plain["qkv"], "q")
    assert_equal(actual["k_cache"].isnan(), exact["k_cache"].isnan(), "k_cache slots written")
    assert_accurate(*(d["k_cache"].nan_to_num(0) for d in (actual, exact, plain)), name="k_cache")
    assert_equal(actual["v_cache"], plain["v_cache"], "v_cache")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_are_those_of_the_cpu(dtype: torch.dtype, backend) -> None:
    """CUDA and every CPU with fused multiply-adds agree to the last bit."""
    if backend.name == "cpu-baseline" or _library.C.best_cpu_isa() == "baseline":
        pytest.skip("no fused multiply-add")
    case = Case(65, 3, 2, 80, 16, freqs=32, scale_len=100)
    data = make(case, dtype, backend.device)
    data["positions"][:2] = torch.tensor([0, 2**31 - 1])
    expected = {n: t.cpu().clone() for n, t in data.items()}
    kw = dict(attention_scaling=1.07, query_scale_beta=0.1, query_scale_len=case.scale_len)
    run(ops.rope_append_, case, data, **kw)
    _library.C.set_cpu_isa(_library.C.best_cpu_isa())
    run(torch.ops.nld.rope_append_, case, expected, **kw)
    for name in ("qkv", "k_cache", "v_cache"):
        assert_equal(data[name], expected[name], name)


def test_slots_outside_the_cache_are_not_written(backend) -> None:
    case = Case(6, 2, 1, 16, 4)
    data = make(case, torch.float32, backend.device)
    num_slots = data["k_cache"].shape[0] * case.page_size
    slots = [-1, num_slots, num_slots - 1, 2**31 - 1, -(2**31), 0]
    data["slot_mapping"] = torch.tensor(slots, dtype=torch.int32, device=backend.device)
    before = data["qkv"].clone()
    run(ops.rope_append_, case, data)
    written = ~data["k_cache"].view(num_slots, -1).isnan().any(dim=1)
    assert written.nonzero().flatten().tolist() == [0, num_slots - 1]
    assert_equal(data["k_cache"].isnan(), data["v_cache"].isnan(), "the same slots of k and v")
    assert_equal(data["qkv"][:, 2:], before[:, 2:], "k and v are only read")
    assert (data["qkv"][:, :2] != before[:, :2]).any(dim=-1).all(), "every query is rotated"


def test_append_follows_the_page_order(backend) -> None:
    """One layer of a [layers, pages, ...] cache, a sequence across pages in any order."""
    page_size, tokens, dim = 3, 8, 8
    caches = torch.full((2, 2, 5, page_size, 2, dim), torch.nan, device=backend.device)
    k_cache, v_cache = caches[0, 1], caches[1, 1]
    table = torch.tensor([4, 0, 2])
    index = torch.arange(tokens)
    slots = (table[index // page_size] * page_size + index % page_size).int().to(backend.device)
    qkv = torch.randn(tokens, 6, dim, device=backend.device)
    q, k, v = qkv.split([2, 2, 2], dim=1)
    freqs = torch.zeros(dim // 2, device=backend.device)  # angle 0: k is stored as it is
    ops.rope_append_(q, k, v, k_cache, v_cache, index.int().to(backend.device), slots, freqs)
    for cache, source in ((k_cache, k), (v_cache, v)):
        assert_equal(cache[table].flatten(0, 1)[:tokens], source, "tokens in order")
        assert int(cache.isnan().any(-1).any(-1).sum()) == 5 * page_size - tokens
    assert caches[:, 0].isnan().all(), "the other layer"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounds_as_torch_does(dtype: torch.dtype, backend) -> None:
    """At position 0 only the scaling is left: every finite value, to nearest even, bit for bit."""
    bits = torch.randint(-(2**15), 2**15, (64, 3, 96), dtype=torch.int16)
    values = bits.view(torch.float16) if dtype == torch.float16 else bits.view(torch.bfloat16)
    values = torch.where(values.isfinite(), values, 1.0).to(dtype)
    data = make(Case(64, 1, 1, 96, 16), dtype, backend.device)
    data["qkv"] = values.clone().to(backend.device)
    data["positions"] = torch.zeros_like(data["positions"])
    run(ops.rope_append_, Case(64, 1, 1, 96, 16), data, attention_scaling=1.25)
    assert_equal(data["qkv"][:, 0], (values[:, 0].float() * 1.25).to(dtype), "q")


def test_rotation_at_every_position(backend) -> None:
    """Angles up to 2^31: cos and sin keep their digits, the quadrants their signs."""
    positions = torch.cat((torch.arange(4000), torch.randint(0, 2**31 - 1, (4000,)))).int()
    frequencies = torch.tensor([1.0, 0.5, 1e-3, 7.7e-8])
    q = torch.zeros(len(positions), 1, 8)
    q[..., :4] = 1  # rotated: cos in the first half, sin in the second
    q = q.to(backend.device)
    cache = torch.zeros(1, 1, 1, 8, device=backend.device)
    slots = torch.full_like(positions, -1).to(backend.device)
    k = q.clone()
    ops.rope_append_(
        q, k, k, cache, cache.clone(), positions.to(q.device), slots, frequencies.to(q.device)
    )
    angles = (positions.float()[:, None] * frequencies).double()
    exact = torch.cat((angles.cos(), angles.sin()), dim=-1)
    assert (q[:, 0].cpu().double() - exact).abs().max() < 5e-7


@pytest.mark.parametrize("layout", ["dense", "heads first", "layers inside", "with gaps"])
@pytest.mark.parametrize("page_size,layers", [(1, 1), (4, 3), (7, 2)])
def test_compact(page_size: int, layers: int, layout: str, backend) -> None:
    batch, heads, dim, max_kept, stride = 4, 2, 8, 5, 6
    pages_each = 40 // page_size + 2
    pages = batch * pages_each
    shape = (layers, pages, page_size, heads, dim)
    k_cache = {
        "dense": lambda: torch.randn(shape),
        "heads first": lambda: torch.randn(layers, pages, heads, page_size, dim).transpose(2, 3),
        "layers inside": lambda: torch.randn(pages, page_size, layers, heads, dim).movedim(2, 0),
        "with gaps": lambda: torch.randn(layers, pages + 1, page_size, heads + 1, dim + 4)[
            :, 1:, :, 1:, :dim
        ],
    }[layout]()
    v_cache = torch.randn(shape)
    table = torch.randperm(pages).int().view(batch, pages_each)
    used = (8 + (max_kept - 1) * stride) // page_size + 1
    table[:, used:] = 2**31 - 1  # unused entries may hold anything
    table[2] = -1  # and so may all of a request that keeps nothing
    base = torch.tensor([0, 3, 8, 5], dtype=torch.int32)
    offsets = (torch.arange(max_kept, dtype=torch.int32) * stride).repeat(batch, 1)
    offsets[3] = torch.tensor([0, 1, 2, 6, 7])  # the first ones stay where they are
    kept = torch.tensor([max_kept + 3, 4, 0, 5], dtype=torch.int32)
    for b in range(batch):  # what is not chosen is poison
        for index in set(range(int(base[b]), 40)) - set((base[b] + offsets[b]).tolist()):
            page = int(table[b, index // page_size])
            if 0 <= page < pages:
                k_cache[:, page, index % page_size] = v_cache[:, page, index % page_size] = (
                    torch.nan
                )
    actual = []
    for t in (k_cache, v_cache, table, base, offsets, kept):
        moved = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=backend.device)
        actual.append(moved.copy_(t))
    wanted = [t.clone() for t in (table, base, offsets, kept)]
    reference.compact_(k_cache, v_cache, table, base, offsets, kept)
    ops.compact_(*actual)
    assert_equal(actual[0], k_cache, "k_cache")
    assert_equal(actual[1], v_cache, "v_cache")
    for got, want in zip(actual[2:], wanted, strict=True):
        assert_equal(got, want, "arguments that are only read")
    for b, count in enumerate((5, 4, 0, 5)):
        for i in range(count):
            page, offset = table[b, (base[b] + i) // page_size], (base[b] + i) % page_size
            assert not k_cache[:, page, offset].isnan().any(), "poison was moved"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compact_in_two_bytes(dtype: torch.dtype, backend) -> None:
    cache = torch.randn(2, 3, 4, 2, 8).to(dtype).to(backend.device)
    other = cache.clone() + 1
    before, before_other = cache.clone(), other.clone()
    ints = ([[2, 0, 1]], [1], [[0, 2, 5, 9]], [4])
    ops.compact_(cache, other, *(torch.tensor(i, dtype=torch.int32).to(cache.device) for i in ints))
    # entries 1, 3, 6, 10 of the sequence (pages 2, 0, 1) become entries 1 .. 5
    for now, was in ((cache, before), (other, before_other)):
        sequence, old = now[:, [2, 0, 1]].flatten(1, 2), was[:, [2, 0, 1]].flatten(1, 2)
        assert_equal(sequence[:, 1:5], old[:, [1, 3, 6, 10]], "kept entries")
        assert_equal(sequence[:, [0, *range(5, 12)]], old[:, [0, *range(5, 12)]], "the others")


@pytest.mark.parametrize("kept", [7, 8, 9, 64, 65, 150])
def test_compact_moves_long_chains(kept: int, backend) -> None:
    """Every destination is the source of the entry before it, or of one far back."""
    cache = torch.randn(1, 40, 8, 3, 8, device=backend.device)
    other = cache.clone() + 1
    table = torch.randperm(40).view(1, 40).int()
    offsets = torch.arange(kept) + 1
    offsets[kept // 2 :] += kept // 2
    args = [t.to(backend.device) for t in (table, torch.tensor([3]).int(), offsets[None].int())]
    args.append(torch.tensor([kept], dtype=torch.int32, device=backend.device))
    expected = [cache.cpu().clone(), other.cpu().clone()]
    reference.compact_(*expected, *(t.cpu() for t in args))
    ops.compact_(cache, other, *args)
    assert_equal(cache, expected[0], "k_cache")
    assert_equal(other, expected[1], "v_cache")


def test_compact_with_entries_beyond_the_table(backend) -> None:
    """Indices the table has no page for move nothing, and nothing else is touched."""
    cache = torch.randn(1, 2, 2, 1, 4, device=backend.device)
    before = cache.clone()
    for base, offsets in ((0, [9, 10]), (-5, [1, 2]), (2**31 - 1, [3, 4])):
        ints = ([[0, 1]], [base], [offsets], [2])
        args = (torch.tensor(i, dtype=torch.int32).to(cache.device) for i in ints)
        ops.compact_(cache, cache.clone(), *args)
        assert_equal(cache, before, "cache")


def test_traffic_of_rope_append(traffic) -> None:
    """Queries are read and written once, keys and values read once and written where they fit."""
    case = Case(33, 8, 2, 64, 16)
    written = 24  # every fourth token has no slot
    per_head = case.dim * 2
    for name, read, wrote in (
        ("qkv", 33 * (8 + 2 * 2) * per_head, 33 * 8 * per_head),
        ("k_cache", 0, written * 2 * per_head),
        ("v_cache", 0, written * 2 * per_head),
    ):
        data = make(case, torch.bfloat16, "cpu")
        assert int((data["slot_mapping"] >= 0).sum()) == written
        with traffic(data[name]) as counted:
            run(ops.rope_append_, case, data)
        assert (counted.read_bytes, counted.written_bytes) == (read, wrote), name


def test_traffic_of_compact(traffic) -> None:
    """Entries that move are read once and written once; the leading ones stay and cost nothing."""
    cache, other = torch.randn(3, 4, 4, 2, 8), torch.randn(3, 4, 4, 2, 8)
    ints = ([[0, 1], [3, 2]], [1, 0], [[0, 1, 3, 5], [0, 2, 9, 9]], [4, 2])
    moves = 2 + 1
    with traffic(cache) as counted:
        ops.compact_(cache, other, *(torch.tensor(i, dtype=torch.int32) for i in ints))
    moved = moves * 3 * 2 * 8 * 4
    assert (counted.read_bytes, counted.written_bytes) == (moved, moved)


def test_opcheck() -> None:
    case = CASES[1]
    data = make(case, torch.float32, "cpu")
    q, k, v = (
        t.contiguous() for t in data["qkv"].split([case.heads, case.kv_heads, case.kv_heads], dim=1)
    )
    rest = [data[n].nan_to_num(0) for n in ("k_cache", "v_cache")]
    rest += [data[n] for n in ("positions", "slot_mapping", "inv_freq")]
    torch.library.opcheck(torch.ops.nld.rope_append_, (q, k, v, *rest), {"query_scale_len": 100})
    cache = torch.randn(2, 6, 4, 2, 8)
    ints = [
        torch.arange(6).int().view(1, 6),
        torch.tensor([2]).int(),
        torch.tensor([[0, 3, 6]]).int(),
    ]
    torch.library.opcheck(
        torch.ops.nld.compact_, (cache, cache.clone(), *ints, torch.tensor([3]).int())
    )


@pytest.mark.parametrize(
    "change,message",
    [
        ({"positions": lambda t: t.long()}, "rope_append_: positions must be int32, got int64"),
        ({"slot_mapping": lambda t: t[:-1]}, r"slot_mapping must have size 33 \(tokens of q\)"),
        ({"k_cache": lambda t: t[..., ::2]}, "k_cache must have size 64"),
        ({"v_cache": lambda t: t.double()}, "v_cache must have the dtype of k_cache"),
        ({"k_cache": lambda t: t[0]}, "k_cache must have 4 dimensions"),
        ({"k_cache": lambda t: t[:, :0], "v_cache": lambda t: t[:, :0]}, "at least one token"),
        ({"v_cache": lambda t: t[:-1]}, "v_cache must have the shape of k_cache"),
        ({"positions": lambda t: t.repeat(2)[::2]}, "positions must be contiguous"),
        ({"inv_freq": lambda t: t.double()}, "inv_freq must be float32, got float64"),
        ({"inv_freq": lambda t: torch.cat([t, t])}, "inv_freq must have at most head_dim / 2 = 32"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    case = CASES[1]
    data = make(case, torch.float32, "cpu")
    before = data["qkv"].clone()
    for name, fn in change.items():
        data[name] = fn(data[name])
    with pytest.raises(RuntimeError, match=message):
        run(ops.rope_append_, case, data)
    assert_equal(data["qkv"], before, "q after a refused call")


@pytest.mark.parametrize(
    "change,message",
    [
        ({"k_cache": lambda t: t[0]}, "compact_: k_cache must have 5 dimensions"),
        ({"k_cache": lambda t: t[..., ::2], "v_cache": lambda t: t[..., ::2]}, "stride 1 in its"),
        ({"k_cache": lambda t: t.int(), "v_cache": lambda t: t.int()}, "k_cache must be float32"),
        ({"v_cache": lambda t: t.half()}, "v_cache must have the dtype of k_cache"),
        (
            {"k_cache": lambda t: t[:, :, :0], "v_cache": lambda t: t[:, :, :0]},
            "at least one token",
        ),
        ({"page_table": lambda t: t.long()}, "page_table must be int32"),
        ({"page_table": lambda t: t[:1]}, "page_table must have size 2"),
        ({"base_lens": lambda t: t[:1]}, r"base_lens must have size 2 \(batch of src_offsets\)"),
        ({"src_offsets": lambda t: t.long()}, "src_offsets must be int32"),
        ({"src_offsets": lambda t: t.t().contiguous().t()}, "src_offsets must be contiguous"),
        ({"num_kept": lambda t: t.float()}, "num_kept must be int32, got float32"),
    ],
)
def test_bad_arguments_of_compact(change: dict, message: str) -> None:
    data = {
        "k_cache": torch.zeros(1, 4, 2, 1, 4),
        "v_cache": torch.zeros(1, 4, 2, 1, 4),
        "page_table": torch.arange(4, dtype=torch.int32).view(2, 2),
        "base_lens": torch.zeros(2, dtype=torch.int32),
        "src_offsets": torch.arange(2, dtype=torch.int32).repeat(2, 1),
        "num_kept": torch.ones(2, dtype=torch.int32),
    }
    for name, fn in change.items():
        data[name] = fn(data[name])
    with pytest.raises(RuntimeError, match=message):
        ops.compact_(**data)


def test_compiles_with_dynamic_shapes() -> None:
    case = CASES[1]

    def step(q, k, v, k_cache, v_cache, positions, slots, inv_freq):
        ops.rope_append_(q, k, v, k_cache, v_cache, positions, slots, inv_freq)
        return q * 2

    compiled = torch.compile(step, backend=COMPILE_BACKEND, fullgraph=True, dynamic=True)
    for tokens in (5, 9, 33):
        data = make(
            Case(tokens, case.heads, case.kv_heads, case.dim, case.page_size), torch.float32, "cpu"
        )
        copy = {n: t.clone() for n, t in data.items()}
        names = ("k_cache", "v_cache", "positions", "slot_mapping", "inv_freq")
        q, k, v = (t.contiguous() for t in data["qkv"].split([8, 2, 2], dim=1))
        q2, k2, v2 = (t.contiguous() for t in copy["qkv"].split([8, 2, 2], dim=1))
        out = compiled(q, k, v, *(data[n] for n in names))
        expected = step(q2, k2, v2, *(copy[n] for n in names))
        assert_equal(out, expected, "compiled result")
        assert_equal(data["k_cache"], copy["k_cache"], "k_cache")


def test_compact_compiles_with_dynamic_shapes() -> None:
    def step(k_cache, v_cache, table, base, offsets, kept):
        ops.compact_(k_cache, v_cache, table, base, offsets, kept)
        return base + kept

    compiled = torch.compile(step, backend=COMPILE_BACKEND, fullgraph=True, dynamic=True)
    for batch, max_kept in ((2, 3), (3, 4), (5, 2)):
        # Two tensors: inductor (torch 2.13) loses writes to the second of two views of one tensor.
        k_cache, v_cache = (torch.randn(2, 4 * batch, 4, 2, 8) for _ in range(2))
        table = torch.randperm(4 * batch).int().view(batch, 4)
        base = torch.arange(batch, dtype=torch.int32)
        offsets = (2 * torch.arange(max_kept, dtype=torch.int32)).repeat(batch, 1)
        kept = torch.full((batch,), max_kept, dtype=torch.int32)
        expected = [k_cache.clone(), v_cache.clone()]
        reference.compact_(*expected, table, base, offsets, kept)
        assert_equal(compiled(k_cache, v_cache, table, base, offsets, kept), base + kept, "lens")
        assert_equal(k_cache, expected[0], "k_cache")
        assert_equal(v_cache, expected[1], "v_cache")
