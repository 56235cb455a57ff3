"""Sampled speculation follows the autoregressive distribution: the theorem, by counting.

The model is so small that the exact distribution of the first tokens follows from the oracle's
logits; thousands of requests of one batch are drawn and counted against it.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import emulated
import nld_cuda
from decode_cases import TinyModel, tiny_model
from nld_cuda import _library
from nld_cuda.decode import linear_spec
from nld_cuda.ops import Purpose
from oracle import causal_mask

VOCAB, NEW, DRAWS, HEAT = 5, 3, 3000, 3.0
PROMPT = [1, 4, 0]


@pytest.fixture(scope="module")
def tiny() -> TinyModel:
    return tiny_model(VOCAB, layers=1)


@pytest.fixture(scope="module")
def exact(tiny: TinyModel) -> Tensor:
    """Probability of every sequence of NEW tokens, in the order of `itertools.product`."""
    logits = tiny.logits()
    prefixes = [p for n in range(NEW) for p in itertools.product(range(VOCAB), repeat=n)]
    following = {}
    for prefix in prefixes:
        tokens = PROMPT + list(prefix)
        rows = logits(tokens, list(range(len(tokens))), causal_mask(len(tokens)), None)
        following[prefix] = torch.softmax(rows[-1].double() / HEAT, -1)
    return torch.tensor(
        [
            torch.stack([following[s[:i]][s[i]] for i in range(NEW)]).prod()
            for s in itertools.product(range(VOCAB), repeat=NEW)
        ]
    )


def draw(tiny: TinyModel, mode: str, seed: int, **options: Any) -> nld_cuda.GenerateResult:
    return nld_cuda.generate(
        tiny.model, [PROMPT] * DRAWS, mode, max_new_tokens=NEW, temperature=HEAT, seed=seed,
        eos_token_id=(), page_size=8, **options,
    )  # fmt: skip


def chi_square(result: nld_cuda.GenerateResult, exact: Tensor) -> float:
    """Normalised: about standard normal where the draws follow the distribution."""
    places = torch.tensor(result.tokens) @ torch.tensor([VOCAB**2, VOCAB, 1])
    counts = torch.bincount(places, minlength=VOCAB**NEW).double()
    expected = exact * len(result.tokens)
    rare = expected < 5  # pooled, as the test wants
    if rare.any():
        counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = len(expected) - 1
    return (statistic - freedom) / (2 * freedom) ** 0.5


SAMPLERS: list[tuple[str, dict[str, Any]]] = [
    ("ar", {}),
    ("linear_spec", {"block_length": 4}),
    ("linear_spec", {"block_length": 3, "spec_sampling": "rejection"}),
    ("linear_spec", {"block_length": 3, "spec_sampling": "rejection", "lora": False}),
    ("quadratic_spec", {"block_length": 2}),
    ("quadratic_spec", {"block_length": 3, "spec_sampling": "rejection"}),
]


@pytest.mark.parametrize("mode,options", SAMPLERS, ids=str)
def test_sampled_modes_follow_the_ar_distribution(
    tiny: TinyModel, exact: Tensor, mode: str, options: dict[str, Any]
) -> None:
    assert abs(float(exact.sum()) - 1) < 1e-9
    assert (exact > 1e-3).sum() > 30  # many sequences are likely: the test has something to see
    assert abs(chi_square(draw(tiny, mode, 11, **options), exact)) < 4


@pytest.mark.parametrize("mode,options", [*SAMPLERS, ("diffusion", {"block_length": 3})], ids=str)
def test_emulated_kernels_draw_the_same_tokens(
    tiny: TinyModel, mode: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers decide on CUDA: what was counted above holds there, too."""
    monkeypatch.setitem(globals(), "DRAWS", 30)
    expected = draw(tiny, mode, 17, **options)
    library = emulated.load()
    library.configure()
    monkeypatch.setattr(_library, "nld", library.ops)
    actual = draw(tiny, mode, 17, **options)
    assert actual.tokens == expected.tokens
    assert len(set(map(tuple, actual.tokens))) > 15


def test_the_count_would_notice_a_wrong_distribution(tiny: TinyModel, exact: Tensor) -> None:
    """Diffusion fills places independently: another distribution, by as many draws."""
    result = draw(tiny, "diffusion", 11, block_length=3, rule="all")
    assert chi_square(result, exact) > 20
    # and so would accepting drafts unseen
    assert chi_square(draw(tiny, "ar", 11), exact.roll(1)) > 20


def test_rejection_accepts_more_than_sample_and_match(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """min(1, p / q) beats two independent draws that happen to agree; shared noise helps, too."""

    def accepted(**options: Any) -> float:
        stats = draw(tiny, "linear_spec", 5, block_length=3, lora=False, **options).stats
        # The first draft of a cycle only: later ones are judged less often where few are accepted.
        histogram = stats.accept_len_histogram
        return sum(histogram[1:]) / sum(histogram)

    coupled = accepted()
    rejection = accepted(spec_sampling="rejection")
    make = linear_spec.LinearSpec.__init__

    def independent(self: linear_spec.LinearSpec, *args: Any, **kw: Any) -> None:
        make(self, *args, **kw)
        self._purpose = Purpose.DRAFT

    monkeypatch.setattr(linear_spec.LinearSpec, "__init__", independent)
    matching = accepted()
    noise = 4 * (0.25 / DRAWS) ** 0.5
    assert rejection > matching + noise
    assert coupled > matching + noise


def test_rejection_acceptance_is_the_overlap_of_the_distributions(tiny: TinyModel) -> None:
    """The first draft is accepted with probability sum(min(p, q)), given the first token."""
    logits = tiny.logits()
    n = len(PROMPT)
    result = nld_cuda.generate(
        tiny.model, [PROMPT] * DRAWS, "linear_spec", max_new_tokens=2, temperature=HEAT, seed=3,
        eos_token_id=(), block_length=2, spec_sampling="rejection", lora=False,
    )  # fmt: skip
    first = torch.tensor([t[0] for t in result.tokens])
    overlap = torch.zeros(VOCAB, dtype=torch.float64)
    for token in range(VOCAB):
        row = logits([*PROMPT, token], list(range(n + 1)), causal_mask(n + 1), None)[-1]
        p = torch.softmax(row.double() / HEAT, -1)
        mask = causal_mask(n + 2)
        mask[n:] = True
        row = logits([*PROMPT, token, 3], list(range(n + 2)), mask, None)[-1].double()
        row[3] = -torch.inf  # never drafts the mask
        overlap[token] = torch.minimum(p, torch.softmax(row / HEAT, -1)).sum()
    want = float(overlap[first].mean())
    histogram = result.stats.accept_len_histogram
    got = histogram[1] / sum(histogram)
    assert sum(histogram) == DRAWS
    assert abs(got - want) < 4 * (want * (1 - want) / DRAWS) ** 0.5
    assert 0.1 < want < 0.97
