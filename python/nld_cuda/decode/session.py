"""A cache that outlives a decode call, for texts that grow turn by turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nld_cuda.decode.images import image_marks
from nld_cuda.decode.kv_cache import KVCache
from nld_cuda.decode.state import Request, capacities

if TYPE_CHECKING:
    from nld_cuda.decode.run import Run
    from nld_cuda.model.transformer import NLDModel


class Session:
    """Keeps keys and values of one text between calls of `generate` and `stream`.

    Pass it as their `session`, with the whole text so far as the prompt each time, and all its
    images. The part that equals the beginning of what is cached is not read again; where the two
    part, the cache is rolled back. Every mode leaves the same kind of entries (causal ones, of
    tokens that stayed), so modes may change from call to call. One call at a time.

    Attributes:
        model, page_size: as given.
        tokens: ids whose keys and values are cached.
        num_reused: prompt tokens that the latest call did not have to read.
    """

    def __init__(self, model: NLDModel, *, page_size: int = 16) -> None:
        """Start empty; memory is taken as the text grows, twice as much each time."""
        self.tokens: list[int] = []
        self._marks: dict[int, bytes] = {}  # cached image tokens: what they show
        self.num_reused = 0
        self.model, self.page_size = model, page_size
        self._cache: KVCache | None = None
        self._page_table: Tensor | None = None

    def forget(self, num_kept: int = 0) -> None:
        """Keep only the first `num_kept` cached tokens."""
        del self.tokens[num_kept:]
        self._marks = {place: mark for place, mark in self._marks.items() if place < num_kept}

    @torch.inference_mode()
    def begin(
        self, model: NLDModel, requests: Sequence[Request], overhang: int, page_size: int
    ) -> tuple[list[Request], KVCache, Tensor]:
        """Make room for a call: its request with `num_cached` set, the cache, the page table.

        Raises:
            ValueError: another model or page_size than the session's, or more than one request.
        """
        if len(requests) != 1:
            raise ValueError(f"generate: session must have one prompt a call, got {len(requests)}")
        if model is not self.model:
            raise ValueError("generate: session must be one of this model, got another model's")
        if page_size != self.page_size:
            raise ValueError(
                f"generate: page_size must be the session's, {self.page_size}, got {page_size}"
            )
        prompt, marks = list(requests[0].prompt), image_marks(requests[0])
        shared = 0
        # The last token is always read: its logits give the next one.
        for ours, theirs in zip(self.tokens, prompt[:-1], strict=False):
            if ours != theirs or self._marks.get(shared) != marks.get(shared):
                break
            shared += 1
        self.forget(shared)
        self.num_reused = shared
        cache, page_table = self._reserve(capacities(requests, overhang)[0])
        return [replace(requests[0], num_cached=shared)], cache, page_table

    def end(self, run: Run) -> None:
        """Take over what a call has left in the cache, finished or not."""
        state = run.state
        text = [*state.requests[0].prompt, *run.tokens()[0]]
        self.tokens, self._marks = text, image_marks(state.requests[0])
        self.forget(int(state.seq_lens[0]))

    def _reserve(self, capacity: int) -> tuple[KVCache, Tensor]:
        """A cache for `capacity` tokens that holds what was cached."""
        size, model = self.page_size, self.model
        if self._cache is None or self._page_table is None:
            pages = KVCache.pages_for(capacity, size)
            self._cache = KVCache.of(model, pages, size)
            self._page_table = self._cache.allocate(1, pages * size)
        held = self._cache.num_pages
        if held * size < capacity:
            self._cache.grow(max(KVCache.pages_for(capacity, size), 2 * held))
            more = self._cache.allocate(1, (self._cache.num_pages - held) * size)
            self._page_table = torch.cat([self._page_table, more], dim=1)
        return self._cache, self._page_table
