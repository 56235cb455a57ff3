"""A decode call in flight: cache, state and the mode that advances them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from nld_cuda import ops as default_ops
from nld_cuda.decode import stats
from nld_cuda.decode.autoregressive import Autoregressive
from nld_cuda.decode.diffusion import Diffusion
from nld_cuda.decode.kv_cache import KVCache
from nld_cuda.decode.linear_spec import LinearSpec
from nld_cuda.decode.options import AR, Settings
from nld_cuda.decode.quadratic_spec import QuadraticSpec
from nld_cuda.decode.state import DecodeState, Pass, Request, pages_needed
from nld_cuda.parallel.sharded_ops import ShardedOps

if TYPE_CHECKING:
    from nld_cuda.decode.session import Session
    from nld_cuda.model.transformer import NLDModel

Mode = Autoregressive | Diffusion | LinearSpec | QuadraticSpec


@dataclass(frozen=True)
class ModeEntry:
    """How a mode is made, and how many rows it places beyond a request's last token."""

    make: Callable[[NLDModel, KVCache, DecodeState, Any, Settings], Mode]
    overhang: Callable[[int], int]


MODES: dict[str, ModeEntry] = {
    "ar": ModeEntry(
        make=lambda model, cache, state, ops, s: Autoregressive(model, cache, state, ops),
        overhang=lambda block_len: 1,
    ),
    "diffusion": ModeEntry(
        make=lambda model, cache, state, ops, s: Diffusion(
            model, cache, state, ops, block_len=s.block_len, mask_token_id=s.mask_token_id,
            rule=s.rule, quota=s.quota, revise_threshold=s.revise_threshold,
        ),
        overhang=lambda block_len: block_len,
    ),
    "linear_spec": ModeEntry(
        make=lambda model, cache, state, ops, s: LinearSpec(
            model, cache, state, ops, block_len=s.block_len, mask_token_id=s.mask_token_id,
            use_lora=s.use_lora, rejection=s.rejection,
        ),
        overhang=lambda block_len: block_len,
    ),
    "quadratic_spec": ModeEntry(
        make=lambda model, cache, state, ops, s: QuadraticSpec(
            model, cache, state, ops, block_len=s.block_len, mask_token_id=s.mask_token_id,
            rejection=s.rejection,
        ),
        overhang=lambda block_len: block_len * (block_len + 1),
    ),
}  # fmt: skip


class Run:
    """One batch from its prompts to its last token.

    Attributes:
        cache, state, mode: what `advance` works on.
        finished: whether every request has ended, as of the latest poll.
    """

    # A poll makes the host wait for the device, a late one runs passes that do nothing.
    POLL_EVERY_ON_CUDA = 4

    @torch.inference_mode()
    def __init__(
        self,
        model: NLDModel,
        requests: Sequence[Request],
        settings: Settings,
        *,
        ops: Any = default_ops,
        session: Session | None = None,
    ) -> None:
        """Allocate cache and state. `ops` may be `nld_cuda.reference`: same names, same meaning.

        With a session the cache is the session's, and what it holds of the prompt is not read anew.
        """
        entry = MODES[settings.mode]
        overhang = entry.overhang(settings.block_len)
        self.settings, self._model = settings, model
        if model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(model.device)
        self._started = time.perf_counter()
        self._first_token = self._ended = self._started
        page_table = None
        if session is not None:
            requests, self.cache, page_table = session.begin(
                model, requests, overhang, settings.page_size
            )
        else:
            num_pages = pages_needed(requests, overhang, settings.page_size)
            self.cache = KVCache.of(model, num_pages, settings.page_size)
        self.state = DecodeState(
            requests,
            self.cache,
            overhang=overhang,
            block_len=settings.block_len,
            page_table=page_table,
        )
        if model.shard is not None:
            ops = ShardedOps(model.shard, ops)
        self.mode = entry.make(model, self.cache, self.state, ops, settings)
        self.finished = False
        self._poll_every = self.POLL_EVERY_ON_CUDA if model.device.type == "cuda" else 1
        self._since_poll = 0

    @torch.inference_mode()
    def start(self) -> None:
        """Read the prompts; every request has its first token after that."""
        if any(r.max_new_tokens for r in self.state.requests):
            self.mode.start()
        self.finished = self.state.all_done()
        self._first_token = self._ended = time.perf_counter()

    @torch.inference_mode()
    def advance(self) -> Pass:
        """Run one forward of the mode, and look whether all is done where something was emitted."""
        kind = self.mode.advance()
        emitted = kind == Pass.VERIFY or self.settings.mode == "diffusion"
        self._since_poll += emitted
        if self._since_poll >= self._poll_every:
            self._since_poll = 0
            self.finished = self.state.all_done()
            self._ended = time.perf_counter()
        return kind

    def tokens(self) -> list[list[int]]:
        """Tokens emitted so far, per request. Waits for the device."""
        lens = self.state.out_lens.tolist()
        return [row[:n] for row, n in zip(self.state.out_tokens.tolist(), lens, strict=True)]

    def stats(self) -> stats.DecodeStats:
        """Counts and times so far."""
        s = self.settings
        return stats.collect(
            self.state,
            mode=s.mode,
            block_length=None if s.mode == AR else s.block_len,
            seconds=self._ended - self._started,
            first_token_seconds=self._first_token - self._started,
            dtype=self._model.dtype,
            spec_sampling="rejection" if s.rejection else "sampled",
            lora=s.use_lora,
            num_ranks=1 if self._model.shard is None else self._model.shard.num_ranks,
        )
