"""Writing to the paged cache, and moving what it holds."""

from __future__ import annotations

import torch
from torch import Tensor

from nld_cuda import _library


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
    """Rotate queries in place, rotate keys, and write keys and values to their cache slots.

    Args:
        q: `[total_tokens, num_heads, head_dim]`, float32, bfloat16 or float16, any strides with a
            dense last dimension; written: rotated, and scaled where `query_scale_len` is set.
        k: `[total_tokens, num_kv_heads, head_dim]`, same dtype; only read.
        v: as `k`; only read.
        k_cache: `[num_pages, page_size, num_kv_heads, head_dim]` in any stride order with a dense
            last dimension, page_size >= 1; written at the slots. Dtype of q, or float8_e4m3fn.
        v_cache: as `k_cache`; written.
        positions: `[total_tokens]` int32, absolute 0-based position of each token.
        slot_mapping: `[total_tokens]` int32, `page * page_size + offset`; a slot of -1 (or outside
            the cache) is not written, its query is still rotated. Slots must not repeat.
        inv_freq: `[num_freqs]` float32, `2 * num_freqs <= head_dim`; the first `2 * num_freqs`
            elements of a head are rotated in the rotate-half layout, the rest pass through.
        attention_scaling: factor on cos and sin (YaRN's attention factor).
        query_scale_beta: llama-4 scale: q is multiplied by
            `1 + beta * ln(1 + floor(position / query_scale_len))`.
        query_scale_len: period of that scale in tokens; 0 switches it off.
        k_scale: `[num_kv_heads]` float32, positive and finite, for float8_e4m3fn caches only: what
            is stored is `rotated k / k_scale` of the head, computed in float32 and rounded once, to
            nearest even. Larger magnitudes than 448 (infinity too) become 448, NaN stays NaN. None:
            1.
        v_scale: as `k_scale`, for v.

    Raises:
        RuntimeError: a shape, dtype, stride or device does not fit; nothing has been written. That
            scales are positive is checked on CPU, and on CUDA in a debug build.

    Source: RoPE (Su et al. 2021), rotate-half layout; llama-4 attention temperature tuning.
    Meaning: `reference.rope_append_`.
    """
    _library.nld.rope_append_(
        q, k, v, k_cache, v_cache, positions, slot_mapping, inv_freq,
        attention_scaling=attention_scaling, query_scale_beta=query_scale_beta,
        query_scale_len=query_scale_len, k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip


@torch.library.register_fake("nld::rope_append_")
def _(q, k, v, k_cache, v_cache, positions, slot_mapping, inv_freq, *,
      attention_scaling=1.0, query_scale_beta=0.0, query_scale_len=0,
      k_scale=None, v_scale=None):  # fmt: skip
    return None


def compact_(
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    base_lens: Tensor,
    src_offsets: Tensor,
    num_kept: Tensor,
) -> None:
    """Move chosen cache entries of each request together, in place, in all layers.

    Entry `base_lens[b] + src_offsets[b, i]` moves to `base_lens[b] + i` for `i < num_kept[b]`.

    Args:
        k_cache: `[num_layers, num_pages, page_size, num_kv_heads, head_dim]`, float32, bfloat16,
            float16 or float8_e4m3fn, any stride order with a dense last dimension; written.
        v_cache: as `k_cache`; written.
        page_table: `[batch, max_pages]` int32, page index of each `page_size` tokens.
        base_lens: `[batch]` int32, tokens before the entries to choose from.
        src_offsets: `[batch, max_kept]` int32, strictly increasing along a row with
            `src_offsets[b, i] >= i` (so that no entry is overwritten before it is read).
        num_kept: `[batch]` int32, entries kept; 0 moves nothing, more than `max_kept` counts as
            `max_kept`.

    Raises:
        RuntimeError: a shape, dtype, stride or device does not fit.

    Meaning: `reference.compact_`.
    """
    _library.nld.compact_(k_cache, v_cache, page_table, base_lens, src_offsets, num_kept)


@torch.library.register_fake("nld::compact_")
def _(k_cache, v_cache, page_table, base_lens, src_offsets, num_kept):
    return None
