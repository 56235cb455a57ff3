"""What csrc/attention/heuristic.h chooses: pinned, sane, and near the best by the time model."""

from __future__ import annotations

import itertools
import statistics
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nld_cuda import ops
from nld_cuda.bench import grid, plans, time_model
from nld_cuda.ops import MaskMode

# A change here is a change of what users get: look at the time model, or better at a GPU, first.
# name: kernel, rows of a tile, CTAs of a cluster, CTAs, splits of the longest tile, keys of the
# longest item; on an H100, then on an A100 (108 SMs).
CHOICES = {
    "attention/q1/b1/c512": (
        ("sm80", 16, 8, 64, 8, 64), ("sm80", 16, 1, 64, 8, 64),
    ),
    "attention/q1/b1/c1024": (
        ("sm80", 16, 16, 128, 16, 64), ("sm80", 16, 1, 128, 16, 64),
    ),
    "attention/q1/b1/c8192": (
        ("sm80", 16, 16, 128, 16, 512), ("sm80", 16, 1, 208, 26, 320),
    ),
    "attention/q1/b1/c32768": (
        ("sm80", 16, 1, 256, 32, 1024), ("sm80", 16, 1, 216, 27, 1216),
    ),
    "attention/q1/b8/c4096": (
        ("sm80", 16, 4, 256, 4, 1024), ("sm80", 16, 1, 192, 3, 1408),
    ),
    "attention/q1/b64/c4096": (
        ("sm80", 16, 1, 264, 1, 4096), ("sm80", 16, 1, 216, 1, 4096),
    ),
    "attention/q8/b1/c1024": (
        ("sm90", 64, 16, 128, 16, 64), ("sm80", 64, 1, 64, 8, 128),
    ),
    "attention/q8/b8/c4096": (
        ("sm90", 64, 4, 256, 4, 1024), ("sm80", 64, 1, 192, 3, 1408),
    ),
    "attention/q16/b1/c4096": (
        ("sm90", 64, 16, 128, 16, 256), ("sm80", 64, 1, 104, 13, 320),
    ),
    "attention/q32/b1/c512": (
        ("sm90", 128, 8, 64, 8, 64), ("sm80", 128, 1, 64, 8, 64),
    ),
    "attention/q32/b1/c1024": (
        ("sm90", 128, 16, 128, 16, 64), ("sm80", 128, 1, 64, 8, 128),
    ),
    "attention/q32/b1/c4096": (
        ("sm90", 128, 16, 128, 16, 256), ("sm80", 128, 1, 104, 13, 320),
    ),
    "attention/q32/b1/c32768": (
        ("sm90", 128, 16, 128, 16, 2048), ("sm80", 128, 1, 104, 13, 2560),
    ),
    "attention/q32/b4/c1024": (
        ("sm90", 128, 4, 128, 4, 256), ("sm80", 128, 1, 96, 3, 384),
    ),
    "attention/q32/b8/c512": (
        ("sm90", 128, 2, 128, 2, 256), ("sm80", 128, 1, 64, 1, 512),
    ),
    "attention/q32/b8/c4096": (
        ("sm90", 128, 1, 128, 2, 2048), ("sm80", 128, 1, 108, 3, 1408),
    ),
    "attention/q32/b32/c2048": (
        ("sm90", 128, 1, 132, 1, 2048), ("sm80", 128, 1, 108, 1, 2048),
    ),
    "attention/q64/b1/c8192": (
        ("sm90", 128, 8, 128, 8, 1024), ("sm80", 128, 1, 96, 6, 1408),
    ),
    "attention/lengths/q32/b8/c512-32768": (
        ("sm90", 128, 1, 132, 12, 2752), ("sm80", 128, 1, 108, 10, 3328),
    ),
    "attention/prefill/causal/b1/c1024": (
        ("sm90", 128, 1, 132, 1, 1024), ("sm80", 128, 1, 108, 1, 1024),
    ),
    "attention/prefill/causal/b1/c8192": (
        ("sm90", 128, 1, 132, 1, 8192), ("sm80", 128, 1, 108, 1, 8192),
    ),
    "attention/q32/b8/c4096/fp8": (
        ("sm90", 128, 1, 128, 2, 2048), ("sm80", 128, 1, 108, 3, 1408),
    ),
}  # fmt: skip


