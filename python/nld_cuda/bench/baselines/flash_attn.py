"""FlashAttention 2 (module flash_attn) and 3 (module flash_attn_interface), from paged caches."""

from __future__ import annotations

import torch

from nld_cuda.bench import attention, grid
from nld_cuda.bench.attention import AttentionProblem
from nld_cuda.bench.base import Baseline, Prepared, needs_cuda_module
from nld_cuda.bench.baselines import paging
from nld_cuda.bench.baselines.sdpa import gathered_bytes

FA2_PAGE_SIZE = 256  # its page sizes are multiples of it


def make_fa2(problem: AttentionProblem) -> Prepared:
    """Copy the cache to pages of 256; equal rows take the call that splits keys, others varlen."""
    import flash_attn

    cell = problem.cell
    if cell.page_size % FA2_PAGE_SIZE == 0:
        k, v, table = problem.k_cache, problem.v_cache, problem.table
    else:
        (k, table), (v, _) = (
            paging.repage(cell, cache, problem.table, FA2_PAGE_SIZE)
            for cache in (problem.k_cache, problem.v_cache)
        )
    causal, scale = paging.is_causal(cell), cell.head_dim**-0.5
    rows = cell.requests[0].rows
    if all(r.rows == rows for r in cell.requests):
        q = problem.q.view(-1, rows, cell.heads, cell.head_dim)
        return Prepared(
            lambda: flash_attn.flash_attn_with_kvcache(
                q, k, v, cache_seqlens=problem.seq_lens, block_table=table, softmax_scale=scale,
                causal=causal,
            ),
            lambda out: out.flatten(0, 1),
        )  # fmt: skip
    starts_k = paging.kv_indptr([r.seq_len for r in cell.requests]).to(problem.device)
    most_rows = max(r.rows for r in cell.requests)
    most_keys = max(r.seq_len for r in cell.requests)
    return Prepared(
        lambda: flash_attn.flash_attn_varlen_func(
            problem.q, k, v, problem.starts, starts_k, most_rows, most_keys, softmax_scale=scale,
            causal=causal, block_table=table,
        )
    )  # fmt: skip


def make_fa3(problem: AttentionProblem) -> Prepared:
    """Take our pages as they are."""
    import flash_attn_interface

    cell = problem.cell
    most_rows = max(r.rows for r in cell.requests)
    causal, scale = paging.is_causal(cell), cell.head_dim**-0.5

    def call() -> torch.Tensor:
        out = flash_attn_interface.flash_attn_with_kvcache(
            problem.q, problem.k_cache, problem.v_cache, cache_seqlens=problem.seq_lens,
            page_table=problem.table, cu_seqlens_q=problem.starts, max_seqlen_q=most_rows,
            softmax_scale=scale, causal=causal,
        )  # fmt: skip
        return out[0] if isinstance(out, tuple) else out

    return Prepared(call)


def _refuses(cell: grid.Attention, device: str) -> str | None:
    if cell.dtype not in ("bfloat16", "float16"):
        return f"has no {cell.dtype}"
    if cell.kv_dtype != cell.dtype:
        return "has no fp8 cache under half-precision queries"
    return paging.one_flag(cell)


def _fa2_bytes(cell: grid.Attention) -> float:
    return 0.0 if cell.page_size % FA2_PAGE_SIZE == 0 else gathered_bytes(cell)


FA2 = Baseline(
    "flash-attn 2", make_fa2, attention.differs, missing=needs_cuda_module("flash_attn"),
    refuses=_refuses, layout="pages of 256", layout_bytes=_fa2_bytes,
    note="copying the cache to pages of 256 is not timed",
)  # fmt: skip
FA3 = Baseline(
    "flash-attn 3", make_fa3, attention.differs, missing=needs_cuda_module("flash_attn_interface"),
    refuses=_refuses,
)  # fmt: skip
