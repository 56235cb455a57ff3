"""Whole generations of the packaged model on CUDA kernels: token for token what the CPU says."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch

import emulated
import nld_cuda
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
        monkeypatch.setattr(ops, "_nld", emulated.Ops())
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
