"""What rope_append_ and compact_ mean."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate_half(x: Tensor) -> Tensor:
    """Return (-second half, first half) along the last dimension."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def as_stored(x: Tensor, dtype: torch.dtype, scale: Tensor | None) -> Tensor:
    """Return what a cache of `dtype` keeps of x `[tokens, num_kv_heads, head_dim]`."""
    if dtype != torch.float8_e4m3fn:
        return x.to(dtype)
    scaled = x.float() if scale is None else x.float() / scale[:, None]
    return scaled.clamp(-448, 448).to(dtype)  # NaN stays; casts of torch differ past 448


def rope_append_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    inv_freq: Tensor,
    *,
    attention_scaling: float = 1.0,
    query_scale_beta: float = 0.0,
    query_scale_len: int = 0,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Rotate q in place, rotate k, write k and v to their slots."""
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    # The angle is one float32 product whatever the dtype, as the published model computes it.
    angles = positions.float()[:, None] * inv_freq.float()
    cos = torch.cos(angles).repeat(1, 2)[:, None].to(compute) * attention_scaling
    sin = torch.sin(angles).repeat(1, 2)[:, None].to(compute) * attention_scaling
    rotary_dim = 2 * inv_freq.numel()

    def rotate(x: Tensor) -> Tensor:
        turned, rest = x[..., :rotary_dim].to(compute), x[..., rotary_dim:].to(compute)
        return torch.cat((turned * cos + rotate_half(turned) * sin, rest), dim=-1)

    scale = torch.ones(q.shape[0], dtype=compute, device=q.device)
    if query_scale_len > 0:
        steps = torch.div(positions, query_scale_len, rounding_mode="floor").to(compute)
        scale = 1 + query_scale_beta * torch.log1p(steps)
    q.copy_((rotate(q) * scale[:, None, None]).to(q.dtype))
    stored_k = as_stored(rotate(k), k_cache.dtype, k_scale)
    stored_v = as_stored(v, v_cache.dtype, v_scale)
    num_pages, page_size = k_cache.shape[:2]
    for token, slot in enumerate(slot_mapping.tolist()):
        if 0 <= slot < num_pages * page_size:
            k_cache[slot // page_size, slot % page_size] = stored_k[token]
            v_cache[slot // page_size, slot % page_size] = stored_v[token]


def compact_(
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    base_lens: Tensor,
    src_offsets: Tensor,
    num_kept: Tensor,
) -> None:
    """Move entries base + src_offsets[i] to base + i, for all layers."""
    page_size = k_cache.shape[2]
    for b, base in enumerate(base_lens.tolist()):
        for i in range(min(int(num_kept[b]), src_offsets.shape[1])):
            src, dst = base + int(src_offsets[b, i]), base + i
            src_page, dst_page = page_table[b, src // page_size], page_table[b, dst // page_size]
            for cache in (k_cache, v_cache):
                cache[:, dst_page, dst % page_size] = cache[:, src_page, src % page_size].clone()
