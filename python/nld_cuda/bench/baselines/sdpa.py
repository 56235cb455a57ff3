"""torch's scaled_dot_product_attention, one backend at a time, on K/V gathered beforehand.

Equal requests are one call, others a call each. `gather + sdpa` gathers the pages itself, as a
paged cache makes an eager pipeline do; the others get dense K/V for nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from nld_cuda.bench import attention, grid
from nld_cuda.bench.attention import AttentionProblem
from nld_cuda.bench.base import Baseline, Prepared
from nld_cuda.bench.baselines import paging
from nld_cuda.ops import MaskMode

Mask = dict[str, Any]


def mask_arguments(r: grid.Request, device: torch.device, *, lower_right: bool) -> Mask:
    """Return attn_mask and is_causal: SDPA's own flag lines rows and keys up at the start."""
    if r.mode == MaskMode.FULL or (r.mode == MaskMode.CAUSAL and r.rows == 1):
        return {}
    if r.mode == MaskMode.CAUSAL and r.rows == r.seq_len:
        return {"is_causal": True}
    if r.mode == MaskMode.CAUSAL and lower_right:
        from torch.nn.attention.bias import causal_lower_right

        return {"attn_mask": causal_lower_right(r.rows, r.seq_len)}
    return {"attn_mask": paging.visible(r).to(device)}


def make(problem: AttentionProblem, *, expand: bool, gather: bool, lower_right: bool) -> Prepared:
    """Gather K/V now (or in the call) and return what runs SDPA on them."""
    cell, one = problem.cell, paging.uniform(problem.cell)
    times = cell.heads // cell.kv_heads if expand else 1
    groups = [0] if one else range(len(cell.requests))

    def keys_values(b: int) -> tuple[Tensor, Tensor]:
        k, v = problem.gather_all() if one else (x[None] for x in problem.gather(b))
        return (k, v) if times == 1 else (_expanded(k, times), _expanded(v, times))

    def shared_keys_values(b: int) -> tuple[Tensor, Tensor]:
        if (b, times) not in problem.laid_out:
            problem.laid_out[b, times] = keys_values(b)
        return problem.laid_out[b, times]

    inputs: list[tuple[Tensor, Callable[[], tuple[Tensor, Tensor]], Mask]] = []
    starts = problem.starts.tolist()
    for b in groups:
        r = cell.requests[b]
        rows = problem.q if one else problem.q[starts[b] : starts[b + 1]]
        rows = rows.view(-1, r.rows, cell.heads, cell.head_dim).transpose(1, 2).contiguous()
        mask = mask_arguments(r, problem.device, lower_right=lower_right)
        if times < cell.heads // cell.kv_heads:
            mask["enable_gqa"] = True
        if not gather:
            shared_keys_values(b)
        inputs.append((rows, partial(keys_values if gather else shared_keys_values, b), mask))

    def call() -> list[Tensor]:
        made = []
        for rows, kv, mask in inputs:
            k, v = kv()
            made.append(scaled_dot_product_attention(rows, k, v, **mask))
        return made

    return Prepared(call, _rows)


def _expanded(x: Tensor, times: int) -> Tensor:
    return x.repeat_interleave(times, dim=1)


def _rows(returned: list[Tensor]) -> Tensor:
    return torch.cat([x.transpose(1, 2).flatten(0, 1) for x in returned])


def _refuses(
    cell: grid.Attention, device: str, *, masks: bool, dtypes: tuple[str, ...], offset: bool
) -> str | None:
    """offset: it has a causal mask for rows that are not the first keys."""
    if cell.dtype not in dtypes:
        return f"has no {cell.dtype}"
    kinds = paging.modes(cell)
    if not masks:
        if kinds & {MaskMode.BLOCK_CAUSAL, MaskMode.QUADRATIC}:
            return "takes no mask tensor"
        if not offset and any(
            r.mode == MaskMode.CAUSAL and 1 < r.rows < r.seq_len for r in cell.requests
        ):
            return "takes no mask tensor, its causal flag starts at key 0"
    pairs = max(r.rows * r.seq_len for r in cell.requests)
    if masks and kinds != {MaskMode.FULL} and pairs > 1 << 29:
        return f"its mask would hold {pairs} elements"
    return None


