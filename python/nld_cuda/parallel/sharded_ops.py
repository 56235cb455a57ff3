"""The decode ops over shards of the vocabulary: the same names, arguments and decisions."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nld_cuda.parallel.shard import Shard


class ShardedOps:
    """`nld_cuda.ops` (or `reference`) for a rank whose logits hold its own ids only.

    Whatever a decision depends on is gathered, in the order of the ranks, so every rank takes the
    same one.
    """

    def __init__(self, shard: Shard, ops: Any) -> None:
        self._shard, self._ops = shard, ops
        self.compact_ = ops.compact_

    def commit_(self, logits: Tensor, *args: Any, **options: Any) -> Any:
        """`ops.commit_`; logits `[rows, own ids]`."""
        return self._ops.commit_(self._shard.whole_logits(logits), *args, **options)

    def verify_(self, logits: Tensor, *args: Any, **options: Any) -> Any:
        """`ops.verify_`; logits `[rows, own ids]`."""
        return self._ops.verify_(self._shard.whole_logits(logits), *args, **options)
