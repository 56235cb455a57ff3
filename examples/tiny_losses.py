"""Make training batches, and compute the three losses: ar, joint, draft."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import tiny_tasks as tasks
from tiny_net import BLOCK, DIFFUSION_WEIGHT, Attend, Lora, TinyModel

NOISE_EPS = 1e-3


@dataclass
class Batch:
    """Hold problems of one kind and size: equal prompt length, answers padded with end tokens."""

    tokens: Tensor  # [batch, rows], prompt + answer + <eos>...
    prompt_len: int
    is_answer: Tensor  # [batch, rows]: the answer and its first <eos>
    first_block_len: int  # answer tokens before the first whole block


def make_batch(
    tokenizer: tasks.Tokenizer, kind: str, size: int, count: int, rng: random.Random
) -> Batch:
    """Make a batch; the phase of the blocks is drawn, since a draft may start anywhere."""
    problems = [tasks.make(kind, rng, size) for _ in range(count)]
    prompts = [e.ids for e in tokenizer.encode_batch([p.prompt for p in problems])]
    answers = [
        e.ids
        for e in tokenizer.encode_batch([p.answer for p in problems], add_special_tokens=False)
    ]
    (prompt_len,) = {len(p) for p in prompts}
    first = rng.randint(1, BLOCK)
    longest = max(map(len, answers)) + 1
    answer_len = first + math.ceil((longest - first) / BLOCK) * BLOCK
    rows = [
        p + a + [tasks.EOS] * (answer_len - len(a)) for p, a in zip(prompts, answers, strict=True)
    ]
    lens = torch.tensor([prompt_len + len(a) + 1 for a in answers])
    index = torch.arange(prompt_len + answer_len)
    is_answer = (index >= prompt_len) & (index < lens[:, None])
    return Batch(torch.tensor(rows), prompt_len, is_answer, first)


# --- the two training objectives ---------------------------------------------------------------


def causal_attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend token-causally."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def dual_attend(num_noisy: int, is_visible: Tensor) -> Attend:
    """Attend with rows [noisy | clean]: clean is causal, noisy sees what ``is_visible`` says."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        noisy = F.scaled_dot_product_attention(
            q[:, :, :num_noisy], k, v, attn_mask=is_visible, enable_gqa=True
        )
        q, k, v = (x[:, :, num_noisy:] for x in (q, k, v))
        return torch.cat((noisy, causal_attend(layer, q, k, v)), 2)

    return attend


def dual_forward(
    model: TinyModel, batch: Batch, noisy: Tensor, lora: Lora | None = None
) -> tuple[Tensor, Tensor]:
    """Run the noisy answer and the clean text in one forward; return both hidden states.

    This is the 2N-row forward without the noisy rows of the prompt: they are never masked, carry
    no loss and no other row sees them.
    """
    n, a, first = batch.tokens.shape[1], noisy.shape[1], batch.first_block_len
    answer = torch.arange(a)
    block = (answer - first).div(BLOCK, rounding_mode="floor") + 1
    clean_block = torch.cat((torch.full((batch.prompt_len,), -1), block))
    is_visible = torch.cat(
        (block[:, None] == block[None, :], block[:, None] > clean_block[None, :]), 1
    )
    positions = torch.cat((batch.prompt_len + answer, torch.arange(n)))
    tokens = torch.cat((noisy, batch.tokens), 1)
    hidden = model(tokens, positions, dual_attend(a, is_visible), lora, a)
    return hidden[:, :a], hidden[:, a:]


def is_block_start(batch: Batch, num_answer: int) -> Tensor:
    """Mark the first token of every block: decoding always knows it (the seed)."""
    index = torch.arange(num_answer)
    return (index == 0) | ((index - batch.first_block_len) % BLOCK == 0)


def ar_sum(model: TinyModel, batch: Batch, clean: Tensor) -> tuple[Tensor, int]:
    """Return the summed next-token loss on answers, and the number of tokens."""
    p = batch.prompt_len
    logits = model.diffusion_head(clean[:, p - 1 : -1]).float()
    is_answer = batch.is_answer[:, p:]
    return F.cross_entropy(logits[is_answer], batch.tokens[:, p:][is_answer], reduction="sum"), int(
        is_answer.sum()
    )


def joint_loss(model: TinyModel, batches: list[Batch], generator: torch.Generator) -> Tensor:
    """Return L_AR + 0.3 L_diff, each a sum over all batches divided once by its token count."""
    ar = diffusion = torch.zeros(())
    num_ar = num_noisy = 0
    for batch in batches:
        target = batch.tokens[:, batch.prompt_len :]
        t = torch.rand(target.shape[0], 1, generator=generator)
        p = (1 - NOISE_EPS) * t + NOISE_EPS
        is_masked = torch.rand(target.shape, generator=generator) < p
        is_masked &= ~is_block_start(batch, target.shape[1])
        noisy, clean = dual_forward(model, batch, target.masked_fill(is_masked, tasks.MASK))
        loss, count = ar_sum(model, batch, clean)
        ar, num_ar = ar + loss, num_ar + count
        logits = model.diffusion_head(noisy[is_masked]).float()
        losses = F.cross_entropy(logits, target[is_masked], reduction="none")
        diffusion = diffusion + (losses / p.expand_as(target)[is_masked]).sum()
        # 1/p makes every masked token stand for 1/p tokens: the count is that of all maskable ones.
        num_noisy += target.shape[0] * int((~is_block_start(batch, target.shape[1])).sum())
    return ar / num_ar + DIFFUSION_WEIGHT * diffusion / num_noisy


def ar_loss(model: TinyModel, batches: list[Batch], generator: torch.Generator) -> Tensor:
    """Return the next-token loss on answers."""
    total, num = torch.zeros(()), 0
    for batch in batches:
        clean = model(batch.tokens, torch.arange(batch.tokens.shape[1]), causal_attend)
        loss, count = ar_sum(model, batch, clean)
        total, num = total + loss, num + count
    return total / num


def draft_loss(model: TinyModel, lora: Lora, batches: list[Batch]) -> Tensor:
    """Return the drafting loss: against the verifier, up to the first rejection of each block.

    All tokens of a block but the first are masked, as in a draft; the clean rows (LoRA off) give
    the verifier's distribution. Per position: cross entropy to the verifier's choice, plus KL.
    """
    total, num = torch.zeros(()), 0
    for batch in batches:
        p, target = batch.prompt_len, batch.tokens[:, batch.prompt_len :]
        start = is_block_start(batch, target.shape[1]).expand_as(target)
        noisy, clean = dual_forward(model, batch, target.masked_fill(~start, tasks.MASK), lora)
        draft = model.diffusion_head(noisy).float()
        with torch.no_grad():
            verifier = model.diffusion_head(clean[:, p - 1 : -1]).float()
            choice = verifier.argmax(-1)
            wrong = ((draft.argmax(-1) != choice) & ~start).int()
            before = wrong.cumsum(1) - wrong  # wrong drafts so far, from the block's start on
            at_start = torch.where(start, before, 0).cummax(1).values
            keep = (before == at_start) & ~start & batch.is_answer[:, p:]
        draft, verifier, choice = draft[keep], verifier[keep], choice[keep]
        kl = F.kl_div(draft.log_softmax(-1), verifier.log_softmax(-1), log_target=True,
                      reduction="sum")  # fmt: skip
        total = total + kl + F.cross_entropy(draft, choice, reduction="sum")
        num += int(keep.sum())
    return total / num
