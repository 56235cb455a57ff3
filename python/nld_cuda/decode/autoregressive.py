"""Autoregressive decoding: one token per forward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from nld_cuda.decode.kv_cache import KVCache
from nld_cuda.decode.prefill import judge, keep_active_lens, prefill, run_rows
from nld_cuda.decode.state import DecodeState, Pass, Rows
from nld_cuda.ops import MaskMode, VerifyMode

if TYPE_CHECKING:
    from nld_cuda.model.transformer import NLDModel


class Autoregressive:
    """Greedy or sampled decoding: the distribution that the speculative modes must reproduce."""

    def __init__(self, model: NLDModel, cache: KVCache, state: DecodeState, ops: Any) -> None:
        self.model, self.cache, self.state, self.ops = model, cache, state, ops
        self.rows = Rows.make(state, 1)
        self._mask_mode = torch.full_like(state.seq_lens, int(MaskMode.CAUSAL))
        self._verify_mode = torch.full_like(state.seq_lens, int(VerifyMode.SAMPLED))

    def start(self) -> None:
        """Read the prompts and emit the first token."""
        prefill(self.model, self.cache, self.state, self.ops)

    def advance(self) -> Pass:
        """Run one forward: the last token in, the next one out."""
        state, rows = self.state, self.rows
        rows.place(state)
        rows.tokens[:, 0] = state.next_tokens
        state.count(Pass.VERIFY, ~state.done)
        logits = run_rows(self.model.forward, self.cache, state, rows, self._mask_mode)
        judge(
            self.ops, state, logits, rows.tokens.view(-1), rows.cu_seqlens, self._verify_mode,
            rows.positions.view(-1),
        )  # fmt: skip
        keep_active_lens(state)
        return Pass.VERIFY
