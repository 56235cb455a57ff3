"""torch's FlexAttention, compiled for the very shape, on K/V gathered and padded beforehand.

One mask function holds all our masks: it reads lengths, modes and block lengths of the requests
from tensors, so a mixed batch is one call. Every shape compiles for itself (tens of seconds),
therefore it runs in few cells unless it is asked for by name.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nld_cuda.bench import attention, grid
from nld_cuda.bench.attention import AttentionProblem
from nld_cuda.bench.base import Baseline, Prepared
from nld_cuda.bench.baselines.sdpa import NOTE, gathered_bytes
from nld_cuda.ops import MaskMode


@dataclass(frozen=True)
class Masks:
    """What the masks of a cell depend on, a value per request."""

    seq_lens: Tensor
    rows: Tensor
    modes: Tensor
    block_lens: Tensor

    @staticmethod
    def of(cell: grid.Attention, device: torch.device) -> Masks:
        """Put them on a device."""
        columns = zip(
            *((r.seq_len, r.rows, int(r.mode), r.block_len) for r in cell.requests), strict=True
        )
        return Masks(*(torch.tensor(column).to(device) for column in columns))

    def visible(self, b: Any, h: Any, row: Any, key: Any) -> Any:
        """Our masks as FlexAttention asks for them: may this row see this key? Index tensors."""
        length, mode, block_len = self.seq_lens[b], self.modes[b], self.block_lens[b]
        first = length - self.rows[b]
        p = first + row
        causal = key <= p
        blocks = key // block_len <= p // block_len
        group_len = block_len + 1
        current = key - first
        is_head = (current % group_len == 0) & (current <= row)
        same_group = (row % group_len != 0) & (current // group_len == row // group_len)
        quadratic = (current < 0) | is_head | same_group
        seen = torch.where(
            mode == int(MaskMode.CAUSAL), causal,
            torch.where(
                mode == int(MaskMode.BLOCK_CAUSAL), blocks,
                torch.where(mode == int(MaskMode.QUADRATIC), quadratic, row >= 0),
            ),
        )  # fmt: skip
        return seen & (key < length) & (row < self.rows[b])


@functools.lru_cache(maxsize=1)
def block_mask(cell: grid.Attention, device: torch.device) -> Any:
    """Return the block mask of a cell, one for all its inputs: each would compile for itself.

    None where every key is seen and none is padding.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    if cell.requests[0].mode == MaskMode.FULL and len(set(cell.requests)) == 1:
        return None
    masks = Masks.of(cell, device)

    def visible(b: Any, h: Any, row: Any, key: Any) -> Any:
        return masks.visible(b, h, row, key)

    rows, keys = max(r.rows for r in cell.requests), max(r.seq_len for r in cell.requests)
    return create_block_mask(visible, len(cell.requests), None, rows, keys, device=str(device))


def padded(problem: AttentionProblem) -> tuple[Tensor, Tensor, Tensor]:
    """Return q `[batch, heads, most rows, dim]` and K, V `[batch, kv_heads, most keys, dim]`."""
    cell = problem.cell
    batch, rows = len(cell.requests), max(r.rows for r in cell.requests)
    q = problem.q.new_zeros(batch, cell.heads, rows, cell.head_dim)
    keys = max(r.seq_len for r in cell.requests)
    k, v = (q.new_zeros(batch, cell.kv_heads, keys, cell.head_dim) for _ in range(2))
    starts = problem.starts.tolist()
    for b, r in enumerate(cell.requests):
        q[b, :, : r.rows] = problem.q[starts[b] : starts[b + 1]].transpose(0, 1)
        k[b, :, : r.seq_len], v[b, :, : r.seq_len] = problem.gather(b)
    return q, k, v


def make(problem: AttentionProblem) -> Prepared:
    """Lay out and build the block mask now, compile at the first call."""
    from torch.nn.attention.flex_attention import flex_attention

    cell = problem.cell
    compiled = torch.compile(flex_attention, dynamic=False)
    q, k, v = padded(problem)
    mask = block_mask(cell, problem.device)

    def call() -> Any:
        return compiled(q, k, v, block_mask=mask, enable_gqa=cell.heads != cell.kv_heads)

    def rows(out: Tensor) -> Tensor:
        parts = [out[b, :, : r.rows].transpose(0, 1) for b, r in enumerate(cell.requests)]
        return torch.cat(parts)

    return Prepared(call, rows)


def _refuses(cell: grid.Attention, device: str) -> str | None:
    longest, rows = max(r.seq_len for r in cell.requests), max(r.rows for r in cell.requests)
    num_padded = len(cell.requests) * (longest + rows)
    if num_padded > 4 * sum(r.seq_len + r.rows for r in cell.requests):
        return "padding would make it more than four times the work"
    return None


def _costly(cell: grid.Attention) -> str | None:
    few = cell.headline and cell.group in ("decode", "mixed", "quadratic", "prefill")
    if few and (cell.group != "decode" or max(r.seq_len for r in cell.requests) == 4096):
        return None
    return "compiles tens of seconds for every shape"


def _padded_bytes(cell: grid.Attention) -> float:
    keys = sum(r.seq_len for r in cell.requests)
    most = len(cell.requests) * max(r.seq_len for r in cell.requests)
    return gathered_bytes(cell) * most / keys


def _missing(device: str) -> str | None:
    return None if device == "cuda" else "compiled FlexAttention is measured on CUDA only"


FLEX = Baseline(
    "flex", make, attention.differs, missing=_missing, refuses=_refuses,
    costly=_costly, layout="padded",
    layout_bytes=_padded_bytes, note=NOTE + ", nor the block mask",
)  # fmt: skip
