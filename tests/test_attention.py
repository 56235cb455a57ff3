"""block_attention against its reference: every mask mode, layout and size, poison, invariance."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import emulated
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

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INT = torch.int32


def make(case: AttentionCase, dtype: torch.dtype, device: str = "cpu") -> tuple[list, dict]:
    """Return (arguments, options): NaN past seq_lens, absurd unused page-table entries."""
    lens = [r.seq_len for r in case.requests]
    pages_of = [-(-n // case.page_size) for n in lens]
    num_pages = sum(pages_of) + 2
    shape = [num_pages, case.page_size, case.kv_heads, case.dim]
    if case.hnd:
        shape[1], shape[2] = shape[2], shape[1]
    # The caches are planes of one buffer, so that strides are not those of a contiguous tensor.
    caches = torch.randn(num_pages, 2, *shape[1:]).to(dtype)
    k_cache, v_cache = caches.unbind(1)
    if case.hnd:
        k_cache, v_cache = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    order = torch.randperm(num_pages).tolist()
    table = torch.full((len(lens), max(pages_of, default=0) + 2), 2**31 - 1, dtype=INT)
    used = torch.zeros(num_pages, case.page_size, dtype=torch.bool)
    for b, length in enumerate(lens):
        for i in range(pages_of[b]):
            page = order.pop()
            table[b, i] = page
            used[page, : length - i * case.page_size] = True
    k_cache[~used] = torch.nan
    v_cache[~used] = torch.nan
    total = case.rows + case.extra_rows
    qkv = torch.randn(total, case.heads + 2 * case.kv_heads, case.dim).to(dtype)
    q = qkv[:, : case.heads]
    q[case.rows :] = torch.nan
    ints = {
        "seq_lens": lens,
        "cu_seqlens_q": [0, *torch.tensor([r.rows for r in case.requests]).cumsum(0).tolist()],
        "mask_mode": [r.mode for r in case.requests],
        "block_len": [r.block_len for r in case.requests],
        "block_phase": [r.phase for r in case.requests],
    }
    tensors = {name: torch.tensor(value, dtype=INT, device=device) for name, value in ints.items()}
    args = [t.to(device) for t in (q, k_cache, v_cache, table)]
    args += [tensors[n] for n in ("seq_lens", "cu_seqlens_q", "mask_mode")]
    options = {
        "block_len": tensors["block_len"],
        "block_phase": tensors["block_phase"],
        "softmax_scale": case.scale,
        "softcap": case.softcap,
        "split_len": case.split_len,
    }
    return args, options


def expected(args: list, options: dict) -> tuple[tuple, tuple]:
    """Return the reference's (out, lse) in float64 and in the dtype of q, computed on the CPU."""
    cpu = [t.cpu() for t in args]
    cpu_options = {n: v.cpu() if isinstance(v, torch.Tensor) else v for n, v in options.items()}
    exact = reference.block_attention(
        *(t.double() if t.is_floating_point() else t for t in cpu), **cpu_options
    )
    return exact, reference.block_attention(*cpu, **cpu_options)


def check(actual: tuple, args: list, options: dict, want: tuple | None = None) -> None:
    exact, plain = expected(args, options) if want is None else want
    assert actual[0].dtype == args[0].dtype and actual[1].dtype == torch.float32
    assert_accurate(actual[0], exact[0], plain[0], "out")
    assert_accurate(actual[1], exact[1], plain[1], "lse", tiny=2e-6)


@cache
def prepared(case: AttentionCase, dtype: torch.dtype) -> tuple[list, dict, tuple]:
    """The case's inputs and expected results, made once for all backends."""
    args, options = make(case, dtype)
    return args, options, expected(args, options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ATTENTION_CORRECT + ATTENTION_CORNER, ids=str)
def test_matches_reference(case: AttentionCase, dtype: torch.dtype, backend) -> None:
    args, options, want = prepared(case, dtype)
    args = [t.to(backend.device) for t in args]
    options = {
        n: v.to(backend.device) if isinstance(v, torch.Tensor) else v for n, v in options.items()
    }
    check(ops.block_attention(*args, **options), args, options, want)


