"""What every op must move and compute by its own formula, and the time that predicts on a GPU.

The byte counts are those of docs/attention.md, sampler.md and verify.md: each key and value once
for every 128 packed rows, logits once. The floor counts what must come from memory (K/V once; more
tiles of the same request find them in L2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


def predicted_us(work: Work, gpu: Gpu) -> float:
    """Bandwidth or tensor cores, whichever is longer, and the launches."""
    memory = work.floor_bytes / gpu.copy_gbps / 1e3
    compute = work.flops / gpu.mma_tflops / 1e6
    return max(memory, compute) + FIRST_LAUNCH_US + NEXT_LAUNCH_US * (work.launches - 1)


def gpu_named(name: str, copy_gbps: float) -> Gpu:
    """Return the rates of a device by its name; of one not listed, its own copy."""
    found = next((gpu for key, gpu in GPUS.items() if key in name), None)
    return found or Gpu(copy_gbps, 100)
