"""float8_e4m3fn caches: every code, append, attention, error bounds, bytes, refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import emulated
import test_attention
import test_attention_mma as mma
import test_kv_cache
from cases import (
    ATTENTION_CORNER,
    ATTENTION_CORRECT,
    BLOCK_CAUSAL,
    CAUSAL,
    FULL,
    MIXED,
    QUADRATIC,
    AttentionCase,
    Request,
)
from compare import COMPILE_BACKEND, assert_accurate, assert_equal
from nld_cuda import _library, ops, reference

FP8 = torch.float8_e4m3fn
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def codes(t: torch.Tensor) -> torch.Tensor:
    """The bytes of an fp8 tensor: few torch operations know the dtype itself."""
    return t.view(torch.uint8)


ALL_CODES = torch.arange(256, dtype=torch.uint8)
# By the definition: 4 exponent bits of bias 7, 3 mantissa bits; the largest magnitude is NaN.
MAGNITUDES = torch.tensor(
    [(c % 8) * 2.0**-9 if c < 8 else (1 + c % 8 / 8) * 2.0 ** (c // 8 - 7) for c in range(127)],
    dtype=torch.float64,
)


def encode(x: torch.Tensor) -> torch.Tensor:
    """The rule: nearest value, of two as near the even code; saturating; NaN and signs stay."""
    x = x.double()
    magnitude = x.abs().nan_to_num(0).clamp(max=448.0)
    above = torch.searchsorted(MAGNITUDES, magnitude).clamp(max=126)
    below = (above - 1).clamp(min=0)
    up, down = MAGNITUDES[above] - magnitude, magnitude - MAGNITUDES[below]
    code = torch.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    code = torch.where(x.isnan(), 127, code)
    return (code + 128 * torch.signbit(x)).to(torch.uint8)


def edges() -> torch.Tensor:
    """Every value, every midpoint, their float32 neighbours, and what lies outside."""
    mid = (MAGNITUDES[1:] + MAGNITUDES[:-1]) / 2
    x = torch.cat((MAGNITUDES, mid)).float()
    inf = torch.tensor(torch.inf)
    x = torch.cat((x, torch.nextafter(x, inf), torch.nextafter(x, -inf)))
    outside = [456.0, 464.0, 465.0, 480.0, 512.0, 3e38, torch.inf, torch.nan, 1e-30, 1e-45]
    x = torch.cat((x, torch.tensor(outside), 10 ** (12 * torch.rand(500) - 7)))
    return torch.cat((x, -x))


def test_the_rule_is_torchs_where_torch_has_one() -> None:
    x = edges()
    x = x[x.isnan() | (x.abs() <= 448)]
    assert_equal(encode(x), codes(x.to(FP8)), "codes")
    finite = torch.cat((MAGNITUDES, torch.tensor([torch.nan])))
    exact = torch.cat((finite, -finite)).float()
    assert_equal(ALL_CODES.view(FP8).float(), exact, "values of all codes")


@pytest.mark.parametrize("dim", [512, 48, 7])
def test_every_edge_of_rounding(dim: int, backend) -> None:
    x = edges()
    tokens = -(-x.numel() // dim)
    v = torch.zeros(tokens * dim)
    v[: x.numel()] = x
    v = v.view(tokens, 1, dim)
    k_cache, v_cache = (torch.zeros(tokens, 1, 1, dim).to(FP8).to(backend.device) for _ in "kv")
    ints = torch.arange(tokens, dtype=torch.int32)
    for scale in (None, 1.0, 0.75):  # 0.75: a division that rounds
        scales = None if scale is None else torch.tensor([scale], device=backend.device)
        ops.rope_append_(
            *(t.clone().to(backend.device) for t in (v, v, v)),
            k_cache,
            v_cache,
            (0 * ints).to(backend.device),
            ints.to(backend.device),
            torch.ones(dim // 2).to(backend.device),  # at position 0 nothing is turned
            k_scale=scales,
            v_scale=scales,
        )
        want = encode(v / (scale or 1.0)).view(k_cache.shape)
        assert_equal(codes(v_cache), want, f"v, scale {scale}")
        # The rotation is x * 1 - y * 0: it loses infinities, and the sign of a zero.
        usual = (v.isfinite() & (v != 0)).view(tokens, dim)
        half = dim // 2 * 2
        pairs = usual[:, :half].view(tokens, 2, -1).all(1).repeat(1, 2)
        usual = torch.cat((pairs, usual[:, half:]), 1).view(k_cache.shape)
        assert_equal(codes(k_cache).cpu()[usual], want[usual], f"k, scale {scale}")


def scales_of(kv_heads: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    return {name: (0.02 * 30 ** torch.rand(kv_heads)).to(device) for name in ("k_scale", "v_scale")}


def to_fp8(args: list, scales: dict, hnd: bool = False) -> list:
    """The arguments with quantised caches, as planes of one buffer; NaN stays where it was."""
    stored = []
    for name, cache in zip(("k_scale", "v_scale"), args[1:3], strict=True):
        stored.append(codes(reference.as_stored(cache.cpu(), FP8, scales[name].cpu())))
    planes = torch.stack([s.transpose(1, 2) if hnd else s for s in stored], dim=1)
    k, v = (p.view(FP8).to(args[0].device) for p in planes.unbind(1))
    if args[0].device.type == "cpu":  # .to() of another device would copy the planes apart
        k, v = (p.view(FP8) for p in planes.unbind(1))
    if hnd:
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    return [args[0], k, v, *args[3:]]


def make(case: AttentionCase, dtype: torch.dtype, device: str = "cpu") -> tuple[list, dict, list]:
    """Return (arguments with fp8 caches, options with scales, arguments as they were)."""
    args, options = test_attention.make(case, dtype, device)
    scales = scales_of(case.kv_heads, device)
    return to_fp8(args, scales, case.hnd), options | scales, args


def run(case: AttentionCase, dtype: torch.dtype, backend) -> None:
    args, options, _ = make(case, dtype, backend.device)
    test_attention.check(ops.block_attention(*args, **options), args, options)


@pytest.mark.gpus(80, 90)
@pytest.mark.parametrize("case", ATTENTION_CORRECT + ATTENTION_CORNER, ids=str)
def test_attention_matches_reference(case: AttentionCase, backend) -> None:
    run(case, torch.bfloat16, backend)


OTHER = [c for c in ATTENTION_CORRECT if c.name in ("mixed", "mixed-splits", "softcap", "dim-33")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", OTHER, ids=str)
def test_attention_of_other_queries(case: AttentionCase, dtype: torch.dtype, backend) -> None:
    run(case, dtype, backend)


@pytest.mark.gpus(80, 90)
@pytest.mark.parametrize("softcap", [0.0, 4.0])
@pytest.mark.parametrize("scale", [None, -0.3, 0.0])
def test_scales_and_softcap(scale: float | None, softcap: float, backend) -> None:
    case = AttentionCase("x", MIXED[:2], softcap=softcap, scale=scale, dim=64, kv_heads=4)
    run(case, torch.bfloat16, backend)


@pytest.mark.gpus(80, 90)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 128, 20])
def test_every_code_is_read_right(dim: int, dtype: torch.dtype, backend) -> None:
    """One key: out is its value exactly, and the lse of a one-hot query an element of the key."""
    heads = -(-256 // dim)
    row = ALL_CODES.repeat(2)[: heads * dim].view(1, 1, heads, dim)
    cache = row.view(FP8).to(backend.device)
    exact = row.view(FP8).float()[0, 0]
    ints = [torch.tensor(x, dtype=torch.int32, device=backend.device) for x in ([1], [0, dim], [0])]
    table = torch.zeros(1, 1, dtype=torch.int32, device=backend.device)
    q = torch.eye(dim, dtype=dtype, device=backend.device)[:, None].repeat(1, heads, 1)
    out, lse = ops.block_attention(q, cache, cache, table, *ints, softmax_scale=1.0)
    for head in range(heads):
        if not exact[head].isnan().any():  # NaN: the next test
            torch.testing.assert_close(lse[head].cpu(), exact[head], rtol=1e-6, atol=1e-6)
            assert_equal(out[:, head].float(), exact[head].expand(dim, dim), f"values of {head}")
    # NaN among values comes out where it is, and only there.
    zeros = torch.zeros_like(row).view(FP8).to(backend.device)
    out, _ = ops.block_attention(q, zeros, cache, table, *ints, softmax_scale=1.0)
    for head in range(heads):
        assert_equal(out[:, head].float(), exact[head].expand(dim, dim), f"values of head {head}")


@pytest.mark.gpus(80, 90)
@pytest.mark.parametrize("tile_rows", [16, 64, 128])
@pytest.mark.parametrize("dim", [64, 128])
def test_every_instance(dim: int, tile_rows: int, backend) -> None:
    rows = mma.ROWS_OF_TILE[tile_rows]
    requests = (Request(rows, 150, CAUSAL), Request(rows, 2 * rows + 64, FULL))
    for softcap in (0.0, dim / 8.0):
        case = AttentionCase("x", requests, heads=8, kv_heads=2, dim=dim, softcap=softcap)
        args, options, _ = make(case, torch.bfloat16, backend.device)
        assert mma.plan_tile_rows(args, options, case) == tile_rows
        test_attention.check(ops.block_attention(*args, **options), args, options)


@pytest.mark.gpus(80, 90)
@pytest.mark.parametrize("page_size", [1, 3, 64, 100])
@pytest.mark.parametrize("hnd", [False, True], ids=["nhd", "hnd"])
@pytest.mark.parametrize("rows", [2, 20])
def test_pages(page_size: int, hnd: bool, rows: int, backend) -> None:
    requests = (Request(rows, 217, CAUSAL), Request(rows, page_size), Request(rows, 128, FULL))
    case = AttentionCase("x", requests, heads=6, dim=128, page_size=page_size, hnd=hnd)
    run(case, torch.bfloat16, backend)


@pytest.mark.parametrize("seq_len", [1, 63, 64, 65, 128, 129])
@pytest.mark.parametrize("rows", [1, 20, 40])
def test_edges_of_tiles(rows: int, seq_len: int, backend) -> None:
    requests = (Request(rows, seq_len, FULL), Request(min(rows, seq_len), seq_len, QUADRATIC, 3))
    run(AttentionCase("x", requests, heads=4, kv_heads=1), torch.bfloat16, backend)


@pytest.mark.gpus(80, 90)
def test_tiles_of_64_and_128_rows_give_equal_bits(backend) -> None:
    small = (Request(16, 150, FULL), Request(11, 211, CAUSAL), Request(10, 77, QUADRATIC, 4))
    case = AttentionCase("x", (*small, Request(60, 100)), dim=128, split_len=64, heads=8)
    args, options, _ = make(case, torch.bfloat16, backend.device)
    out, lse = ops.block_attention(*args, **options)
    begin = 0
    for b, request in enumerate(small):
        end = begin + request.rows
        cu_seqlens = torch.tensor([0, request.rows], dtype=torch.int32, device=backend.device)
        one = [args[0][begin:end], *args[1:3], args[3][b : b + 1], args[4][b : b + 1]]
        one_options = options | {n: options[n][b : b + 1] for n in ("block_len", "block_phase")}
        result = ops.block_attention(*one, cu_seqlens, args[6][b : b + 1], **one_options)
        assert_equal(result[0], out[begin:end], f"out of request {b}")
        assert_equal(result[1], lse[:, begin:end], f"lse of request {b}")
        begin = end


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("shift", [1, 8])
def test_rows_that_start_at_no_multiple_of_16_bytes(shift: int, dim: int, backend) -> None:
    case = AttentionCase("x", MIXED[:2], dim=dim)
    args, options, _ = make(case, torch.bfloat16, backend.device)
    for which in (1, 2):
        moved = list(args)
        shape = moved[which].shape
        buffer = torch.zeros(*shape[:3], dim + 16, dtype=torch.uint8, device=backend.device)
        buffer[..., shift : shift + dim] = codes(args[which])
        moved[which] = buffer.view(FP8)[..., shift : shift + dim]
        test_attention.check(ops.block_attention(*moved, **options), moved, options)


@pytest.mark.parametrize("gpu,rows", [(80, 3), (80, 12), (80, 40), (90, 12), (90, 40)])
@pytest.mark.parametrize("order", emulated.ORDERS)
@pytest.mark.parametrize("landing", emulated.LANDINGS)
def test_any_order_of_threads_and_copies(
    order: str, landing: str, gpu: int, rows: int, monkeypatch
) -> None:
    requests = (Request(rows, 203, CAUSAL), Request(rows, 131, QUADRATIC, 4))
    args, options, _ = make(AttentionCase("x", requests, dim=64), torch.bfloat16)
    monkeypatch.setattr(_library, "nld", emulated.Ops())
    emulated.configure()
    with emulated.load().gpu(gpu):
        want = ops.block_attention(*args, **options)
        test_attention.check(want, args, options)
        emulated.configure(order=order, landing=landing, seed=2)
        out, lse = ops.block_attention(*args, **options)
    assert_equal(out, want[0], "out")
    assert_equal(lse, want[1], "lse")


@pytest.mark.gpus(80, 90)
@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize("at", [(0, 0), (37, 15), (99, 63)], ids=str)
def test_nan_is_not_lost(at: tuple, code: int, backend) -> None:
    """A key with a NaN spoils the rows that see it, a value its element of them."""
    case = AttentionCase("x", (Request(20, 100, FULL),), dim=64)
    args, options, _ = make(case, torch.bfloat16, backend.device)
    page = int(args[3][0, at[0] // case.page_size])
    for which in (1, 2):
        spoilt = list(args)
        spoilt[which] = args[which].clone()
        codes(spoilt[which])[page, at[0] % case.page_size, 1, at[1]] = code
        out, _ = ops.block_attention(*spoilt, **options)
        nan = torch.zeros(20, 4, 64, dtype=torch.bool)
        nan[:, 2:, at[1] if which == 2 else slice(None)] = True
        assert_equal(out.isnan(), nan, "NaN in out")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_scale_is_one(dtype: torch.dtype, backend) -> None:
    case = AttentionCase("x", MIXED[:3], split_len=64)
    args, options, _ = make(case, dtype, backend.device)
    one = torch.ones(case.kv_heads, device=backend.device)
    want = ops.block_attention(*args, **options | {"k_scale": one, "v_scale": one})
    for changes in ({"k_scale": None, "v_scale": one}, {"k_scale": None, "v_scale": None}):
        actual = ops.block_attention(*args, **options | changes)
        assert_equal(actual[0], want[0], "out")
        assert_equal(actual[1], want[1], "lse")


@pytest.mark.gpus(80, 90)
@pytest.mark.parametrize("mode", [FULL, CAUSAL, BLOCK_CAUSAL, QUADRATIC])
def test_error_of_quantising_is_bounded(mode: int, backend) -> None:
    """Against attention on what was quantised: an entry is off by at most 2^-4 of itself.

    So a score is off by d = 2^-4 |scale| sum |q| |k| at most, a probability by a factor in
    exp(-2d) .. exp(2d), and out by (exp(2d) - 1) sum p |v'| + 2^-4 sum p |v|, v' as stored.
    """
    requests = (Request(20, 90, mode, block_len=4),)
    case = AttentionCase("x", requests, dim=64, scale=0.02)
    args, options, before = make(case, torch.float32, backend.device)
    plain = {n: v for n, v in options.items() if n not in ("k_scale", "v_scale")}
    scales = options["k_scale"].cpu()[:, None], options["v_scale"].cpu()[:, None]
    step = [s * 2.0**-10 for s in scales]  # below 2^-6 the steps are absolute ones
    exact, _ = reference.block_attention(
        *(t.cpu().double() if t.is_floating_point() else t.cpu() for t in before),
        **{n: v.cpu() if isinstance(v, torch.Tensor) else v for n, v in plain.items()},
    )
    out, _ = ops.block_attention(*args, **options)

    q, k, v = (t.cpu().double().nan_to_num(0) for t in before[:3])
    stored_v = args[2].cpu().double().nan_to_num(0) * scales[1]
    request = requests[0]
    index = torch.arange(request.seq_len)
    pages = before[3].cpu()[0, index // case.page_size].long()
    at = (pages, index % case.page_size)
    group = case.heads // case.kv_heads
    k, v, stored_v = (t[at].repeat_interleave(group, dim=1) for t in (k, v, stored_v))
    k_off = 2.0**-4 * k.abs() + step[0].repeat_interleave(group, dim=0)
    v_off = 2.0**-4 * v.abs() + step[1].repeat_interleave(group, dim=0)
    seen = reference.visible_keys(mode, request.seq_len, request.rows, request.block_len)
    scores = 0.02 * torch.einsum("qhd,khd->hqk", q, k)
    d = 0.02 * torch.einsum("qhd,khd->hqk", q.abs(), k_off).masked_fill(~seen, 0)
    d = d.amax(-1, keepdim=True)
    p = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    bound = torch.einsum("hqk,khd->qhd", (torch.exp(2 * d) - 1) * p, stored_v.abs())
    bound += torch.einsum("hqk,khd->qhd", p, v_off)
    error = (out.cpu().double() - exact).abs()
    assert not error.isnan().any() and (error <= bound + 1e-5).all()
    assert error.norm() < 0.06 * exact.norm(), "typical errors cancel: far below the bound"
    assert error.max() > 1e-4, "it was quantised"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [test_kv_cache.CASES[i] for i in (1, 2, 3, 4, 5, 7, 8, 9, 11)])
def test_append(case: test_kv_cache.Case, dtype: torch.dtype, backend) -> None:
    data = test_kv_cache.make(case, dtype, backend.device)
    scales = scales_of(case.kv_heads, backend.device)
    for name in ("k_cache", "v_cache"):
        data[name] = data[name].to(FP8)
    before = {n: t.cpu().clone() for n, t in data.items()}
    host = {n: s.cpu() for n, s in scales.items()}
    test_kv_cache.run(ops.rope_append_, case, data, **scales)

    plain = {n: t.clone() for n, t in before.items()}
    for name in ("k_cache", "v_cache"):
        plain[name] = plain[name].float()
    plain["qkv"] = plain["qkv"].double()
    exact = {n: t.clone() for n, t in plain.items()}
    for name in ("k_cache", "v_cache"):
        exact[name] = exact[name].double()
    test_kv_cache.run(reference.rope_append_, case, exact)  # rotated, not quantised
    want = {n: t.clone() for n, t in before.items()}
    test_kv_cache.run(reference.rope_append_, case, want, **host)
    assert_equal(codes(data["v_cache"]), codes(want["v_cache"]), "v_cache")
    # A rotated key may lie beside a midpoint: it is then one step away, but as near.
    scaled = exact["k_cache"] / host["k_scale"][:, None]
    actual = data["k_cache"].cpu().double()
    assert_equal(actual.isnan(), scaled.isnan(), "slots written")
    scaled = scaled.nan_to_num(0).clamp(-448, 448)
    best = (encode(scaled).view(FP8).double() - scaled).abs()
    assert ((actual.nan_to_num(0) - scaled).abs() <= best * (1 + 1e-4) + 1e-5).all()
    heads = data["qkv"][:, : case.heads]
    assert_accurate(heads, exact["qkv"][:, : case.heads], want["qkv"][:, : case.heads], "q")


def test_bits_are_those_of_the_cpu(backend) -> None:
    if backend.name == "cpu-baseline" or _library.C.best_cpu_isa() == "baseline":
        pytest.skip("no fused multiply-add")
    case = test_kv_cache.Case(65, 3, 2, 80, 16, freqs=32, scale_len=100)
    data = test_kv_cache.make(case, torch.bfloat16, backend.device)
    for name in ("k_cache", "v_cache"):
        data[name] = data[name].to(FP8)
    scales = scales_of(2, backend.device)
    want = {n: t.cpu().clone() for n, t in data.items()}
    test_kv_cache.run(ops.rope_append_, case, data, **scales)
    _library.C.set_cpu_isa(_library.C.best_cpu_isa())
    test_kv_cache.run(
        torch.ops.nld.rope_append_, case, want, **{n: s.cpu() for n, s in scales.items()}
    )
    for name in ("k_cache", "v_cache"):
        assert_equal(codes(data[name]), codes(want[name]), name)


@pytest.mark.parametrize("dim", [16, 5])
def test_compact_moves_bytes(dim: int, backend) -> None:
    k, v = (torch.randint(0, 256, (2, 6, 4, 2, dim), dtype=torch.uint8) for _ in "kv")
    ints = ([[3, 1, 0], [2, 5, 4]], [3, 0], [[0, 2, 5], [1, 4, 7]], [3, 2])
    ints = [torch.tensor(i, dtype=torch.int32) for i in ints]
    want = [k.clone(), v.clone()]
    reference.compact_(*want, *ints)
    caches = [t.to(backend.device).view(FP8) for t in (k, v)]
    ops.compact_(*caches, *(i.to(backend.device) for i in ints))
    for cache, expected in zip(caches, want, strict=True):
        assert_equal(codes(cache), expected, "cache")


def test_traffic_of_append(traffic) -> None:
    """A quarter of float32, half of bfloat16: one byte an element."""
    case = test_kv_cache.Case(33, 8, 2, 64, 16)
    for name in ("k_cache", "v_cache"):
        data = test_kv_cache.make(case, torch.bfloat16, "cpu")
        for cache in ("k_cache", "v_cache"):
            data[cache] = data[cache].to(FP8)
        written = int((data["slot_mapping"] >= 0).sum())
        with traffic(data[name]) as counted:
            test_kv_cache.run(ops.rope_append_, case, data)
        assert (counted.read_bytes, counted.written_bytes) == (0, written * 2 * 64)


@pytest.mark.parametrize("gpu,dtype", [(80, d) for d in DTYPES] + [(90, torch.bfloat16)], ids=str)
def test_traffic_of_attention(gpu: int, dtype: torch.dtype, traffic) -> None:
    """The keys and values that a bfloat16 cache would read, in half the bytes."""
    case = AttentionCase("x", MIXED[:3], dim=64, split_len=64)
    args, options, before = make(case, dtype)
    plain = {n: v for n, v in options.items() if n not in ("k_scale", "v_scale")}
    counts = []
    for call, kept in ((args, options), (before, plain)):
        call[1:3] = [t.contiguous() for t in call[1:3]]
        with emulated.load("checked").gpu(gpu), traffic(call[1]) as k, traffic(call[2]) as v:
            ops.block_attention(*call, **kept)
        assert k.read_bytes == v.read_bytes > 0
        counts.append(k.read_bytes / call[1].element_size())
    if dtype == torch.float16:  # fp8 goes to the general kernel: once per 16 rows
        assert counts[0] > counts[1]
    else:
        assert counts[0] == counts[1]


def fp8_call() -> dict:
    args, options, _ = make(AttentionCase("x", MIXED), torch.bfloat16)
    return {**dict(zip(test_attention.NAMES, args, strict=True)), **options}


@pytest.mark.parametrize(
    "change,message",
    [
        ({"k_cache": lambda t: t.half()}, r"k_cache must have the dtype of q \(bfloat16\) or floa"),
        ({"v_cache": lambda t: t.bfloat16()}, r"v_cache must have the dtype of k_cache \(float8_"),
        ({"k_scale": lambda t: t[:1]}, r"k_scale must have size 2 \(kv heads\)"),
        ({"v_scale": lambda t: t.double()}, "v_scale must be float32, got float64"),
        ({"v_scale": lambda t: t.repeat(2)[::2]}, "v_scale must be contiguous"),
        ({"k_scale": lambda t: t[:, None]}, "k_scale must have 1 dimensions"),
        ({"k_scale": lambda t: t * 0}, "k_scale must be positive and finite, got 0 for kv head 0"),
        ({"v_scale": lambda t: t * torch.tensor([1, -1])}, "v_scale must be positive and finite"),
        ({"v_scale": lambda t: t * torch.inf}, "v_scale must be positive and finite, got inf"),
        ({"k_scale": lambda t: t * torch.nan}, "k_scale must be positive and finite, got nan"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    call = fp8_call()
    for name, fn in change.items():
        call[name] = fn(call[name])
    with pytest.raises(RuntimeError, match="block_attention: " + message):
        ops.block_attention(**call)
    case = test_kv_cache.CASES[1]
    data = test_kv_cache.make(case, torch.bfloat16, "cpu")
    data |= {n: data[n].to(FP8) for n in ("k_cache", "v_cache")} | scales_of(2)
    for name, fn in change.items():
        data[name] = fn(data[name])
    before = codes(data["k_cache"]).clone()
    with pytest.raises(RuntimeError, match="rope_append_: " + message):
        test_kv_cache.run(
            ops.rope_append_, case, data, k_scale=data["k_scale"], v_scale=data["v_scale"]
        )
    assert_equal(codes(data["k_cache"]), before, "k_cache after a refused call")


@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
def test_scales_without_fp8(name: str) -> None:
    args, options = test_attention.make(AttentionCase("x", MIXED), torch.bfloat16)
    message = f"{name} must be None unless the caches are float8_e4m3fn, got a tensor and bfloat16"
    with pytest.raises(RuntimeError, match="block_attention: " + message):
        ops.block_attention(*args, **options, **{name: torch.ones(2)})
    case = test_kv_cache.CASES[1]
    data = test_kv_cache.make(case, torch.bfloat16, "cpu")
    with pytest.raises(RuntimeError, match="rope_append_: " + message):
        test_kv_cache.run(ops.rope_append_, case, data, **{name: torch.ones(2)})


def test_opcheck() -> None:
    args, options, _ = make(AttentionCase("x", (Request(3, 9), Request(2, 5, FULL))), torch.float32)
    out, lse = torch.zeros(5, 4, 64), torch.zeros(4, 5)
    checks = ("test_faketensor",)  # the others compute with the arguments, which torch cannot
    torch.library.opcheck(
        torch.ops.nld.block_attention.default, tuple(args), options, test_utils=checks
    )
    torch.library.opcheck(
        torch.ops.nld.block_attention.out,
        tuple(args),
        options | {"out": out, "lse": lse},
        test_utils=checks,
    )


def test_compiles() -> None:
    def step(q, k, v, k_cache, v_cache, ints, scales, args, options):
        ops.rope_append_(q, k, v, k_cache, v_cache, *ints, **scales)
        return ops.block_attention(*args, **options)[0] * 2

    case = AttentionCase("x", (Request(3, 9), Request(2, 5, FULL)), dim=32)
    args, options, _ = make(case, torch.float32)
    args[0] = args[0].contiguous()
    qkv = [torch.randn(4, h, 32) for h in (4, 2, 2)]
    caches = [torch.zeros(2, 4, 2, 32).to(FP8) for _ in "kv"]
    ints = (torch.arange(4).int(), torch.arange(4).int(), torch.rand(16))
    results = []
    for fn in (torch.compile(step, backend=COMPILE_BACKEND, fullgraph=True), step):
        own = [t.clone() for t in (*qkv, *caches)]
        scales = {n: options[n] for n in ("k_scale", "v_scale")}
        results.append((fn(*own, ints, scales, args, options), *own))
    for name, a, b in zip(["out", "q", "k", "v", "k_cache", "v_cache"], *results, strict=True):
        assert_equal(*(codes(t) if t.dtype == FP8 else t for t in (a, b)), name)
    assert codes(results[0][4]).any()


def test_split_tiles_are_scaled_once(backend) -> None:
    """One split or many, merged or not: the same result within the usual error."""
    case = replace(ATTENTION_CORRECT[0], page_size=16)
    args, options, _ = make(case, torch.float32, backend.device)
    want = test_attention.expected(args, options)
    for split_len in (16, 100, 4096):
        actual = ops.block_attention(*args, **{**options, "split_len": split_len})
        test_attention.check(actual, args, options, want)
