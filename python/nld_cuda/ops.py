"""One typed wrapper per torch op of `torch.ops.nld`, with its fake (shape) implementation.

The wrappers add nothing but defaults and documentation; `nld_cuda.reference` holds the meaning of
every op in plain PyTorch under the same names and argument order. All ops run on the current
stream, read nothing on the host, and can be captured in a CUDA graph. A trailing underscore marks
an op that writes arguments in place; in-place writes do not bump a tensor's autograd version.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from nld_cuda import _library as _library  # registers torch.ops.nld

_nld = torch.ops.nld


# ---- kv_cache ---------------------------------------------------------------------------------


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
    _nld.rope_append_(
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
    _nld.compact_(k_cache, v_cache, page_table, base_lens, src_offsets, num_kept)


@torch.library.register_fake("nld::compact_")
def _(k_cache, v_cache, page_table, base_lens, src_offsets, num_kept):
    return None


# ---- attention --------------------------------------------------------------------------------


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
        return _nld.attention_plan(seq_lens, cu_seqlens_q, mask_mode, **sizes, **options)
    _nld.attention_plan.out(seq_lens, cu_seqlens_q, mask_mode, **sizes, **options, plan=plan)
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
        return _nld.block_attention(*args, **options)
    if out is None or lse is None:
        missing = "out" if out is None else "lse"
        raise RuntimeError(f"block_attention: out and lse must be given together, got no {missing}")
    _nld.block_attention.out(*args, **options, out=out, lse=lse)
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


# ---- sampler ----------------------------------------------------------------------------------


class CommitRule(IntEnum):
    """Which masked rows `commit_` reveals; see there."""

    THRESHOLD = 0
    QUOTA = 1
    ALL = 2
    ENTROPY = 3
    REVISE = 4


class Purpose(IntEnum):
    """What a random number is drawn for: one place can need several independent ones."""

    SAMPLE = 0
    DRAFT = 1
    ACCEPT = 2
    RESIDUAL = 3


class CommitResult(NamedTuple):
    """What `commit_` found: see its arguments of the same names."""

    candidates: Tensor
    confidence: Tensor
    num_committed: Tensor
    num_remaining: Tensor
    done: Tensor


def commit_(
    logits: Tensor,
    block_tokens: Tensor,
    is_masked: Tensor,
    cu_seqlens: Tensor,
    rule: Tensor,
    threshold: Tensor,
    *,
    mask_token_id: int,
    quota: Tensor | None = None,
    revise_threshold: Tensor | None = None,
    is_fixed: Tensor | None = None,
    banned_token_ids: Tensor | None = None,
    eos_token_ids: Tensor | None = None,
    temperature: Tensor | None = None,
    seed: Tensor | None = None,
    positions: Tensor | None = None,
    purpose: int = Purpose.SAMPLE,
    candidates: Tensor | None = None,
    confidence: Tensor | None = None,
    num_committed: Tensor | None = None,
    num_remaining: Tensor | None = None,
    done: Tensor | None = None,
    tickets: Tensor | None = None,
) -> CommitResult:
    """Reveal the masked rows of each request that its rule is confident enough about, in place.

    Every masked row gets a candidate (the largest logit; at temperature > 0 a draw by the
    position-keyed Gumbel maximum) and the candidate's confidence: the float32 softmax of the
    untempered logits over the whole vocabulary. Then the request's rule chooses rows:

    - THRESHOLD: confidence >= threshold, and always the most confident row;
    - QUOTA: the `quota` most confident rows, at least one;
    - ALL: every masked row;
    - ENTROPY: by increasing entropy of the softmax (natural log), the longest prefix whose
      entropies without the largest sum to at most threshold, at least one;
    - REVISE: as THRESHOLD; and rows revealed before this call, neither fixed nor masked, whose
      token now has confidence < revise_threshold are masked again.

    Ties go to the lowest row and the lowest id. Then the EOS freeze: if an unfixed unmasked row
    holds an EOS id of its request and no masked row lies left of it, every row right of the first
    such row becomes that EOS and is unmasked. NaN logits count as -inf, +inf as the largest finite
    float. A row without an allowed logit above -inf gets the lowest allowed id with confidence 0
    and entropy +inf. Logits of rows that are not judged are not read.

    Args:
        logits: `[rows, vocab]` float32, bfloat16 or float16, any row stride, dense last dimension;
            row r judges the token of row r (unshifted).
        block_tokens: `[rows]` int64; written where a row is revealed, masked again or frozen.
        is_masked: `[rows]` bool; written likewise. Alone decides what is masked.
        cu_seqlens: `[batch + 1]` int32; request b owns rows `cu_seqlens[b] .. cu_seqlens[b + 1]`.
            Other rows are ignored.
        rule: `[batch]` int32, a `CommitRule` each (out of range: RuntimeError on CPU).
        threshold: `[batch]` float32: probability, or nats for ENTROPY.
        mask_token_id: written where REVISE masks a row again.
        quota: `[batch]` int32, rows per call; default 1.
        revise_threshold: `[batch]` float32; default 0: nothing is masked again.
        is_fixed: `[rows]` bool, rows that REVISE and the freeze's EOS search pass over; default
            none.
        banned_token_ids: `[n]` int64, ids that are never chosen; default the mask id. -1 entries
            are ignored. If every id is banned, id 0 is taken with confidence 0.
        eos_token_ids: `[batch, n]` int64, padded with -1; default none: no freeze.
        temperature: `[batch]` float32; default, and <= 1e-6: greedy.
        seed: `[batch]` int64, needed with temperature.
        positions: `[rows]` int32, absolute position of each row, needed with temperature.
        purpose: a `Purpose`: which stream of random numbers to draw from.
        candidates: `[rows]` int64, written: the candidate; for rows not masked, their token.
        confidence: `[rows]` float32, written: of the candidate, or of the token where REVISE judged
            it; 1.0 for rows that were not judged. Allocated if None, as the other outputs are.
        num_committed: `[batch]` int32, written: rows revealed by the rule, not by the freeze.
        num_remaining: `[batch]` int32, written: rows still masked.
        done: `[batch]` bool, written: num_remaining is 0.
        tickets: `[batch]` int32 zeros, zeros again on return: scratch memory of the CUDA kernel.
            A caller that keeps it saves a launch; without it the op zeroes its own. Calls that may
            run at the same time must not share it. On CPU it is left as it is.

    Raises:
        RuntimeError: a shape, dtype, stride or device does not fit, or temperature comes without
            seed or positions; nothing has been written.

    On CUDA one launch (two without `tickets`); cu_seqlens must not decrease and lie within the
    rows, a rule out of range reveals nothing. Workspace: 32 bytes a row and 8192 ids, 5 bytes a
    row; on CPU 32 bytes a row and 16384 ids, 13 bytes a row.
    Source: confidence-threshold decoding (Fast-dLLM, Wu et al. 2025); entropy bound (Ben-Hamu et
    al. 2025); Gumbel maximum with Philox4x32-10 (Salmon et al. 2011).
    Meaning: `reference.commit_`.
    """
    if candidates is None:
        candidates = block_tokens.clone()
    if confidence is None:
        confidence = torch.ones_like(block_tokens, dtype=torch.float32)
    if num_committed is None:
        num_committed = torch.zeros_like(rule)
    if num_remaining is None:
        num_remaining = torch.zeros_like(rule)
    if done is None:
        done = torch.zeros_like(rule, dtype=torch.bool)
    _nld.commit_(
        logits, block_tokens, is_masked, cu_seqlens, rule, threshold,
        mask_token_id=mask_token_id, quota=quota, revise_threshold=revise_threshold,
        is_fixed=is_fixed, banned_token_ids=banned_token_ids, eos_token_ids=eos_token_ids,
        temperature=temperature, seed=seed, positions=positions, purpose=int(purpose),
        candidates=candidates, confidence=confidence, num_committed=num_committed,
        num_remaining=num_remaining, done=done, tickets=tickets,
    )  # fmt: skip
    return CommitResult(candidates, confidence, num_committed, num_remaining, done)


@torch.library.register_fake("nld::commit_")
def _(logits, block_tokens, is_masked, cu_seqlens, rule, threshold, *, mask_token_id, quota=None,
      revise_threshold=None, is_fixed=None, banned_token_ids=None, eos_token_ids=None,
      temperature=None, seed=None, positions=None, purpose=0, candidates, confidence,
      num_committed, num_remaining, done, tickets=None):  # fmt: skip
    return None


# A part: eight int32 words, what the logits of up to 8192 neighbouring token ids say about one row.
# Ranks that share a vocabulary gather parts instead of logits.
PART_LEN, PART_WORDS = 8192, 8


def num_parts(shard_len: int) -> int:
    """Return how many parts a row of a shard needs: ask for those of the longest shard."""
    return max(-(-shard_len // PART_LEN), 1)


def commit_scan(
    logits: Tensor,
    block_tokens: Tensor,
    is_masked: Tensor,
    cu_seqlens: Tensor,
    rule: Tensor,
    *,
    first_token_id: int,
    mask_token_id: int,
    is_fixed: Tensor | None = None,
    banned_token_ids: Tensor | None = None,
    temperature: Tensor | None = None,
    seed: Tensor | None = None,
    positions: Tensor | None = None,
    purpose: int = Purpose.SAMPLE,
    num_parts: int = 0,
) -> Tensor:
    """Return what one shard of the vocabulary says about the rows that `commit_` would judge.

    The first half of `commit_` for ranks that hold some columns of the logits each: every rank
    scans its own, all ranks gather the parts in order of their token ids, and every rank calls
    `commit_parts_` with what all have said. Arguments not listed are those of `commit_` and the
    same on every rank; is_masked, block_tokens as they are before the commit.

    A part holds, as int32 words, the bits of the float32 `max, sum, dot` (softmax sums of the
    untempered logits: `sum exp(x - max)`, and for ENTROPY `sum exp(x - max) (x - max)`), of the
    best allowed `value` (at temperature > 0 tempered and with noise), its token `id` (-1: none
    above -inf; of a token that REVISE judges: itself, where it lies in the shard), the bits of that
    id's untempered `logit`, and two zeros. Which part tells of which ids is up to the device; parts
    that tell of none, and those of rows that are not judged, are `-inf, 0, 0, -inf, -1, 0, 0, 0`.

    Args:
        logits: `[rows, shard]` float32, bfloat16 or float16, any row stride, dense last dimension:
            column j is token `first_token_id + j`. A shard may have no columns.
        first_token_id: of the shard; any number from 0 on. Candidates are the same for every cut.
            Where shards begin at multiples of 16384 (CUDA: are all of one length, a multiple of
            8192, but for the last, which may be shorter), `commit_parts_` gives the bits of
            `commit_` in everything; elsewhere confidences can differ in their last digits.
        num_parts: parts of each row, the same on every rank; 0: `num_parts(shard)`, as few as this
            shard needs.

    Returns:
        `[rows, num_parts, 8]` int32.

    Raises:
        RuntimeError: a shape, dtype, stride or device does not fit, temperature comes without seed
            or positions, num_parts is too small, or (CPU) a rule is out of range.

    On CUDA one launch. Logits of rows that are not judged are not read.
    Source: distributed softmax and argmax of vocabulary-parallel heads (Megatron-LM, Shoeybi et
    al. 2019).
    Meaning: `reference.commit_scan`.
    """
    return _nld.commit_scan(
        logits, block_tokens, is_masked, cu_seqlens, rule, first_token_id=first_token_id,
        mask_token_id=mask_token_id, is_fixed=is_fixed, banned_token_ids=banned_token_ids,
        temperature=temperature, seed=seed, positions=positions, purpose=int(purpose),
        num_parts=num_parts,
    )  # fmt: skip


@torch.library.register_fake("nld::commit_scan")
def _(logits, block_tokens, is_masked, cu_seqlens, rule, *, first_token_id, mask_token_id,
      is_fixed=None, banned_token_ids=None, temperature=None, seed=None, positions=None, purpose=0,
      num_parts=0):  # fmt: skip
    return _new_parts(logits, num_parts)


def _new_parts(logits: Tensor, num: int) -> Tensor:
    shape = (logits.shape[0], num or num_parts(logits.shape[1]), PART_WORDS)
    return logits.new_empty(shape, dtype=torch.int32)


def commit_parts_(
    parts: Tensor,
    block_tokens: Tensor,
    is_masked: Tensor,
    cu_seqlens: Tensor,
    rule: Tensor,
    threshold: Tensor,
    *,
    vocab: int,
    mask_token_id: int,
    quota: Tensor | None = None,
    revise_threshold: Tensor | None = None,
    is_fixed: Tensor | None = None,
    banned_token_ids: Tensor | None = None,
    eos_token_ids: Tensor | None = None,
    candidates: Tensor | None = None,
    confidence: Tensor | None = None,
    num_committed: Tensor | None = None,
    num_remaining: Tensor | None = None,
    done: Tensor | None = None,
) -> CommitResult:
    """Do what `commit_` does, from what the shards of the vocabulary say instead of from logits.

    Arguments that are not listed, results and errors are those of `commit_`. Every rank that calls
    with the same tensors writes the same bits.

    Args:
        parts: `[num_shards, rows, num_parts, 8]` int32, contiguous: what `commit_scan` returned for
            each shard, stacked in order of their token ids (all_gather_into_tensor in rank order).
        vocab: number of token ids of all shards together.

    On CUDA one launch. Workspace: 5 bytes a row.
    Meaning: `reference.commit_parts_`.
    """
    if candidates is None:
        candidates = block_tokens.clone()
    if confidence is None:
        confidence = torch.ones_like(block_tokens, dtype=torch.float32)
    if num_committed is None:
        num_committed = torch.zeros_like(rule)
    if num_remaining is None:
        num_remaining = torch.zeros_like(rule)
    if done is None:
        done = torch.zeros_like(rule, dtype=torch.bool)
    _nld.commit_parts_(
        parts, block_tokens, is_masked, cu_seqlens, rule, threshold, vocab=vocab,
        mask_token_id=mask_token_id, quota=quota, revise_threshold=revise_threshold,
        is_fixed=is_fixed, banned_token_ids=banned_token_ids, eos_token_ids=eos_token_ids,
        candidates=candidates, confidence=confidence, num_committed=num_committed,
        num_remaining=num_remaining, done=done,
    )  # fmt: skip
    return CommitResult(candidates, confidence, num_committed, num_remaining, done)


@torch.library.register_fake("nld::commit_parts_")
def _(parts, block_tokens, is_masked, cu_seqlens, rule, threshold, *, vocab, mask_token_id,
      quota=None, revise_threshold=None, is_fixed=None, banned_token_ids=None, eos_token_ids=None,
      candidates, confidence, num_committed, num_remaining, done):  # fmt: skip
    return None


def gumbel_noise_(noise: Tensor, seed: Tensor, positions: Tensor, purpose: int = 0) -> None:
    """Fill a tensor with the Gumbel noise that the other ops draw tokens with.

    A draw at temperature T is the argmax of `logit * (1 / T) + noise`. The numbers depend on the
    seed, the position, the purpose and the token id only, with equal bits on every backend.

    Args:
        noise: `[rows, vocab]` float32, any row stride, dense last dimension; written.
        seed: `[rows]` int64.
        positions: `[rows]` int32, absolute position of the token being drawn.
        purpose: a `Purpose`.

    Raises:
        RuntimeError: a shape, dtype, stride or device does not fit.

    Source: Philox4x32-10 (Salmon et al. 2011).
    Meaning: `reference.gumbel_noise_`.
    """
    _nld.gumbel_noise_(noise, seed, positions, int(purpose))


@torch.library.register_fake("nld::gumbel_noise_")
def _(noise, seed, positions, purpose=0):
    return None


# ---- verify -----------------------------------------------------------------------------------


class VerifyMode(IntEnum):
    """How `verify_` judges the drafts of a request; a value of its `verify_mode` tensor."""

    GREEDY = 0
    SAMPLED = 1
    REJECTION = 2
    COMMIT = 3


class VerifyResult(NamedTuple):
    """Counts of one `verify_` call, int32 `[batch]` each; 0 for requests that were not touched."""

    num_emitted: Tensor
    num_accepted: Tensor


def verify_(
    logits: Tensor,
    block_tokens: Tensor,
    cu_seqlens: Tensor,
    verify_mode: Tensor,
    out_tokens: Tensor,
    out_lens: Tensor,
    max_out_lens: Tensor,
    next_tokens: Tensor,
    seq_lens: Tensor,
    done: Tensor,
    *,
    positions: Tensor | None = None,
    temperature: Tensor | None = None,
    seed: Tensor | None = None,
    draft_probs: Tensor | None = None,
    eos_token_ids: Tensor | None = None,
    banned_token_ids: Tensor | None = None,
    force_positions: Tensor | None = None,
    force_tokens: Tensor | None = None,
    num_emitted: Tensor | None = None,
    num_accepted: Tensor | None = None,
    tickets: Tensor | None = None,
) -> VerifyResult:
    """Accept drafted tokens, emit them with one bonus token, and roll the cache length back.

    Request b owns rows `cu_seqlens[b] .. cu_seqlens[b + 1]` = [seed, draft, draft, ...]; the seed
    has been emitted before. A request with one row takes a plain autoregressive step; one without
    rows, or with `done[b]` set, is not touched. Modes mix freely in a batch:

    - GREEDY: the target of a row is its argmax (lowest id on ties); drafts are accepted while
      they equal their targets; the first target that differs, or the last one, is the bonus.
    - SAMPLED: the same with targets drawn at the temperature: noise depends on seed, place and
      token id only, so this is what one-row calls would have drawn at the same places.
    - REJECTION: a draft of probability q is accepted when `u * q < p`; the first rejection draws
      the bonus from `max(p - q, 0)` (from p if that is zero everywhere), otherwise it is drawn
      from p. The output follows p exactly, and more drafts are accepted than under SAMPLED.
    - COMMIT: every draft is accepted (a finished diffusion block), the bonus is drawn as in
      SAMPLED. An EOS ends the request as seed (nothing is emitted) or as draft; as the bonus it
      is emitted and ends the request in the next call.

    At temperature 0 every draw is an argmax. Other values of `verify_mode` count as GREEDY. NaN
    logits count as -inf, +inf as the largest finite float; a row without a finite allowed logit
    draws the lowest allowed id. Drafts outside the vocabulary are accepted under COMMIT only.

    On CUDA one launch, a second where draft_probs and temperature are given, a memset without
    `tickets`. No host read: which launches are made depends on which arguments are given, never on
    their values, so CUDA graphs replay with other lengths, modes and drafts.

    Args:
        logits: `[rows, vocab]` float32, bfloat16 or float16, dense last dimension; row i predicts
            the token after row i. Only read, and only as far as a request's drafts are accepted.
        block_tokens: `[rows]` int64, seed and drafts of each request.
        cu_seqlens: `[batch + 1]` int32, ascending; rows past its end belong to nobody.
        verify_mode: `[batch]` int32, a `VerifyMode` each.
        out_tokens: `[batch, capacity]` int64, dense last dimension; written: emitted tokens at
            `out_lens[b]` and after.
        out_lens: `[batch]` int32, >= 0; written: plus the tokens emitted.
        max_out_lens: `[batch]` int32: where out_lens stops (capacity, if that is less); the
            request is then done.
        next_tokens: `[batch]` int64; written: the last token emitted.
        seq_lens: `[batch]` int32, cached tokens including the request's rows; written: the cache
            keeps the seed and all emitted tokens but the last, `seq_lens -= rows - emitted`.
        done: `[batch]` bool; written: set by an EOS or a full output.
        positions: `[rows]` int32, absolute place of block_tokens[row], rising by one along a
            request; needed with temperature or force_positions.
        temperature: `[batch]` float32; None: 0. At most 1e-6 (and NaN): greedy.
        seed: `[batch]` int64, of the random numbers; needed with temperature.
        draft_probs: `[rows, vocab]` float32, dense last dimension: row i + 1 holds the
            distribution its draft was drawn from. NaN and negative values count as 0. None: the
            drafts were certain (one-hot). Read under REJECTION only.
        eos_token_ids: `[batch, n]` int64, -1: unused entry. None: no EOS.
        banned_token_ids: `[n]` int64 that no row may draw; -1: unused entry. None: none.
        force_positions: `[batch]` int32: at this place the target is the forced token with
            certainty; -1: nowhere. Written: -1 once that token has been emitted there or before.
        force_tokens: `[batch]` int64; needed with force_positions, and only then.
        num_emitted: `[batch]` int32; written: tokens appended. Allocated when None.
        num_accepted: `[batch]` int32; written: drafts accepted, before any cut. Allocated when
            None.
        tickets: `[batch]` int32 zeros, zeros again on return: scratch memory of the CUDA kernels,
            for one stream. A caller that keeps it saves a launch. None: allocated.

    Returns:
        num_emitted and num_accepted.

    Raises:
        RuntimeError: a shape, dtype, stride or device does not fit, or an argument that another
            one needs is missing; nothing has been written.

    Source: Leviathan et al. 2022 and Chen et al. 2023 (rejection); Gumbel-max sampling.
    Meaning: `reference.verify_`.
    """
    if num_emitted is None:
        num_emitted = torch.empty_like(out_lens)
    if num_accepted is None:
        num_accepted = torch.empty_like(out_lens)
    _nld.verify_(
        logits, block_tokens, cu_seqlens, verify_mode, out_tokens, out_lens, max_out_lens,
        next_tokens, seq_lens, done, positions=positions, temperature=temperature, seed=seed,
        draft_probs=draft_probs, eos_token_ids=eos_token_ids, banned_token_ids=banned_token_ids,
        force_positions=force_positions, force_tokens=force_tokens, num_emitted=num_emitted,
        num_accepted=num_accepted, tickets=tickets,
    )  # fmt: skip
    return VerifyResult(num_emitted, num_accepted)


@torch.library.register_fake("nld::verify_")
def _(logits, block_tokens, cu_seqlens, verify_mode, out_tokens, out_lens, max_out_lens,
      next_tokens, seq_lens, done, *, positions=None, temperature=None, seed=None, draft_probs=None,
      eos_token_ids=None, banned_token_ids=None, force_positions=None, force_tokens=None,
      num_emitted, num_accepted, tickets=None):  # fmt: skip
    return None


def verify_scan(
    logits: Tensor,
    cu_seqlens: Tensor,
    verify_mode: Tensor,
    done: Tensor,
    *,
    first_token_id: int,
    positions: Tensor | None = None,
    temperature: Tensor | None = None,
    seed: Tensor | None = None,
    banned_token_ids: Tensor | None = None,
    num_parts: int = 0,
) -> Tensor:
    """Return what one shard of the vocabulary says about the rows that `verify_` would judge.

    The first half of `verify_` for ranks that hold some columns of the logits each, as
    `commit_scan` is of `commit_`: the same parts (without sums: max -inf, sum and dot 0), for
    `verify_parts_`, which then emits the tokens that `verify_` would emit, however the vocabulary
    is cut. Arguments that are not listed are those of `verify_`, the same on every rank, as they
    are before it.

    REJECTION is not for shards: it draws from what all logits of a row have left over, which takes
    a second exchange. Gather the logits and call `verify_` (the host knows: there are draft_probs).
    On the CPU it is an error; CUDA cannot look, there it counts as SAMPLED: tokens of the same
    distribution, with fewer drafts kept.

    Args:
        logits: `[rows, shard]` float32, bfloat16 or float16, any row stride, dense last dimension:
            column j is token `first_token_id + j`. A shard may have no columns.
        first_token_id: of the shard; any number from 0 on.
        num_parts: parts of each row, the same on every rank; 0: `num_parts(shard)`, as few as this
            shard needs.

    Returns:
        `[rows, num_parts, 8]` int32.

    Raises:
        RuntimeError: a shape, dtype, stride or device does not fit, temperature comes without seed
            or positions, num_parts is too small, or (CPU) a request asks for REJECTION.

    On CUDA one launch. Rows of requests that are done, and drafts under COMMIT, are not read.
    Source: as `commit_scan`.
    Meaning: `reference.verify_scan`.
    """
    return _nld.verify_scan(
        logits, cu_seqlens, verify_mode, done, first_token_id=first_token_id, positions=positions,
        temperature=temperature, seed=seed, banned_token_ids=banned_token_ids, num_parts=num_parts,
    )  # fmt: skip


@torch.library.register_fake("nld::verify_scan")
def _(logits, cu_seqlens, verify_mode, done, *, first_token_id, positions=None, temperature=None,
      seed=None, banned_token_ids=None, num_parts=0):  # fmt: skip
    return _new_parts(logits, num_parts)


def verify_parts_(
    parts: Tensor,
    block_tokens: Tensor,
    cu_seqlens: Tensor,
    verify_mode: Tensor,
    out_tokens: Tensor,
    out_lens: Tensor,
    max_out_lens: Tensor,
    next_tokens: Tensor,
    seq_lens: Tensor,
    done: Tensor,
    *,
    vocab: int,
    positions: Tensor | None = None,
    eos_token_ids: Tensor | None = None,
    banned_token_ids: Tensor | None = None,
    force_positions: Tensor | None = None,
    force_tokens: Tensor | None = None,
    num_emitted: Tensor | None = None,
    num_accepted: Tensor | None = None,
) -> VerifyResult:
    """Do what `verify_` does, from what the shards of the vocabulary say instead of from logits.

    Arguments that are not listed, results and errors are those of `verify_`; REJECTION: see
    `verify_scan`. Every rank that calls with the same tensors writes the same bits.

    Args:
        parts: `[num_shards, rows, num_parts, 8]` int32, contiguous: what `verify_scan` returned for
            each shard, stacked in order of their token ids (all_gather_into_tensor in rank order).
        vocab: number of token ids of all shards together.
        positions: needed with force_positions.

    On CUDA one launch.
    Meaning: `reference.verify_parts_`.
    """
    if num_emitted is None:
        num_emitted = torch.empty_like(out_lens)
    if num_accepted is None:
        num_accepted = torch.empty_like(out_lens)
    _nld.verify_parts_(
        parts, block_tokens, cu_seqlens, verify_mode, out_tokens, out_lens, max_out_lens,
        next_tokens, seq_lens, done, vocab=vocab, positions=positions, eos_token_ids=eos_token_ids,
        banned_token_ids=banned_token_ids, force_positions=force_positions,
        force_tokens=force_tokens, num_emitted=num_emitted, num_accepted=num_accepted,
    )  # fmt: skip
    return VerifyResult(num_emitted, num_accepted)


@torch.library.register_fake("nld::verify_parts_")
def _(parts, block_tokens, cu_seqlens, verify_mode, out_tokens, out_lens, max_out_lens, next_tokens,
      seq_lens, done, *, vocab, positions=None, eos_token_ids=None, banned_token_ids=None,
      force_positions=None, force_tokens=None, num_emitted, num_accepted):  # fmt: skip
    return None
