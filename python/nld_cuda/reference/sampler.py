"""What commit_ means."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nld_cuda.reference.draws import allowed_tokens, draw_tokens


def _entropy_prefix(entropy: Tensor, threshold: float) -> Tensor:
    """Return which rows form the longest prefix, by increasing entropy, that stays in the bound."""
    order = entropy.argsort(stable=True)
    before = entropy[order].cumsum(0) - entropy[order]
    chosen = torch.zeros_like(entropy, dtype=torch.bool)
    chosen[order] = torch.where(before.isnan(), torch.inf, before) <= threshold  # inf - inf
    chosen[order[0]] = True
    return chosen


def commit_(
    logits: Tensor,
    block_tokens: Tensor,
    is_masked: Tensor,
    cu_seqlens: Tensor,
    rule: Tensor,
    threshold: Tensor,
    *,
    mask_token_id: int,
    quota: Tensor | None = None,
    revise_threshold: Tensor | None = None,
    is_fixed: Tensor | None = None,
    banned_token_ids: Tensor | None = None,
    eos_token_ids: Tensor | None = None,
    temperature: Tensor | None = None,
    seed: Tensor | None = None,
    positions: Tensor | None = None,
    purpose: int = 0,
    candidates: Tensor | None = None,
    confidence: Tensor | None = None,
    num_committed: Tensor | None = None,
    num_remaining: Tensor | None = None,
    done: Tensor | None = None,
    tickets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Judge the masked rows, reveal those the rule allows, re-mask disbelieved ones, freeze EOS."""
    rows, vocab = logits.shape
    batch, device = rule.numel(), logits.device
    compute = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if confidence is None:
        confidence = torch.ones(rows, dtype=compute, device=device)
    if banned_token_ids is None:
        banned_token_ids = torch.tensor([mask_token_id], device=device)
    if temperature is None or seed is None or positions is None:
        temperature = torch.zeros(batch, device=device)
        seed = torch.zeros(batch, dtype=torch.int64, device=device)
        positions = torch.zeros(rows, dtype=torch.int32, device=device)
    allowed = allowed_tokens(vocab, banned_token_ids)

    def judge(b: int, own: slice) -> tuple[Tensor, Tensor, Tensor]:
        n, mine, masked = own.stop - own.start, logits[own], is_masked[own]
        draws = draw_tokens(
            mine, temperature[b].expand(n), seed[b].expand(n), positions[own], purpose, allowed
        )
        chosen = torch.where(masked, draws, block_tokens[own])
        cleaned = mine.to(compute).nan_to_num(
            -torch.inf, torch.finfo(torch.float32).max, -torch.inf
        )
        log_probs = cleaned.log_softmax(-1)
        probs = log_probs.exp()
        entropy = -(probs * log_probs).nan_to_num(0.0).sum(-1)
        in_vocab = (chosen >= 0) & (chosen < vocab)
        belief = probs.gather(1, chosen.clamp(0, vocab - 1)[:, None])[:, 0]
        hopeless = (cleaned.masked_fill(~allowed, -torch.inf) == -torch.inf).all(-1) & masked
        belief = torch.where(hopeless | ~in_vocab, 0.0, belief.nan_to_num(0.0))
        return chosen, belief, torch.where(hopeless, torch.inf, entropy)

    return _commit_judged_(
        judge, block_tokens, is_masked, cu_seqlens, rule, threshold, mask_token_id, quota,
        revise_threshold, is_fixed, eos_token_ids, candidates, confidence, num_committed,
        num_remaining, done,
    )  # fmt: skip


def _commit_judged_(
    judge: Callable[[int, slice], tuple[Tensor, Tensor, Tensor]],
    block_tokens: Tensor,
    is_masked: Tensor,
    cu_seqlens: Tensor,
    rule: Tensor,
    threshold: Tensor,
    mask_token_id: int,
    quota: Tensor | None,
    revise_threshold: Tensor | None,
    is_fixed: Tensor | None,
    eos_token_ids: Tensor | None,
    candidates: Tensor | None,
    confidence: Tensor | None,
    num_committed: Tensor | None,
    num_remaining: Tensor | None,
    done: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Commit by what judge(request, its rows) says: tokens chosen or held, belief, entropy."""
    batch, device = rule.numel(), rule.device
    if candidates is None:
        candidates = block_tokens.clone()
    if confidence is None:
        confidence = torch.ones(block_tokens.numel(), device=device)
    if num_committed is None:
        num_committed = torch.zeros(batch, dtype=torch.int32, device=device)
    if num_remaining is None:
        num_remaining = torch.zeros(batch, dtype=torch.int32, device=device)
    if done is None:
        done = torch.zeros(batch, dtype=torch.bool, device=device)
    for b in range(batch):
        own = slice(int(cu_seqlens[b]), int(cu_seqlens[b + 1]))
        n = own.stop - own.start
        tokens, masked = block_tokens[own], is_masked[own]
        fixed = torch.zeros_like(masked) if is_fixed is None else is_fixed[own]
        held = ~masked & ~fixed & (int(rule[b]) == 4)
        chosen, belief, entropy = judge(b, own)
        candidates[own] = torch.where(masked, chosen, tokens)
        confidence[own] = torch.where(masked | held, belief, 1.0).to(confidence.dtype)

        where = masked.nonzero()[:, 0]
        order = where[belief[where].argsort(descending=True, stable=True)]  # lowest row on ties
        commits = torch.zeros_like(masked)
        if where.numel():
            if int(rule[b]) in (0, 4):
                commits = masked & (belief >= threshold[b])
                commits[order[0]] = True
            elif int(rule[b]) == 1:
                commits[order[: max(1 if quota is None else int(quota[b]), 1)]] = True
            elif int(rule[b]) == 2:
                commits = masked.clone()
            else:
                commits[where] = _entropy_prefix(entropy[where], float(threshold[b]))
        again = held & (belief < (0.0 if revise_threshold is None else float(revise_threshold[b])))
        tokens[commits] = chosen[commits]
        tokens[again] = mask_token_id
        masked &= ~commits
        masked |= again

        eos = [] if eos_token_ids is None else [i for i in eos_token_ids[b].tolist() if i >= 0]
        for i in range(n):
            if masked[i]:
                break
            if int(tokens[i]) in eos and not fixed[i]:
                tokens[i + 1 :] = tokens[i].clone()
                masked[i + 1 :] = False
                break
        num_committed[b] = commits.sum()
        num_remaining[b] = masked.sum()
        done[b] = num_remaining[b] == 0
    return candidates, confidence, num_committed, num_remaining, done
