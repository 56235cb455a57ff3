"""Accepting drafted tokens."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from nld_cuda import _library


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
    _library.nld.verify_(
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
