"""What the ops over shards of the vocabulary mean."""

from __future__ import annotations

import torch
from torch import Tensor

from nld_cuda.reference.draws import (
    SAMPLE,
    allowed_tokens,
    clean_logits,
    draw_values,
    lowest_argmax,
)
from nld_cuda.reference.sampler import _commit_judged_
from nld_cuda.reference.verify import COMMIT, REJECTION, SAMPLED, verify_


def _no_parts(rows: int, shard_len: int, num_parts: int) -> Tensor:
    """Return parts that say nothing: max, sum, dot, value, id, logit and two unused words."""
    parts = torch.zeros(rows, num_parts or max(-(-shard_len // 8192), 1), 8, dtype=torch.int32)
    parts[..., [0, 3]] = torch.tensor(-torch.inf).view(torch.int32)
    parts[..., 4] = -1
    return parts


def _allowed_shard(first: int, shard_len: int, banned_token_ids: Tensor | None) -> Tensor:
    banned = torch.empty(0) if banned_token_ids is None else banned_token_ids.cpu()
    return allowed_tokens(first + shard_len, banned.long())[first:]


def _best_part(parts: Tensor) -> tuple[Tensor, Tensor]:
    """Return id and logit `[rows]` of what is chosen, from parts `[shards, rows, n, 8]`."""
    parts = parts.transpose(0, 1).flatten(1, 2)  # in order of the ids
    best = parts[..., 3].contiguous().view(torch.float32).argmax(-1)  # the first on ties
    chosen = parts[torch.arange(len(parts), device=parts.device), best]
    return chosen[:, 4].long(), chosen[:, 5].contiguous().view(torch.float32)


def commit_scan(
    logits: Tensor,
    block_tokens: Tensor,
    is_masked: Tensor,
    cu_seqlens: Tensor,
    rule: Tensor,
    *,
    first_token_id: int,
    mask_token_id: int,
    is_fixed: Tensor | None = None,
    banned_token_ids: Tensor | None = None,
    temperature: Tensor | None = None,
    seed: Tensor | None = None,
    positions: Tensor | None = None,
    purpose: int = 0,
    num_parts: int = 0,
) -> Tensor:
    """Return `[rows, num_parts, 8]` int32: softmax sums and best token of a shard of the logits."""
    shard_len = logits.shape[1]
    if banned_token_ids is None:
        banned_token_ids = torch.tensor([mask_token_id])
    allowed = _allowed_shard(first_token_id, shard_len, banned_token_ids)
    parts = _no_parts(logits.shape[0], shard_len, num_parts)
    for b in range(rule.numel() if shard_len else 0):
        for row in range(int(cu_seqlens[b]), int(cu_seqlens[b + 1])):
            is_held = not is_masked[row]
            if is_held and (int(rule[b]) != 4 or (is_fixed is not None and bool(is_fixed[row]))):
                continue
            x = clean_logits(logits[row].cpu())
            top = x.amax()
            if top > -torch.inf:
                weights, shifts = (x - top).exp(), (x - top).clamp_min(-200)
                sums = torch.stack((top, weights.sum(), (weights * shifts).sum()))
                parts[row, 0, :3] = sums.view(torch.int32)
            if is_held:
                values = torch.full((shard_len,), -torch.inf)
                held = int(block_tokens[row]) - first_token_id
                if 0 <= held < shard_len:
                    values[held] = 0.0
            elif temperature is None or seed is None or positions is None:
                values = x.masked_fill(~allowed, -torch.inf)
            else:
                values = draw_values(
                    x[None], temperature[b : b + 1].cpu(), seed[b : b + 1].cpu(),
                    positions[row : row + 1].cpu(), purpose, first_token_id,
                )[0].masked_fill(~allowed, -torch.inf)  # fmt: skip
            _put_best(parts[row, 0], values, x, first_token_id)
    return parts.to(logits.device)


def _put_best(part: Tensor, values: Tensor, logits: Tensor, first_token_id: int) -> None:
    """Write the lowest id of the largest value, that value and its logit into a part `[8]`."""
    best = int(lowest_argmax(values, torch.ones_like(values, dtype=torch.bool)))
    if values[best] > -torch.inf:
        part[3] = values[best].view(torch.int32)
        part[4] = first_token_id + best
        part[5] = logits[best].view(torch.int32)


def commit_parts_(
    parts: Tensor,
    block_tokens: Tensor,
    is_masked: Tensor,
    cu_seqlens: Tensor,
    rule: Tensor,
    threshold: Tensor,
    *,
    vocab: int,
    mask_token_id: int,
    quota: Tensor | None = None,
    revise_threshold: Tensor | None = None,
    is_fixed: Tensor | None = None,
    banned_token_ids: Tensor | None = None,
    eos_token_ids: Tensor | None = None,
    candidates: Tensor | None = None,
    confidence: Tensor | None = None,
    num_committed: Tensor | None = None,
    num_remaining: Tensor | None = None,
    done: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Do what `commit_` does, from parts `[num_shards, rows, num_parts, 8]` instead of logits."""
    if banned_token_ids is None:
        banned_token_ids = torch.tensor([mask_token_id], device=parts.device)
    allowed = allowed_tokens(vocab, banned_token_ids)
    lowest = int(lowest_argmax(torch.zeros(vocab, device=parts.device), allowed))

    def judge(b: int, own: slice) -> tuple[Tensor, Tensor, Tensor]:
        top, total, dot = parts[:, own, :, :3].transpose(0, 1).flatten(1, 2).contiguous().view(
            torch.float32
        ).unbind(-1)  # fmt: skip
        best, logit = _best_part(parts[:, own])
        shift = (top - top.amax(-1, keepdim=True)).nan_to_num(-200, neginf=-200).clamp_min(-200)
        dot = ((dot + total * shift) * shift.exp()).sum(-1)
        total = (total * shift.exp()).sum(-1)
        known = (best >= 0) & (total > 0)
        belief = torch.where(known, (logit - top.amax(-1)).exp() / total, 0.0)
        entropy = torch.where(known, (total.log() - dot / total).clamp_min(0), torch.inf)
        chosen = torch.where(best >= 0, best, lowest)
        return torch.where(is_masked[own], chosen, block_tokens[own]), belief, entropy

    return _commit_judged_(
        judge, block_tokens, is_masked, cu_seqlens, rule, threshold, mask_token_id, quota,
        revise_threshold, is_fixed, eos_token_ids, candidates, confidence, num_committed,
        num_remaining, done,
    )  # fmt: skip


def verify_scan(
    logits: Tensor,
    cu_seqlens: Tensor,
    verify_mode: Tensor,
    done: Tensor,
    *,
    first_token_id: int,
    positions: Tensor | None = None,
    temperature: Tensor | None = None,
    seed: Tensor | None = None,
    banned_token_ids: Tensor | None = None,
    num_parts: int = 0,
) -> Tensor:
    """Return `[rows, num_parts, 8]` int32: the best token of each row in a shard of the logits."""
    shard_len = logits.shape[1]
    allowed = _allowed_shard(first_token_id, shard_len, banned_token_ids)
    parts = _no_parts(logits.shape[0], shard_len, num_parts)
    for b in range(verify_mode.numel() if shard_len else 0):
        begin, end, kind = int(cu_seqlens[b]), int(cu_seqlens[b + 1]), int(verify_mode[b])
        assert kind != REJECTION, "not for shards"
        for row in range(max(end - 1, begin) if kind == COMMIT else begin, end):
            if done[b]:
                continue
            values = x = clean_logits(logits[row].cpu())
            if kind in (SAMPLED, COMMIT) and not (temperature is None or seed is None):
                place = torch.zeros(1) if positions is None else positions[row : row + 1].cpu() + 1
                values = draw_values(
                    x[None], temperature[b : b + 1].cpu(), seed[b : b + 1].cpu(), place, SAMPLE,
                    first_token_id,
                )[0]  # fmt: skip
            _put_best(parts[row, 0], values.masked_fill(~allowed, -torch.inf), x, first_token_id)
    return parts.to(logits.device)


def verify_parts_(
    parts: Tensor,
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
    vocab: int,
    positions: Tensor | None = None,
    eos_token_ids: Tensor | None = None,
    banned_token_ids: Tensor | None = None,
    force_positions: Tensor | None = None,
    force_tokens: Tensor | None = None,
    num_emitted: Tensor,
    num_accepted: Tensor,
) -> None:
    """Do what `verify_` does, from parts `[num_shards, rows, num_parts, 8]` instead of logits."""
    targets, _ = _best_part(parts)
    certain = torch.full((parts.shape[1], vocab), -torch.inf, device=parts.device)
    row = (targets >= 0).nonzero()[:, 0]
    certain[row, targets[row]] = 0.0  # every draw is then this token
    verify_(
        certain, block_tokens, cu_seqlens, verify_mode, out_tokens, out_lens, max_out_lens,
        next_tokens, seq_lens, done, positions=positions, eos_token_ids=eos_token_ids,
        banned_token_ids=banned_token_ids, force_positions=force_positions,
        force_tokens=force_tokens, num_emitted=num_emitted, num_accepted=num_accepted,
    )  # fmt: skip
