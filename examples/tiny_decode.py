"""Decode with a dense cache and measure: small on purpose, shares no code with the package."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import tiny_tasks as tasks
from tiny_net import BLOCK, Lora, TinyModel


class Decoder:
    """Decode a batch of equally long prompts greedily; each row has its own cache length."""

    def __init__(self, model: TinyModel, lora: Lora | None, prompts: Tensor, room: int) -> None:
        config = model.config
        self.model, self.lora, (batch, self.prompt_len) = model, lora, prompts.shape
        shape = (batch, config["num_key_value_heads"], self.prompt_len + room, config["head_dim"])
        self.cache = [
            (torch.zeros(shape), torch.zeros(shape)) for _ in range(config["num_hidden_layers"])
        ]
        self.seq_lens = torch.zeros(batch, dtype=torch.long)
        self.num_forwards = 0
        self.seed = self.forward(prompts, True)[:, -1].argmax(-1)
        self.seq_lens += self.prompt_len

    def forward(self, tokens: Tensor, is_causal: bool, with_lora: bool = False) -> Tensor:
        """Return logits of ``tokens`` placed at each row's cache length; the length stays."""
        positions = self.seq_lens[:, None] + torch.arange(tokens.shape[1])
        index = torch.arange(self.cache[0][0].shape[2])
        last = positions if is_causal else positions[:, -1:].expand_as(positions)
        is_visible = (index <= last[..., None])[:, None]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for cached, new in zip(self.cache[layer], (k, v), strict=True):
                cached.scatter_(2, positions[:, None, :, None].expand_as(new), new)
            return F.scaled_dot_product_attention(
                q, *self.cache[layer], attn_mask=is_visible, enable_gqa=True
            )

        lora = self.lora if with_lora else None
        hidden = self.model(tokens, positions, attend, lora, tokens.shape[1])
        return self.model.diffusion_head(hidden)


@dataclass
class Decoded:
    """Hold what one row gave: its tokens up to and with the end token, and what they cost."""

    tokens: list[int]
    num_forwards: int = 0
    num_cycles: int = 0


def decode_ar(decoder: Decoder, max_new: int) -> list[Decoded]:
    """Decode one token a forward."""
    out = [Decoded([int(t)], 1) for t in decoder.seed]
    seed = decoder.seed
    while any(r.tokens[-1] != tasks.EOS for r in out) and len(out[0].tokens) < max_new:
        seed = decoder.forward(seed[:, None], True)[:, 0].argmax(-1)
        decoder.seq_lens += 1
        for r, t in zip(out, seed.tolist(), strict=True):
            r.tokens.append(t)
    return [cut(r, forwards=None) for r in out]


def cut(row: Decoded, forwards: int | None) -> Decoded:
    """Cut after the first end token; in ar a forward is a token."""
    if tasks.EOS in row.tokens:
        row.tokens = row.tokens[: row.tokens.index(tasks.EOS) + 1]
    row.num_forwards = len(row.tokens) if forwards is None else forwards
    return row


def decode_linear_spec(decoder: Decoder, max_new: int, with_lora: bool) -> list[Decoded]:
    """Draft a whole block in one bidirectional forward, verify it in one causal forward."""
    out = [Decoded([int(t)], 1) for t in decoder.seed]
    seed = decoder.seed.clone()
    live = [r.tokens[-1] != tasks.EOS for r in out]
    while any(live):
        block = torch.full((len(out), BLOCK), tasks.MASK)
        block[:, 0] = seed
        draft = decoder.forward(block, False, with_lora).argmax(-1)
        block[:, 1:] = draft[:, 1:]
        choice = decoder.forward(block, True).argmax(-1)
        is_same = (choice[:, :-1] == block[:, 1:]).long()
        accepted = is_same.cumprod(1).sum(1) + 1
        for i, r in enumerate(out):
            if not live[i]:
                continue
            n = int(accepted[i])
            new = choice[i, :n].tolist()
            r.num_forwards, r.num_cycles = r.num_forwards + 2, r.num_cycles + 1
            r.tokens = (r.tokens + new)[:max_new]
            seed[i], decoder.seq_lens[i] = new[-1], decoder.seq_lens[i] + n
            live[i] = tasks.EOS not in new and len(r.tokens) < max_new
            if not live[i]:
                cut(r, r.num_forwards)
    return out


