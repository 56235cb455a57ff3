"""The decode ops over shards of the vocabulary: the same names, arguments and decisions."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nld_cuda.parallel.shard import Shard


class ShardedOps:
    """`nld_cuda.ops` (or `reference`) for a rank whose logits hold its own ids only.

    Every rank says what its logits say, 32 bytes for a row and up to 8192 ids; what all have said
    is gathered in the order of the ids, and every rank takes the same decision from it.
    """

    def __init__(self, shard: Shard, ops: Any) -> None:
        self._shard, self._ops = shard, ops
        self._place = {"first_token_id": shard.first_id, "num_parts": shard.num_parts}
        self._vocab = shard.full.vocab_size
        self.compact_ = ops.compact_

    def commit_(
        self,
        logits: Tensor,
        block_tokens: Tensor,
        is_masked: Tensor,
        cu_seqlens: Tensor,
        rule: Tensor,
        threshold: Tensor,
        *,
        mask_token_id: int,
        is_fixed: Tensor | None = None,
        banned_token_ids: Tensor | None = None,
        temperature: Tensor | None = None,
        seed: Tensor | None = None,
        positions: Tensor | None = None,
        purpose: int = 0,
        tickets: Tensor | None = None,
        **finish: Any,
    ) -> Any:
        """`ops.commit_`; logits `[rows, own ids]`."""
        block = (block_tokens, is_masked, cu_seqlens, rule)
        both = {
            "mask_token_id": mask_token_id, "is_fixed": is_fixed,
            "banned_token_ids": banned_token_ids,
        }  # fmt: skip
        parts = self._ops.commit_scan(
            logits, *block, temperature=temperature, seed=seed, positions=positions,
            purpose=purpose, **both, **self._place,
        )  # fmt: skip
        parts = self._shard.gather(parts)
        return self._ops.commit_parts_(
            parts, *block, threshold, vocab=self._vocab, **both, **finish
        )

    def verify_(
        self,
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
        banned_token_ids: Tensor | None = None,
        tickets: Tensor | None = None,
        **finish: Any,
    ) -> Any:
        """`ops.verify_`; logits `[rows, own ids]`, draft_probs of the whole vocabulary.

        With draft_probs (rejection) whole logits are gathered: what is left over of a distribution
        depends on all of it.
        """
        requests = (out_tokens, out_lens, max_out_lens, next_tokens, seq_lens, done)
        both = {"positions": positions, "banned_token_ids": banned_token_ids}
        draws = {"temperature": temperature, "seed": seed}
        if draft_probs is not None:
            return self._ops.verify_(
                self._shard.whole_logits(logits), block_tokens, cu_seqlens, verify_mode, *requests,
                draft_probs=draft_probs, tickets=tickets, **both, **draws, **finish,
            )  # fmt: skip
        parts = self._ops.verify_scan(
            logits, cu_seqlens, verify_mode, done, **both, **draws, **self._place
        )
        return self._ops.verify_parts_(
            self._shard.gather(parts), block_tokens, cu_seqlens, verify_mode, *requests,
            vocab=self._vocab, **both, **finish,
        )  # fmt: skip