def choice_of(name: str, gpu: str) -> tuple[Any, ...]:
    cell = grid.BY_NAME[name]
    assert isinstance(cell, grid.Attention)
    choice = time_model.attention(cell, time_model.GPUS[gpu]).choice
    names = ("kernel", "tile_rows", "cluster", "ctas", "splits", "longest")
    return tuple(choice[k] for k in names)


@pytest.mark.parametrize("name", CHOICES)
def test_choices(name: str) -> None:
    assert (choice_of(name, "H100"), choice_of(name, "A100")) == CHOICES[name]


BLOCKS = st.builds(
    lambda rows, batch, keys: grid.Attention(
        "x", (grid.Request(min(rows, keys), keys),) * batch, "decode"
    ),
    st.sampled_from((1, 3, 8, 16, 32, 64)), st.integers(1, 70), st.integers(1, 40000),
)  # fmt: skip


@given(cell=BLOCKS, sms=st.integers(1, 160))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_cuts_are_sane(cell: grid.Attention, sms: int) -> None:
    """Of a batch of equal requests: only what pays, and nobody is idle for it."""
    plan = plans.plan_of(cell, sms)
    wave = max(sms * (1 if plan.tile_rows == 128 else 2) // cell.kv_heads, 1)
    num_tiles, num_items = len(plan.tiles), len(plan.items)
    if plan.splits > 1:
        lengths = [end - begin for *_, begin, end in plan.items]
        assert num_items <= num_tiles + 2 * wave, "more than the workspace holds"
        assert min(t[5] for t in plan.tiles) >= plans.KEY_STEP
        assert max(lengths) - min(lengths) <= plan.splits * plans.KEY_STEP, "splits are uneven"
        # Cutting has to shorten the busiest CTA's way, or to spread the loads.
        before = -(-num_tiles // wave) * max(plan.tile_keys(t) for t in range(num_tiles))
        assert -(-num_items // wave) * max(lengths) <= before
    if num_tiles >= 4 * wave:
        assert plan.splits == 1, "a GPU that is full four times over needs no cuts"


@given(
    rows=st.sampled_from((1, 8, 32)), batch=st.integers(1, 16), keys=st.integers(64, 20000),
    sms=st.sampled_from((8, 66, 108, 132)),
)  # fmt: skip
@settings(max_examples=100, deadline=None, derandomize=True)
def test_more_keys_take_longer(rows: int, batch: int, keys: int, sms: int) -> None:
    """Twice the keys never take less time by the model, whatever is cut, but for rounding."""
    gpu = replace(time_model.GPUS["H100"], sms=sms, gpcs=sms // 16)
    cells = [
        grid.Attention("x", (grid.Request(rows, n),) * batch, "decode") for n in (keys, 2 * keys)
    ]
    times = [time_model.attention(cell, gpu).us for cell in cells]
    assert times[1] >= 0.98 * times[0]


def test_tile_rows_grow_with_the_rows() -> None:
    chosen = [
        plans.plan_of(grid.Attention("x", (grid.Request(n, 600),), "decode"), 132).tile_rows
        for n in range(1, 40)
    ]
    assert chosen == sorted(chosen)
    assert [chosen.index(rows) + 1 for rows in (16, 64, 128)] == [1, 5, 17]


@pytest.mark.parametrize("name", ["H100", "A100"])
def test_cuts_are_near_the_best(name: str) -> None:
    """Against every other cut of the same tiles that has room in the workspace: one set of
    constants serves all GPUs."""
    gpu, losses = time_model.GPUS[name], {}
    for cell in grid.ATTENTION:
        if cell.group not in ("decode", "mixed") or len(cell.requests) not in (1, 8):
            continue
        if cell.group == "decode" and cell.requests[0].rows not in (1, 8, 32):
            continue
        plan = plans.plan_of(cell, gpu.sms)
        wave = gpu.sms * (1 if plan.tile_rows == 128 else 2) // cell.kv_heads
        others = [plans.recut(plan, keys) for keys in plans.candidates(plan)]
        times = [
            time_model.attention(cell, gpu, other).us
            for other in others
            if len(other.items) <= len(plan.tiles) + 2 * wave
        ]
        losses[cell.name] = time_model.attention(cell, gpu, plan).us / min(times) - 1
    assert len(losses) > 45
    assert statistics.fmean(losses.values()) < 0.03, losses
    worst = max(losses, key=lambda n: losses[n])
    assert losses[worst] < 0.19, (worst, losses[worst])
    assert sum(loss > 0.05 for loss in losses.values()) <= 0.2 * len(losses)


def test_recut_makes_the_plan_itself() -> None:
    """A plan that is cut as it is has the same words, but for the room behind its items."""
    for name in ("attention/q32/b8/c4096", "attention/everything/b8", "attention/q1/b1/c8192"):
        cell = grid.BY_NAME[name]
        assert isinstance(cell, grid.Attention)
        plan = plans.plan_of(cell, 132)
        again = plans.recut(plan, max(t[5] for t in plan.tiles))
        if len({t[3] for t in plan.tiles}) == 1:
            assert again.items == plan.items and again.tiles == plan.tiles
            words = min(len(again.words), len(plan.words))
            assert torch.equal(again.words[:words], plan.words[:words])
        assert [t[:4] for t in again.tiles] == [t[:4] for t in plan.tiles]
        for t, tile in enumerate(again.tiles):
            mine = sorted((i for i in again.items if i[0] == t), key=lambda i: i[2])
            assert mine[0][2] == 0 and mine[-1][3] == tile[3]
            assert sum(again.item_keys(i) for i in mine) == again.tile_keys(t)
            cut, left_out = plan.cut(tile)
            for a, b in itertools.pairwise(mine):
                assert b[2] == a[3] + (left_out if a[3] == cut else 0)


@pytest.mark.parametrize("rows", plans.TILE_ROWS)
def test_padding_reaches_every_tile(rows: int) -> None:
    for name in ("attention/q32/b1/c4096", "attention/q1/b8/c4096", "attention/q8/b2/c1024"):
        cell = grid.BY_NAME[name]
        assert isinstance(cell, grid.Attention)
        padded = plans.with_tile_rows(cell, rows)
        plan = plans.plan_of(padded, 132)
        assert plan.tile_rows == rows
        assert padded.visible_pairs == cell.visible_pairs
        assert {t[0] for t in plan.tiles} == set(range(len(cell.requests)))


@pytest.mark.backends("emulated", "cuda")
def test_other_plans_give_the_same_rows(backend) -> None:
    """block_attention takes a plan that was cut otherwise, or padded, and means the same."""
    cell = grid.Attention(
        "x",
        (
            grid.Request(9, 500), grid.Request(3, 290, MaskMode.CAUSAL),
            grid.Request(310, 430, MaskMode.QUADRATIC, 30),
        ),
        "mixed", heads=4, kv_heads=2, head_dim=64,
    )  # fmt: skip
    expected = None
    for made in (cell, plans.with_tile_rows(cell, 64)):
        plan = plans.plan_of(made, 4)
        assert any(plan.cut(tile)[1] for tile in plan.tiles), "a hole to leave out"
        for keys in (None, 64, 192):
            words = plan.words if keys is None else plans.recut(plan, keys).words
            out = attend(made, words, backend.device)[: cell.total_q]
            expected = out if expected is None else expected
            assert (out - expected).abs().max() < 0.02
    assert plans.plan_of(cell, 4).tile_rows == 128


def attend(cell: grid.Attention, words: torch.Tensor, device: str) -> torch.Tensor:
    torch.manual_seed(5)
    pages = sum(-(-r.seq_len // 16) for r in cell.requests)
    caches = torch.randn(2, pages, 16, cell.kv_heads, cell.head_dim).bfloat16().to(device)
    q = torch.randn(cell.total_q, cell.heads, cell.head_dim).bfloat16().to(device)
    (seq_lens, starts, mode), options = plans.plan_arguments(cell)
    table = torch.zeros(len(cell.requests), cell.max_seq_len // 16, dtype=torch.int32)
    first = 0
    for b, r in enumerate(cell.requests):
        count = -(-r.seq_len // 16)
        table[b, :count] = torch.arange(first, first + count)
        first += count
    tensors = [table, seq_lens, starts, mode, options["block_len"], words]
    table, seq_lens, starts, mode, block_len, words = (t.to(device) for t in tensors)
    out, _ = ops.block_attention(
        q, *caches, table, seq_lens, starts, mode, block_len=block_len, plan=words
    )
    return out.float().cpu()
