"""What a batch of requests is between two steps: device tensors of fixed shape, and nothing else.

A step of a decode mode reads and writes these tensors in place, allocates none of them and looks at
no value on the host, so that the same step can run eagerly or be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import torch
from torch import Tensor

from nld_cuda.decode.images import PlacedImage
from nld_cuda.decode.kv_cache import KVCache


class Pass(IntEnum):
    """Kinds of forwards that are counted."""

    PREFILL = 0
    DRAFT = 1  # a draft or denoise pass: its keys and values do not stay
    VERIFY = 2  # a causal pass whose keys and values stay (ar step, verify, block refresh)


@dataclass(frozen=True)
class Request:
    """One prompt and how to continue it.

    Attributes:
        prompt: token ids, at least one.
        max_new_tokens: most tokens to produce, >= 0.
        temperature: 0 is greedy.
        seed: keys every random draw of this request, together with the place of the token.
        threshold: commit or draft threshold (or entropy bound) of the mode.
        eos_token_ids: tokens that end the request; kept in the output.
        max_thinking_tokens: new tokens after which `end_think_token_id` is forced, unless the
            request has produced it before; None: no budget.
        end_think_token_id: needed with max_thinking_tokens.
        num_cached: leading prompt tokens whose keys and values are in the cache already; fewer
            than the prompt has.
        images: what its image tokens stand for, in the order of the prompt.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    threshold: float = 0.0
    eos_token_ids: tuple[int, ...] = ()
    max_thinking_tokens: int | None = None
    end_think_token_id: int | None = None
    num_cached: int = 0
    images: tuple[PlacedImage, ...] = ()


@dataclass
class ForwardCounts:
    """Forwards of the whole batch, counted on the host as they are launched."""

    prefill: int = 0
    draft: int = 0
    verify: int = 0
    mixed: int = 0  # some requests denoise while others refresh (diffusion)

    @property
    def total(self) -> int:
        return self.prefill + self.draft + self.verify + self.mixed


