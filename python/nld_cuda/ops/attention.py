"""Attention over the paged cache, and its plan."""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from nld_cuda import _library


class MaskMode(IntEnum):
    """Values of `mask_mode` in `block_attention`, one per request."""

    FULL = 0
    CAUSAL = 1
    BLOCK_CAUSAL = 2
    QUADRATIC = 3


def attention_plan(
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    mask_mode: Tensor,
    *,
    total_q: int,
    num_heads: int,
    num_kv_heads: int,
    max_seq_len: int,
    block_len: Tensor | None = None,
    block_phase: Tensor | None = None,
    split_len: int = 0,
    num_sms: int = 0,
    plan: Tensor | None = None,
) -> Tensor:
    """Cut a batch's attention into work items for CUDA: once per step, for all its layers.

    Without a plan `block_attention` makes one in every call (one small kernel more). The plan holds
    for the lengths, masks and `cu_seqlens_q` it was made from, and for any caches.

    Args:
        seq_lens, cu_seqlens_q, mask_mode, block_len, block_phase, split_len: as
            `block_attention` gets them.
        total_q: rows of q, at least `cu_seqlens_q[batch]`.
        num_heads, num_kv_heads: of q and of the caches.
        max_seq_len: bound of seq_lens, in tokens: `max_pages * page_size` is always right. Only
            sizes the plan, and only with split_len > 0. Splits past it are merged into the last.
        num_sms: multiprocessors to fill; 0: those of the device (4 on the CPU).
        plan: written: int32, `attention_plan_len` words. Words that the counts in its header do not
            reach are left alone. None: allocated, zeros there.

    Returns:
        The plan; `csrc/attention/plan.h` describes its words. The CPU's plan is equal to CUDA's;
        CPU attention takes its schedule from the lengths themselves and needs none.

    Raises:
        RuntimeError: a shape, dtype or device does not fit. Lengths, modes and block_len are
            checked on CPU, and on CUDA in a debug build.

    Meaning: `reference.attention_plan`.
    """
    sizes = {
        "total_q": total_q, "num_heads": num_heads, "num_kv_heads": num_kv_heads,
        "max_seq_len": max_seq_len,
    }  # fmt: skip
    options = {
        "block_len": block_len, "block_phase": block_phase, "split_len": split_len,
        "num_sms": num_sms,
    }  # fmt: skip
    if plan is None:
        return _library.nld.attention_plan(seq_lens, cu_seqlens_q, mask_mode, **sizes, **options)
    _library.nld.attention_plan.out(
        seq_lens, cu_seqlens_q, mask_mode, **sizes, **options, plan=plan
    )
    return plan


_HOST_SMS = 4  # csrc/attention/attention.h: kHostSms
_PLAN_HEADER_WORDS, _PLAN_TILE_WORDS, _PLAN_ITEM_WORDS = 12, 12, 4


