"""Block diffusion: denoise a block in place over several passes, then pass over it once causally.

Requests do not wait for each other. In one forward some requests denoise (full mask, `commit_`)
while others refresh the block they have finished (causal mask, `verify_` in COMMIT mode, which
emits the block and the next block's first token). Which one a request does is a bool on the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nld_cuda.decode.block import Block
from nld_cuda.decode.kv_cache import KVCache
from nld_cuda.decode.prefill import judge, prefill, run_rows
from nld_cuda.decode.state import DecodeState, Pass
from nld_cuda.ops import CommitRule, VerifyMode

if TYPE_CHECKING:
    from nld_cuda.model.transformer import NLDModel


class Diffusion:
    """Denoising with a commit rule; the first token of each block is the causal prediction.

    `threshold` of a request is the confidence that commits a token, or the entropy bound under
    `CommitRule.ENTROPY`. Rows past max_new_tokens stay mask tokens: they are context, never
    denoised.
    """

    def __init__(
        self,
        model: NLDModel,
        cache: KVCache,
        state: DecodeState,
        ops: Any,
        *,
        block_len: int,
        mask_token_id: int,
        rule: CommitRule,
        quota: int = 1,
        revise_threshold: float = 0.0,
    ) -> None:
        self.model, self.cache, self.state, self.ops = model, cache, state, ops
        self.block = Block(state, block_len, mask_token_id)
        ints, flags = state.seq_lens, state.done
        # Whether the block is finished and only waits for its causal pass.
        self.refreshing = torch.zeros_like(flags)
        self._num_passes = torch.zeros_like(ints)  # denoise passes of this block
        # Revision could undo its own work forever; past this many passes a block is only filled.
        self._max_revising = 2 * block_len
        self._revising = rule == CommitRule.REVISE
        self._rule = torch.full_like(ints, int(rule))
        self._quota = torch.full_like(ints, quota)
        self._revise_threshold = torch.full_like(state.threshold, revise_threshold)
        self._commit_mode = torch.full_like(ints, int(VerifyMode.COMMIT))
        self._mask_mode = torch.zeros_like(ints)
        self._step_rule = self._rule.clone()
        self._fill_rule = torch.full_like(ints, int(CommitRule.THRESHOLD))
        self._is_fixed = torch.ones_like(self.block.is_masked)
        self._skip = torch.zeros_like(flags)

    def start(self) -> None:
        """Read the prompts, emit the first token and lay out the first block."""
        prefill(self.model, self.cache, self.state, self.ops, verify_mode=VerifyMode.COMMIT)
        self._begin_blocks(torch.ones_like(self.refreshing))
        self._find_finished()

    def advance(self) -> Pass:
        """Run one forward: every request denoises its block or refreshes a finished one."""
        state, block = self.state, self.block
        state.forwards[:, Pass.DRAFT].add_(~(self.refreshing | state.done))
        state.forwards[:, Pass.VERIFY].add_(self.refreshing)
        state.batch_forwards.mixed += 1
        self._mask_mode.copy_(self.refreshing)  # False is FULL, True is CAUSAL
        logits = run_rows(self.model.forward, self.cache, state, block.rows, self._mask_mode)
        self._denoise(logits)
        self._refresh(logits)
        self._find_finished()
        return Pass.DRAFT

    def _denoise(self, logits: Tensor) -> None:
        """Commit tokens. A finished block has no masked row, so nothing happens to it."""
        state, block = self.state, self.block
        options: dict[str, Any] = {}
        if self._revising:
            fill_only = self.refreshing | (self._num_passes >= self._max_revising)
            torch.where(fill_only, self._fill_rule, self._rule, out=self._step_rule)
            options["revise_threshold"] = self._revise_threshold
            options["is_fixed"] = self._is_fixed.view(-1)
            self._num_passes += 1
        block.commit(
            self.ops, state, logits, self._step_rule, stop_at_eos=True, quota=self._quota,
            **options,
        )  # fmt: skip
        if state.any_forced:
            block.release_pinned(state)

    def _refresh(self, logits: Tensor) -> None:
        """Emit finished blocks and lay out the next ones of the same requests."""
        state, block = self.state, self.block
        torch.logical_or(state.done, ~self.refreshing, out=self._skip)
        judge(
            self.ops, state, logits, block.rows.tokens.view(-1), block.rows.cu_seqlens,
            self._commit_mode, block.rows.positions.view(-1), done=self._skip,
        )  # fmt: skip
        torch.where(self.refreshing, self._skip, state.done, out=state.done)
        torch.where(self.refreshing, state.step_lens, state.seq_lens, out=state.seq_lens)
        self._begin_blocks(self.refreshing)

    def _begin_blocks(self, fresh: Tensor) -> None:
        """Start a block for the requests in `fresh` `[batch]` bool; the others keep theirs."""
        state, block = self.state, self.block
        block.rows.place(state)
        block.clear(state, fresh=fresh, within_limit=True)
        if self._revising:
            if (
                state.any_eos
            ):  # an EOS seed is emitted: it must neither change nor be denoised after
                ended = (state.next_tokens[:, None] == state.eos_token_ids).any(dim=1)
                block.is_masked &= ~(ended & fresh)[:, None]
            torch.where(fresh[:, None], ~block.is_masked, self._is_fixed, out=self._is_fixed)
            self._num_passes.masked_fill_(fresh, 0)

    def _find_finished(self) -> None:
        torch.logical_or(self.block.is_masked.any(dim=1), self.state.done, out=self.refreshing)
        self.refreshing.logical_not_()
