"""The tensor-core attention kernel: every instance, page size, layout and edge of a tile.

What every attention kernel must do is in test_attention.py. Kernels that a GPU runs are chosen by
dtype and head_dim, and the rows of their tiles by the batch (attention_plan).
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

import emulated
from cases import BLOCK_CAUSAL, CAUSAL, FULL, QUADRATIC, AttentionCase, Request
from compare import assert_equal
from nld_cuda import ops, reference
from test_attention import check, expected, make

pytestmark = pytest.mark.backends("emulated", "cuda")  # those that have this kernel
ROOT = Path(__file__).parents[1]
DTYPES = [torch.bfloat16, torch.float16]
DIMS = [64, 96, 128]
ROWS_OF_TILE = {16: 3, 64: 12, 128: 27}  # query rows at 4 heads per kv head: tiles not full


def plan_tile_rows(args: list, options: dict, case: AttentionCase) -> int:
    plan = ops.attention_plan(
        *args[4:7],
        total_q=args[0].shape[0],
        num_heads=case.heads,
        num_kv_heads=case.kv_heads,
        max_seq_len=args[3].shape[1] * case.page_size,
        block_len=options["block_len"],
        block_phase=options["block_phase"],
        split_len=case.split_len,
    )
    return int(plan[4])


def run(case: AttentionCase, dtype: torch.dtype, backend) -> tuple:
    args, options = make(case, dtype, backend.device)
    result = ops.block_attention(*args, **options)
    check(result, args, options)
    return result


@pytest.mark.parametrize("tile_rows", [16, 64, 128])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instance(dtype: torch.dtype, dim: int, tile_rows: int, backend) -> None:
    rows = ROWS_OF_TILE[tile_rows]
    requests = (Request(rows, 150, CAUSAL), Request(rows, 2 * rows + 64, FULL))
    case = AttentionCase("x", requests, heads=8, kv_heads=2, dim=dim, softcap=dim / 8.0)
    args, options = make(case, dtype, backend.device)
    assert plan_tile_rows(args, options, case) == tile_rows
    check(ops.block_attention(*args, **options), args, options)


@pytest.mark.parametrize("page_size", [1, 3, 16, 64, 100])
@pytest.mark.parametrize("hnd", [False, True], ids=["nhd", "hnd"])
@pytest.mark.parametrize("rows", [2, 20])
def test_pages(page_size: int, hnd: bool, rows: int, backend) -> None:
    requests = (Request(rows, 217, CAUSAL), Request(rows, page_size), Request(rows, 128, FULL))
    case = AttentionCase("x", requests, heads=6, dim=96, page_size=page_size, hnd=hnd)
    run(case, torch.bfloat16, backend)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("shift", [1, 4, 8])
@pytest.mark.parametrize("which", ["q", "k_cache", "v_cache", "out"])
def test_rows_that_start_at_no_multiple_of_16_bytes(
    which: str, shift: int, dim: int, backend
) -> None:
    """The general kernel takes them; 8 elements are 16 bytes, and other strides than usual."""
    case = AttentionCase("x", (Request(3, 70), Request(9, 131, FULL)), dim=dim, page_size=5)
    args, options = make(case, torch.float16, backend.device)
    want = expected(args, options)

    def move(t: torch.Tensor) -> torch.Tensor:  # the values of t, rows `shift` elements longer
        shape = (*t.shape[:-1], t.shape[-1] + shift)
        buffer = torch.full(shape, torch.nan, dtype=t.dtype, device=t.device)
        buffer[..., shift:] = t
        return buffer[..., shift:]

    out = torch.full(args[0].shape, torch.nan, dtype=torch.float16, device=backend.device)
    lse = torch.full((case.heads, case.rows), torch.nan, device=backend.device)
    if which == "out":
        out = move(out)
    else:
        index = ["q", "k_cache", "v_cache"].index(which)
        args[index] = move(args[index])
    ops.block_attention(*args, **options, out=out, lse=lse)
    check((out, lse), args, options, want)
    if which == "out":
        between = out.as_strided(
            (*out.shape[:-1], shift), out.stride(), out.storage_offset() - shift
        )
        assert between.isnan().all()


@pytest.mark.parametrize("heads,kv_heads", [(2, 2), (3, 1), (8, 2), (8, 1), (5, 1), (10, 2)])
def test_head_ratios(heads: int, kv_heads: int, backend) -> None:
    requests = (Request(1, 90), Request(33, 150, BLOCK_CAUSAL, block_len=16, phase=5))
    run(AttentionCase("x", requests, heads, kv_heads), torch.bfloat16, backend)


@pytest.mark.parametrize("seq_len", [1, 15, 16, 17, 63, 64, 65, 127, 128, 129])
@pytest.mark.parametrize("rows", [1, 20])
def test_edges_of_key_tiles(seq_len: int, rows: int, backend) -> None:
    modes = [
        Request(min(rows, seq_len), seq_len, FULL),
        Request(rows, seq_len, CAUSAL),
        Request(min(rows, seq_len), seq_len, BLOCK_CAUSAL, block_len=7, phase=2),
        Request(min(rows, seq_len), seq_len, QUADRATIC, block_len=3),
    ]
    run(AttentionCase("x", tuple(modes)), torch.bfloat16, backend)


@pytest.mark.parametrize("rows", [15, 16, 17, 31, 32, 33, 64, 65])
def test_edges_of_row_tiles(rows: int, backend) -> None:
    case = AttentionCase("x", (Request(rows, rows + 3),), heads=2, kv_heads=1, split_len=64)
    run(case, torch.float16, backend)


@pytest.mark.parametrize("block_len", [1, 2, 15, 16, 63, 64])
def test_groups_that_cross_tiles(block_len: int, backend) -> None:
    rows = 2 * (block_len + 1) + block_len // 2 if block_len > 16 else 9 * (block_len + 1)
    requests = (Request(rows, rows + 50, QUADRATIC, block_len),)
    run(AttentionCase("x", requests, heads=2, kv_heads=1), torch.bfloat16, backend)
    run(AttentionCase("x", requests, heads=2, kv_heads=1, split_len=80), torch.half, backend)


def test_groups_leave_whole_tiles_unread(backend) -> None:
    """Keys of other groups may hold NaN values: their tiles are neither read nor multiplied."""
    block_len = 127  # a group is two tiles of keys; row tiles lie within one group
    case = AttentionCase("x", (Request(256, 256, QUADRATIC, block_len),), heads=1, kv_heads=1)
    args, options = make(case, torch.bfloat16, backend.device)
    want, _ = ops.block_attention(*args, **options)
    check((want, _), args, options)
    # Keys 64 to 127 are members of the first group, after the heads and its first members.
    tokens = reference.reading_order(QUADRATIC, 256, 256, block_len)[64:128]
    pages, offsets = args[3][0].cpu()[tokens // 16].long(), tokens % 16
    args[1][pages, offsets] = torch.nan
    args[2][pages, offsets] = torch.nan
    out, _ = ops.block_attention(*args, **options)
    assert_equal(out[128:], want[128:], "rows of the second group")
    assert out[1:128].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", DIMS)
def test_tiles_of_64_and_128_rows_give_equal_bits(dim: int, dtype: torch.dtype, backend) -> None:
    """With a fixed split_len a request's result does not depend on its batch."""
    small = (Request(16, 150, FULL), Request(11, 211, CAUSAL), Request(10, 77, QUADRATIC, 4))
    case = AttentionCase("x", (*small, Request(60, 100)), dim=dim, split_len=64, heads=8)
    args, options = make(case, dtype, backend.device)
    assert plan_tile_rows(args, options, case) == 128
    out, lse = ops.block_attention(*args, **options)
    check((out, lse), args, options)
    begin = 0
    for b, request in enumerate(small):
        end = begin + request.rows
        one = [args[0][begin:end], *args[1:3], args[3][b : b + 1], args[4][b : b + 1]]
        one += [
            torch.tensor([0, request.rows], dtype=torch.int32, device=backend.device),
            args[6][b : b + 1],
        ]
        one_options = {
            n: v[b : b + 1] if isinstance(v, torch.Tensor) else v for n, v in options.items()
        }
        assert plan_tile_rows(one, one_options, case) == 64
        out_one, lse_one = ops.block_attention(*one, **one_options)
        assert_equal(out_one, out[begin:end], f"out of request {b}")
        assert_equal(lse_one, lse[:, begin:end], f"lse of request {b}")
        begin = end