def _math_bytes(cell: grid.Attention) -> float:
    """Its score matrices in float32, some of them at a time, and expanded K/V."""
    pairs = sum(r.rows * r.seq_len for r in cell.requests)
    if not paging.uniform(cell):
        pairs = max(r.rows * r.seq_len for r in cell.requests)
    return gathered_bytes(cell) * (1 + cell.heads // cell.kv_heads) + 12 * cell.heads * pairs


def gathered_bytes(cell: grid.Attention) -> float:
    """Dense K and V of all requests, in the dtype of q."""
    keys = sum(r.seq_len for r in cell.requests)
    return 2.0 * keys * cell.kv_heads * cell.head_dim * grid.ELEMENT_BYTES[cell.dtype]


def _expanded_bytes(cell: grid.Attention) -> float:
    return gathered_bytes(cell) * cell.heads / cell.kv_heads


def _cuda_only(device: str) -> str | None:
    return None if device == "cuda" else "runs on CUDA only"


def _cpu_only(device: str) -> str | None:
    return None if device == "cpu" else "on CUDA the backend shares K/V heads itself"


def _backend(backend: SDPBackend) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: sdpa_kernel(backend)


HALF = ("bfloat16", "float16")
ALL = ("float32", *HALF)
NOTE = "gathering K/V is not timed"


def _flash_refuses(cell: grid.Attention, device: str) -> str | None:
    on_cuda = device == "cuda"  # the CPU's takes masks and float32
    return _refuses(
        cell, device, masks=not on_cuda, dtypes=HALF if on_cuda else ALL, offset=on_cuda
    )


def _make(*, expand: bool = False, gather: bool = False, flash: bool = False) -> Any:
    def prepare(problem: AttentionProblem) -> Prepared:
        lower_right = flash and problem.device.type == "cuda"
        return make(problem, expand=expand, gather=gather, lower_right=lower_right)

    return prepare


FLASH = Baseline(
    "sdpa flash", _make(flash=True), attention.differs, refuses=_flash_refuses,
    around=_backend(SDPBackend.FLASH_ATTENTION), layout="gathered", layout_bytes=gathered_bytes,
    note=NOTE,
)  # fmt: skip
FLASH_EXPANDED = Baseline(
    "sdpa flash expanded", _make(expand=True, flash=True), attention.differs,
    missing=_cpu_only, refuses=_flash_refuses, around=_backend(SDPBackend.FLASH_ATTENTION),
    layout="expanded", layout_bytes=_expanded_bytes, note=NOTE + ", nor copying the heads",
)  # fmt: skip
CUDNN = Baseline(
    "sdpa cudnn", _make(), attention.differs, missing=_cuda_only,
    refuses=partial(_refuses, masks=True, dtypes=HALF, offset=False),
    around=_backend(SDPBackend.CUDNN_ATTENTION), layout="gathered", layout_bytes=gathered_bytes,
    note=NOTE,
)  # fmt: skip
EFFICIENT = Baseline(
    "sdpa efficient", _make(expand=True), attention.differs, missing=_cuda_only,
    refuses=partial(_refuses, masks=True, dtypes=ALL, offset=False),
    around=_backend(SDPBackend.EFFICIENT_ATTENTION), layout="expanded",
    layout_bytes=_expanded_bytes, note=NOTE + ", nor copying the heads",
)  # fmt: skip
MATH = Baseline(
    "sdpa math", _make(), attention.differs,
    refuses=partial(_refuses, masks=True, dtypes=ALL, offset=False),
    around=_backend(SDPBackend.MATH), layout="math", layout_bytes=_math_bytes, note=NOTE,
)  # fmt: skip
GATHER = Baseline(
    "gather + sdpa", _make(gather=True, flash=True), attention.differs, refuses=_flash_refuses,
    around=_backend(SDPBackend.FLASH_ATTENTION), layout="gathering", layout_bytes=gathered_bytes,
    note="gathers K/V from the pages in every call",
)  # fmt: skip
