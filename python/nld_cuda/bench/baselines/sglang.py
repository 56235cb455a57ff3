"""SGLang's Triton attention: decode for one row a request, extend for more.

Extend gets the keys of the current rows as dense tensors and the ones before through slots, as in
SGLang itself; masks that are not one causal flag for the batch go in as a custom mask.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from nld_cuda.bench import attention, grid
from nld_cuda.bench.attention import AttentionProblem
from nld_cuda.bench.base import Baseline, Prepared, needs_cuda_module
from nld_cuda.bench.baselines import paging
from nld_cuda.bench.baselines.signature import call_with, first_module

PLACES = ("sglang.srt.layers.attention.triton_ops", "sglang.kernels.ops.attention")
EXTEND = tuple(f"{place}.extend_attention" for place in PLACES)
DECODE = tuple(f"{place}.decode_attention" for place in PLACES)
SPLITS = 8  # SGLang's default of triton_attention_num_kv_splits
MOST_MASK_ELEMENTS = 1 << 28
NO_SCALES = {"k_scale": 1.0, "v_scale": 1.0}  # arguments of newer versions


def make(problem: AttentionProblem) -> Prepared:
    """Choose decode or extend, as SGLang does by the kind of forward."""
    one_row = all(r.rows == 1 for r in problem.cell.requests)
    return make_decode(problem) if one_row else make_extend(problem)


def make_decode(problem: AttentionProblem) -> Prepared:
    """One row a request."""
    function = first_module(DECODE).decode_attention_fwd
    cell, device = problem.cell, problem.device
    batch = len(cell.requests)
    lens = [r.seq_len for r in cell.requests]
    out = torch.empty_like(problem.q)
    f32: dict[str, Any] = {"dtype": torch.float32, "device": device}
    call = partial(
        call_with, function, NO_SCALES, q=problem.q, k_buffer=problem.k_cache.flatten(0, 1),
        v_buffer=problem.v_cache.flatten(0, 1), o=out,
        kv_indptr=paging.kv_indptr(lens).to(device),
        kv_indices=paging.slots(cell, problem.table, lens),
        attn_logits=torch.empty(batch, cell.heads, SPLITS, cell.head_dim, **f32),
        attn_lse=torch.empty(batch, cell.heads, SPLITS, **f32),
        num_kv_splits=torch.full((batch,), SPLITS, dtype=torch.int32).to(device),
        max_kv_splits=SPLITS, sm_scale=cell.head_dim**-0.5, logit_cap=0.0,
    )  # fmt: skip
    return Prepared(call, lambda _: out)


def make_extend(problem: AttentionProblem) -> Prepared:
    """Some rows a request."""
    function = first_module(EXTEND).extend_attention_fwd
    cell, device = problem.cell, problem.device
    prefix = [r.seq_len - r.rows for r in cell.requests]
    slots = paging.slots(cell, problem.table, [r.seq_len for r in cell.requests])
    parts = slots.split([r.seq_len for r in cell.requests])
    before = torch.cat([x[:n] for x, n in zip(parts, prefix, strict=True)])
    current = torch.cat([x[n:] for x, n in zip(parts, prefix, strict=True)])
    k_flat, v_flat = problem.k_cache.flatten(0, 1), problem.v_cache.flatten(0, 1)
    custom_mask, mask_indptr = None, None
    if paging.one_flag(cell):
        custom_mask = torch.cat([paging.visible(r).flatten() for r in cell.requests]).to(device)
        sizes = [r.rows * r.seq_len for r in cell.requests]
        mask_indptr = paging.kv_indptr(sizes).to(device).long()
    out = torch.empty_like(problem.q)
    call = partial(
        call_with, function, NO_SCALES, q_extend=problem.q, k_extend=k_flat[current],
        v_extend=v_flat[current], o_extend=out, k_buffer=k_flat, v_buffer=v_flat,
        qo_indptr=problem.starts, kv_indptr=paging.kv_indptr(prefix).to(device),
        kv_indices=before, custom_mask=custom_mask,
        is_causal=paging.is_causal(cell) and custom_mask is None, mask_indptr=mask_indptr,
        max_len_extend=max(r.rows for r in cell.requests), sm_scale=cell.head_dim**-0.5,
        logit_cap=0.0,
    )  # fmt: skip
    return Prepared(call, lambda _: out)


def _refuses(cell: grid.Attention, device: str) -> str | None:
    if cell.dtype not in ("bfloat16", "float16"):
        return f"has no {cell.dtype}"
    if cell.kv_dtype != cell.dtype:
        return "takes the current rows' keys apart from the fp8 cache, unquantised"
    pairs = sum(r.rows * r.seq_len for r in cell.requests)
    if paging.one_flag(cell) and pairs > MOST_MASK_ELEMENTS:
        return f"its custom mask would hold {pairs} elements"
    return None


TRITON = Baseline(
    "sglang triton", make, attention.differs, missing=needs_cuda_module(*EXTEND),
    refuses=_refuses, note="making its slot lists is not timed",
)  # fmt: skip
