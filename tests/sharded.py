"""commit_ and verify_ as ranks run them that hold some columns of the logits each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nld_cuda import ops

ROWS = ("is_fixed", "banned_token_ids")
DRAWS = ("temperature", "seed", "positions")


def gather(scan: Callable, logits: Tensor, cuts: list[int]) -> Tensor:
    """What all ranks hold after they have gathered their parts. cuts: where shards end."""
    bounds = list(zip([0, *cuts], [*cuts, logits.shape[1]], strict=True))
    most = max(ops.num_parts(end - begin) for begin, end in bounds)
    return torch.stack([
        scan(logits[:, begin:end], first_token_id=begin, num_parts=most) for begin, end in bounds
    ])  # fmt: skip


def sharded_commit(cuts: list[int], module: Any = ops) -> Callable:
    """`commit_` by ranks that hold the columns between the cuts."""

    def commit_(
        logits, block_tokens, is_masked, cu_seqlens, rule, threshold, *, mask_token_id,
        tickets=None, **named,
    ):  # fmt: skip
        rows = (block_tokens, is_masked, cu_seqlens, rule)
        draws = {n: named[n] for n in (*ROWS, *DRAWS, "purpose") if n in named}
        rest = {n: t for n, t in named.items() if n not in (*DRAWS, "purpose")}

        def scan(shard: Tensor, **which: int) -> Tensor:
            return module.commit_scan(shard, *rows, mask_token_id=mask_token_id, **draws, **which)

        return module.commit_parts_(
            gather(scan, logits, cuts), *rows, threshold, vocab=logits.shape[1],
            mask_token_id=mask_token_id, **rest,
        )  # fmt: skip

    return commit_


def sharded_verify(cuts: list[int], module: Any = ops) -> Callable:
    """`verify_` by ranks that hold the columns between the cuts."""

    def verify_(
        logits, block_tokens, cu_seqlens, verify_mode, out_tokens, out_lens, max_out_lens,
        next_tokens, seq_lens, done, *, draft_probs=None, tickets=None, **named,
    ):  # fmt: skip
        draws = {n: named[n] for n in (*DRAWS, "banned_token_ids") if n in named}
        rest = {n: t for n, t in named.items() if n not in ("temperature", "seed")}

        def scan(shard: Tensor, **which: int) -> Tensor:
            return module.verify_scan(shard, cu_seqlens, verify_mode, done, **draws, **which)

        module.verify_parts_(
            gather(scan, logits, cuts), block_tokens, cu_seqlens, verify_mode, out_tokens, out_lens,
            max_out_lens, next_tokens, seq_lens, done, vocab=logits.shape[1], **rest,
        )  # fmt: skip

    return verify_
