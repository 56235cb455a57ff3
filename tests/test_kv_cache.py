"""rope_append_ and compact_ against their reference: odd sizes, strides, page sizes, poison."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from compare import assert_accurate, assert_equal
from nld_cuda import ops, reference

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


@pytest.mark.parametrize("page_size,layers,hnd", [(1, 1, False), (4, 3, False), (7, 2, True)])
def test_compact(page_size: int, layers: int, hnd: bool, backend) -> None:
    batch, heads, dim, max_kept, stride = 3, 2, 8, 5, 6
    pages_each = 40 // page_size + 2
    shape = [layers, batch * pages_each, page_size, heads, dim]
    if hnd:
        k_cache = torch.randn(layers, batch * pages_each, heads, page_size, dim).transpose(2, 3)
    else:
        k_cache = torch.randn(shape)
    v_cache = torch.randn(shape).bfloat16().float()
    table = torch.randperm(batch * pages_each).int().view(batch, pages_each)
    base = torch.tensor([0, 3, 8], dtype=torch.int32)
    offsets = (torch.arange(max_kept, dtype=torch.int32) * stride).repeat(batch, 1)
    kept = torch.tensor([5, 0, 3], dtype=torch.int32)
    args = [
        t.to(backend.device) for t in (k_cache.clone(), v_cache.clone(), table, base, offsets, kept)
    ]
    reference.compact_(k_cache, v_cache, table, base, offsets, kept)
    ops.compact_(*args)
    assert_equal(args[0], k_cache, "k_cache")
    assert_equal(args[1], v_cache, "v_cache")


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


def test_compiles_with_dynamic_shapes() -> None:
    case = CASES[1]

    def step(q, k, v, k_cache, v_cache, positions, slots, inv_freq):
        ops.rope_append_(q, k, v, k_cache, v_cache, positions, slots, inv_freq)
        return q * 2

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
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
