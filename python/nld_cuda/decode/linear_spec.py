"""Linear self-speculation: draft a block with one denoise pass, verify it with one causal pass.

The drafter and the verifier are the same weights (plus an adapter on the drafter), so nothing but
the attention mask changes between the two passes. Rejected tokens are forgotten by moving
`seq_lens` back; nothing is copied.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from nld_cuda.decode.block import Block, DraftProbs
from nld_cuda.decode.kv_cache import KVCache
from nld_cuda.decode.prefill import judge, keep_active_lens, prefill, run_rows
from nld_cuda.decode.state import DecodeState, Pass
from nld_cuda.ops import CommitRule, MaskMode, Purpose, VerifyMode

if TYPE_CHECKING:
    from nld_cuda.model.transformer import NLDModel


class LinearSpec:
    """The same tokens as `Autoregressive`, several per cycle of two forwards.

    With `rejection`, drafts are kept by the ratio of the two distributions: the output follows the
    autoregressive distribution, but not its very draws.
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
        use_lora: bool,
        rejection: bool = False,
        independent_drafts: bool = False,
    ) -> None:
        self.model, self.cache, self.state, self.ops = model, cache, state, ops
        self.use_lora = use_lora
        self.block = Block(state, block_len, mask_token_id)
        rejection = rejection and state.any_sampled
        # Sampled drafts share the verifier's noise unless rejection needs them independent of it.
        self._purpose = Purpose.DRAFT if rejection or independent_drafts else Purpose.SAMPLE
        mode = VerifyMode.REJECTION if rejection else VerifyMode.SAMPLED
        self._full = torch.full_like(state.seq_lens, int(MaskMode.FULL))
        self._causal = torch.full_like(state.seq_lens, int(MaskMode.CAUSAL))
        self._verify_mode = torch.full_like(state.seq_lens, int(mode))
        self._rule = torch.where(
            state.threshold > 0, int(CommitRule.THRESHOLD), int(CommitRule.ALL)
        ).int()
        self._many_passes = any(r.threshold > 0 for r in state.requests)
        self._next = Pass.PREFILL
        self._draft_probs = (
            DraftProbs(state, self.block, model.config.vocab_size) if rejection else None
        )

    def start(self) -> None:
        """Read the prompts and emit the first token."""
        prefill(self.model, self.cache, self.state, self.ops)
        self._next = Pass.PREFILL

    def advance(self) -> Pass:
        """Run one forward: a draft pass while anything is masked, else the verify pass."""
        if self._next == Pass.PREFILL:
            self.begin()
            self._next = Pass.DRAFT if self.block.rows.num > 1 else Pass.VERIFY
        if self._next == Pass.DRAFT:
            self.draft()
            # Only a draft threshold has to ask the device whether another pass is needed.
            if not (self._many_passes and bool(self.block.is_masked.any())):
                self._next = Pass.VERIFY
            return Pass.DRAFT
        self.verify()
        self._next = Pass.PREFILL
        return Pass.VERIFY

    def begin(self) -> None:
        """Start a cycle: the last emitted token and masks, right after the cached tokens."""
        self.block.rows.place(self.state)
        self.block.clear(self.state)

    def draft(self) -> None:
        """Fill masked rows from one denoise pass. Its cache entries are overwritten by `verify`."""
        state, block = self.state, self.block
        state.count(Pass.DRAFT, block.is_masked.any(dim=1))
        logits = run_rows(
            self.model.forward, self.cache, state, block.rows, self._full, use_lora=self.use_lora
        )
        block.commit(self.ops, state, logits, self._rule, purpose=self._purpose)
        if self._draft_probs is not None:
            self._draft_probs.update(logits, self.model.shard)

    def verify(self) -> None:
        """Judge the drafts with one causal pass, emit, and move the cache lengths back."""
        state, block = self.state, self.block
        state.count(Pass.VERIFY, ~state.done)
        active = state.step_lens > 0
        logits = run_rows(self.model.forward, self.cache, state, block.rows, self._causal)
        judge(
            self.ops, state, logits, block.rows.tokens.view(-1), block.rows.cu_seqlens,
            self._verify_mode, block.rows.positions.view(-1),
            draft_probs=self._draft_probs.probs if self._draft_probs else None,
        )  # fmt: skip
        keep_active_lens(state)
        state.count_accepted(active)
