"""Whole generations of the packaged model on CUDA kernels: token for token what the CPU says."""

from __future__ import annotations

import copy
import json
from functools import cache
from typing import Any

import pytest
import torch

import emulated
import nld_cuda
from decode_cases import prompt, tiny_model
from nld_cuda import NLDModel, _library, ops

HAS_CUDA = torch.cuda.is_available() and bool(_library.C.cuda_archs())
DEVICES = ["emulated", "cuda"] if HAS_CUDA else ["emulated"]
MODES: list[tuple[str, dict[str, Any]]] = [
    ("ar", {}),
    ("linear_spec", {"block_length": 6}),
    ("linear_spec", {"block_length": 6, "temperature": 0.8, "seed": 1}),
    ("quadratic_spec", {"block_length": 3}),
    ("diffusion", {"block_length": 8}),
]


@cache
def on_cpu() -> NLDModel:
    return nld_cuda.load("nld-tiny", device="cpu")


@cache
def prompts() -> list[str]:
    """Three prompts of different lengths."""
    lines = (nld_cuda.api.ASSETS / "nld-tiny" / "heldout.jsonl").read_text().splitlines()
    found = sorted((json.loads(line)["prompt"] for line in lines), key=len)
    return [found[0], found[len(found) // 3], found[len(found) // 2]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode,options", MODES, ids=lambda v: str(v))
def test_equals_the_cpu(
    mode: str, options: dict[str, Any], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**options, "max_new_tokens": 48}
    expected = nld_cuda.generate(on_cpu(), prompts(), mode, **options)
    assert all(len(tokens) > 3 for tokens in expected.tokens)
    planned = 0
    if device == "emulated":
        emulated.configure()
        monkeypatch.setattr(_library, "nld", emulated.Ops())
        model = on_cpu()
        monkeypatch.setattr(model, "plans_attention", True)
    else:
        model = nld_cuda.load("nld-tiny", device="cuda")
        assert model.plans_attention
    make_plan = ops.attention_plan

    def count(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal planned
        planned += 1
        return make_plan(*args, **kwargs)

    monkeypatch.setattr(ops, "attention_plan", count)
    actual = nld_cuda.generate(model, prompts(), mode, **options)
    assert actual.tokens == expected.tokens
    assert planned == sum(actual.stats.batch_forwards.values()), (
        "one plan a forward, for all its layers"
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "mode,options", [m for m in MODES if m[0] != "diffusion" and "temperature" not in m[1]]
)
def test_tensor_cores_emit_the_best_tokens(
    mode: str, options: dict[str, Any], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each token's logit, by a dense float32 pass over the text, is the largest or nearly so."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64}
    tiny = tiny_model(dtype=torch.bfloat16, **heads)
    model = tiny.model
    if device == "emulated":
        emulated.configure()
        monkeypatch.setattr(_library, "nld", emulated.Ops())
        monkeypatch.setattr(model, "plans_attention", True)
    else:
        model = copy.deepcopy(model).to("cuda")
    prompts = [prompt(n, 61) for n in (5, 70)]
    emitted = nld_cuda.generate(
        model, prompts, mode, max_new_tokens=12, eos_token_id=(), **options
    ).tokens
    for start, tokens in zip(prompts, emitted, strict=True):
        assert len(tokens) == 12
        text = start + tokens
        causal = torch.ones(len(text), len(text)).tril() > 0
        logits = tiny.logits()(text, list(range(len(text))), causal, None)[len(start) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(tokens)[:, None])
        short_of = logits.max(dim=1, keepdim=True).values - chosen
        assert short_of.max() <= 0.1 * logits.std(), "no rounding error picks such a token"
