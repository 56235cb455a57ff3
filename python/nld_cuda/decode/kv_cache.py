"""The paged key/value cache: the only owner of cache memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nld_cuda.model.config import ModelConfig
from nld_cuda.model.transformer import KVScales

if TYPE_CHECKING:
    from nld_cuda.model.transformer import NLDModel


class KVCache:
    """Keys and values of all layers in pages of `page_size` tokens, handed out to requests.

    Attributes:
        k, v: `[num_layers, num_pages, page_size, num_kv_heads, head_dim]`, uninitialised: entries
            at or past a request's seq_len are garbage by contract. Only ops whose schema says so
            write them.
        k_layers, v_layers: views of `k` and `v`, one per layer.
        k_scales, v_scales: per layer what the ops take as k_scale and v_scale, for good: float32
            `[num_kv_heads]`, or None (1, and always so unless the dtype is float8_e4m3fn).
        page_size: tokens per page.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_pages: int,
        page_size: int,
        device: torch.device | str,
        dtype: torch.dtype,
        scales: KVScales | None = None,
    ) -> None:
        """Allocate the cache.

        Args:
            config: shapes of the model.
            num_pages, page_size: pages, and tokens of each.
            device: of the model.
            dtype: that of the model, or torch.float8_e4m3fn: half the memory of bfloat16.
            scales: of float8_e4m3fn entries, `[num_layers, num_kv_heads]` each; None: 1.

        Raises:
            ValueError: num_pages < 0, page_size < 1, or more slots than an int32 can number; scales
                of another shape, or for another dtype.
        """
        if num_pages < 0 or page_size < 1 or num_pages * page_size >= 2**31:
            raise ValueError(
                "KVCache: num_pages * page_size must lie in [0, 2^31) with page_size >= 1, "
                f"got {num_pages} * {page_size}"
            )
        if scales is not None:
            wanted = (config.num_layers, config.num_kv_heads)
            if dtype != torch.float8_e4m3fn:
                raise ValueError(f"KVCache: scales must be None unless fp8, got some for {dtype}")
            if any(s.shape != wanted for s in scales):
                got = [list(s.shape) for s in scales]
                raise ValueError(f"KVCache: scales must have shape {list(wanted)}, got {got}")
        none: tuple[Tensor | None, ...] = (None,) * config.num_layers
        self.k_scales = none if scales is None else scales.k.float().to(device).unbind(0)
        self.v_scales = none if scales is None else scales.v.float().to(device).unbind(0)
        shape = (config.num_layers, num_pages, page_size, config.num_kv_heads, config.head_dim)
        self.k = torch.empty(shape, dtype=dtype, device=device)
        self.v = torch.empty(shape, dtype=dtype, device=device)
        self.k_layers: tuple[Tensor, ...] = self.k.unbind(0)
        self.v_layers: tuple[Tensor, ...] = self.v.unbind(0)
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))

    @classmethod
    def of(cls, model: NLDModel, num_pages: int, page_size: int) -> KVCache:
        """Allocate a cache for a model, of its kv_dtype and kv_scales."""
        is_fp8 = model.kv_dtype == torch.float8_e4m3fn
        scales = model.kv_scales if is_fp8 else None
        return cls(model.config, num_pages, page_size, model.device, model.kv_dtype, scales)

    def grow(self, num_pages: int) -> None:
        """Move to larger memory: pages keep their numbers and entries, new ones are free.

        `k`, `v` and their layers are new tensors afterwards.

        Raises:
            ValueError: num_pages is less than there are, or too many to number.
        """
        held = self.num_pages
        if num_pages < held or num_pages * self.page_size >= 2**31:
            raise ValueError(
                f"KVCache.grow: num_pages must lie in [{held}, 2^31 / page_size), got {num_pages}"
            )
        for name in ("k", "v"):
            old: Tensor = getattr(self, name)
            new = old.new_empty((old.shape[0], num_pages, *old.shape[2:]))
            new[:, :held] = old
            setattr(self, name, new)
            setattr(self, f"{name}_layers", new.unbind(0))
        self._free = [*range(num_pages - 1, held - 1, -1), *self._free]

    @property
    def num_pages(self) -> int:
        """Pages in all, free or not."""
        return self.k.shape[1]

    @property
    def num_free_pages(self) -> int:
        """Pages that no request holds."""
        return len(self._free)

    @property
    def num_bytes(self) -> int:
        """Memory of keys and values together."""
        return 2 * self.k.numel() * self.k.element_size()

    @staticmethod
    def pages_for(num_tokens: int, page_size: int) -> int:
        """Pages that hold `num_tokens` tokens of one request."""
        return -(-num_tokens // page_size)

    def allocate(
        self,
        batch: int,
        capacity_tokens: int | Sequence[int],
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Take pages for `batch` requests and return their page table. Runs on the host.

        Args:
            batch: number of requests.
            capacity_tokens: tokens each request may hold, one number for all or one per request.
            generator: takes the free pages in random order (tests), else the lowest first.

        Returns:
            `[batch, max_pages]` int32 on the cache's device; entries a request has no page for
            are -1.

        Raises:
            ValueError: capacity_tokens has not one entry per request, or a negative one.
            RuntimeError: the free pages do not suffice; nothing is taken.
        """
        capacities = (
            [capacity_tokens] * batch if isinstance(capacity_tokens, int) else list(capacity_tokens)
        )
        if len(capacities) != batch or any(c < 0 for c in capacities):
            raise ValueError(
                f"KVCache.allocate: capacity_tokens must be >= 0, one for each of {batch} "
                f"requests, got {capacity_tokens}"
            )
        counts = [self.pages_for(c, self.page_size) for c in capacities]
        if sum(counts) > len(self._free):
            raise RuntimeError(
                f"KVCache.allocate: free pages must suffice, need {sum(counts)} pages of "
                f"{self.page_size} tokens, got {len(self._free)} of {self.num_pages}"
            )
        if generator is not None:
            order = torch.randperm(len(self._free), generator=generator).tolist()
            self._free = [self._free[i] for i in order]
        table = torch.full((batch, max(counts, default=0)), -1, dtype=torch.int32)
        for row, count in enumerate(counts):
            pages = [self._free.pop() for _ in range(count)]
            table[row, :count] = torch.tensor(pages, dtype=torch.int32)
        return table.to(self.k.device)

    def free(self, page_table: Tensor) -> None:
        """Give back the pages of a table from `allocate`. Reads the table on the host.

        Raises:
            ValueError: a page is out of range, repeated, or free already; nothing is given back.
        """
        pages = [page for page in page_table.flatten().tolist() if page != -1]
        free = set(self._free)
        if len(set(pages)) != len(pages) or any(
            page in free or not 0 <= page < self.num_pages for page in pages
        ):
            raise ValueError(
                "KVCache.free: page_table must hold pages in use, each once, "
                f"got {page_table.tolist()}"
            )
        self._free.extend(sorted(pages, reverse=True))

    def slots(self, page_table: Tensor, request_idx: Tensor, positions: Tensor) -> Tensor:
        """Compute the slot of each token: `page * page_size + offset`. Reads nothing on the host.

        Args:
            page_table: `[batch, max_pages]` int32, max_pages >= 1.
            request_idx: `[rows]` int64 or int32, row of the page table.
            positions: `[rows]` int32, place of the token in its request.

        Returns:
            `[rows]` int32; -1 (not written by `rope_append_`) for a negative position, one past the
            table, or one on a page the request has not (-1 in the table).
        """
        page_size = self.page_size
        page_idx = torch.div(positions, page_size, rounding_mode="floor")
        inside = (page_idx >= 0) & (page_idx < page_table.shape[1])
        pages = page_table[request_idx, page_idx.clamp(0, page_table.shape[1] - 1)]
        slot = pages * page_size + positions.remainder(page_size)
        return torch.where(inside & (pages >= 0), slot, -1)
