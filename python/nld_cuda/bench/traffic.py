"""What every op must move and compute by its own formula, and the time that predicts on a GPU.

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


@dataclass(frozen=True)
class Gpu:
    """Measured rates: a copy (read + written), and what mma.sync reaches in attention."""

    copy_gbps: float
    mma_tflops: float


# Copies as measured on such machines; mma.sync is recalled (FlashAttention-2 on Hopper).
GPUS = {"H100": Gpu(3000, 350), "H200": Gpu(4300, 350)}
# Start of a kernel in a graph to its first load's return, and back; each further dependent kernel.
FIRST_LAUNCH_US, NEXT_LAUNCH_US = 4.0, 2.5


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


def predicted_us(work: Work, gpu: Gpu) -> float:
    """Bandwidth or tensor cores, whichever is longer, and the launches."""
    memory = work.floor_bytes / gpu.copy_gbps / 1e3
    compute = work.flops / gpu.mma_tflops / 1e6
    return max(memory, compute) + FIRST_LAUNCH_US + NEXT_LAUNCH_US * (work.launches - 1)


def gpu_named(name: str, copy_gbps: float) -> Gpu:
    """Return the rates of a device by its name; of one not listed, its own copy."""
    found = next((gpu for key, gpu in GPUS.items() if key in name), None)
    return found or Gpu(copy_gbps, 100)


def _table() -> str:
    """The predictions for the shapes of an 8B model, as docs/gpu.md shows them."""
    vocab, heads, kv_heads, dim = 131072, 32, 8, 128

    def block(batch: int, rows: int, context: int) -> Work:
        pairs = batch * rows * context
        return attention([(rows, context)] * batch, heads, kv_heads, dim, 2, pairs)

    cases = {f"attention 1 x 32 rows, {n} keys": block(1, 32, n) for n in (1024, 4096, 32768)}
    cases |= {f"attention 8 x 32 rows, {n} keys": block(8, 32, n) for n in (4096, 16384)}
    cases |= {f"attention 1 x 1 row, {n} keys": block(1, 1, n) for n in (1024, 32768)}
    cases |= {
        "commit 32 x 131072 bfloat16": commit(32, vocab, 2),
        "commit 32 x 131072 float32": commit(32, vocab, 4),
        "verify greedy 32 x 131072 bfloat16": verify(32, vocab, 2),
        "verify rejection 32 x 131072 float32, one residual": verify(32, vocab, 4, 1, 2),
        "append 32 tokens bfloat16": rope_append(32, heads, kv_heads, dim, 2),
        "append 1024 tokens bfloat16": rope_append(1024, heads, kv_heads, dim, 2),
        "compact 15 entries, 26 layers bfloat16": compact(15, 26, kv_heads, dim, 2),
    }
    lines = ["| call | bytes | H100 | H200 |", "|---|---|---|---|"]
    for name, work in cases.items():
        times = " | ".join(f"{predicted_us(work, gpu):.1f} us" for gpu in GPUS.values())
        lines.append(f"| {name} | {work.floor_bytes / 1e6:.2f} MB | {times} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(_table())