@pytest.mark.parametrize("split_len", [64, 100, 1000])
def test_groups_do_not_depend_on_the_rows_of_a_tile(split_len: int, backend) -> None:
    """Tiles of 64 and 128 rows see other holes; a row's steps and splits are the request's."""
    groups = Request(150, 200, QUADRATIC, 49)
    case = AttentionCase(
        "x", (groups, *[Request(1, 9)] * 3), heads=1, kv_heads=1, split_len=split_len
    )
    args, options = make(case, torch.bfloat16, backend.device)
    assert plan_tile_rows(args, options, case) == 64
    out, lse = ops.block_attention(*args, **options)
    check((out, lse), args, options)
    one = [args[0][:150], *args[1:3], args[3][:1], args[4][:1], args[5][:2], args[6][:1]]
    one_options = {n: v[:1] if isinstance(v, torch.Tensor) else v for n, v in options.items()}
    assert plan_tile_rows(one, one_options, case) == 128
    out_one, lse_one = ops.block_attention(*one, **one_options)
    assert_equal(out_one, out[:150], "out")
    assert_equal(lse_one, lse[:, :150], "lse")


@pytest.mark.parametrize("scale", [0.0, -0.3, 3.0])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("rows", [2, 10])
def test_scales(scale: float, softcap: float, rows: int, backend) -> None:
    case = AttentionCase("x", (Request(rows, 90),), heads=8, scale=scale, softcap=softcap)
    run(case, torch.bfloat16, backend)


