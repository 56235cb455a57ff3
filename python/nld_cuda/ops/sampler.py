"""Revealing masked tokens by confidence."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from nld_cuda import _library


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
    outputs = commit_outputs(
        block_tokens, rule, candidates, confidence, num_committed, num_remaining, done
    )
    _library.nld.commit_(
        logits, block_tokens, is_masked, cu_seqlens, rule, threshold,
        mask_token_id=mask_token_id, quota=quota, revise_threshold=revise_threshold,
        is_fixed=is_fixed, banned_token_ids=banned_token_ids, eos_token_ids=eos_token_ids,
        temperature=temperature, seed=seed, positions=positions, purpose=int(purpose),
        candidates=outputs.candidates, confidence=outputs.confidence,
        num_committed=outputs.num_committed, num_remaining=outputs.num_remaining,
        done=outputs.done, tickets=tickets,
    )  # fmt: skip
    return outputs


def commit_outputs(
    block_tokens: Tensor,
    rule: Tensor,
    candidates: Tensor | None,
    confidence: Tensor | None,
    num_committed: Tensor | None,
    num_remaining: Tensor | None,
    done: Tensor | None,
) -> CommitResult:
    """Return the outputs of a commit: those that are given, new ones for the others."""
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
    return CommitResult(candidates, confidence, num_committed, num_remaining, done)


@torch.library.register_fake("nld::commit_")
def _(logits, block_tokens, is_masked, cu_seqlens, rule, threshold, *, mask_token_id, quota=None,
      revise_threshold=None, is_fixed=None, banned_token_ids=None, eos_token_ids=None,
      temperature=None, seed=None, positions=None, purpose=0, candidates, confidence,
      num_committed, num_remaining, done, tickets=None):  # fmt: skip
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
    _library.nld.gumbel_noise_(noise, seed, positions, int(purpose))


@torch.library.register_fake("nld::gumbel_noise_")
def _(noise, seed, positions, purpose=0):
    return None
