"""benchmarks/grid.py: the cells of issue 4, counted by the definition of the masks."""

from __future__ import annotations

import pytest

from nld_cuda import reference
from nld_cuda.bench import grid
from nld_cuda.ops import MaskMode


@pytest.mark.parametrize(
    "request_",
    [
        grid.Request(5, 30),
        grid.Request(5, 30, MaskMode.CAUSAL),
        grid.Request(17, 17, MaskMode.CAUSAL),
        grid.Request(9, 40, MaskMode.BLOCK_CAUSAL, 8),
        grid.Request(30, 31, MaskMode.BLOCK_CAUSAL, 7),
        grid.Request(20, 33, MaskMode.QUADRATIC, 4),
        grid.Request(23, 50, MaskMode.QUADRATIC, 4),
    ],
    ids=str,
)
def test_visible_pairs(request_: grid.Request) -> None:
    mask = reference.visible_keys(
        int(request_.mode), request_.seq_len, request_.rows, request_.block_len
    )
    cell = grid.Attention("x", (request_, request_), "decode")
    assert cell.visible_pairs == 2 * int(mask.sum())


def test_the_grid_is_the_one_asked_for() -> None:
    decode = [c for c in grid.ATTENTION if c.group == "decode"]
    shapes = {(c.requests[0].rows, len(c.requests), c.requests[0].seq_len) for c in decode}
    assert {s[0] for s in shapes} == {1, 8, 16, 32, 64}
    assert min(s[1] for s in shapes) == 1 and max(s[1] for s in shapes) == 64
    assert min(s[2] for s in shapes) == 512 and max(s[2] for s in shapes) == 32768
    assert len(shapes) == len(decode) == 5 * len(grid.BATCHES) * len(grid.CONTEXTS)
    assert {len({r.mode for r in c.requests}) for c in grid.ATTENTION} == {1, 2, 3, 4}
    prefills = {c.max_seq_len for c in grid.ATTENTION if c.group == "prefill"}
    assert {1024, 2048, 4096, 8192, 16384} <= prefills
    assert {c.model for c in grid.COMPACT} == {"3B", "8B", "14B"}
    for op in ("attention", "commit", "verify", "append", "compact"):
        assert any(c.headline for c in grid.CELLS if grid.op_of(c) == op), op


def test_numbers_of_cells() -> None:
    cell = grid.BY_NAME["attention/q32/b8/c4096"]
    assert isinstance(cell, grid.Attention)
    assert cell.total_q == 256 and cell.cache_bytes == 8 * 4096 * 4096
    assert cell.visible_pairs == 256 * 4096
    lens = grid.spread(8)
    assert lens[0] == 512 and lens[-1] == 32768 and lens == sorted(lens)
    assert grid.Commit(2, 32, masked=0.25).judged_rows == 16
