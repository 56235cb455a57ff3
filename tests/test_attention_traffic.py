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
from nld_cuda import ops, reference
from test_attention import make, make_plan

SIMT_ROWS, SIMT_KEYS = 16, 32  # csrc/attention/kernel_simt.cuh: kSimtRows, kSimtKeys
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
    AttentionCase("groups-4", (Request(20, 150, QUADRATIC, 4), Request(19, 99, QUADRATIC, 4))),
    AttentionCase("groups-16", (Request(272, 301, QUADRATIC, 16),), heads=2, kv_heads=1),
    AttentionCase(
        "groups-16-split", (Request(272, 301, QUADRATIC, 16),), heads=2, kv_heads=1, split_len=96
    ),
    AttentionCase("groups-32", (Request(1056, 1156, QUADRATIC, 32),), heads=2, kv_heads=1),
]


def keys_read(plan: plans.Parsed, case: AttentionCase, tile_rows: int, step: int) -> int:
    """Keys read for one kv head: of each item the steps in which a row of a tile sees a key."""
    masks, per_kv = [plans.seen_keys(r) for r in case.requests], case.heads // case.kv_heads
    keys = 0
    for t, _, begin, end in plan.items:
        tile = plan.tiles[t]
        row, rows_end = tile["row_begin"], tile["row_begin"] + tile["num_rows"]
        for first in range(row, rows_end, tile_rows):
            last = min(first + tile_rows, rows_end) - 1
            seen = masks[tile["request"]][first // per_kv : last // per_kv + 1].any(0)
            seen_end = min(int(seen.nonzero().max()) + 1, end)
            for key in range(begin, seen_end, step):
                if seen[key : key + step].any():
                    keys += min(step, seen_end - key)
    return keys


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_only_steps_that_are_seen_are_read(
    case: AttentionCase, dtype: torch.dtype, traffic
) -> None:
    q, k, v, out, lse, plan = counted(case, dtype, traffic)
    tensor_cores, row_bytes = dtype == torch.bfloat16, dtype.itemsize * case.dim
    if tensor_cores:
        keys = keys_read(plan, case, plan.header["tile_rows"], TILE_KEYS)
    else:
        keys = keys_read(plan, case, SIMT_ROWS, SIMT_KEYS)
    assert k.read_bytes == v.read_bytes == keys * case.kv_heads * row_bytes
    rows = sum(plan.tiles[t]["num_rows"] for t, *_ in plan.items)
    # Tiles of 16 rows on tensor cores: every warp holds all of them.
    readers = 4 if tensor_cores and plan.header["tile_rows"] == 16 else 1
    assert q.read_bytes == readers * rows * case.kv_heads * row_bytes
    total = (case.rows + case.extra_rows) * case.heads
    assert out.written_bytes == total * row_bytes
    assert lse.written_bytes == total * 4


# docs/attention.md: keys read for one kv head by k * (k + 1) rows of a 4:1 model after 1024 tokens;
# what the rows of the tiles see; and what the tiles of 64 keys held in the order of the tokens.
GROUPS = {
    4: (1044, 1044, 1044),
    8: (3248, 3164, 3244),
    16: (10176, 9672, 10696),
    32: (38336, 36368, 52240),
}


@pytest.mark.parametrize("k", GROUPS)
def test_groups_cost_what_their_tiles_see(k: int) -> None:
    rows, context = k * (k + 1), 1024
    request = Request(rows, context + rows, QUADRATIC, k)
    case = AttentionCase("x", (request,), heads=32, kv_heads=8)
    batch = plans.Batch(case.requests, case.heads, case.kv_heads, num_sms=132)
    arguments, options = batch.arguments()
    plan = plans.parse(ops.attention_plan(*arguments, **options), batch)
    mask = reference.visible_keys(QUADRATIC, request.seq_len, rows, k)
    visible = by_tokens = 0
    for tile in plan.tiles:
        seen = mask[tile["row_begin"] // 4 : (tile["row_begin"] + tile["num_rows"]) // 4].any(0)
        visible += int(seen.sum())
        end = int(seen.nonzero().max()) + 1
        by_tokens += sum(
            min(TILE_KEYS, end - key)
            for key in range(0, end, TILE_KEYS)
            if seen[key : key + TILE_KEYS].any()
        )
    read = keys_read(plan, case, plan.header["tile_rows"], TILE_KEYS)
    assert (read, visible, by_tokens) == GROUPS[k]
    # Where the heads end and where the own groups begin, a step may be seen in part.
    assert read <= visible + 2 * TILE_KEYS * len(plan.tiles)
