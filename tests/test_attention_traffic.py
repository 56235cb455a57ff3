"""Bytes that attention moves, counted under the emulator, against the formulas of its plan.

Our performance test without a GPU: each byte of K and V is read once per tile of query rows, q once
per item, `out` and `lse` are written once, and nothing is read that no row sees.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import test_attention_plan as plans
from cases import BLOCK_CAUSAL, CAUSAL, FULL, MIXED, QUADRATIC, AttentionCase, Request
from nld_cuda import ops
from test_attention import make, make_plan

SIMT_ROWS = 16  # csrc/attention/kernel_simt.cuh: kSimtRows
TILE_KEYS = 64  # csrc/attention/tile_loader.cuh: kTileKeys


def counted(case: AttentionCase, dtype: torch.dtype, traffic: Callable) -> tuple:
    """Return (traffic of q, k, v, out, lse; the plan) of one call."""
    args, options = make(case, dtype)
    args[:3] = [t.contiguous() for t in args[:3]]  # apart, so that each can be told
    plan = make_plan(args, options)
    out, lse = torch.empty_like(args[0]), torch.empty(args[0].shape[1], args[0].shape[0])
    with (
        traffic(args[0]) as q,
        traffic(args[1]) as k,
        traffic(args[2]) as v,
        traffic(out) as o,
        traffic(lse) as m,
    ):
        ops.block_attention(*args, **options, plan=plan, out=out, lse=lse)
    assert q.written_bytes == k.written_bytes == v.written_bytes == 0
    assert o.read_bytes == m.read_bytes == 0
    batch = plans.Batch(case.requests, case.heads, case.kv_heads)
    return q, k, v, o, m, plans.parse(plan, batch)


CASES = [
    AttentionCase("blocks", (Request(32, 200, FULL), Request(20, 75, FULL)), kv_heads=1),
    AttentionCase("prompt", (Request(90, 90, CAUSAL), Request(50, 130, BLOCK_CAUSAL, 8))),
    AttentionCase("decode", (Request(1, 300, CAUSAL), Request(1, 64, CAUSAL)), page_size=5),
    AttentionCase("splits", MIXED[:3], split_len=64, extra_rows=2),
    AttentionCase("few-rows-of-many", (Request(2, 700, FULL), Request(40, 40, CAUSAL))),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tensor_cores_read_keys_once_per_tile(case: AttentionCase, traffic) -> None:
    q, k, v, out, lse, plan = counted(case, torch.bfloat16, traffic)
    row_bytes = 2 * case.dim
    keys = sum(end - begin for _, _, begin, end in plan.items)
    rows = sum(plan.tiles[t]["num_rows"] for t, *_ in plan.items)
    assert k.read_bytes == v.read_bytes == keys * case.kv_heads * row_bytes
    readers = 4 if plan.header["tile_rows"] == 16 else 1  # 16 rows: every warp holds all of them
    assert q.read_bytes == readers * rows * case.kv_heads * row_bytes
    total = (case.rows + case.extra_rows) * case.heads
    assert out.written_bytes == total * row_bytes
    assert lse.written_bytes == total * 4


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_general_kernel_reads_keys_once_per_16_rows(case: AttentionCase, traffic) -> None:
    q, k, v, out, lse, plan = counted(case, torch.float32, traffic)
    row_bytes, per_kv = 4 * case.dim, case.heads // case.kv_heads
    masks = [plans.seen_keys(r) for r in case.requests]
    keys = 0
    for t, _, begin, end in plan.items:
        tile = plan.tiles[t]
        for group in range(0, tile["num_rows"], SIMT_ROWS):
            last = min(group + SIMT_ROWS, tile["num_rows"]) - 1
            seen = masks[tile["request"]][(tile["row_begin"] + last) // per_kv]
            keys += max(min(int(seen.sum()), end) - begin, 0)  # all of these masks are prefixes
    rows = sum(plan.tiles[t]["num_rows"] for t, *_ in plan.items)
    assert k.read_bytes == v.read_bytes == keys * case.kv_heads * row_bytes
    assert q.read_bytes == rows * case.kv_heads * row_bytes
    total = (case.rows + case.extra_rows) * case.heads
    assert out.written_bytes == total * row_bytes
    assert lse.written_bytes == total * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_holes_between_groups_are_not_read(dtype: torch.dtype, traffic) -> None:
    """The last of 8 groups of 120 rows sees the cache, 7 heads and itself, not the other groups."""
    groups, block_len, context = 8, 119, 64
    rows = groups * (block_len + 1)
    case = AttentionCase(
        "x", (Request(rows, context + rows, QUADRATIC, block_len),), heads=1, kv_heads=1
    )
    _, k, v, _, _, plan = counted(case, dtype, traffic)
    mask = plans.seen_keys(case.requests[0])
    tensor_cores = dtype == torch.bfloat16
    tile_keys = TILE_KEYS if tensor_cores else 32
    tile_rows = plan.header["tile_rows"] if tensor_cores else SIMT_ROWS
    most = everything = 0  # keys of the tiles in which the mask has a bit; of all
    for t, _, begin, end in plan.items:
        tile = plan.tiles[t]
        for group in range(0, tile["num_rows"], tile_rows):
            first = tile["row_begin"] + group
            seen = mask[first : min(first + tile_rows, tile["row_begin"] + tile["num_rows"])].any(0)
            for key in range(begin, end, tile_keys):
                most += int(seen[key : min(key + tile_keys, end)].any()) * min(tile_keys, end - key)
            everything += end - begin
    row_bytes = case.dim * dtype.itemsize
    assert k.read_bytes == v.read_bytes and k.read_bytes <= most * row_bytes
    assert most < 0.8 * everything
