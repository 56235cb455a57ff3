"""Committing and verifying where the vocabulary is divided among ranks.

Each rank scans its own logits, the small parts that this gives are gathered, and every rank
finishes from all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nld_cuda import _library
from nld_cuda.ops.sampler import CommitResult, Purpose, commit_outputs
from nld_cuda.ops.verify import VerifyResult

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
    return _library.nld.commit_scan(
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
    outputs = commit_outputs(
        block_tokens, rule, candidates, confidence, num_committed, num_remaining, done
    )
    _library.nld.commit_parts_(
        parts, block_tokens, is_masked, cu_seqlens, rule, threshold, vocab=vocab,
        mask_token_id=mask_token_id, quota=quota, revise_threshold=revise_threshold,
        is_fixed=is_fixed, banned_token_ids=banned_token_ids, eos_token_ids=eos_token_ids,
        candidates=outputs.candidates, confidence=outputs.confidence,
        num_committed=outputs.num_committed, num_remaining=outputs.num_remaining,
        done=outputs.done,
    )  # fmt: skip
    return outputs


@torch.library.register_fake("nld::commit_parts_")
def _(parts, block_tokens, is_masked, cu_seqlens, rule, threshold, *, vocab, mask_token_id,
      quota=None, revise_threshold=None, is_fixed=None, banned_token_ids=None, eos_token_ids=None,
      candidates, confidence, num_committed, num_remaining, done):  # fmt: skip
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
    return _library.nld.verify_scan(
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
    _library.nld.verify_parts_(
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