def decode_diffusion(decoder: Decoder, max_new: int, threshold: float) -> list[Decoded]:
    """Denoise block after block: commit what is sure enough and always the surest one."""
    out = [Decoded([]) for _ in decoder.seed]
    seed = decoder.seed
    live = torch.ones(len(out), dtype=torch.bool)
    for _ in range(math.ceil(max_new / BLOCK)):
        block = torch.full((len(out), BLOCK), tasks.MASK)
        block[:, 0] = seed
        is_masked = block == tasks.MASK
        while True:
            is_eos = ((block == tasks.EOS) & ~is_masked).int()
            open_before = is_masked.cumsum(1) - is_masked.long()
            ended = (is_eos.bool() & (open_before == 0)).any(1)
            busy = live & is_masked.any(1) & ~ended
            if not busy.any():
                break
            probs = decoder.forward(block, False).softmax(-1)
            probs[..., tasks.MASK] = 0
            confidence, token = probs.max(-1)
            confidence = confidence.masked_fill(~is_masked, -1)
            commit = confidence >= threshold
            commit.scatter_(1, confidence.argmax(1, keepdim=True), True)
            commit &= is_masked & busy[:, None]
            block[commit] = token[commit]
            is_masked &= ~commit
            for i in busy.nonzero()[:, 0].tolist():
                out[i].num_forwards += 1
        seed = decoder.forward(block, True)[:, -1].argmax(-1)
        decoder.seq_lens += BLOCK
        for i in live.nonzero()[:, 0].tolist():
            out[i].num_forwards += 1
            out[i].num_cycles += 1
            out[i].tokens += block[i].tolist()
            if tasks.EOS in out[i].tokens:
                cut(out[i], out[i].num_forwards)
                live[i] = False
        if not live.any():
            break
    return out


THRESHOLDS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)


@torch.no_grad()
def evaluate(
    model: TinyModel,
    lora: Lora,
    tokenizer: tasks.Tokenizer,
    problems: list[tasks.Problem],
    modes: tuple[str, ...],
    max_new: int = 192,
) -> list[dict]:
    """Measure every mode on the problems; return one row per mode and kind."""
    groups: dict[tuple[str, int], list[tuple[tasks.Problem, list[int]]]] = {}
    for problem in problems:
        ids = tokenizer.encode(problem.prompt).ids
        groups.setdefault((problem.kind, len(ids)), []).append((problem, ids))
    rows = []
    reference: dict[str, list[int]] = {}
    for mode in modes:
        name, _, value = mode.partition(":")
        sums: dict[str, list[float]] = {}
        for (kind, _), members in groups.items():
            decoder = Decoder(
                model, lora, torch.tensor([ids for _, ids in members]), max_new + 2 * BLOCK
            )
            if name == "ar":
                decoded = decode_ar(decoder, max_new)
            elif name == "diffusion":
                decoded = decode_diffusion(decoder, max_new, float(value))
            else:
                decoded = decode_linear_spec(decoder, max_new, name == "linear_spec_lora")
            for (problem, _), row in zip(members, decoded, strict=True):
                body = row.tokens[:-1] if row.tokens[-1] == tasks.EOS else row.tokens
                text = tokenizer.decode(body, skip_special_tokens=False)
                right = row.tokens[-1] == tasks.EOS and tasks.check(problem, text)
                same = row.tokens == reference.setdefault(problem.prompt, row.tokens)
                for key in (kind, "all"):
                    s = sums.setdefault(key, [0.0] * 6)
                    for i, x in enumerate(
                        (1, right, same, len(row.tokens), row.num_forwards, row.num_cycles)
                    ):
                        s[i] += x
        for key, (count, right, same, tokens, forwards, cycles) in sums.items():
            first = count if "spec" in name else 0  # the first token comes from the prefill
            rows.append({
                "mode": mode, "kind": key, "problems": int(count),
                "exact": round(right / count, 4), "same_as_ar": round(same / count, 4),
                "tokens_per_forward": round(tokens / forwards, 2),
                "tokens_per_cycle": round((tokens - first) / cycles, 2) if cycles else None,
            })  # fmt: skip
    return rows
