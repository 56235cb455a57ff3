"""What all modes share: reading the prompts, and judging rows with `verify_`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nld_cuda.decode.images import unread_images
from nld_cuda.decode.kv_cache import KVCache
from nld_cuda.decode.state import DecodeState, Pass, Rows
from nld_cuda.ops import MaskMode, VerifyMode

if TYPE_CHECKING:
    from nld_cuda.model.transformer import NLDModel

# Stands for "no seed" in `verify_`: equal to no token and to no padding of an EOS list.
NO_SEED = -2


def judge(
    ops: Any,
    state: DecodeState,
    logits: Tensor,
    tokens: Tensor,
    cu_seqlens: Tensor,
    mode: Tensor,
    positions: Tensor,
    *,
    done: Tensor | None = None,
    draft_probs: Tensor | None = None,
) -> None:
    """Verify drafts and emit, over the whole state.

    Reads `state.step_lens` as the cache lengths with the rows of this step and turns them into the
    lengths after it. Leaves out the arguments that no request needs.
    """
    sampled, forced = state.any_sampled, state.any_forced
    ops.verify_(
        logits,
        tokens,
        cu_seqlens,
        mode,
        state.out_tokens,
        state.out_lens,
        state.max_out_lens,
        state.next_tokens,
        state.step_lens,
        state.done if done is None else done,
        positions=positions if sampled or forced else None,
        temperature=state.temperature if sampled else None,
        seed=state.seed if sampled else None,
        draft_probs=draft_probs,
        eos_token_ids=state.eos_token_ids if state.any_eos else None,
        force_positions=state.force_positions if forced else None,
        force_tokens=state.force_tokens if forced else None,
        num_emitted=state.num_emitted,
        num_accepted=state.num_accepted,
    )


def keep_active_lens(state: DecodeState) -> None:
    """Take over the lengths that `judge` left; a done request keeps its own."""
    torch.where(state.step_lens > 0, state.step_lens, state.seq_lens, out=state.seq_lens)


def run_rows(
    forward: Callable[..., Tensor],
    cache: KVCache,
    state: DecodeState,
    rows: Rows,
    mask_mode: Tensor,
    *,
    use_lora: bool = False,
    **options: Tensor | None,
) -> Tensor:
    """Run `model.forward` (or `model.hidden`) over the rows of a step."""
    return forward(
        rows.tokens.view(-1),
        rows.positions.view(-1),
        rows.slots.view(-1),
        cache,
        state.page_table,
        state.step_lens,
        rows.cu_seqlens,
        mask_mode,
        use_lora=use_lora,
        **options,
    )


def prefill(
    model: NLDModel,
    cache: KVCache,
    state: DecodeState,
    ops: Any,
    *,
    verify_mode: VerifyMode = VerifyMode.SAMPLED,
    num_masks: int = 0,
    mask_token_id: int = 0,
) -> Tensor | None:
    """Read what the cache lacks of all prompts in one causal forward; emit their first tokens.

    Args:
        verify_mode: SAMPLED, or COMMIT where an EOS as first token ends the request only later.
        num_masks: mask rows to add after each prompt, which see everything (quadratic mode). They
            are a second attention request on the pages of the first: prompt rows stay causal.
        mask_token_id: token of those rows.

    Returns:
        Logits `[batch, num_masks, vocab]` of the mask rows, None without them.
    """
    device, batch = state.device, state.batch
    active = [r for r in state.requests if r.max_new_tokens]
    tokens = [t for r in active for t in r.prompt[r.num_cached :]]
    if not tokens:
        return None
    starts = [r.num_cached for r in state.requests]
    lens = [len(r.prompt) if r.max_new_tokens else 0 for r in state.requests]
    counts = [max(n - start, 0) for n, start in zip(lens, starts, strict=True)]
    if num_masks:
        counts += [num_masks if n else 0 for n in lens]
    tokens += [mask_token_id] * (sum(counts) - len(tokens))
    cu = torch.tensor([0, *counts]).cumsum(0)
    request_idx = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)) % batch
    places = torch.cat(
        [torch.arange(start, max(n, start)) for n, start in zip(lens, starts, strict=True)]
    )
    ends = torch.tensor(lens)
    if num_masks:
        shadow = (ends[:, None] + torch.arange(num_masks))[ends > 0]
        places = torch.cat([places, shadow.flatten()])
    last_rows = (cu[1 : batch + 1] - 1).clamp_(min=0)
    mask_rows = torch.arange(int(cu[batch]), int(cu[-1]))
    seq_lens = torch.cat([ends, torch.where(ends > 0, ends + num_masks, 0)])[: len(counts)]
    modes = [MaskMode.CAUSAL] * batch + [MaskMode.FULL] * (len(counts) - batch)

    features, feature_rows = unread_images(model, state.requests, cu[:batch].tolist())
    state.step_lens.copy_(ends)
    logits = model.forward(
        torch.tensor(tokens).to(device),
        places.int().to(device),
        state.slot_table[request_idx.to(device), places.to(device)],
        cache,
        state.page_table.repeat(len(counts) // batch, 1),
        seq_lens.int().to(device),
        cu.int().to(device),
        torch.tensor(modes, dtype=torch.int32).to(device),
        logits_rows=torch.cat([last_rows, mask_rows]).to(device),
        features=features,
        feature_rows=feature_rows,
    )
    state.count(Pass.PREFILL, ~state.done)
    cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=device)
    mode = torch.full((batch,), int(verify_mode), dtype=torch.int32, device=device)
    no_seed = torch.full((batch,), NO_SEED, dtype=torch.int64, device=device)
    judge(ops, state, logits[:batch], no_seed, cu_seqlens, mode, state.step_lens - 1)
    keep_active_lens(state)
    if not num_masks:
        return None
    vocab = logits.shape[1]
    if all(lens):
        return logits[batch:].view(batch, num_masks, vocab)
    out = logits.new_zeros(batch, num_masks, vocab)
    out[ends.to(device) > 0] = logits[batch:].view(-1, num_masks, vocab)
    return out
