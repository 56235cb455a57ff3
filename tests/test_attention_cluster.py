"""block_attention in clusters whose CTAs share a tile's keys and merge what they find themselves.

The bodies of the other attention tests on an emulated GPU with just so many multiprocessors that
clusters of the wanted size are chosen; on a GPU, with the size that it is given. HOPPER has a
kernel of its own for tiles of 64 and 128 rows; BLACKWELL runs the mma.sync kernel.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import emulated
import test_attention_mma as mma
import test_attention_plan as plans
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
from conftest import Backend
from nld_cuda import _library, ops
from test_attention import check, make, make_plan

ROOT = Path(__file__).parents[1]
BF16 = torch.bfloat16
SIZES = [2, 4, 8, 16]
HOPPER, BLACKWELL = 90, 100  # compute capability
GPUS = [HOPPER, BLACKWELL]
ROWS_OF_TILE = {16: 3, 64: 12, 128: 27}  # query rows at 4 heads per kv head

pytestmark = pytest.mark.backends("emulated", "cuda")


def usual_pairs(case: AttentionCase) -> int:
    """Tiles times kv heads if all requests had equally many rows (csrc/attention/cluster.h)."""
    total, per_kv = case.rows + case.extra_rows, case.heads // case.kv_heads
    requests = min(len(case.requests), total)
    if requests == 0:
        return 1
    average = -(-total * per_kv // len(case.requests))
    tile_rows = 128 if average > 64 else 64 if average > 16 else 16
    return requests * -(-(-(-total // requests) * per_kv) // tile_rows) * case.kv_heads


@contextlib.contextmanager
def clusters(
    size: int, case: AttentionCase, gpu: int, library: emulated.Library | None = None
) -> Iterator:
    """Multiprocessors for clusters of `size` CTAs, one for each tile and kv head."""
    library = library or emulated.load()
    with library.gpu(gpu, num_sms=size * usual_pairs(case)):
        yield


def run(
    case: AttentionCase, size: int, gpu: int, backend: Backend, dtype: torch.dtype = BF16
) -> tuple:
    args, options = make(case, dtype, backend.device)
    total = args[0].shape[0]
    out = torch.full_like(args[0], torch.nan)
    lse = torch.full((case.heads, total), torch.nan, device=backend.device)
    with clusters(size, case, gpu):
        ops.block_attention(*args, **options, out=out, lse=lse)
    check((out, lse), args, options)
    return out, lse


KERNELS = [(16, BLACKWELL), *((rows, gpu) for rows in (64, 128) for gpu in GPUS)]


@pytest.mark.parametrize("tile_rows,gpu", KERNELS)
@pytest.mark.parametrize("dim", mma.DIMS)
@pytest.mark.parametrize("dtype", mma.DTYPES, ids=str)
def test_every_instance(dtype: torch.dtype, dim: int, tile_rows: int, gpu: int, backend) -> None:
    rows = ROWS_OF_TILE[tile_rows]
    requests = (Request(rows, 150, CAUSAL), Request(rows, 2 * rows + 64, FULL))
    case = AttentionCase("x", requests, heads=8, kv_heads=2, dim=dim, softcap=dim / 8.0)
    run(case, 2, gpu, backend, dtype)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tile_rows,gpu", KERNELS)
def test_every_size(tile_rows: int, gpu: int, size: int, backend) -> None:
    """1000 keys: the last CTAs of a cluster of 16 have a short share, the shorter request leaves
    some without keys."""
    rows = ROWS_OF_TILE[tile_rows]
    requests = (Request(rows, 1000, CAUSAL), Request(rows, 70, FULL))
    run(AttentionCase("x", requests, heads=4, kv_heads=1), size, gpu, backend)


CASES = [
    c for c in ATTENTION_CORRECT + ATTENTION_CORNER if c.dim in (64, 96, 128) and c.split_len == 0
]
CASES.append(AttentionCase("nobody's-rows", MIXED[:2], extra_rows=5))


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case: AttentionCase, gpu: int, backend) -> None:
    run(case, 2, gpu, backend)


@pytest.mark.parametrize("mode", [FULL, CAUSAL, BLOCK_CAUSAL, QUADRATIC])
@pytest.mark.parametrize("rows", [1, 9, 33])
@pytest.mark.parametrize("gpu", GPUS)
def test_mask_modes(gpu: int, rows: int, mode: int, backend) -> None:
    requests = (Request(rows, 300, mode, block_len=7, phase=2),)
    run(AttentionCase("x", requests, page_size=5 if rows < 9 else 16), 4, gpu, backend)


@pytest.mark.parametrize("gpu", GPUS)
def test_more_tiles_than_clusters(gpu: int, backend) -> None:
    """Uneven rows make more tiles than even ones would: clusters take several, one by one."""
    rows = [1, 60, 1, 1, 2]
    requests = tuple(Request(n, 150 + 20 * i, FULL) for i, n in enumerate(rows))
    run(AttentionCase("x", requests, heads=2, kv_heads=1), 2, gpu, backend)


def splits_of(args: list, options: dict, case: AttentionCase) -> tuple[torch.Tensor, list]:
    plan = make_plan(args, options)
    batch = plans.Batch(case.requests, case.heads, case.kv_heads)
    return plan, plans.parse(plan, batch).tiles


@pytest.mark.backends("emulated")  # only the emulator can choose
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("tile_rows,gpu", KERNELS)
def test_equal_splits_give_equal_bits(tile_rows: int, gpu: int, size: int, backend) -> None:
    """Merged in the cluster or by a second kernel, where the plan cuts as the cluster does."""
    request = Request(ROWS_OF_TILE[tile_rows], 960 * size - 30, CAUSAL)
    case = AttentionCase("x", (request,), heads=4, kv_heads=1)
    args, options = make(case, BF16)
    args[0] *= 3
    library = emulated.load()
    num_sms = size if tile_rows == 128 else size // 2  # a CTA for each split
    with library.gpu(gpu, num_sms):
        plan, tiles = splits_of(args, options, case)
        assert [t["num_splits"] for t in tiles] == [size] and tiles[0]["split_keys"] == 960
    with library.gpu(gpu, num_sms=1):  # room for no cluster; the plan says where to cut
        out, lse = ops.block_attention(*args, **options, plan=plan)
    with clusters(size, case, gpu):
        given = ops.block_attention(*args, **options, plan=plan)
        own = ops.block_attention(*args, **options)
    for name, merged in ("plan given", given), ("plan made", own):
        assert_equal(merged[0], out, f"out, {name}")
        assert_equal(merged[1], lse, f"lse, {name}")


def test_a_split_len_is_the_callers(backend) -> None:
    """Batch invariance wins: no clusters, and so the bits of every other GPU."""
    case = AttentionCase("x", MIXED, split_len=64)
    args, options = make(case, BF16, backend.device)
    out, lse = ops.block_attention(*args, **options)
    with clusters(4, case, BLACKWELL):
        again = ops.block_attention(*args, **options)
    assert_equal(again[0], out, "out")
    assert_equal(again[1], lse, "lse")


@pytest.mark.parametrize("gpu", GPUS)
def test_out_is_written_through_its_strides(gpu: int, backend) -> None:
    case = AttentionCase("x", MIXED[:3], extra_rows=2)
    args, options = make(case, BF16, backend.device)
    total = case.rows + case.extra_rows
    shape = (total, case.heads + 3, case.dim + 5)
    buffer = torch.full(shape, 7.0, dtype=BF16, device=backend.device)
    view = buffer[:, 2 : 2 + case.heads, : case.dim]
    lse_buffer = torch.full((total, case.heads + 1), 7.0, device=backend.device)
    lse_view = lse_buffer[:, : case.heads].T
    with clusters(2, case, gpu):
        ops.block_attention(*args, **options, out=view, lse=lse_view)
    check((view, lse_view), args, options)
    view.fill_(7.0)
    lse_view.fill_(7.0)
    assert (buffer == 7).all() and (lse_buffer == 7).all(), "written outside out"


@pytest.mark.backends("emulated")  # only the emulator can choose
@pytest.mark.parametrize("rows,gpu", [(3, BLACKWELL), (12, HOPPER), (40, HOPPER), (40, BLACKWELL)])
@pytest.mark.parametrize("order", emulated.ORDERS)
@pytest.mark.parametrize("landing", emulated.LANDINGS)
@pytest.mark.slow_emulated
def test_any_order_of_threads_and_copies(
    order: str, landing: str, rows: int, gpu: int, backend
) -> None:
    requests = (Request(rows, 203, CAUSAL), Request(rows, 131, QUADRATIC, 4))
    case = AttentionCase("x", requests, heads=4, kv_heads=1)
    args, options = make(case, BF16)
    results = []
    with clusters(4, case, gpu):
        for seed in (1, 2):
            emulated.configure(order=order, landing=landing, seed=seed)
            results.append(ops.block_attention(*args, **options))
    check(results[0], args, options)
    for result in results[1:]:
        assert_equal(result[0], results[0][0], "out")
        assert_equal(result[1], results[0][1], "lse")


@pytest.mark.parametrize("dtype,gpu", [(torch.float32, HOPPER), *((BF16, gpu) for gpu in GPUS)])
def test_dependent_launches_wait(dtype: torch.dtype, gpu: int, backend) -> None:
    """On sm_90 each kernel may start before the one before it has ended; the race checker sees
    whoever touches global memory too early. With splits, and so with all three kernels."""
    case = AttentionCase("x", (Request(9, 700, FULL), *MIXED[:2]), extra_rows=2, split_len=256)
    args, options = make(case, dtype, backend.device)
    with emulated.load().gpu(gpu):
        result = ops.block_attention(*args, **options)
    check(result, args, options)


@pytest.mark.backends("emulated")  # counted by the emulator
@pytest.mark.parametrize("size", [2, 8])
@pytest.mark.parametrize("tile_rows,gpu", KERNELS)
def test_traffic(tile_rows: int, gpu: int, size: int, backend) -> None:
    """K and V once, q once for each CTA (Hopper's kernel: with keys or without), out and lse once;
    nothing else is written: no partial result goes through global memory."""
    rows = ROWS_OF_TILE[tile_rows]
    case = AttentionCase(
        "x", (Request(rows, 600, FULL), Request(rows, 130)), heads=4, kv_heads=1, extra_rows=1
    )
    args, options = make(case, BF16)
    args[:3] = [t.contiguous() for t in args[:3]]
    out = torch.full_like(args[0], torch.nan)
    lse = torch.full((case.heads, out.shape[0]), torch.nan)
    library = emulated.load("checked")
    library.configure()
    real = _library.nld
    try:
        _library.nld = library.ops
        with clusters(size, case, gpu, library):  # a plan made for other room would be followed
            plan, tiles = splits_of(args, options, case)
        with (
            clusters(size, case, gpu, library),
            library.traffic() as all_memory,
            library.traffic(args[0]) as q,
            library.traffic(args[1]) as k,
            library.traffic(args[2]) as v,
        ):
            ops.block_attention(*args, **options, plan=plan, out=out, lse=lse)
    finally:
        _library.nld = real
    check((out, lse), args, options)
    row_bytes = 2 * case.dim
    keys = sum(t["key_end"] for t in tiles)
    assert k.read_bytes == v.read_bytes == keys * row_bytes
    readers = 0  # of q: rows times CTAs
    for t in tiles:
        share = (-(-t["key_end"] // size) + 63) // 64 * 64
        ctas = size if gpu == HOPPER else -(-t["key_end"] // share)
        readers += t["num_rows"] * ctas * (4 if tile_rows == 16 else 1)
    assert q.read_bytes == readers * row_bytes
    assert all_memory.written_bytes == out.nbytes + lse.nbytes


def test_sizes_that_are_chosen(tmp_path: Path) -> None:
    """The rule of cluster.h, pinned for an H100."""
    program = tmp_path / "cluster_test"
    command = [emulated.tool("g++"), "-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror"]
    command += [f"-I{ROOT / 'csrc'}", str(ROOT / "tests/cpp/cluster_test.cpp"), "-o", str(program)]
    subprocess.run(command, check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout == "0 failures\n"
