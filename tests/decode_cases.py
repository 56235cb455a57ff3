"""Tiny random models for the decode tests, and the oracle's view of them."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import nld_cuda
from nld_cuda import NLDModel
from nld_cuda.decode.kv_cache import KVCache
from oracle import Logits, Options
from tiny_model import config_fields, plain_logits, random_lora, random_weights, write_checkpoint

MASK, EOS, END_THINK = 3, 2, 6


@dataclass(frozen=True, eq=False)
class TinyModel:
    """A loaded model, and the same weights for `plain_logits` (the adapter multiplied out)."""

    model: NLDModel
    fields: dict[str, Any]
    weights: dict[str, Tensor]
    adapter: list[Tensor]

    def logits(self, lora: bool = True) -> Logits:
        """What the oracle sees: everything recomputed densely in float32."""

        def call(
            tokens: list[int], positions: list[int], mask: Tensor, draft_from: int | None
        ) -> Tensor:
            adapter = self.adapter if lora and draft_from is not None else None
            return plain_logits(
                self.fields, self.weights, torch.tensor(tokens), mask, torch.float32,
                torch.tensor(positions), adapter, draft_from or 0,
            )  # fmt: skip

        return call


@cache
def tiny_model(
    vocab: int = 61,
    seed: int = 0,
    layers: int = 2,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> TinyModel:
    """A model with an adapter. A small vocabulary makes drafts agree by chance now and then.

    `dtype` is the loaded model's; `changes` replace fields of its config.
    """
    with tempfile.TemporaryDirectory() as folder:
        fields, weights, lora = write_tiny(Path(folder), vocab, seed, layers, **changes)
        model = nld_cuda.load(folder, device="cpu", dtype=dtype)
    adapter = []
    for i in range(layers):
        at = f"base_model.model.encoder.layers.{i}.self_attn.o_proj"
        adapter.append(4 * lora[f"{at}.lora_B.weight"] @ lora[f"{at}.lora_A.weight"])
    return TinyModel(model, fields, weights, adapter)


def write_tiny(
    folder: Path, vocab: int = 61, seed: int = 0, layers: int = 2, **changes: Any
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Write the checkpoint of `tiny_model`; return its config, weights and adapter."""
    generator_state = torch.get_rng_state()
    torch.manual_seed(1000 + seed)
    fields = config_fields(vocab_size=vocab, num_hidden_layers=layers, **changes)
    weights = random_weights(fields)
    # Loud enough that no argmax hangs on rounding; and what all tokens share makes all places
    # predict alike, so that drafts are often right.
    if "diffusion_head.weight" in weights:
        weights["diffusion_head.weight"] *= 3
        weights["diffusion_head.weight"][EOS] *= 0.5
    weights["encoder.embed_tokens.weight"] += 0.6 * torch.randn(fields["hidden_size"])
    lora = {name: t * 0.4 for name, t in random_lora(fields, rank=4).items()}
    torch.set_rng_state(generator_state)
    write_checkpoint(folder, fields, weights, lora=lora)
    return fields, weights, lora


def poison_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches made from now on start full of NaN."""
    make = KVCache.__init__

    def poisoned(self: KVCache, *args: Any, **kw: Any) -> None:
        make(self, *args, **kw)
        self.k.fill_(torch.nan)
        self.v.fill_(torch.nan)

    monkeypatch.setattr(KVCache, "__init__", poisoned)


def prompt(length: int, vocab: int, seed: int = 0) -> list[int]:
    """Random tokens, mask and EOS ids among them."""
    generator = torch.Generator().manual_seed(100 * seed + length)
    return torch.randint(vocab, (length,), generator=generator).tolist()


def options(max_new: int, eos: tuple[int, ...] = (), budget: int | None = None) -> Options:
    return Options(max_new, MASK, eos, budget, END_THINK)
