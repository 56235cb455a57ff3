"""FlashInfer's paged prefill and decode (PyPI: flashinfer-python), on our pages as they are.

Its `plan` runs on the host and is not timed. Masks other than one causal flag for the batch go in
as a custom mask, which its FA2 kernels take.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from nld_cuda.bench import attention, grid
from nld_cuda.bench.attention import AttentionProblem
from nld_cuda.bench.base import Baseline, Prepared, needs_cuda_module
from nld_cuda.bench.baselines import paging

WORKSPACE_BYTES = 256 << 20
MOST_MASK_ELEMENTS = 1 << 28


@functools.cache
def _workspace(device: torch.device) -> Tensor:
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def arguments(problem: AttentionProblem) -> tuple[tuple[object, ...], dict[str, object]]:
    """Return what `plan` gets: by position and by name."""
    cell, device = problem.cell, problem.device
    needs_mask = paging.one_flag(cell) is not None
    custom_mask = None
    if needs_mask:
        parts = [paging.visible(r).flatten() for r in cell.requests]
        custom_mask = torch.cat(parts).to(device)
    positions = (
        problem.starts,
        paging.kv_indptr(paging.page_counts(cell)).to(device),
        paging.page_indices(cell, problem.table),
        paging.last_page_lens(cell).to(device),
        cell.heads,
        cell.kv_heads,
        cell.head_dim,
        cell.page_size,
    )
    names = {
        "custom_mask": custom_mask,
        "causal": paging.is_causal(cell) and not needs_mask,
        "sm_scale": cell.head_dim**-0.5,
        "q_data_type": problem.q.dtype,
        "kv_data_type": problem.k_cache.dtype,
    }
    return positions, names


def _scales(problem: AttentionProblem) -> dict[str, float]:
    """Return its one scale of each fp8 cache; of ours all heads have the same."""
    return {name: float(scale[0]) for name, scale in problem.scales.items()}


def make(problem: AttentionProblem) -> Prepared:
    """Plan now, return the run."""
    import flashinfer

    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(problem.device), "NHD")
    positions, names = arguments(problem)
    wrapper.plan(*positions, **names)
    out = torch.empty_like(problem.q)
    caches = (problem.k_cache, problem.v_cache)
    scales = _scales(problem)
    return Prepared(lambda: wrapper.run(problem.q, caches, out=out, **scales), lambda _: out)


def _refuses(cell: grid.Attention, device: str) -> str | None:
    if cell.dtype not in ("bfloat16", "float16"):
        return f"has no {cell.dtype}"
    pairs = sum(r.rows * r.seq_len for r in cell.requests)
    if paging.one_flag(cell) and pairs > MOST_MASK_ELEMENTS:
        return f"its custom mask would hold {pairs} elements"
    return None


def make_decode(problem: AttentionProblem) -> Prepared:
    """One row a request: its decode, on tensor cores as it advises for shared K/V heads."""
    import flashinfer

    cell, device = problem.cell, problem.device
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        _workspace(device), "NHD", use_tensor_cores=True
    )
    wrapper.plan(
        paging.kv_indptr(paging.page_counts(cell)).to(device),
        paging.page_indices(cell, problem.table), paging.last_page_lens(cell).to(device),
        cell.heads, cell.kv_heads, cell.head_dim, cell.page_size, q_data_type=problem.q.dtype,
        kv_data_type=problem.k_cache.dtype, sm_scale=cell.head_dim**-0.5,
    )  # fmt: skip
    out = torch.empty_like(problem.q)
    caches = (problem.k_cache, problem.v_cache)
    scales = _scales(problem)
    return Prepared(lambda: wrapper.run(problem.q, caches, out=out, **scales), lambda _: out)


def _decode_refuses(cell: grid.Attention, device: str) -> str | None:
    if any(r.rows != 1 for r in cell.requests):
        return "is for one row a request"
    return _refuses(cell, device)


DECODE = Baseline(
    "flashinfer decode", make_decode, attention.differs, missing=needs_cuda_module("flashinfer"),
    refuses=_decode_refuses, layout="flashinfer workspaces", layout_bytes=lambda cell: 64 << 20,
    note="its plan on the host is not timed",
)  # fmt: skip
FLASHINFER = Baseline(
    "flashinfer", make, attention.differs, missing=needs_cuda_module("flashinfer"),
    refuses=_refuses, layout="flashinfer workspaces",
    layout_bytes=lambda cell: 64 << 20, note="its plan on the host is not timed",
)  # fmt: skip
