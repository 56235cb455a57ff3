"""The Hopper attention kernel: the bodies that every attention kernel must pass, and its own edges.

The emulator pretends to be an sm_90, so block_attention takes the kernel of csrc/attention/
kernel_sm90.cuh where tiles have 64 or 128 rows. On a GPU of that kind the other files test it too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import emulated
import test_attention
import test_attention_mma as mma
import test_attention_plan as plans
import test_attention_traffic as traffic_of
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
from compare import assert_equal
from nld_cuda import ops

pytestmark = [pytest.mark.backends("emulated"), pytest.mark.gpus(90)]
TILE_KEYS = 128  # csrc/attention/ring_sm90.cuh: kHopperKeys
BF16 = torch.bfloat16


@pytest.mark.parametrize("tile_rows", [64, 128])
@pytest.mark.parametrize("dim", mma.DIMS)
@pytest.mark.parametrize("dtype", mma.DTYPES, ids=str)
def test_every_instance(dtype: torch.dtype, dim: int, tile_rows: int, backend) -> None:
    mma.test_every_instance(dtype, dim, tile_rows, backend)


MODES = [
    replace(case, dim=dim)
    for case, dim in zip(
        [c for c in ATTENTION_CORRECT if c.dim in (64, 96, 128)] + ATTENTION_CORNER,
        [128, 64, 128, 96] * 10,
        strict=False,
    )
]


@pytest.mark.parametrize("case", MODES, ids=str)
def test_matches_reference(case: AttentionCase, backend) -> None:
    test_attention.test_matches_reference(case, BF16, backend)


@pytest.mark.parametrize("page_size", [1, 7, 8, 24, 48, 64, 100, 128, 256])
@pytest.mark.parametrize("hnd", [False, True], ids=["nhd", "hnd"])
def test_pages(page_size: int, hnd: bool, backend) -> None:
    """Boxes of 8 to 64 tokens, or none; a part of the last page; several pages of a tile."""
    requests = (Request(10, 317, CAUSAL), Request(10, page_size), Request(12, 256, FULL))
    case = AttentionCase("x", requests, heads=6, dim=128, page_size=page_size, hnd=hnd)
    mma.run(case, BF16, backend)


@pytest.mark.parametrize("split_len", [8, 24, 37, 128, 192])
def test_boxes_begin_where_splits_do(split_len: int, backend) -> None:
    requests = (Request(20, 317, CAUSAL), Request(9, 130, FULL))
    mma.run(AttentionCase("x", requests, page_size=64, split_len=split_len), BF16, backend)


@pytest.mark.parametrize("which", [1, 2])
def test_caches_that_have_no_tensor_map(which: int, backend) -> None:
    """One head for all (stride 0), and tokens in descending order: gathered row by row."""
    args, options = test_attention.make(AttentionCase("x", (Request(20, 150, FULL),)), BF16)
    args[which] = args[which][:, :, :1].expand(-1, -1, 2, -1)
    test_attention.check(ops.block_attention(*args, **options), args, options)


@pytest.mark.parametrize("seq_len", [1, 8, 63, 64, 65, 127, 128, 129, 255, 256, 257])
@pytest.mark.parametrize("rows", [10, 20])
def test_edges_of_key_tiles(seq_len: int, rows: int, backend) -> None:
    mma.test_edges_of_key_tiles(seq_len, rows, backend)


@pytest.mark.parametrize("rows", [31, 32, 33, 64, 65])
def test_edges_of_row_tiles(rows: int, backend) -> None:
    mma.test_edges_of_row_tiles(rows, backend)


@pytest.mark.parametrize("block_len", [2, 15, 63, 64])
def test_groups_that_cross_tiles(block_len: int, backend) -> None:
    mma.test_groups_that_cross_tiles(block_len, backend)


@pytest.mark.parametrize("dtype", mma.DTYPES, ids=str)
@pytest.mark.parametrize("dim", mma.DIMS)
def test_tiles_of_64_and_128_rows_give_equal_bits(dim: int, dtype: torch.dtype, backend) -> None:
    mma.test_tiles_of_64_and_128_rows_give_equal_bits(dim, dtype, backend)


@pytest.mark.parametrize("scale", [0.0, -0.3, 3.0])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_scales(scale: float, softcap: float, backend) -> None:
    mma.test_scales(scale, softcap, 10, backend)


def test_large_scores_keep_their_winner(backend) -> None:
    mma.test_large_scores_keep_their_winner(backend)


@pytest.mark.parametrize("heads,kv_heads", [(2, 2), (3, 1), (8, 1), (10, 2)])
def test_head_ratios(heads: int, kv_heads: int, backend) -> None:
    mma.test_head_ratios(heads, kv_heads, backend)


def test_prompts(backend) -> None:
    """Prefill: many row tiles of one request, of odd lengths, in all causal modes."""
    requests = (Request(150, 150), Request(97, 297, BLOCK_CAUSAL, 32, 5), Request(70, 70, FULL))
    mma.run(AttentionCase("x", requests, dim=128), BF16, backend)


def test_requests_that_see_nothing_between_others(backend) -> None:
    requests = (Request(20, 0, FULL), Request(33, 130), Request(40, 3), Request(0, 9))
    mma.run(AttentionCase("x", requests, extra_rows=3), BF16, backend)


def test_out_is_written_through_its_strides(backend) -> None:
    test_attention.test_out_is_written_through_its_strides(BF16, backend)


def test_batch_equals_its_requests_alone(backend) -> None:
    test_attention.test_batch_equals_its_requests_alone(32, BF16, backend)


def test_shuffled_batch(backend) -> None:
    test_attention.test_shuffled_batch(BF16, backend)


def test_given_plan_changes_nothing(backend) -> None:
    test_attention.test_given_plan_changes_nothing(48, backend)


@pytest.mark.parametrize("page_size", [5, 16])
@pytest.mark.parametrize("order", emulated.ORDERS)
@pytest.mark.parametrize("landing", emulated.LANDINGS)
@pytest.mark.slow_emulated
def test_any_order_of_threads_and_copies(order: str, landing: str, page_size: int, backend) -> None:
    requests = (Request(33, 303, CAUSAL), Request(35, 331, QUADRATIC, 4))
    case = AttentionCase("x", requests, kv_heads=4, dim=128, page_size=page_size)
    args, options = test_attention.make(case, BF16)
    want = ops.block_attention(*args, **options)
    test_attention.check(want, args, options)
    for seed in (1, 2):
        emulated.configure(order=order, landing=landing, seed=seed)
        out, lse = ops.block_attention(*args, **options)
        assert_equal(out, want[0], f"out, seed {seed}")
        assert_equal(lse, want[1], f"lse, seed {seed}")


@pytest.mark.parametrize(
    "index,change,message",
    [
        (3, lambda t: t.clone().fill_(-1), "page indices in use lie in the cache"),
        (4, lambda t: t + 10000, "seq_lens fit the page table"),
    ],
)
def test_kernels_check_values_in_debug_builds(index: int, change, message: str, backend) -> None:
    args, options = test_attention.make(AttentionCase("x", MIXED), BF16)
    args[index] = change(args[index])
    with pytest.raises(RuntimeError, match=message):
        ops.block_attention(*args, **options)


# ---- traffic ----


@pytest.fixture
def hopper_traffic(traffic: Callable):
    # Room for no cluster, whose CTAs each read q (test_attention_cluster.py).
    with emulated.load("checked").gpu(90, num_sms=1):
        yield traffic


HOPPER_CASES = ("blocks", "prompt", "splits", "groups-16", "groups-16-split")


@pytest.mark.parametrize("page_size", [5, 64])
@pytest.mark.parametrize("case", [c for c in traffic_of.CASES if c.name in HOPPER_CASES], ids=str)
def test_keys_are_read_once_per_tile(case: AttentionCase, page_size: int, hopper_traffic) -> None:
    """To the byte, whether boxes are copied or rows gathered: what is past the end is not read."""
    case = replace(case, page_size=page_size)
    q, k, v, out, lse, plan = traffic_of.counted(case, BF16, hopper_traffic)
    row_bytes = 2 * case.dim
    keys = traffic_of.keys_read(plan, case, plan.header["tile_rows"], TILE_KEYS)
    rows = sum(plan.tiles[t]["num_rows"] for t, *_ in plan.items)
    assert plan.header["tile_rows"] > 16
    assert k.read_bytes == v.read_bytes == keys * case.kv_heads * row_bytes
    assert q.read_bytes == rows * case.kv_heads * row_bytes
    total = (case.rows + case.extra_rows) * case.heads
    assert out.written_bytes == total * row_bytes
    assert lse.written_bytes == total * 4


def test_holes_between_groups_are_not_read(hopper_traffic) -> None:
    groups, block_len, context = 5, 255, 64
    rows = groups * (block_len + 1)
    requests = (Request(rows, context + rows, QUADRATIC, block_len),)
    case = AttentionCase("x", requests, heads=1, kv_heads=1)
    _, k, v, _, _, plan = traffic_of.counted(case, BF16, hopper_traffic)
    mask = plans.seen_keys(requests[0])
    most = everything = 0  # keys of the tiles in which the mask has a bit; of all
    for t, _, begin, end in plan.items:
        tile = plan.tiles[t]
        seen = mask[tile["row_begin"] : tile["row_begin"] + tile["num_rows"]].any(0)
        for key in range(begin, end, TILE_KEYS):
            count = min(TILE_KEYS, end - key)
            most += int(seen[key : key + count].any()) * count
            everything += count
    assert k.read_bytes == v.read_bytes and k.read_bytes <= most * case.dim * 2
    assert most < 0.8 * everything