def test_large_scores_keep_their_winner(backend) -> None:
    case = AttentionCase("x", (Request(4, 200, FULL), Request(20, 200, FULL)), split_len=128)
    args, options = make(case, torch.bfloat16, backend.device)
    args[0] *= 50
    args[1] *= 50
    check(ops.block_attention(*args, **options), args, options)


@pytest.mark.parametrize("rows", [3, 12, 40])
@pytest.mark.parametrize("order", emulated.ORDERS)
@pytest.mark.parametrize("landing", emulated.LANDINGS)
@pytest.mark.slow_emulated
@pytest.mark.backends("emulated")  # only the emulator can choose
def test_any_order_of_threads_and_copies(order: str, landing: str, rows: int, backend) -> None:
    requests = (Request(rows, 203, CAUSAL), Request(rows, 131, QUADRATIC, 4))
    args, options = make(AttentionCase("x", requests, dim=128), torch.bfloat16)
    want = ops.block_attention(*args, **options)
    check(want, args, options)
    for seed in (1, 2):
        emulated.configure(order=order, landing=landing, seed=seed)
        out, lse = ops.block_attention(*args, **options)
        assert_equal(out, want[0], f"out, seed {seed}")
        assert_equal(lse, want[1], f"lse, seed {seed}")


def test_mask_of_tiles(tmp_path: Path) -> None:
    """mask.h against the rule for one row and one token; fast_div against division."""
    program = tmp_path / "mask_test"
    source = ROOT / "tests/cpp/mask_test.cpp"
    command = [emulated.tool("g++"), "-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror"]
    command += [f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout == "0 failures\n"
