"""Quadratic self-speculation: verify k drafts and draft after each of them in one forward.

The rows of a step are k groups of [draft j, mask x k]. The heads (the drafts) form a causal chain
that `verify_` judges; the masks of group j predict what follows draft j. Whatever number of drafts
is accepted, the next drafts are there already. The cache then holds heads with masks between them;
`compact_` moves the accepted heads together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nld_cuda.decode.block import Block, DraftProbs
from nld_cuda.decode.kv_cache import KVCache
from nld_cuda.decode.prefill import judge, keep_active_lens, prefill, run_rows
from nld_cuda.decode.state import DecodeState, Pass, Rows
from nld_cuda.ops import CommitRule, MaskMode, Purpose, VerifyMode

if TYPE_CHECKING:
    from nld_cuda.model.transformer import NLDModel


class QuadraticSpec:
    """The same tokens as `Autoregressive`, in one forward of k * (k + 1) rows per cycle."""

    def __init__(
        self,
        model: NLDModel,
        cache: KVCache,
        state: DecodeState,
        ops: Any,
        *,
        block_len: int,
        mask_token_id: int,
        rejection: bool = False,
    ) -> None:
        self.model, self.cache, self.state, self.ops = model, cache, state, ops
        k, device, batch = block_len, state.device, state.batch
        self.block = Block(state, k, mask_token_id)  # [last emitted token, drafts]
        flat = torch.arange(k * (k + 1), dtype=torch.int32, device=device)
        group_and_slot = flat // (k + 1) + flat % (k + 1)  # group j starts at the place of draft j
        self.rows = Rows.make(state, k * (k + 1), group_and_slot)
        rejection = rejection and state.any_sampled
        self._purpose = Purpose.DRAFT if rejection else Purpose.SAMPLE
        mode = VerifyMode.REJECTION if rejection else VerifyMode.SAMPLED
        self._quadratic = torch.full_like(state.seq_lens, int(MaskMode.QUADRATIC))
        self._block_len = torch.full_like(state.seq_lens, k)
        self._verify_mode = torch.full_like(state.seq_lens, int(mode))
        self._rule = torch.full_like(state.seq_lens, int(CommitRule.ALL))
        heads = torch.arange(k, dtype=torch.int32, device=device) * (k + 1)
        self._head_offsets = heads.repeat(batch, 1)
        # Row 1 of the first group of each request: its prediction is the seed's own place.
        first = torch.arange(batch, device=device)[:, None] * (k * (k + 1)) + 1
        self._draft_rows = first + torch.arange(k, device=device)
        self._draft_probs = (
            DraftProbs(state, self.block, model.config.vocab_size) if rejection else None
        )

    def start(self) -> None:
        """Read the prompts, emit the first token, and draft from mask rows in the same forward."""
        logits = prefill(
            self.model, self.cache, self.state, self.ops,
            num_masks=self.block.block_len, mask_token_id=self.block.mask_token_id,
        )  # fmt: skip
        if logits is not None:
            self._draft(logits.flatten(0, 1))

    def advance(self) -> Pass:
        """Run one forward: judge the drafts, take the next ones from the accepted head's group."""
        state, rows, block, k = self.state, self.rows, self.block, self.block.block_len
        rows.place(state)
        groups = rows.tokens.view(-1, k, k + 1)
        groups.fill_(block.mask_token_id)
        groups[:, :, 0] = block.rows.tokens
        active = ~state.done
        state.count(Pass.VERIFY, active)
        hidden = run_rows(
            self.model.hidden,
            self.cache,
            state,
            rows,
            self._quadratic,
            block_len=self._block_len,
        )
        logits = self.model.logits(hidden[:: k + 1])  # the heads
        # Of the rows just written only the k heads count.
        torch.mul(active, state.seq_lens + k, out=state.step_lens)
        judge(
            self.ops, state, logits, block.rows.tokens.view(-1), block.rows.cu_seqlens,
            self._verify_mode, block.rows.positions.view(-1),
            draft_probs=self._draft_probs.probs if self._draft_probs else None,
        )  # fmt: skip
        self.ops.compact_(
            self.cache.k, self.cache.v, state.page_table, state.seq_lens, self._head_offsets,
            state.num_emitted,
        )  # fmt: skip
        keep_active_lens(state)
        state.count_accepted(active)
        group = (state.num_emitted - 1).clamp_(min=0)
        draft_rows = (self._draft_rows + (group * (k + 1))[:, None]).view(-1)
        self._draft(self.model.logits(hidden, draft_rows))
        return Pass.VERIFY

    def _draft(self, logits: Tensor) -> None:
        """Draw the next drafts from logits `[batch * k, vocab]` of the places from the seed on."""
        state, block = self.state, self.block
        block.rows.place(state)
        block.clear(state)
        block.commit(self.ops, state, logits, self._rule, purpose=self._purpose)
        if self._draft_probs is not None:
            self._draft_probs.update(logits, self.model.shard)
