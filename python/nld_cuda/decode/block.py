"""A diffusion block per request: the tokens being denoised or drafted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nld_cuda.decode.state import DecodeState, Rows
from nld_cuda.ops import Purpose
from nld_cuda.parallel.shard import Shard


class Block:
    """Tokens of one block per request and what is known about each, `[batch, block_len]`.

    Attributes:
        rows: tokens, positions and slots.
        is_masked: bool, whether the token is still hidden; never derived from the token's id.
        pinned: bool, rows holding a forced token that was written ahead of its turn.
        candidates: int64, confidence: float32, of the latest commit.
        num_committed, num_remaining: `[batch]` int32, finished: `[batch]` bool, likewise.
    """

    def __init__(self, state: DecodeState, block_len: int, mask_token_id: int) -> None:
        shape, device = (state.batch, block_len), state.device
        self.rows = Rows.make(state, block_len)
        self.mask_token_id = mask_token_id
        self.is_masked = torch.zeros(shape, dtype=torch.bool, device=device)
        self.pinned = torch.zeros(shape, dtype=torch.bool, device=device)
        self.candidates = torch.zeros(shape, dtype=torch.int64, device=device)
        self.confidence = torch.zeros(shape, dtype=torch.float32, device=device)
        self.num_committed = torch.zeros(state.batch, dtype=torch.int32, device=device)
        self.num_remaining = torch.zeros(state.batch, dtype=torch.int32, device=device)
        self.finished = torch.zeros(state.batch, dtype=torch.bool, device=device)
        self._not_seed = self.rows.offsets > 0
        self._fields = (self.rows.tokens, self.is_masked, self.pinned)
        self._held = tuple(torch.zeros_like(t) for t in self._fields)

    @property
    def block_len(self) -> int:
        return self.rows.num

    def clear(
        self, state: DecodeState, *, fresh: Tensor | None = None, within_limit: bool = False
    ) -> None:
        """Make the block [last emitted token, mask, mask, ...]; nothing is masked when done.

        Only for the requests in `fresh` `[batch]` bool, where given.

        A token that the thinking budget forces inside the block is written there at once: the
        rows around it see it, and it need not be guessed. With `within_limit`, rows past
        max_new_tokens hold the mask token without counting as masked.
        """
        tokens, is_masked = self.rows.tokens, self.is_masked
        if fresh is not None:
            for held, value in zip(self._held, self._fields, strict=True):
                held.copy_(value)
        tokens.fill_(self.mask_token_id)
        tokens[:, 0] = state.next_tokens
        torch.gt(self._not_seed, state.done[:, None], out=is_masked)  # not_seed and not done
        if within_limit:
            # The seed is emitted already, so it does not count against what is left.
            left = state.max_out_lens - state.out_lens
            is_masked &= self.rows.offsets <= left[:, None]
        if state.any_forced:
            offset = (state.force_positions - state.seq_lens)[:, None]
            torch.logical_and(self.rows.offsets == offset, is_masked, out=self.pinned)
            torch.where(self.pinned, state.force_tokens[:, None], tokens, out=tokens)
            is_masked &= ~self.pinned
        if fresh is not None:
            for held, value in zip(self._held, self._fields, strict=True):
                torch.where(fresh[:, None], value, held, out=value)

    def commit(
        self,
        ops: Any,
        state: DecodeState,
        logits: Tensor,
        rule: Tensor,
        *,
        purpose: Purpose = Purpose.SAMPLE,
        stop_at_eos: bool = False,
        **options: Tensor,
    ) -> None:
        """Reveal masked rows by a rule (`ops.commit_`). logits `[batch * block_len, vocab]`."""
        sampled = state.any_sampled
        ops.commit_(
            logits,
            self.rows.tokens.view(-1),
            self.is_masked.view(-1),
            self.rows.cu_seqlens,
            rule,
            state.threshold,
            mask_token_id=self.mask_token_id,
            eos_token_ids=state.eos_token_ids if stop_at_eos and state.any_eos else None,
            temperature=state.temperature if sampled else None,
            seed=state.seed if sampled else None,
            positions=self.rows.positions.view(-1) if sampled else None,
            purpose=int(purpose),
            candidates=self.candidates.view(-1),
            confidence=self.confidence.view(-1),
            num_committed=self.num_committed,
            num_remaining=self.num_remaining,
            done=self.finished,
            tickets=state.tickets,
            **options,
        )

    def release_pinned(self, state: DecodeState) -> None:
        """Mask a forced token again where the request has produced it further left by itself."""
        tokens = self.rows.tokens
        is_end = (tokens == state.force_tokens[:, None]) & ~self.is_masked
        seen = (is_end & ~self.pinned).cumsum(dim=1) > 0
        released = self.pinned & is_end & seen
        tokens.masked_fill_(released, self.mask_token_id)
        self.is_masked |= released
        self.pinned &= ~released


class DraftProbs:
    """The distributions that drafts are drawn from, which rejection sampling has to know.

    Attributes:
        probs: `[batch * block_len, vocab]` float32.
    """

    def __init__(self, state: DecodeState, block: Block, vocab_size: int) -> None:
        rows = state.batch * block.block_len
        self.probs = torch.zeros(rows, vocab_size, dtype=torch.float32, device=state.device)
        temperature = torch.where(state.temperature > 0, state.temperature, 1.0)
        self._temperature = temperature.repeat_interleave(block.block_len)[:, None]
        self._mask_token_id = block.mask_token_id

    def update(self, logits: Tensor, shard: Shard | None = None) -> None:
        """Take the logits of a draft pass. The mask token is never drafted."""
        if shard is not None:
            logits = shard.whole_logits(logits)
        torch.div(logits, self._temperature, out=self.probs)
        self.probs[:, self._mask_token_id] = -torch.inf
        torch.softmax(self.probs, dim=1, out=self.probs)