class DecodeState:
    """Requests in flight.

    Invariant between steps, for a request that is not done:
    `seq_lens = prompt length + emitted - 1`: the cache holds every token but the last emitted one.

    Attributes:
        page_table: `[batch, max_pages]` int32.
        slot_table: `[batch, capacity]` int32, cache slot of each place, -1 where there is none.
        seq_lens: `[batch]` int32, tokens in the cache.
        step_lens: `[batch]` int32, scratch: seq_lens with the rows of the step, 0 when done.
        next_tokens: `[batch]` int64, last token emitted.
        out_tokens: `[batch, longest max_new_tokens]` int64, emitted tokens.
        out_lens, max_out_lens: `[batch]` int32, emitted tokens and their limit.
        done: `[batch]` bool.
        temperature, threshold: `[batch]` float32. seed: `[batch]` int64.
        eos_token_ids: `[batch, n]` int64 padded with -1.
        force_positions: `[batch]` int32, place that `force_tokens` `[batch]` int64 is forced to
            (thinking budget), -1 for none.
        forwards: `[batch, 3]` int32, forwards each request took part in, by `Pass`.
        num_emitted, num_accepted: `[batch]` int32, of the latest verify.
        accept_hist: `[batch, widest block]` int32, verify passes by number of accepted drafts.
        tickets: `[batch]` int32, scratch that ops leave at zero.
        batch_forwards: the same forwards counted once per batch, on the host.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        cache: KVCache,
        *,
        overhang: int,
        block_len: int,
        page_table: Tensor | None = None,
    ) -> None:
        """Lay out the tensors and take pages from the cache.

        Args:
            requests: one entry per request.
            cache: must have the pages that `pages_needed` counts.
            overhang: rows a step may place beyond the last token of a request.
            block_len: most drafts a verify pass may accept, plus one.
            page_table: pages that the requests hold already, enough of them; None: new ones.
        """
        device = cache.k.device
        batch = len(requests)
        self.requests = tuple(requests)
        if page_table is None:
            page_table = cache.allocate(batch, capacities(requests, overhang))
        self.page_table = page_table
        capacity = self.page_table.shape[1] * cache.page_size
        self.slot_table = torch.full((batch, capacity), -1, dtype=torch.int32, device=device)
        if capacity:
            rows = torch.arange(batch, device=device).repeat_interleave(capacity)
            places = torch.arange(capacity, dtype=torch.int32, device=device).repeat(batch)
            self.slot_table.copy_(cache.slots(self.page_table, rows, places).view(batch, capacity))

        def per_request(values: list[int] | list[float] | list[bool], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype).to(device)

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        limits = [r.max_new_tokens for r in requests]
        self.prompt_lens = per_request([len(r.prompt) for r in requests], torch.int32)
        self.seq_lens = per_request([r.num_cached for r in requests], torch.int32)
        self.step_lens, self.out_lens = zeros(batch), zeros(batch)
        self.next_tokens = zeros(batch, dtype=torch.int64)
        self.out_tokens = zeros(batch, max(limits, default=0), dtype=torch.int64)
        self.max_out_lens = per_request(limits, torch.int32)
        self.done = per_request([n == 0 for n in limits], torch.bool)
        self.temperature = per_request([r.temperature for r in requests], torch.float32)
        self.threshold = per_request([r.threshold for r in requests], torch.float32)
        self.seed = per_request([_as_int64(r.seed) for r in requests], torch.int64)
        num_eos = max((len(r.eos_token_ids) for r in requests), default=0)
        self.eos_token_ids = torch.full((batch, num_eos), -1, dtype=torch.int64)
        for b, request in enumerate(requests):
            ids = torch.tensor(request.eos_token_ids, dtype=torch.int64)
            self.eos_token_ids[b, : len(ids)] = ids
        self.eos_token_ids = self.eos_token_ids.to(device)
        budgets = [r.max_thinking_tokens for r in requests]
        self.force_positions = per_request(
            [
                -1 if n is None else len(r.prompt) + n
                for n, r in zip(budgets, requests, strict=True)
            ],
            torch.int32,
        )
        self.force_tokens = per_request([r.end_think_token_id or 0 for r in requests], torch.int64)
        self.forwards = zeros(batch, len(Pass))
        self.num_emitted, self.num_accepted = zeros(batch), zeros(batch)
        self.tickets = zeros(batch)
        self.accept_hist = zeros(batch, max(block_len, 1))
        self.batch_forwards = ForwardCounts()
        # Known before the first step, so that a step can leave out what no request asks for.
        self.any_sampled = any(r.temperature > 0 for r in requests)
        self.any_eos = num_eos > 0
        self.any_forced = any(n is not None for n in budgets)

    @property
    def batch(self) -> int:
        return len(self.requests)

    @property
    def device(self) -> torch.device:
        return self.seq_lens.device

    def count(self, kind: Pass, active: Tensor) -> None:
        """Count a forward for the requests in `active` `[batch]` bool."""
        self.forwards[:, kind].add_(active)
        counts = self.batch_forwards
        if kind == Pass.PREFILL:
            counts.prefill += 1
        elif kind == Pass.DRAFT:
            counts.draft += 1
        else:
            counts.verify += 1

    def count_accepted(self, active: Tensor) -> None:
        """Count `num_accepted` of the latest verify for the requests in `active` `[batch]` bool."""
        accepted = self.num_accepted.long()[:, None]
        self.accept_hist.scatter_add_(1, accepted, active.int()[:, None])

    def all_done(self) -> bool:
        """Whether every request has ended: the host read of a decode loop. Waits for the device."""
        return bool(self.done.all())


def capacities(requests: Sequence[Request], overhang: int) -> list[int]:
    """Cache entries each request needs at most; a request without new tokens needs none."""
    return [
        len(r.prompt) + r.max_new_tokens + overhang if r.max_new_tokens else 0 for r in requests
    ]


def pages_needed(requests: Sequence[Request], overhang: int, page_size: int) -> int:
    """Pages a cache must have for `DecodeState(requests, cache, overhang=overhang)`."""
    return sum(KVCache.pages_for(n, page_size) for n in capacities(requests, overhang))


def _as_int64(seed: int) -> int:
    """The same 64 bits as a signed number."""
    seed &= 2**64 - 1
    return seed - 2**64 if seed >= 2**63 else seed


@dataclass
class Rows:
    """The rows of one step: the same number for each request, right after its cached tokens.

    Attributes:
        num: rows per request.
        cu_seqlens: `[batch + 1]` int32, constant.
        offsets: `[num]` int32, row index.
        position_offsets: `[num]` int32, distance of a row's token from the first row's.
        positions, slots: `[batch, num]` int32. tokens: `[batch, num]` int64.
    """

    num: int
    cu_seqlens: Tensor
    offsets: Tensor
    position_offsets: Tensor
    positions: Tensor
    slots: Tensor
    tokens: Tensor
    _index: Tensor = field(repr=False)

    @classmethod
    def make(cls, state: DecodeState, num: int, position_offsets: Tensor | None = None) -> Rows:
        """Allocate the rows; position_offsets `[num]` int32 where they differ from 0, 1, 2, ..."""
        device, batch = state.device, state.batch
        offsets = torch.arange(num, dtype=torch.int32, device=device)
        return cls(
            num=num,
            cu_seqlens=torch.arange(batch + 1, dtype=torch.int32, device=device) * num,
            offsets=offsets,
            position_offsets=offsets if position_offsets is None else position_offsets,
            positions=torch.zeros(batch, num, dtype=torch.int32, device=device),
            slots=torch.zeros(batch, num, dtype=torch.int32, device=device),
            tokens=torch.zeros(batch, num, dtype=torch.int64, device=device),
            _index=torch.zeros(batch, num, dtype=torch.int64, device=device),
        )

    def place(self, state: DecodeState) -> None:
        """Put the rows right after the cached tokens: positions, slots, and `state.step_lens`.

        Rows of a request that is done get slot -1 and its step_len is 0.
        """
        torch.add(state.seq_lens[:, None], self.offsets, out=self._index)
        torch.gather(state.slot_table, 1, self._index, out=self.slots)
        self.slots.masked_fill_(state.done[:, None], -1)
        torch.add(state.seq_lens[:, None], self.position_offsets, out=self.positions)
        torch.add(state.seq_lens, self.num, out=state.step_lens)
        state.step_lens.masked_fill_(state.done, 0)
