"""Which part of a model a process holds, and what it exchanges with the others in a forward.

Query heads, key heads and inner units are divided evenly, the vocabulary in runs of ids. So q, k,
v, gate and up give a rank's own heads and units; o and down take them and give a part of a sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from nld_cuda import ops
from nld_cuda.model.config import ModelConfig
from nld_cuda.model.linear import Lora, Weight, linear, lora_add_


def vocab_borders(vocab_size: int, num_ranks: int) -> tuple[int, ...]:
    """Where the shards of a vocabulary begin, and its end: `num_ranks + 1` ids.

    As even as possible: multiples of `ops.PART_LEN` if there is a part for every rank, else any
    ids. The last digits of a confidence are those of one process where shards end with its slices.
    """
    step = ops.PART_LEN if vocab_size >= num_ranks * ops.PART_LEN else 1
    even = (vocab_size * rank / (num_ranks * step) for rank in range(1, num_ranks))
    return (0, *(round(border) * step for border in even), vocab_size)


@dataclass(frozen=True, eq=False)
class Shard:
    """One rank's part of a model.

    Attributes:
        group: the ranks that hold the model together.
        rank, num_ranks: this one, and how many.
        full: sizes of the whole model.
    """

    group: Any
    rank: int
    num_ranks: int
    full: ModelConfig

    @staticmethod
    def of(config: ModelConfig, group: Any) -> Shard:
        """This process's part of a model.

        Raises:
            ValueError: the model cannot be divided by the size of the group.
        """
        rank, num = dist.get_rank(group), dist.get_world_size(group)
        sizes = (config.num_heads, config.num_kv_heads, config.intermediate_size)
        if math.gcd(*sizes) % num:
            possible = [n for n in range(1, math.gcd(*sizes) + 1) if math.gcd(*sizes) % n == 0]
            raise ValueError(
                "load: num_heads, num_kv_heads and intermediate_size must be multiples of the "
                f"number of processes, got {sizes[0]}, {sizes[1]} and {sizes[2]} for {num} "
                f"processes; numbers that divide this model: {', '.join(map(str, possible))}"
            )
        if config.vocab_size < num:
            raise ValueError(
                f"load: vocab_size must be at least the number of processes, {num}, got "
                f"{config.vocab_size}"
            )
        return Shard(group, rank, num, config)

    @cached_property
    def config(self) -> ModelConfig:
        """Sizes of this rank's part: heads and inner units are its own, the vocabulary is whole."""
        return replace(
            self.full,
            num_heads=self.full.num_heads // self.num_ranks,
            num_kv_heads=self.full.num_kv_heads // self.num_ranks,
            intermediate_size=self.full.intermediate_size // self.num_ranks,
        )

    @cached_property
    def borders(self) -> tuple[int, ...]:
        """First id of every rank's shard of the vocabulary, and the end."""
        return vocab_borders(self.full.vocab_size, self.num_ranks)

    @property
    def first_id(self) -> int:
        """Token id of this rank's first row of embedding and head."""
        return self.borders[self.rank]

    @property
    def num_parts(self) -> int:
        """Parts in which every rank tells of its logits: as many as the longest shard needs."""
        return ops.num_parts(max(end - begin for begin, end in pairwise(self.borders)))

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of this rank's part, by the names in the table of `checkpoint`."""
        config = self.config
        return {
            "vocab": self.borders[self.rank + 1] - self.first_id,
            "hidden": config.hidden_size,
            "inner": config.intermediate_size,
            "q": config.q_size,
            "kv": config.kv_size,
        }

    @property
    def begins(self) -> dict[str, int]:
        """Where that part begins in the whole."""
        begins = {name: self.rank * size for name, size in self.sizes.items()}
        return begins | {"vocab": self.first_id, "hidden": 0}

    def embedding(self, tokens: Tensor, embed: Tensor) -> Tensor:
        """Rows of the whole embedding. tokens `[total]` int64; embed `[own ids, hidden]`.

        Exact: every other rank adds zero.
        """
        row = tokens - self.first_id
        is_own = (row >= 0) & (row < embed.shape[0])
        x = F.embedding(row.clamp_(0, embed.shape[0] - 1), embed)
        x.masked_fill_(~is_own[:, None], 0)
        dist.all_reduce(x, group=self.group)
        return x

    def linear_add_(
        self, residual: Tensor, x: Tensor, weight: Weight, lora: Lora | None = None
    ) -> None:
        """Add `x @ weight.T` of all ranks' inputs to `residual` in place; see `linear.linear_add_`.

        The adapter's `b` is linear, so its part is summed with the product's: one exchange.
        """
        part = linear(x, weight)
        if lora is not None:
            lora_add_(part, x, lora)
        dist.all_reduce(part, group=self.group)
        residual.add_(part)

    def gather(self, part: Tensor) -> Tensor:
        """`[num_ranks, ...]`: a tensor of the same shape from every rank, in order."""
        parts = part.new_empty((self.num_ranks, *part.shape))
        dist.all_gather(list(parts.unbind(0)), part.contiguous(), group=self.group)
        return parts

    def whole_logits(self, logits: Tensor) -> Tensor:
        """Logits `[rows, vocab]` from every rank's `[rows, own ids]`."""
        widths = [end - begin for begin, end in pairwise(self.borders)]
        padded = F.pad(logits, (0, max(widths) - logits.shape[1]))
        parts = self.gather(padded)
        return torch.cat([p[:, :width] for p, width in zip(parts, widths, strict=True)], dim=1)