def attention_plan_len(
    batch: int,
    *,
    total_q: int,
    num_heads: int,
    num_kv_heads: int,
    max_seq_len: int,
    split_len: int = 0,
    num_sms: int = _HOST_SMS,
) -> int:
    """Return the int32 words of a plan, as csrc/attention/plan.h counts them."""
    if batch == 0 or total_q == 0:
        return _PLAN_HEADER_WORDS
    heads_per_kv = num_heads // num_kv_heads
    rows = -(-total_q * heads_per_kv // batch)
    tile_rows = 128 if rows > 64 else 64 if rows > 16 or split_len > 0 else 16
    tiles = total_q * heads_per_kv // tile_rows + min(batch, total_q)
    if split_len > 0:
        items = tiles * (-(-max_seq_len // split_len) if max_seq_len > 0 else 1)
    else:
        items = tiles + 2 * max(num_sms * (1 if tile_rows == 128 else 2) // num_kv_heads, 1)
    offset = -(-(_PLAN_HEADER_WORDS + (_PLAN_TILE_WORDS + 1) * tiles) // 4) * 4
    return offset + _PLAN_ITEM_WORDS * items


@torch.library.register_fake("nld::attention_plan")
def _(seq_lens, cu_seqlens_q, mask_mode, *, total_q, num_heads, num_kv_heads, max_seq_len,
      block_len=None, block_phase=None, split_len=0, num_sms=0):  # fmt: skip
    if num_sms == 0:
        num_sms = _HOST_SMS
        if seq_lens.device.type == "cuda":
            num_sms = torch.cuda.get_device_properties(seq_lens.device).multi_processor_count
    return seq_lens.new_empty(
        attention_plan_len(
            seq_lens.shape[0], total_q=total_q, num_heads=num_heads, num_kv_heads=num_kv_heads,
            max_seq_len=max_seq_len, split_len=split_len, num_sms=num_sms,
        )
    )  # fmt: skip


@torch.library.register_fake("nld::attention_plan.out")
def _(seq_lens, cu_seqlens_q, mask_mode, *, total_q, num_heads, num_kv_heads, max_seq_len,
      block_len=None, block_phase=None, split_len=0, num_sms=0, plan):  # fmt: skip
    return None


def block_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    mask_mode: Tensor,
    *,
    block_len: Tensor | None = None,
    block_phase: Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    split_len: int = 0,
    plan: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend from ragged query rows to a paged KV cache, with a mask mode per request.

    Row i of a request with n rows sits at key index `p = seq_len - n + i` and sees, of the keys
    `0 <= j < seq_len`:

    - FULL: all;
    - CAUSAL: `j <= p`;
    - BLOCK_CAUSAL: `floor((j + phase) / block_len) <= floor((p + phase) / block_len)`;
    - QUADRATIC: the n rows are groups of `block_len + 1`, one head and `block_len` masks. All keys
      before the current rows; of the current ones the heads up to row i and, unless row i is a
      head itself, its whole group.

    Args:
        q: `[total_q, num_heads, head_dim]` float32, bfloat16 or float16, any strides with a dense
            last dimension, head_dim >= 1. Rows that belong to no request (past
            `cu_seqlens_q[batch]`) are not read; their outputs are 0 and -inf.
        k_cache: `[num_pages, page_size, num_kv_heads, head_dim]`, dtype of q or float8_e4m3fn (the
            other arguments as they are; the values are exact in q's dtype), any stride order with a
            dense last dimension, page_size >= 1; num_heads is a multiple of num_kv_heads.
            Holds the keys of the current rows already. Nothing at or past `seq_lens` is read.
        v_cache: as `k_cache`.
        page_table: `[batch, max_pages]` int32, page of each `page_size` tokens. Entries in use
            must lie in `[0, num_pages)`; the others may hold anything.
        seq_lens: `[batch]` int32, tokens in the cache including the current rows, in
            `[0, max_pages * page_size]`.
        cu_seqlens_q: `[batch + 1]` int32, not decreasing; request b owns the rows
            `cu_seqlens_q[b] .. cu_seqlens_q[b + 1]`.
        mask_mode: `[batch]` int32, values of `MaskMode`.
        block_len: `[batch]` int32, tokens; >= 1 and needed where the mode is BLOCK_CAUSAL or
            QUADRATIC, ignored elsewhere.
        block_phase: `[batch]` int32, tokens; default 0. Read under BLOCK_CAUSAL only.
        softmax_scale: factor on q.k; default `head_dim ** -0.5`.
        softcap: scores become `softcap * tanh(score / softcap)`; 0 switches it off.
        split_len: keys per split of the KV range. Splits lie at absolute multiples and are merged
            in order: results depend (in the last bits) on split_len, but on neither batch
            composition, thread count, nor how many rows a request has. 0: on CPU the fixed default
            1024; on CUDA splits are chosen so that the batch fills the GPU: equal runs give equal
            bits, but a request's last bits depend on its batch.
        plan: what `attention_plan` made of the same arguments; None: made here. On CPU only its
            size is checked.
        k_scale: `[num_kv_heads]` float32, positive and finite, for float8_e4m3fn caches only: a key
            is its entry times k_scale of its head (a factor on the scores). None: 1.
        v_scale: as `k_scale`, for values (a factor on the head's out, applied in float32).
        out: written: as q, any strides with a dense last dimension. Given together with `lse`.
        lse: written: `[num_heads, total_q]` float32, any strides.

    Returns:
        `(out, lse)`: `[total_q, num_heads, head_dim]` in q's dtype and the natural-log sum of
        exponentials `[num_heads, total_q]` float32. A row that sees no key gives 0 and -inf.

    Arithmetic is float32; half-precision probabilities may be rounded to q's dtype before they
    meet the values. CUDA: tensor cores for bfloat16 and float16 with head_dim 64, 96 or 128
    and rows of q and caches that start at multiples of 16 bytes (as torch allocates them); every
    other dtype, alignment and head_dim up to 512 runs in float32, correct and many times slower.
    float8_e4m3fn caches: see docs/attention.md for which kernel takes what.

    Workspace, CPU: a few tiles per thread (less than `700 * (head_dim + 32)` floats each), and
    while there are fewer than 4 (request, kv head, 128-row tile) items per thread,
    `128 * (head_dim + 18)` floats per item and split. CUDA: `128 * (head_dim + 2)` floats for each
    of 4 * SMs (request, kv head, 128-row tile, split) at most, whatever the context; with a
    split_len of one's own for every such split that `max_pages * page_size` (or the plan) allows.

    Raises:
        RuntimeError: a shape, dtype, stride or device does not fit. What depends on values
            (lengths, modes, block_len, page indices) is checked on CPU; on CUDA only in a debug
            build, where reading it would cost a synchronisation.

    Source: online softmax (Milakov and Gimelshein 2018), FlashAttention (Dao et al. 2022), split
    KV with merging by log-sum-exp (Flash-Decoding 2023).
    Meaning: `reference.block_attention`.
    """
    args = (q, k_cache, v_cache, page_table, seq_lens, cu_seqlens_q, mask_mode)
    options = {
        "block_len": block_len, "block_phase": block_phase, "softmax_scale": softmax_scale,
        "softcap": softcap, "split_len": split_len, "plan": plan,
        "k_scale": k_scale, "v_scale": v_scale,
    }  # fmt: skip
    if out is None and lse is None:
        return _library.nld.block_attention(*args, **options)
    if out is None or lse is None:
        missing = "out" if out is None else "lse"
        raise RuntimeError(f"block_attention: out and lse must be given together, got no {missing}")
    _library.nld.block_attention.out(*args, **options, out=out, lse=lse)
    return out, lse


@torch.library.register_fake("nld::block_attention")
def _(q, k_cache, v_cache, page_table, seq_lens, cu_seqlens_q, mask_mode, *, block_len=None,
      block_phase=None, softmax_scale=None, softcap=0.0, split_len=0, plan=None,
      k_scale=None, v_scale=None):  # fmt: skip
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.register_fake("nld::block_attention.out")
def _(q, k_cache, v_cache, page_table, seq_lens, cu_seqlens_q, mask_mode, *, block_len=None,
      block_phase=None, softmax_scale=None, softcap=0.0, split_len=0, plan=None,
      k_scale=None, v_scale=None, out, lse):  # fmt: skip
    return None
