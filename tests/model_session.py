"""Runs NLDModel.forward on requests in a poisoned cache; compares logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nld_cuda.decode.kv_cache import KVCache
from nld_cuda.model import NLDModel


class Session:
    """Requests in one poisoned cache with shuffled pages; `run` appends ragged rows to them."""

    def __init__(
        self, model: NLDModel, batch: int, capacity: int, page_size: int, first_position: int = 0
    ) -> None:
        self.model, self.first_position = model, first_position
        pages = KVCache.pages_for(capacity, page_size)
        self.cache = KVCache(model.config, batch * pages + 3, page_size, model.device, model.dtype)
        self.cache.k.fill_(torch.nan)
        self.cache.v.fill_(torch.nan)
        self.table = self.cache.allocate(
            batch, capacity, generator=torch.Generator().manual_seed(5)
        )
        self.table = torch.cat((self.table, torch.full_like(self.table[:, :2], 2**30)), dim=1)
        self.lens = [0] * batch
        self.forward = model.forward

    def run(
        self, rows: list[Tensor], modes: list[int], keep: bool = True, **kw: Any
    ) -> list[Tensor]:
        counts = [r.numel() for r in rows]
        request = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(counts))
        places = [
            torch.arange(n, n + c, dtype=torch.int32)
            for n, c in zip(self.lens, counts, strict=True)
        ]
        indices = torch.cat(places)
        lens = [n + c for n, c in zip(self.lens, counts, strict=True)]
        logits = self.forward(
            torch.cat(rows),
            indices + self.first_position,
            self.cache.slots(self.table, request, indices),
            self.cache,
            self.table,
            torch.tensor(lens, dtype=torch.int32),
            torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32),
            torch.tensor(modes, dtype=torch.int32),
            **kw,
        )
        if keep:
            self.lens = lens
        return list(logits.split(counts))


def causal(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


def relative_error(actual: Tensor, exact: Tensor) -> float:
    assert actual.shape == exact.shape
    assert not actual.isnan().any()
    return float((actual.double() - exact).abs().max() / exact.abs().max())


def random_tokens(fields: dict, *counts: int) -> list[Tensor]:
    return [torch.randint(0, fields["vocab_size"], (n,)) for n in counts]