@given(data=st.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_batch(data) -> None:
    requests = data.draw(
        st.lists(
            st.builds(
                Request,
                rows=st.integers(0, 40),
                seq_len=st.integers(0, 90),
                mode=st.integers(0, 3),
                block_len=st.integers(1, 9),
                phase=st.integers(-9, 9),
            ),
            max_size=4,
        )
    )
    kv_heads = data.draw(st.integers(1, 3))
    case = AttentionCase(
        "drawn",
        tuple(requests),
        heads=kv_heads * data.draw(st.integers(1, 5)),
        kv_heads=kv_heads,
        dim=data.draw(st.integers(1, 40)),
        page_size=data.draw(st.integers(1, 9)),
        split_len=data.draw(st.integers(0, 50)),
        hnd=data.draw(st.booleans()),
    )
    args, options = make(case, data.draw(st.sampled_from(DTYPES)))
    check(ops.block_attention(*args, **options), args, options)


@pytest.mark.parametrize("mode", [FULL, CAUSAL, BLOCK_CAUSAL, QUADRATIC])
def test_reference_mask_is_the_written_rule(mode: int) -> None:
    """The rule of docs/design.md, key by key, against the reference's tensor form."""
    for rows, seq_len, block_len, phase in [
        (6, 6, 2, 0),
        (7, 12, 3, 1),
        (12, 20, 3, -2),
        (9, 4, 2, 5),
    ]:
        mask = reference.visible_keys(mode, seq_len, rows, block_len, phase)
        for i in range(rows):
            p = seq_len - rows + i
            for j in range(seq_len):
                c = j - (seq_len - rows)
                size = block_len + 1
                rule = {
                    FULL: True,
                    CAUSAL: j <= p,
                    BLOCK_CAUSAL: math.floor((j + phase) / block_len)
                    <= math.floor((p + phase) / block_len),
                    QUADRATIC: c < 0
                    or (c % size == 0 and c <= i)
                    or (i % size != 0 and c // size == i // size),
                }[mode]
                assert bool(mask[i, j]) == rule, (mode, rows, seq_len, i, j)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_of_groups_are_computed_as_a_chain(dtype: torch.dtype, backend) -> None:
    """Quadratic drafts are judged by the bits of `ar`: same keys, same order, same steps."""
    k, context = 5, 90
    rows = k * (k + 1)
    case = AttentionCase("x", (Request(rows, context + rows, QUADRATIC, k),), split_len=64)
    args, options = make(case, dtype, backend.device)
    out, lse = ops.block_attention(*args, **options)
    chain = torch.tensor(
        [*range(context), *range(context, context + rows, k + 1)], device=backend.device
    )
    slots = args[3][0, chain // 16].long() * 16 + chain % 16
    args[0] = args[0][:: k + 1]
    for i in (1, 2):  # one page that holds the cache and the heads
        args[i] = args[i].flatten(0, 1)[slots][None]
    ints = [[0], [context + k], [0, k], [CAUSAL]]
    args[3:] = [torch.tensor(v, dtype=INT, device=backend.device) for v in ints]
    args[3] = args[3][None]
    alone, lse_alone = ops.block_attention(*args, split_len=64)
    assert_equal(alone, out[:: k + 1], "out")
    assert_equal(lse_alone, lse[:, :: k + 1], "lse")


def test_rows_that_see_nothing(backend) -> None:
    case = AttentionCase(
        "x", (Request(3, 0, FULL), Request(5, 2, CAUSAL), Request(2, 7)), extra_rows=4
    )
    args, options = make(case, torch.float32, backend.device)
    out, lse = ops.block_attention(*args, **options)
    blind = torch.tensor([True] * 6 + [False] * 4 + [True] * 4)
    assert (out.cpu()[blind] == 0).all() and (lse.cpu()[:, blind] == -torch.inf).all()
    assert (out.cpu()[~blind] != 0).any(-1).all() and lse.cpu()[:, ~blind].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_is_written_through_its_strides(dtype: torch.dtype, backend) -> None:
    case = AttentionCase("x", MIXED, extra_rows=2, split_len=64)
    args, options = make(case, dtype, backend.device)
    out, lse = ops.block_attention(*args, **options)
    total = case.rows + case.extra_rows
    buffer = torch.full(
        (total, case.heads + 3, case.dim + 5), 7.0, dtype=dtype, device=backend.device
    )
    lse_buffer = torch.full((total, case.heads + 1), 7.0, device=backend.device)
    view, lse_view = buffer[:, 2 : 2 + case.heads, : case.dim], lse_buffer[:, : case.heads].T
    before = [t.clone() for t in args]
    result = ops.block_attention(*args, **options, out=view, lse=lse_view)
    assert result[0] is view and result[1] is lse_view
    assert_equal(view, out, "out")
    assert_equal(lse_view, lse, "lse")
    view.fill_(7.0)
    lse_view.fill_(7.0)
    assert (buffer == 7).all() and (lse_buffer == 7).all(), "written outside out"
    for now, was in zip(args, before, strict=True):
        assert_equal(now, was, "an argument that is only read")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("split_len", [0, 32])
def test_batch_equals_its_requests_alone(split_len: int, dtype: torch.dtype, backend) -> None:
    """Bit for bit; on CUDA with a split_len of one's own, because 0 fills the GPU as it can."""
    if split_len == 0 and not backend.name.startswith("cpu"):
        split_len = 1024
    case = AttentionCase("x", MIXED, split_len=split_len)
    args, options = make(case, dtype, backend.device)
    out, lse = ops.block_attention(*args, **options)
    begin = 0
    for b, request in enumerate(case.requests):
        end = begin + request.rows
        alone = [args[0][begin:end], *args[1:3], args[3][b : b + 1], args[4][b : b + 1]]
        alone += [
            torch.tensor([0, request.rows], dtype=INT, device=backend.device),
            args[6][b : b + 1],
        ]
        one = {n: v[b : b + 1] if isinstance(v, torch.Tensor) else v for n, v in options.items()}
        out_alone, lse_alone = ops.block_attention(*alone, **one)
        assert_equal(out_alone, out[begin:end], f"out of request {b}")
        assert_equal(lse_alone, lse[:, begin:end], f"lse of request {b}")
        begin = end


def make_plan(args: list, options: dict, **changes) -> torch.Tensor:
    names = ("block_len", "block_phase", "split_len")
    sizes = {
        "total_q": args[0].shape[0],
        "num_heads": args[0].shape[1],
        "num_kv_heads": args[1].shape[2],
        "max_seq_len": args[3].shape[1] * args[1].shape[1],
    }
    return ops.attention_plan(*args[4:], **{**sizes, **{n: options[n] for n in names}, **changes})


@pytest.mark.parametrize("split_len", [0, 48])
def test_given_plan_changes_nothing(split_len: int, backend) -> None:
    """Nor does one that is larger than need be, for lengths that may still grow."""
    case = AttentionCase("x", MIXED, split_len=split_len, extra_rows=2)
    args, options = make(case, torch.bfloat16, backend.device)
    out, lse = ops.block_attention(*args, **options)
    sizes = [{}, {"max_seq_len": 5000}] if split_len else [{}]
    for changes in sizes:
        plan = make_plan(args, options, **changes)
        before = plan.clone()
        planned = ops.block_attention(*args, **options, plan=plan)
        assert_equal(planned[0], out, "out")
        assert_equal(planned[1], lse, "lse")
        assert_equal(plan, before, "plan")
    if split_len == 0:  # made for another GPU: other splits, the same result
        for num_sms in (1, 132):
            plan = make_plan(args, options, num_sms=num_sms)
            check(ops.block_attention(*args, **options, plan=plan), args, options)


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda t: t[:20], "plan must be made by attention_plan for 111 rows, 5 requests, 4/2 hea"),
        (lambda t: t[:-1], "plan must be made by attention_plan"),
        (lambda t: torch.cat((t[:1], t))[1:], "plan must be made by attention_plan"),
        (lambda t: t.long(), "plan must be int32, got int64"),
        (lambda t: t[None], "plan must have 1 dimensions"),
        (lambda t: t.repeat_interleave(2)[::2], "plan must be contiguous"),
    ],
)
def test_bad_plan(change, message: str, backend) -> None:
    args, options = make(AttentionCase("x", MIXED), torch.float32, backend.device)
    with pytest.raises(RuntimeError, match="block_attention: " + message):
        ops.block_attention(*args, **options, plan=change(make_plan(args, options)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shuffled_batch(dtype: torch.dtype, backend) -> None:
    """With a split_len, a request's bits stay as they are wherever it stands in a batch."""
    case = AttentionCase("x", MIXED, split_len=64)
    args, options = make(case, dtype, backend.device)
    out, lse = ops.block_attention(*args, **options)
    order = [3, 0, 4, 2, 1]
    rows = args[5].diff()
    chosen = torch.cat([torch.arange(args[5][b], args[5][b + 1]) for b in order])
    chosen = chosen.to(backend.device)
    shuffled = [args[0][chosen], *args[1:3], args[3][order], args[4][order]]
    shuffled += [torch.cat((rows[:0], rows.new_zeros(1), rows[order].cumsum(0))).int()]
    shuffled += [args[6][order]]
    per_request = {n: v[order] for n, v in options.items() if isinstance(v, torch.Tensor)}
    out_shuffled, lse_shuffled = ops.block_attention(*shuffled, **{**options, **per_request})
    assert_equal(out_shuffled, out[chosen], "out")
    assert_equal(lse_shuffled, lse[:, chosen], "lse")


@pytest.mark.parametrize("split_len", [0, 64])
def test_emulated_runs_are_equal(split_len: int, monkeypatch) -> None:
    """Neither the order of threads nor the landing of copies is seen in a result."""
    case = AttentionCase("x", MIXED[:3], split_len=split_len, extra_rows=1)
    for dtype in (torch.float32, torch.bfloat16):
        args, options = make(case, dtype)
        monkeypatch.setattr(_library, "nld", emulated.Ops())
        results = []
        for order in emulated.ORDERS:
            for landing in emulated.LANDINGS:
                emulated.configure(order=order, landing=landing, seed=3)
                results.append(ops.block_attention(*args, **options))
        for out, lse in results[1:]:
            assert_equal(out, results[0][0], "out")
            assert_equal(lse, results[0][1], "lse")


@pytest.mark.parametrize(
    "index,change,message",
    [
        (3, lambda t: t.clone().fill_(-1), "page indices in use lie in the cache"),
        (3, lambda t: t.clone().fill_(10**6), "page indices in use lie in the cache"),
        (4, lambda t: t + 10000, "seq_lens fit the page table"),
    ],
)
def test_kernels_check_values_in_debug_builds(index: int, change, message: str) -> None:
    emulated.configure()
    for dtype in (torch.float32, torch.bfloat16):
        args, options = make(AttentionCase("x", MIXED), dtype)
        args[index] = change(args[index])
        with pytest.raises(RuntimeError, match=message):
            emulated.Ops().block_attention(*args, **options)


def test_kernels_check_the_plan_in_debug_builds() -> None:
    emulated.configure()
    for dtype in (torch.float32, torch.bfloat16):
        args, options = make(AttentionCase("x", MIXED), dtype)
        plan = make_plan(args, {**options, "split_len": 1}, max_seq_len=1)
        with pytest.raises(RuntimeError, match="the plan was made for these sizes"):
            emulated.Ops().block_attention(*args, **options, plan=plan)


def test_what_cuda_does_not_compute() -> None:
    args, options = make(AttentionCase("x", (Request(1, 2),), dim=513), torch.float32)
    emulated.configure()
    with pytest.raises(RuntimeError, match="head_dim of at most 512 on CUDA, got 513"):
        emulated.Ops().block_attention(*args, **options)
    check(ops.block_attention(*args, **options), args, options)  # the CPU has no bound


def test_row_does_not_depend_on_its_neighbours(backend) -> None:
    case = AttentionCase("x", (Request(50, 250, CAUSAL),), heads=6, split_len=96)
    args, options = make(case, torch.bfloat16, backend.device)
    out, lse = ops.block_attention(*args, **options)
    for row in (0, 17, 49):
        alone = list(args)
        alone[0] = args[0][row : row + 1]
        alone[4] = torch.tensor([201 + row], dtype=INT, device=backend.device)
        alone[5] = torch.tensor([0, 1], dtype=INT, device=backend.device)
        out_alone, lse_alone = ops.block_attention(*alone, **options)
        assert_equal(out_alone, out[row : row + 1], f"out of row {row}")
        assert_equal(lse_alone, lse[:, row : row + 1], f"lse of row {row}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        AttentionCase("splits-in-parallel", (Request(32, 900, FULL),), split_len=128),
        AttentionCase("items-in-parallel", (Request(200, 400), *MIXED), split_len=128),
    ],
    ids=str,
)
@pytest.mark.slow_emulated
def test_thread_count_changes_no_bit(case: AttentionCase, dtype: torch.dtype, backend) -> None:
    args, options = make(case, dtype, backend.device)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results.append(ops.block_attention(*args, **options))
    finally:
        torch.set_num_threads(threads)
    check(results[0], args, options)
    for out, lse in results[1:]:
        assert_equal(out, results[0][0], "out")
        assert_equal(lse, results[0][1], "lse")


@pytest.mark.parametrize("threads", [1, 2])
def test_allocates_no_more_than_the_documented_workspace(threads: int) -> None:
    case = AttentionCase("x", (Request(32, 2100, FULL),), heads=16, kv_heads=4, dim=40)
    args, options = make(case, torch.float32)
    out, lse = ops.block_attention(*args, **options)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.profiler.profile(profile_memory=True) as profile:
            ops.block_attention(*args, **options, out=out, lse=lse)
    finally:
        torch.set_num_threads(before)
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    partials = case.kv_heads * 3 if threads > 1 else 0  # items * splits of 1024 keys
    limit = 4 * (threads * 700 * (case.dim + 32) + partials * 128 * (case.dim + 18))
    assert 0 < allocated <= limit


def test_extreme_scores(backend) -> None:
    """Scores of +-1e4 neither overflow nor lose the winner; equal scores average."""
    case = AttentionCase("x", (Request(2, 300, FULL),), heads=2, kv_heads=1, dim=16)
    args, options = make(case, torch.float32, backend.device)
    args[0] *= 100
    args[1] *= 100
    check(ops.block_attention(*args, **options), args, options)
    args[0].zero_()
    out, lse = ops.block_attention(*args, **options)
    torch.testing.assert_close(lse.cpu(), torch.full((2, 2), math.log(300)))
    check((out, lse), args, options)


def test_nan_reaches_only_rows_that_see_it(backend) -> None:
    args, options = make(
        AttentionCase("x", (Request(20, 40, CAUSAL),), dim=24), torch.float32, backend.device
    )
    page, offset = int(args[3][0, 30 // 16]), 30 % 16
    args[1][page, offset] = torch.nan
    out, lse = ops.block_attention(*args, **options)
    assert not out[:10].isnan().any() and out[10:].isnan().all()
    assert not lse[:, :10].isnan().any() and lse[:, 10:].isnan().all()


def test_opcheck() -> None:
    args, options = make(AttentionCase("x", MIXED, extra_rows=1), torch.float32)
    args = [t.nan_to_num(0) if t.is_floating_point() else t for t in args]
    torch.library.opcheck(torch.ops.nld.block_attention.default, tuple(args), options)
    options["plan"] = make_plan(args, options)
    out, lse = ops.block_attention(*args, **options)
    out_args = {**options, "out": torch.zeros_like(out), "lse": torch.zeros_like(lse)}
    torch.library.opcheck(torch.ops.nld.block_attention.out, tuple(args), out_args)


def test_compiles_with_dynamic_shapes() -> None:
    def step(args, options, out, lse):
        first, _ = ops.block_attention(*args, **options)
        ops.block_attention(*args, **options, out=out, lse=lse)
        return first + out

    compiled = torch.compile(step, backend=COMPILE_BACKEND, fullgraph=True, dynamic=True)
    for rows in (3, 7, 12):
        case = AttentionCase("x", (Request(rows, 40, FULL), Request(rows + 1, 50)), dim=32)
        args, options = make(case, torch.float32)
        args[0] = args[0].contiguous()
        out, lse = torch.zeros_like(args[0]), torch.zeros(case.heads, case.rows)
        actual = compiled(args, options, out, lse)
        eager_out, eager_lse = ops.block_attention(*args, **options)
        assert_equal(actual, eager_out * 2, "compiled result")
        assert_equal(out, eager_out, "out")
        assert_equal(lse, eager_lse, "lse")


NAMES = ["q", "k_cache", "v_cache", "page_table", "seq_lens", "cu_seqlens_q", "mask_mode"]


@pytest.mark.parametrize(
    "change,message",
    [
        ({"q": lambda t: t[0]}, "q must have 3 dimensions"),
        ({"q": lambda t: t.double()}, "q must be float32, bfloat16 or float16, got float64"),
        ({"q": lambda t: t[:, :3]}, "q must have a multiple of the 2 heads of k_cache, got 3"),
        ({"q": lambda t: t[..., :0]}, "q must have a head_dim of at least 1"),
        (
            {"q": lambda t: t.repeat(1, 1, 2)[..., ::2]},
            "q must have stride 1 in its last dimension, got 2",
        ),
        ({"k_cache": lambda t: t[..., :8]}, r"k_cache must have size 64 \(head_dim of q\)"),
        ({"k_cache": lambda t: t[:, :0], "v_cache": lambda t: t[:, :0]}, "page_size of at least 1"),
        (
            {"v_cache": lambda t: t[:, :3]},
            r"v_cache must have size 16 \(as k_cache\) in dimension 1",
        ),
        (
            {"v_cache": lambda t: t.half()},
            r"v_cache must have the dtype of k_cache \(float32\), got float16",
        ),
        ({"page_table": lambda t: t.long()}, "page_table must be int32, got int64"),
        ({"page_table": lambda t: t[1:]}, "page_table must have size 5"),
        (
            {"page_table": lambda t: t.clone().fill_(-1)},
            r"page_table must hold pages in \[0, .* got -1 at request 0",
        ),
        (
            {"seq_lens": lambda t: t + 10000},
            r"seq_lens must lie in \[0, 336\] \(max_pages \* page_size\), got 10070",
        ),
        ({"seq_lens": lambda t: t - 10000}, r"seq_lens must lie in \[0, 336\]"),
        (
            {"cu_seqlens_q": lambda t: t[1:]},
            r"cu_seqlens_q must have size 6 \(batch of seq_lens \+ 1\)",
        ),
        ({"cu_seqlens_q": lambda t: t.flip(0)}, "cu_seqlens_q must grow from 0 to at most 111"),
        ({"cu_seqlens_q": lambda t: t + 1}, "cu_seqlens_q must grow from 0 to at most 111"),
        (
            {"mask_mode": lambda t: torch.where(t == 3, 4, t).int()},
            r"mask_mode must lie in \[0, 4\), got 4 at request 3",
        ),
        ({"mask_mode": lambda t: t.float()}, "mask_mode must be int32, got float32"),
        ({"block_len": lambda t: t * 0}, "block_len must be >= 1, got 0 at request 2"),
        ({"block_len": lambda t: None}, "block_len must be given for mask_mode 2, got None"),
        ({"block_phase": lambda t: t[:2]}, "block_phase must have size 5"),
        ({"softcap": lambda t: -1.0}, "softcap must be >= 0"),
        ({"split_len": lambda t: -1}, "split_len must be >= 0"),
        ({"out": lambda t: torch.zeros(1)}, "out and lse must be given together, got no lse"),
        (
            {"out": lambda t: torch.zeros(111, 4, 64).half(), "lse": lambda t: torch.zeros(4, 111)},
            "out must have the",
        ),
        (
            {"out": lambda t: torch.zeros(110, 4, 64), "lse": lambda t: torch.zeros(4, 111)},
            "out must have size 111",
        ),
        (
            {"out": lambda t: torch.zeros(111, 4, 64), "lse": lambda t: torch.zeros(111, 4)},
            "lse must have size 4",
        ),
        (
            {"out": lambda t: torch.zeros(111, 4, 64), "lse": lambda t: torch.zeros(4, 111).half()},
            "lse must be fl",
        ),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    args, options = make(AttentionCase("x", MIXED), torch.float32)
    call = {**dict(zip(NAMES, args, strict=True)), **options, "out": None, "lse": None}
    for name, fn in change.items():
        call[name] = fn(call[name])
    with pytest.raises(RuntimeError, match="block_attention: .*" + message):
        ops.block_attention(**call)


@pytest.mark.slow_emulated
def test_splits_agree(backend) -> None:
    """Any split length gives the result within the usual error."""
    args, options = make(replace(ATTENTION_CORRECT[0], page_size=16), torch.float32, backend.device)
    want = expected(args, options)
    for split_len in (1, 7, 100, 128, 4096):
        actual = ops.block_attention(*args, **{**options, "split_len": split_len})
        check(actual, args, options, want)
