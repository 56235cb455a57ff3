"""The theorems behind verify_: whatever is drafted, the emitted tokens follow the target.

Tiny vocabularies, tens of thousands of requests (one seed each) in one call, chi-square tests with
a false-alarm rate of 1e-5; seeds are fixed, so a test passes always or never. The emulator is too
slow for that: it verifies the first 150 requests, which must end as on the CPU.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from compare import assert_equal
from nld_cuda import ops, reference
from nld_cuda.ops import VerifyMode, VerifyResult

VOCAB, REQUESTS = 6, 30000
POSITIONAL = (
    "logits", "block_tokens", "cu_seqlens", "verify_mode", "out_tokens", "out_lens", "max_out_lens",
    "next_tokens", "seq_lens", "done",
)  # fmt: skip
EMULATED = 150  # requests that the emulator verifies
SAMPLE, DRAFT = reference.SAMPLE, reference.DRAFT
ALL_ALLOWED = torch.ones(VOCAB, dtype=torch.bool)


def chi_square(tokens: Tensor, probs: Tensor) -> float:
    """Return chi-square of the counts of `tokens` over its limit at false-alarm rate 1e-5."""
    expected = probs.double().flatten() * tokens.numel()
    counts = torch.bincount(tokens.flatten(), minlength=expected.numel()).double()
    assert counts[expected == 0].sum() == 0, "a token of probability 0 was emitted"
    possible = expected > 0
    assert expected[possible].min() > 10, "the test needs more draws"
    statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum().item()
    spread = 2 / (9 * (int(possible.sum()) - 1))  # Wilson-Hilferty
    limit = (int(possible.sum()) - 1) * (1 - spread + 4.265 * math.sqrt(spread)) ** 3
    return statistic / limit


def assert_rate(hits: Tensor, probability: float) -> None:
    """Require a binomial rate within 4.5 standard deviations."""
    deviation = math.sqrt(probability * (1 - probability) / hits.numel())
    assert abs(hits.double().mean().item() - probability) < 4.5 * deviation


def verify(
    mode: VerifyMode,
    logits: Tensor,
    block_tokens: Tensor,
    seeds: Tensor,
    place: int,
    *,
    temperature: float = 1.0,
    draft_probs: Tensor | None = None,
    banned: Tensor | None = None,
    backend: Any = None,
) -> tuple[Tensor, VerifyResult]:
    """Verify n rows of every request; logits [requests, n, vocab], block_tokens [requests, n]."""
    requests, n = block_tokens.shape

    def run(op: Any, count: int, device: str) -> tuple[Tensor, VerifyResult]:
        rows, zeros = count * n, torch.zeros(count, dtype=torch.int32)
        probs = None if draft_probs is None else draft_probs.reshape(-1, VOCAB)[:rows]
        arguments = {
            "logits": logits.reshape(-1, VOCAB)[:rows],
            "block_tokens": block_tokens.reshape(-1)[:rows],
            "cu_seqlens": torch.arange(0, rows + 1, n, dtype=torch.int32),
            "verify_mode": torch.full((count,), int(mode), dtype=torch.int32),
            "out_tokens": torch.full((count, n), -1),
            "out_lens": zeros.clone(),
            "max_out_lens": zeros + n,
            "next_tokens": torch.zeros(count, dtype=torch.int64),
            "seq_lens": zeros + place + n,
            "done": torch.zeros(count, dtype=torch.bool),
            "positions": (torch.arange(rows) % n + place).int(),
            "temperature": torch.full((count,), temperature),
            "seed": seeds[:count],
            "draft_probs": probs,
            "banned_token_ids": banned,
        }
        arguments = {k: None if v is None else v.to(device) for k, v in arguments.items()}
        counts = VerifyResult(*torch.empty((2, count), dtype=torch.int32, device=device))
        positional = [arguments.pop(name) for name in POSITIONAL]
        op(*positional, **arguments, **counts._asdict())
        return positional[4].cpu(), VerifyResult(*(t.cpu() for t in counts))

    if backend is None or backend.name != "emulated":
        return run(ops.verify_, requests, "cpu" if backend is None else backend.device)
    out, counts = run(torch.ops.nld.verify_, requests, "cpu")
    some, some_counts = run(ops.verify_, EMULATED, "cpu")
    assert_equal(some, out[:EMULATED], "tokens")
    for name, value in some_counts._asdict().items():
        assert_equal(value, getattr(counts, name)[:EMULATED], name)
    return out, counts


def draw(logits: Tensor, seeds: Tensor, place: int, purpose: int) -> Tensor:
    """Draw one token per request as the decoder draws drafts; logits [requests, vocab]."""
    places = torch.full_like(seeds, place)
    heat = torch.ones(len(seeds))
    return reference.draw_tokens(logits, heat, seeds, places, purpose, ALL_ALLOWED)


SEEDS = torch.arange(REQUESTS) * 7919 + 12345
TARGET = torch.tensor([0.9, -0.4, 0.2, -1.6, 0.6, -0.7])  # logits
DRAFT_LOGITS = torch.tensor([-0.5, 0.3, 0.8, -0.9, -0.3, 0.5])
P, Q = torch.softmax(TARGET, -1), torch.softmax(DRAFT_LOGITS, -1)


@functools.cache
def block_of_two(purpose: int, from_target: bool = False) -> Tensor:
    """Return [requests, 2]: a seed token at place 50 and a draft at 51, drawn from Q (or P)."""
    logits = (TARGET if from_target else DRAFT_LOGITS).expand(REQUESTS, VOCAB)
    drafts = draw(logits, SEEDS, 51, purpose)
    return torch.stack((torch.zeros_like(drafts), drafts), dim=1)


def rows_of(values: Tensor, n: int) -> Tensor:
    return values.expand(REQUESTS, n, VOCAB)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_sampled_steps(temperature: float, backend) -> None:
    start = torch.zeros(REQUESTS, 1, dtype=torch.int64)
    p = torch.softmax(TARGET / temperature, -1)
    out, _ = verify(
        VerifyMode.SAMPLED,
        rows_of(TARGET, 1),
        start,
        SEEDS,
        41,
        temperature=temperature,
        backend=backend,
    )
    assert chi_square(out, p) < 1
    assert chi_square(out, torch.softmax(TARGET / (temperature * 1.2), -1)) > 1, "no power"
    out, _ = verify(
        VerifyMode.SAMPLED, rows_of(TARGET, 1), start, SEEDS, 7,
        temperature=temperature, banned=torch.tensor([4, -1, 99]),
        backend=backend,
    )  # fmt: skip
    p[4] = 0
    assert chi_square(out, p / p.sum()) < 1


def test_greedy_is_exact() -> None:
    start = torch.zeros(REQUESTS, 1, dtype=torch.int64)
    assert (verify(VerifyMode.GREEDY, rows_of(TARGET, 1), start, SEEDS, 3)[0] == 0).all()


@pytest.mark.parametrize("one_hot", [False, True])
def test_rejection(one_hot: bool, backend) -> None:
    """The first token follows p; drafts are kept with probability sum min(p, q)."""
    block = block_of_two(DRAFT)
    drafts = block[:, 1]
    assert chi_square(drafts, Q) < 1
    probs = None if one_hot else rows_of(Q, 2)
    out, counts = verify(
        VerifyMode.REJECTION,
        rows_of(TARGET, 2),
        block,
        SEEDS,
        50,
        draft_probs=probs,
        backend=backend,
    )
    accepted = counts.num_accepted == 1
    assert chi_square(out[:, 0], P) < 1
    assert chi_square(out[:, 0], 0.95 * P + 0.05 * Q) > 1, "no power"
    assert chi_square(out[accepted, 1], P) < 1, "the bonus after an accepted draft"
    assert (out[accepted, 0] == drafts[accepted]).all()
    if one_hot:  # the draft counts as given: the output follows p for each of them
        assert_rate(accepted, (P * Q).sum().item())
        for token in range(VOCAB):
            assert chi_square(out[drafts == token, 0], P) < 1
    else:
        assert_rate(accepted, torch.minimum(P, Q).sum().item())
        residual = (P - Q).clamp_min(0)
        assert chi_square(out[~accepted, 0], residual / residual.sum()) < 1


def test_rejection_with_banned_ids(backend) -> None:
    p = P.clone()
    p[[0, 2, 3]] = 0  # the first id, and two side by side
    p /= p.sum()
    out, counts = verify(
        VerifyMode.REJECTION, rows_of(TARGET, 2), block_of_two(DRAFT), SEEDS, 50,
        draft_probs=rows_of(Q, 2), banned=torch.tensor([3, 0, 2]),
        backend=backend,
    )  # fmt: skip
    assert chi_square(out[:, 0], p) < 1
    assert_rate(counts.num_accepted == 1, torch.minimum(p, Q).sum().item())


def test_acceptance_of_the_ways_to_draft() -> None:
    """Rejection keeps more than sample-and-match; drafts that share the noise come close to it."""
    rates = {}
    for name, mode, purpose in (
        ("rejection", VerifyMode.REJECTION, DRAFT),
        ("independent", VerifyMode.SAMPLED, DRAFT),
        ("coupled", VerifyMode.SAMPLED, SAMPLE),
    ):
        block = block_of_two(purpose)
        out, counts = verify(mode, rows_of(TARGET, 2), block, SEEDS, 50, draft_probs=rows_of(Q, 2))
        assert chi_square(out[:, 0], P) < 1
        rates[name] = counts.num_accepted.double().mean().item()
    assert abs(rates["independent"] - (P * Q).sum().item()) < 0.015
    assert rates["rejection"] > rates["coupled"] > rates["independent"] + 0.2


@pytest.mark.parametrize("mode", [VerifyMode.SAMPLED, VerifyMode.REJECTION])
def test_two_tokens_follow_the_joint_distribution(mode: VerifyMode) -> None:
    """Speculative cycles until two tokens are out: they follow p(first) * p(second | first)."""
    first, second = torch.randn(VOCAB), torch.randn(VOCAB, VOCAB)
    draft_first, draft_second = first + torch.randn(VOCAB), second + torch.randn(VOCAB, VOCAB)
    one = draw(draft_first.expand(REQUESTS, VOCAB), SEEDS, 51, DRAFT)
    two = draw(draft_second[one], SEEDS, 52, DRAFT)
    block = torch.stack((torch.zeros_like(one), one, two), dim=1)
    # row 0 judges the first draft, row 1 the second given the first, row 2 draws a third token
    rows = torch.stack((first.expand(REQUESTS, VOCAB), second[one], second[two]), dim=1)
    drafted_by = torch.stack(
        (first.expand_as(second[one]), draft_first.expand_as(second[one]), draft_second[one]), 1
    )
    out, counts = verify(mode, rows, block, SEEDS, 50, draft_probs=torch.softmax(drafted_by, -1))
    pairs = out[:, :2].clone()
    short = counts.num_emitted == 1  # the next cycle: a plain step from the bonus token
    assert 0.2 < short.double().mean() < 0.8
    rest, _ = verify(mode, second[pairs[short, 0]][:, None], pairs[short, :1], SEEDS[short], 51)
    pairs[short, 1] = rest[:, 0]
    joint = torch.softmax(first, -1)[:, None] * torch.softmax(second, -1)
    assert chi_square(pairs[:, 0] * VOCAB + pairs[:, 1], joint) < 1
    assert chi_square(pairs[:, 0] * VOCAB + pairs[:, 1], joint.roll(1, 1)) > 1, "no power"


def test_equal_distributions_accept_everything(backend) -> None:
    """With q = p rounding alone may refuse a draft: about never, and the token is still sound."""
    block = block_of_two(DRAFT, from_target=True)
    out, counts = verify(
        VerifyMode.REJECTION,
        rows_of(TARGET, 2),
        block,
        SEEDS,
        50,
        draft_probs=rows_of(P, 2),
        backend=backend,
    )
    assert counts.num_accepted.sum() >= REQUESTS - 3
    assert chi_square(out[:, 0], P) < 1


def test_no_residual_mass_draws_from_the_target(backend) -> None:
    """q = 1 for every id: when a draft is refused, max(p - q, 0) is zero and p takes its place."""
    block = torch.tensor([0, 3]).repeat(REQUESTS, 1)
    out, counts = verify(
        VerifyMode.REJECTION, rows_of(TARGET, 2), block, SEEDS, 50,
        draft_probs=torch.ones(REQUESTS, 2, VOCAB),
        backend=backend,
    )  # fmt: skip
    assert_rate(counts.num_accepted == 1, P[3].item())
    assert chi_square(out[counts.num_accepted == 0, 0], P) < 1
