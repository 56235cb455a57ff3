"""The random numbers: known answers, equal bits on every backend, the right distributions."""

from __future__ import annotations

import pytest
import torch

from compare import assert_equal
from nld_cuda import ops, reference

ALL_ONES = 0xFFFFFFFF

# Known-answer vectors of the authors' Random123 package, philox4x32-10: counter, key, words.
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([ALL_ONES] * 4, [ALL_ONES] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize("counter,key,words", KNOWN_ANSWERS)
def test_known_answers(counter: list, key: list, words: list) -> None:
    assert_equal(
        reference.philox_words(torch.tensor(key), torch.tensor(counter)),
        torch.tensor(words),
        "words",
    )


def test_tokens_use_the_documented_counter() -> None:
    seed, position, purpose, token = -0x0123456789ABCDEF, 4321, 2, 1027
    got = reference.philox_tokens(
        torch.tensor([seed]), torch.tensor([position]), purpose, token + 1
    )[0, token]
    key = torch.tensor([seed & ALL_ONES, (seed >> 32) & ALL_ONES])
    expected = reference.philox_words(key, torch.tensor([token // 4, position, purpose, 0]))[
        token % 4
    ]
    assert_equal(got, expected, "word")


@pytest.mark.parametrize("vocab", [1, 3, 4, 31, 32, 33, 5003, 20011])
def test_noise_has_the_bits_of_the_reference(vocab: int, backend) -> None:
    rows = 5 if vocab < 100 else 2
    seed = torch.tensor([0x0123456789ABCDEF, -1, 0, 7, -(2**63)])[:rows]
    positions = torch.tensor([2**31 - 1, 70000, 0, 1, -5], dtype=torch.int32)[:rows]
    for purpose in ops.Purpose:
        noise = torch.full((rows, vocab + 3), torch.nan, device=backend.device)
        ops.gumbel_noise_(
            noise[:, :vocab], seed.to(backend.device), positions.to(backend.device), purpose
        )
        expected = torch.full((rows, vocab + 3), torch.nan)
        reference.gumbel_noise_(expected[:, :vocab], seed, positions, purpose)
        assert_equal(noise, expected, f"noise, {purpose.name}")


def test_gumbel_accuracy_over_all_words() -> None:
    ends = torch.arange(100_000)
    words = torch.cat([ends, 2**31 - 50_000 + ends, 2**32 - 1 - ends, torch.arange(0, 2**32, 4093)])
    noise = reference.gumbel(words)
    u = (words.double() + 0.5) / 2**32
    exact = -torch.log(-torch.log1p(-u))
    assert (
        noise.isfinite().all() and noise.min() > -3.14 and noise.max() < 22.88
    )  # kMaxGumbel of philox.h
    spacing = torch.finfo(torch.float32).eps * exact.abs().clamp(min=0.5)
    assert ((noise.double() - exact).abs() / spacing).max() < 2.5
    ordered = noise[words.argsort()]
    assert (ordered[1:] <= ordered[:-1]).all(), "noise must not rise with the word"


def test_exact_log_accuracy() -> None:
    x = torch.logspace(-37, 38, 400_000, dtype=torch.float64).float()
    exact = x.double().log()
    error = (reference.exact_log(x).double() - exact).abs() / exact.abs().clamp(min=1)
    assert error.max() < 1.5e-7


def test_uniform_is_below_one_and_even() -> None:
    words = reference.philox_tokens(
        torch.tensor([5]), torch.tensor([9]), ops.Purpose.ACCEPT, 200_000
    )
    u = reference.uniform(words)
    assert u.min() >= 0 and u.max() < 1
    assert reference.uniform(torch.tensor([2**32 - 1])).item() == 1 - 2**-24
    counts = torch.histc(u, bins=64, min=0, max=1)
    assert (
        chi_square(counts, torch.full((64,), 1 / 64)) < 120
    )  # 63 degrees of freedom: p about 2e-5


def chi_square(counts: torch.Tensor, probs: torch.Tensor) -> float:
    expected = counts.sum() * probs
    return float(((counts - expected) ** 2 / expected).sum())


def num_draws(backend) -> int:
    """A CTA per draw takes its time under the emulator."""
    return 600 if backend.name.startswith("emulated") else 20_000


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.slow_emulated
def test_draws_follow_the_tempered_softmax(temperature: float, backend) -> None:
    rows, vocab = num_draws(backend), 13
    logits = torch.randn(vocab) * 2
    draws = draw(logits.expand(rows, vocab).contiguous(), temperature, backend.device)
    counts = torch.bincount(draws, minlength=vocab).float()
    probs = (logits / temperature).softmax(-1)
    keep = probs > 1e-3
    assert (
        chi_square(counts[keep], probs[keep] / probs[keep].sum()) < 45
    )  # at most 12 degrees: p about 1e-5


@pytest.mark.slow_emulated
def test_streams_are_independent(backend) -> None:
    """Neighbouring positions, purposes and seeds: pairs of draws fill a 6 x 6 table evenly."""
    rows = num_draws(backend)
    zeros = torch.zeros(rows, 6)
    first = draw(zeros, 1.0, backend.device)
    others = {
        "position": draw(zeros, 1.0, backend.device, first_position=1),
        "purpose": draw(zeros, 1.0, backend.device, purpose=ops.Purpose.DRAFT),
        "seed": draw(zeros, 1.0, backend.device, seed=12),
    }
    for name, other in others.items():
        counts = torch.bincount(first * 6 + other, minlength=36).float()
        assert chi_square(counts, torch.full((36,), 1 / 36)) < 90, (
            name
        )  # 35 degrees of freedom: p about 1e-6


def draw(
    logits, temperature, device, seed=11, first_position=0, purpose=ops.Purpose.SAMPLE
) -> torch.Tensor:
    rows = logits.shape[0]
    ints = {"dtype": torch.int32, "device": device}
    result = ops.commit_(
        logits.to(device), torch.zeros(rows, dtype=torch.int64, device=device),
        torch.ones(rows, dtype=torch.bool, device=device), torch.tensor([0, rows], **ints),
        torch.tensor([ops.CommitRule.ALL], **ints), torch.zeros(1, device=device), mask_token_id=-1,
        temperature=torch.tensor([temperature], device=device),
        seed=torch.tensor([seed], device=device),
        positions=torch.arange(first_position, first_position + rows, **ints), purpose=purpose,
    )  # fmt: skip
    return result.candidates.cpu()


def test_noise_opcheck_and_bad_arguments() -> None:
    seed, positions = torch.tensor([3, 4]), torch.tensor([1, 2], dtype=torch.int32)
    torch.library.opcheck(torch.ops.nld.gumbel_noise_, (torch.empty(2, 9), seed, positions, 1))
    with pytest.raises(RuntimeError, match=r"gumbel_noise_: purpose must be 0 \(sample\).*, got 4"):
        ops.gumbel_noise_(torch.empty(2, 9), seed, positions, 4)
    with pytest.raises(RuntimeError, match="gumbel_noise_: seed must have size 3"):
        ops.gumbel_noise_(torch.empty(3, 9), seed, positions, 0)
