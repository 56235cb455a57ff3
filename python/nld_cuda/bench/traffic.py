"""What every op must move and compute by its own formula; time_model.py makes times of it.

The byte counts are those of docs/attention.md, sampler.md and verify.md: each key and value once
for every 128 packed rows, logits once. The floor counts what must come from memory (K/V once; more
tiles of the same request find them in L2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nld_cuda.bench import grid
from nld_cuda.ops import VerifyMode

TILE_ROWS = 128  # packed rows (query row x heads of a kv head) of a large attention tile


@dataclass(frozen=True)
class Work:
    """Of one call of an op.

    Attributes:
        floor_bytes: what must come from and go to memory.
        num_bytes: what the kernels ask for, L2 hits included.
        flops: multiply-adds of the tensor cores, counted as two.
        launches: kernels one after the other.
    """

    floor_bytes: float
    num_bytes: float
    flops: float = 0.0
    launches: int = 1


def attention(
    requests: Sequence[tuple[int, int]],
    heads: int,
    kv_heads: int,
    dim: int,
    element_size: int,
    visible_pairs: int,
    launches: int = 2,
) -> Work:
    """requests: (rows, seq_len) each; visible_pairs: (row, key) pairs under the masks."""
    rows = sum(n for n, _ in requests)
    kv_token = 2 * kv_heads * dim * element_size
    q_and_out = 2 * rows * heads * dim * element_size + 4 * rows * heads  # and lse
    tiles = [-(-n * (heads // kv_heads) // TILE_ROWS) for n, _ in requests]
    floor = sum(length for _, length in requests) * kv_token + q_and_out
    asked = sum(
        t * length for t, (_, length) in zip(tiles, requests, strict=True)
    ) * kv_token + q_and_out  # fmt: skip
    return Work(floor, asked, 4.0 * visible_pairs * heads * dim, launches)


def commit(judged_rows: int, vocab: int, element_size: int) -> Work:
    num_bytes = judged_rows * vocab * element_size
    return Work(num_bytes, num_bytes)


def verify(
    rows_read: int, vocab: int, element_size: int, residual_rows: int = 0, launches: int = 1
) -> Work:
    """rows_read: of logits; residual_rows: rows whose logits and draft probabilities are read."""
    num_bytes = rows_read * vocab * element_size
    num_bytes += residual_rows * vocab * (element_size + 4)
    return Work(num_bytes, num_bytes, launches=launches)


def rope_append(tokens: int, heads: int, kv_heads: int, dim: int, element_size: int) -> Work:
    """q read and written, k and v read and written."""
    num_bytes = 2 * tokens * (heads + 2 * kv_heads) * dim * element_size
    return Work(num_bytes, num_bytes)


def compact(moved: int, layers: int, kv_heads: int, dim: int, element_size: int) -> Work:
    """moved: entries that change their place, of K and of V."""
    num_bytes = 2 * 2 * moved * layers * kv_heads * dim * element_size
    return Work(num_bytes, num_bytes)


def of(cell: grid.Cell) -> Work:
    """Return what a call of the cell's op must move and compute.

    Of verify_ the floor is the logits up to the row that ends the walk; kernels may read more.
    """
    if isinstance(cell, grid.Attention):
        q_element, element = (grid.ELEMENT_BYTES[d] for d in (cell.dtype, cell.kv_dtype))
        made = attention(
            [(r.rows, r.seq_len) for r in cell.requests], cell.heads, cell.kv_heads,
            cell.head_dim, element, cell.visible_pairs,
        )  # fmt: skip
        wider = 2 * cell.total_q * cell.heads * cell.head_dim * (q_element - element)
        return Work(made.floor_bytes + wider, made.num_bytes + wider, made.flops, made.launches)
    if isinstance(cell, grid.Commit):
        return commit(cell.judged_rows, cell.vocab, grid.ELEMENT_BYTES[cell.dtype])
    if isinstance(cell, grid.Verify):
        element = grid.ELEMENT_BYTES[cell.dtype]
        last = cell.mode == VerifyMode.COMMIT
        needed = cell.batch * (1 if last else cell.accept + 1)
        launches = 2 if cell.draft_probs else 1
        floor = verify(needed, cell.vocab, element, cell.residual_rows, launches)
        asked = verify(cell.rows_read, cell.vocab, element, cell.residual_rows, launches)
        return Work(floor.floor_bytes, asked.num_bytes, launches=launches)
    if isinstance(cell, grid.Append):
        element, kv_element = (grid.ELEMENT_BYTES[d] for d in (cell.dtype, cell.kv_dtype))
        made = rope_append(cell.tokens, cell.heads, cell.kv_heads, cell.head_dim, element)
        less = 2 * cell.tokens * cell.kv_heads * cell.head_dim * (element - kv_element)
        return Work(made.floor_bytes - less, made.num_bytes - less)
    model = grid.MODELS.get(cell.model, grid.MODEL)
    element = grid.ELEMENT_BYTES[cell.dtype]
    return compact(cell.moved, cell.num_layers, model.kv_heads, model.head_dim, element)
