"""What verify_ means."""

from __future__ import annotations

import torch
from torch import Tensor

from nld_cuda.reference.draws import (
    ACCEPT,
    RESIDUAL,
    SAMPLE,
    allowed_tokens,
    clean_logits,
    draw_tokens,
    gumbel,
    inverse_temperature,
    lowest_argmax,
    philox_tokens,
    uniform,
)

GREEDY, SAMPLED, REJECTION, COMMIT = range(4)  # ops.VerifyMode


def verify_(
    logits: Tensor,
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
    positions: Tensor | None = None,
    temperature: Tensor | None = None,
    seed: Tensor | None = None,
    draft_probs: Tensor | None = None,
    eos_token_ids: Tensor | None = None,
    banned_token_ids: Tensor | None = None,
    force_positions: Tensor | None = None,
    force_tokens: Tensor | None = None,
    num_emitted: Tensor,
    num_accepted: Tensor,
    tickets: Tensor | None = None,
) -> None:
    """Accept drafts, emit them and a bonus token, cut at EOS and budget, roll seq_lens back."""
    vocab = logits.shape[1]
    batch, capacity = out_tokens.shape
    no_ids = torch.empty(0, dtype=torch.int64)
    allowed = allowed_tokens(vocab, no_ids if banned_token_ids is None else banned_token_ids.cpu())
    num_emitted.zero_()
    num_accepted.zero_()
    for b in range(batch):
        begin, end = int(cu_seqlens[b]), int(cu_seqlens[b + 1])
        n, kind = end - begin, int(verify_mode[b])
        if n == 0 or done[b]:
            continue
        seed_token, *drafts = block_tokens[begin:end].tolist()
        places = [0] * n if positions is None else (positions[begin:end] + 1).tolist()
        eos = set() if eos_token_ids is None else set(eos_token_ids[b].tolist()) - {-1}
        force_place = -1 if force_positions is None else int(force_positions[b])
        force_token = -1 if force_tokens is None else int(force_tokens[b])
        heat = torch.zeros(1) if temperature is None else temperature[b : b + 1].cpu()
        key = torch.zeros(1, dtype=torch.int64) if seed is None else seed[b : b + 1].cpu()
        if (inverse_temperature(heat) == 0 and kind != COMMIT) or kind not in range(4):
            kind = GREEDY

        # 1. The leading drafts that are accepted, and the token that follows them.
        pending = force_place  # as if all accepted tokens were emitted
        for i in range(n):
            last, row, place = i == n - 1, begin + i, torch.tensor([places[i]])
            draw = (heat if kind != GREEDY else torch.zeros(1), key, place)
            if kind == COMMIT and not last:
                target, accept = drafts[i], True
            elif pending >= 0 and places[i] == pending:
                target = force_token
                accept = not last and drafts[i] == target
            elif kind == REJECTION and not last:
                q = None if draft_probs is None else draft_probs[row + 1].cpu()
                accept, target = _accept_or_redraw(logits[row].cpu(), drafts[i], q, *draw, allowed)
            else:
                target = int(draw_tokens(logits[row : row + 1].cpu(), *draw, SAMPLE, allowed))
                accept = not last and drafts[i] == target
            if not accept:
                break
            if drafts[i] == force_token and places[i] <= pending:
                pending = -1
        num_accepted[b] = i

        # 2. Emit them, up to the first EOS or the end of the budget.
        limit, length = min(int(max_out_lens[b]), capacity), int(out_lens[b])
        ended = kind == COMMIT and seed_token in eos
        emitted = 0
        for j, token in enumerate([*drafts[:i], target]):
            if ended or length + emitted >= limit:
                break
            out_tokens[b, length + emitted] = token
            next_tokens[b] = token
            emitted += 1
            ended = token in eos and not (kind == COMMIT and j == i)
            if token == force_token and places[j] <= force_place:
                force_place = -1
        if force_positions is not None:
            force_positions[b] = force_place
        if ended or length + emitted >= limit:
            done[b] = True
        out_lens[b] += emitted
        num_emitted[b] = emitted

        # 3. The cache keeps the seed and all emitted tokens but the last.
        seq_lens[b] -= n - emitted


def _accept_or_redraw(
    logits: Tensor,
    draft: int,
    draft_probs: Tensor | None,
    temperature: Tensor,
    seed: Tensor,
    place: Tensor,
    allowed: Tensor,
) -> tuple[bool, int]:
    """Return whether rejection sampling keeps the draft, and else the token from the residual."""
    vocab = logits.numel()
    scaled = clean_logits(logits) * inverse_temperature(temperature)
    scaled = scaled.clamp_max(torch.finfo(torch.float32).max).masked_fill(~allowed, -torch.inf)
    if scaled.amax() == -torch.inf:  # no distribution: the lowest allowed id, with certainty
        target = int(lowest_argmax(scaled, allowed))
        return draft == target, target
    p = torch.softmax(scaled.double(), dim=-1)
    q = torch.zeros(vocab, dtype=torch.float64)
    if draft_probs is not None:
        q = draft_probs.double().nan_to_num(0, posinf=torch.inf).clamp_min(0)
    elif 0 <= draft < vocab:
        q[draft] = 1
    u = uniform(philox_tokens(seed, place, ACCEPT, 1))
    if 0 <= draft < vocab and u * q[draft] < p[draft]:
        return True, draft
    noise = gumbel(philox_tokens(seed, place, RESIDUAL, vocab))[0]
    if draft_probs is None:  # max(p - q, 0) is p without the draft; in logits nothing underflows
        log_mass = torch.where(q > 0, -torch.inf, scaled)
    else:
        log_mass = (p - q).clamp_min(0).log()
    if log_mass.amax() == -torch.inf:
        log_mass = scaled
    return False, int(lowest_argmax(log_mass + noise, allowed))
