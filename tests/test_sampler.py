"""commit_ against its reference and brute force: rules, ties, strange logits, draws, EOS freeze."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compare import COMPILE_BACKEND, assert_accurate, assert_equal
from nld_cuda import _library, ops, reference
from nld_cuda.ops import CommitRule

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MASK = 3
WRITTEN = (
    "block_tokens",
    "is_masked",
    "candidates",
    "confidence",
    "num_committed",
    "num_remaining",
    "done",
)


@dataclass(frozen=True)
class Case:
    lens: tuple[int, ...]
    vocab: int
    rules: tuple[CommitRule, ...] = (CommitRule.THRESHOLD,)
    sampled: bool = False
    extra_rows: int = 0
    options: dict = field(default_factory=dict)


EVERY_RULE = tuple(CommitRule)
CASES = [
    Case((1,), 5),
    Case((33,), 113, (CommitRule.THRESHOLD,)),
    Case((7, 0, 32, 1, 12), 203, EVERY_RULE, extra_rows=3),
    Case((7, 0, 32, 1, 12), 203, EVERY_RULE, sampled=True),
    Case((4, 3, 5, 2, 6), 2049, EVERY_RULE, sampled=True),
    Case(
        (1, 1, 1), 16384 + 5, (CommitRule.REVISE, CommitRule.ENTROPY, CommitRule.ALL), sampled=True
    ),
    Case((), 64),
    Case((0, 0), 64),
]


def make(case: Case, dtype: torch.dtype = torch.float32) -> dict:
    rows, batch = sum(case.lens) + case.extra_rows, len(case.lens)
    rules = [case.rules[b % len(case.rules)] for b in range(batch)]
    # Some rows are peaked and some flat, so that confidences spread over (0, 1).
    logits = torch.randn(rows, case.vocab) * torch.rand(rows, 1) * 2
    top = torch.randint(0, case.vocab, (rows,))
    logits[torch.arange(rows), top] += torch.rand(rows) * 12
    held = torch.where(torch.rand(rows) < 0.5, top, torch.randint(0, case.vocab, (rows,)))
    is_masked = torch.rand(rows) < 0.7
    strided = torch.full((rows, case.vocab + 5), torch.nan, dtype=dtype)
    strided[:, : case.vocab] = logits.to(dtype)
    strided[:, : case.vocab][~is_masked & (torch.rand(rows) < 0.3)] = (
        torch.nan
    )  # rows no rule but REVISE may read
    data = {
        "logits": strided[:, : case.vocab],
        "block_tokens": torch.where(is_masked, MASK, held),
        "is_masked": is_masked,
        "cu_seqlens": torch.tensor([0, *case.lens]).cumsum(0).int(),
        "rule": torch.tensor(rules, dtype=torch.int32),
        "threshold": torch.rand(batch) * 0.6
        + torch.tensor([3.0 * (r == CommitRule.ENTROPY) for r in rules]),
        "quota": torch.randint(0, 5, (batch,), dtype=torch.int32),
        "revise_threshold": torch.rand(batch) * 0.5,
        "is_fixed": torch.rand(rows) < 0.2,
        "banned_token_ids": torch.tensor([MASK, -1, 0, case.vocab + 7]),
        "eos_token_ids": torch.stack([top[: 2 * batch : 2], torch.full((batch,), -1)], 1)[:batch]
        if rows >= 2 * batch and batch
        else torch.full((batch, 2), -1),
    }
    if case.sampled:
        data["temperature"] = torch.tensor([0.7, 1.0, 0.0, 1.5, 0.3])[:batch].contiguous()
        data["seed"] = torch.randint(-(2**62), 2**62, (batch,))
        data["positions"] = torch.randint(0, 10**6, (rows,), dtype=torch.int32)
    return data | case.options


POSITIONAL = ("logits", "block_tokens", "is_masked", "cu_seqlens", "rule", "threshold")


def run(fn, data: dict, device: str = "cpu", **kw) -> dict:
    """Call on copies; return the result with the two mutated arguments."""
    moved = {n: t.to(device) for n, t in data.items()}  # keeps the strides of logits
    moved |= {n: moved[n].clone() for n in ("block_tokens", "is_masked")}
    named = {n: t for n, t in moved.items() if n not in POSITIONAL}
    result = fn(*(moved[n] for n in POSITIONAL), mask_token_id=MASK, **named, **kw)
    return dict(zip(WRITTEN, (moved["block_tokens"], moved["is_masked"], *result), strict=True))


def assert_same_result(actual: dict, plain: dict, exact: dict) -> None:
    for name in WRITTEN:
        if name == "confidence":
            assert_accurate(actual[name], exact[name], plain[name], name)
        else:
            assert_equal(actual[name], plain[name], name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_reference(case: Case, dtype: torch.dtype, backend) -> None:
    data = make(case, dtype)
    plain = run(reference.commit_, data)
    exact = run(reference.commit_, data | {"logits": data["logits"].double()})
    assert_same_result(run(ops.commit_, data, backend.device), plain, exact)


def test_rows_of_nobody_are_untouched(backend) -> None:
    data = make(Case((3, 2), 40, extra_rows=4))
    data["is_masked"][:] = True
    data["candidates"] = torch.full((9,), -7)
    data["confidence"] = torch.full((9,), -7.0)
    result = run(ops.commit_, data, backend.device)
    for name in ("candidates", "confidence"):
        assert (result[name][5:] == -7).all() and (result[name][:5] != -7).all(), name
    assert_equal(result["block_tokens"][5:], data["block_tokens"][5:], "block_tokens")
    assert result["is_masked"][5:].all()


def brute_force_rule(
    rule: CommitRule, confidence: list, entropy: list, threshold: float, quota: int
) -> set[int]:
    """Which of the masked rows (all given here) a rule reveals, straight from the design page."""
    rows = range(len(confidence))
    by_confidence = sorted(rows, key=lambda i: (-confidence[i], i))
    if rule == CommitRule.QUOTA:
        return set(by_confidence[: max(quota, 1)])
    if rule == CommitRule.ALL:
        return set(rows)
    if rule == CommitRule.ENTROPY:
        by_entropy = sorted(rows, key=lambda i: (entropy[i], i))
        fitting = [
            k
            for k in range(1, len(rows) + 1)
            if sum(entropy[i] for i in by_entropy[: k - 1]) <= threshold
        ]
        return set(by_entropy[: max(fitting, default=1)])
    return {i for i in rows if confidence[i] >= threshold} | set(by_confidence[:1])


levels = st.lists(st.integers(0, 6), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(
    peaks=levels,
    rule=st.sampled_from(EVERY_RULE),
    cut=st.integers(0, 13),
    quota=st.integers(-1, 14),
)
def test_rules_against_brute_force(
    peaks: list[int], rule: CommitRule, cut: int, quota: int
) -> None:
    """Rows with one raised logit of a few levels: many exact ties in confidence and entropy."""
    rows, vocab = len(peaks), 20
    logits = torch.zeros(rows, vocab)
    logits[:, 7] = torch.tensor(peaks).float()
    log_probs = logits.double().log_softmax(-1)
    entropy = (-(log_probs.exp() * log_probs).sum(-1)).tolist()
    data = {
        "logits": logits, "block_tokens": torch.full((rows,), MASK),
        "is_masked": torch.ones(rows, dtype=torch.bool),
        "cu_seqlens": torch.tensor([0, rows]).int(), "rule": torch.tensor([rule]).int(),
        "quota": torch.tensor([quota]).int(),
    }  # fmt: skip
    data["threshold"] = torch.zeros(1)
    confidence = run(ops.commit_, data)["confidence"].tolist()
    # Thresholds: at a margin for sums of entropies, exactly on a confidence otherwise.
    sums = torch.tensor(sorted(entropy)).cumsum(0).tolist()
    at = sums[cut % rows] + 1e-3 if rule == CommitRule.ENTROPY else confidence[cut % rows]
    data["threshold"] = torch.tensor([at if cut < 13 else -1.0])
    result = run(ops.commit_, data)
    revealed = set((~result["is_masked"]).nonzero()[:, 0].tolist())
    expected = brute_force_rule(rule, confidence, entropy, float(data["threshold"]), quota)
    assert revealed == expected
    assert int(result["num_committed"]) == len(expected)
    assert int(result["num_remaining"]) == rows - len(expected)
    assert bool(result["done"]) == (len(expected) == rows)


def small(
    logits: torch.Tensor, rule: CommitRule = CommitRule.ALL, threshold: float = 0.5, **options
) -> dict:
    """One request of masked rows."""
    rows = logits.shape[0]
    return {
        "logits": logits, "block_tokens": torch.full((rows,), MASK),
        "is_masked": torch.ones(rows, dtype=torch.bool),
        "cu_seqlens": torch.tensor([0, rows]).int(), "rule": torch.tensor([rule]).int(),
        "threshold": torch.tensor([threshold]),
    } | options  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [6, 37, 5000, 33000])
def test_strange_logits(vocab: int, dtype: torch.dtype, backend) -> None:
    inf, nan, last = torch.inf, torch.nan, vocab - 1
    logits = torch.full((8, vocab), -1.0)
    logits[0] = nan
    logits[1] = -inf
    logits[2, [2, 4]] = inf
    logits[3, [0, 1]] = torch.tensor([nan, 5.0])
    logits[4] = -inf
    logits[4, last] = -3.0
    logits[5, MASK] = inf  # banned
    logits[5, last] = 0.0
    logits[6] = -inf
    logits[6, MASK] = 1.0  # the only finite one is banned
    logits[7] = 2.0  # ties: lowest id
    data = small(logits.to(dtype))
    result = run(ops.commit_, data, backend.device)
    assert result["candidates"].tolist() == [0, 0, 2, 1, last, last, 0, 0]
    confidence = result["confidence"]
    assert_equal(confidence[[0, 1, 6]].cpu(), torch.zeros(3), "confidence of hopeless rows")
    assert confidence[2] == 0.5 and confidence[4] == 1.0 and confidence[5] == 0.0
    assert confidence[7].item() == pytest.approx(1 / vocab, rel=1e-5)
    plain, exact = (
        run(reference.commit_, data),
        run(reference.commit_, data | {"logits": data["logits"].double()}),
    )
    assert_same_result(result, plain, exact)
    # With noise the same rows are hopeless, and nothing is NaN.
    sampled = {
        "temperature": torch.tensor([0.5]),
        "seed": torch.tensor([1]),
        "positions": torch.arange(8).int(),
    }
    result, plain = (
        run(ops.commit_, data | sampled, backend.device),
        run(reference.commit_, data | sampled),
    )
    assert_equal(result["candidates"], plain["candidates"], "drawn candidates")
    assert not result["confidence"].isnan().any()


def test_hopeless_rows_come_last_but_do_come(backend) -> None:
    logits = torch.full((3, 9), -torch.inf)
    logits[1] = 0.0
    for rule in (CommitRule.THRESHOLD, CommitRule.QUOTA, CommitRule.ENTROPY):
        result = run(ops.commit_, small(logits, rule), backend.device)
        assert result["is_masked"].tolist() == [True, False, True], rule.name
        result = run(ops.commit_, small(logits[[0, 2]], rule), backend.device)
        assert result["is_masked"].tolist() == [False, True], rule.name


def far_logits(vocab: int) -> torch.Tensor:
    """Rows that climb, jump, start at -inf, lie far out: sums keep a running reference."""
    noise, climb = torch.randn(10, vocab), torch.linspace(-300, 300, vocab)
    noise[0] += 1000
    noise[1] -= 1000
    noise[2] += climb
    noise[3] -= climb
    noise[4, : vocab // 2] = -torch.inf
    noise[5, vocab - 1] = 900.0
    noise[6, : vocab // 3] = torch.finfo(torch.float32).min
    noise[7] = noise[7] * 1e3 + 5e6
    noise[8, vocab // 2] = 1e38
    noise[9, ::2] = torch.nan
    return noise


@pytest.mark.parametrize("vocab", [700, 2**14 + 2**12])
def test_logits_far_from_zero(vocab: int, backend) -> None:
    noise = far_logits(vocab)
    data = small(noise)
    plain = run(reference.commit_, data)
    exact = run(reference.commit_, data | {"logits": noise.double()})
    assert_same_result(run(ops.commit_, data, backend.device), plain, exact)


@pytest.mark.parametrize("vocab", [700, 2**14 + 2**12])
def test_entropy_to_four_digits(vocab: int, backend) -> None:
    """Of two rows the flat one is revealed only if the other has at most the threshold."""
    rows = torch.cat(
        [far_logits(vocab), torch.randn(6, vocab) * torch.linspace(0.5, 9, 6)[:, None]]
    )
    rows[2:4] /= 100  # climb slowly enough to keep some entropy
    log_probs = reference.clean_logits(rows).double().log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).nan_to_num(0.0).sum(-1)
    num = rows.shape[0]
    pairs = torch.stack([rows, torch.zeros(num, vocab)], 1).flatten(0, 1)
    margin = 1e-4 * entropy + 1e-5
    for threshold, revealed in ((entropy + margin, 2), (entropy - margin, 1)):
        data = small(pairs) | {
            "cu_seqlens": torch.arange(0, 2 * num + 1, 2).int(),
            "rule": torch.full((num,), CommitRule.ENTROPY).int(),
            "threshold": threshold.float(),
        }
        result = run(ops.commit_, data, backend.device)
        assert result["num_committed"].tolist() == [revealed] * num


def test_confidence_is_accurate_relative_to_its_size(backend) -> None:
    logits = torch.randn(40, 5001) * torch.linspace(0, 12, 40)[:, None] + 30
    exact = logits.double().softmax(-1).amax(-1)
    confidence = run(ops.commit_, small(logits), backend.device)["confidence"].cpu()
    error = (confidence.double() / exact - 1).abs().max()
    assert error < 4e-6  # equal logits on 4 lanes are the worst


@pytest.mark.slow_emulated
def test_ties_and_banned_ids_at_every_edge(backend) -> None:
    """Equal largest logits in one register, at the ends of chunks and slices; one banned."""
    if backend.name.startswith("cpu"):
        vocab = 16384 + 4096 + 5
        spots = [0, 1, 4, 2047, 2048, 2049, 5000, 5003, 16383, 16384, 18431, vocab - 2, vocab - 1]
    else:  # a thread's vectors lie 128 or 256 ids apart, a warp has 1024 ids, a CTA 8192
        vocab = 8192 + 1024 + 5
        spots = [0, 1, 256, 1023, 1024, 8191, 8192, vocab - 1]
    pairs = [(a, b) for a in spots for b in spots if a < b]
    logits = torch.zeros(len(pairs), vocab)
    for row, pair in enumerate(pairs):
        logits[row, list(pair)] = 5.0
    data = small(logits, banned_token_ids=torch.tensor([-1]))
    result = run(ops.commit_, data, backend.device)
    assert result["candidates"].tolist() == [a for a, _ in pairs]
    for spot in spots:
        data["banned_token_ids"] = torch.tensor([vocab, spot])
        expected = [b if a == spot else a for a, b in pairs]
        assert run(ops.commit_, data, backend.device)["candidates"].tolist() == expected, spot


def test_everything_banned_takes_id_0(backend) -> None:
    data = small(torch.randn(2, 4), banned_token_ids=torch.arange(4))
    result = run(ops.commit_, data, backend.device)
    assert result["candidates"].tolist() == [0, 0] and result["confidence"].tolist() == [0.0, 0.0]


def test_threshold_is_inclusive(backend) -> None:
    logits = torch.zeros(3, 4)
    logits[:, 0] = torch.tensor([9.0, 0.0, 9.0])
    confidence = run(ops.commit_, small(logits), backend.device)["confidence"]
    assert confidence[1] == 0.25
    at, above = 0.25, torch.tensor(0.25).nextafter(torch.tensor(1.0)).item()
    for threshold, left in ((at, 0), (above, 1)):
        result = run(ops.commit_, small(logits, CommitRule.THRESHOLD, threshold), backend.device)
        assert int(result["num_remaining"]) == left


def test_nan_threshold_still_commits_the_best(backend) -> None:
    for rule in (CommitRule.THRESHOLD, CommitRule.ENTROPY, CommitRule.REVISE):
        result = run(ops.commit_, small(torch.zeros(3, 5), rule, torch.nan), backend.device)
        assert result["is_masked"].tolist() == [False, True, True], rule.name


def test_revision_masks_again(backend) -> None:
    logits = torch.zeros(6, 8)
    logits[:, 5] = 10.0
    data = small(logits, CommitRule.REVISE, 0.9, revise_threshold=torch.tensor([0.5]))
    data["block_tokens"] = torch.tensor(
        [5, 6, 6, MASK, -1, 5]
    )  # -1: no token of the vocabulary is not believed
    data["is_masked"] = torch.tensor([False, False, False, True, False, False])
    data["is_fixed"] = torch.tensor([False, False, True, False, False, True])
    result = run(ops.commit_, data, backend.device)
    assert result["block_tokens"].tolist() == [5, MASK, 6, 5, MASK, 5]
    assert result["is_masked"].tolist() == [False, True, False, False, True, False]
    assert result["candidates"].tolist() == [5, 6, 6, 5, -1, 5]
    assert (
        result["confidence"][2] == 1.0
        and result["confidence"][4] == 0.0
        and result["confidence"][1] < 0.5
    )
    assert (int(result["num_committed"]), int(result["num_remaining"]), bool(result["done"])) == (
        1,
        2,
        False,
    )
    del data["revise_threshold"]  # default 0: nothing falls below it
    assert run(ops.commit_, data, backend.device)["is_masked"].sum() == 0


@pytest.mark.parametrize(
    "tokens,masked,fixed,expected",
    [
        ([5, 1, MASK, 1, MASK], [0, 0, 1, 0, 1], [0] * 5, [5, 1, 9, 9, 9]),  # row 2 commits 9 = EOS
        (
            [9, 1, MASK, 1, MASK],
            [0, 0, 1, 0, 1],
            [1, 0, 0, 0, 0],
            [9, 1, 9, 9, 9],
        ),  # a fixed EOS does not count
        ([MASK, 8, 1, 1, MASK], [1, 0, 0, 0, 1], [0] * 5, [9, 9, 9, 9, 9]),  # the first EOS counts
        (
            [1, 8, 1, MASK, MASK],
            [0, 0, 0, 1, 1],
            [0] * 5,
            [1, 8, 8, 8, 8],
        ),  # any id of the list; already there
    ],
)
def test_eos_freeze(tokens: list, masked: list, fixed: list, expected: list, backend) -> None:
    logits = torch.zeros(5, 12)
    logits[:, 9] = torch.tensor([8.0, 8.0, 8.0, 8.0, 1.0])
    data = small(
        logits, CommitRule.THRESHOLD, 0.9, eos_token_ids=torch.tensor([[-1, 9, 8]]),
        is_fixed=torch.tensor(fixed).bool(),
    )  # fmt: skip
    data |= {"block_tokens": torch.tensor(tokens), "is_masked": torch.tensor(masked).bool()}
    result = run(ops.commit_, data, backend.device)
    assert result["block_tokens"].tolist() == expected
    assert not result["is_masked"].any() and bool(result["done"])
    assert int(result["num_committed"]) == 1, "frozen rows are not counted"


def test_eos_right_of_a_mask_freezes_nothing(backend) -> None:
    logits = torch.zeros(4, 12)
    logits[2, 9] = 8.0
    data = small(logits, CommitRule.THRESHOLD, 0.9, eos_token_ids=torch.tensor([[9]]))
    result = run(ops.commit_, data, backend.device)
    assert result["block_tokens"].tolist() == [MASK, MASK, 9, MASK]
    assert int(result["num_remaining"]) == 3


def test_batch_equals_requests_alone(backend) -> None:
    case = Case((5, 9, 1, 7, 3), 3001, EVERY_RULE, sampled=True)
    data = make(case, torch.bfloat16)
    whole = run(ops.commit_, data, backend.device)
    bounds = data["cu_seqlens"].tolist()
    for b in range(len(case.lens)):
        own = slice(bounds[b], bounds[b + 1])
        per_row = ("logits", "block_tokens", "is_masked", "is_fixed", "positions")
        alone = {n: t[own] if n in per_row else t[b : b + 1] for n, t in data.items()}
        alone |= {
            "cu_seqlens": torch.tensor([0, case.lens[b]]).int(),
            "banned_token_ids": data["banned_token_ids"],
        }
        result = run(ops.commit_, alone, backend.device)
        for name in WRITTEN:
            part = (
                whole[name][own]
                if whole[name].numel() == sum(case.lens)
                else whole[name][b : b + 1]
            )
            assert_equal(result[name], part, f"{name} of request {b}")


@pytest.mark.parametrize("sampled", [False, True])
def test_any_number_of_threads_gives_the_same_bits(sampled: bool, backend) -> None:
    data = make(Case((2, 1), 40001, (CommitRule.ENTROPY, CommitRule.THRESHOLD), sampled=sampled))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run(ops.commit_, data, backend.device)
        for count in (2, 3):
            torch.set_num_threads(count)
            result = run(ops.commit_, data, backend.device)
            for name in WRITTEN:
                assert_equal(result[name], expected[name], f"{name} with {count} threads")
    finally:
        torch.set_num_threads(threads)


def test_draws_are_the_same_on_every_isa() -> None:
    data = make(Case((16, 16), 20011, (CommitRule.ALL,), sampled=True), torch.bfloat16)
    data["is_masked"][:] = True
    results = []
    try:
        for isa in ("baseline", "avx2", "avx512")[
            : 1 + ("baseline", "avx2", "avx512").index(_library.C.best_cpu_isa())
        ]:
            _library.C.set_cpu_isa(isa)
            results.append(run(ops.commit_, data)["candidates"])
    finally:
        _library.C.set_cpu_isa(_library.C.best_cpu_isa())
    for result in results[1:]:
        assert_equal(result, results[0], "candidates")


def test_opcheck() -> None:
    data = make(Case((3, 2), 33, (CommitRule.REVISE, CommitRule.QUOTA), sampled=True))
    for name, like in (("candidates", torch.int64), ("confidence", torch.float32)):
        data[name] = torch.zeros(5, dtype=like)
    for name, like in (
        ("num_committed", torch.int32),
        ("num_remaining", torch.int32),
        ("done", torch.bool),
    ):
        data[name] = torch.zeros(2, dtype=like)
    args = [data.pop(n) for n in POSITIONAL]
    torch.library.opcheck(
        torch.ops.nld.commit_, (args[0].nan_to_num(), *args[1:]), data | {"mask_token_id": MASK}
    )


@pytest.mark.parametrize(
    "change,message",
    [
        (
            {"logits": lambda t: t.double()},
            "commit_: logits must be float32, bfloat16 or float16, got float64",
        ),
        ({"logits": lambda t: t[0]}, "commit_: logits must have 2 dimensions, got shape"),
        (
            {"logits": lambda t: t[:, ::2]},
            "commit_: logits must have stride 1 in its last dimension, got 2",
        ),
        ({"logits": lambda t: t[:, :0]}, "commit_: logits must have 1 to"),
        ({"block_tokens": lambda t: t.int()}, "commit_: block_tokens must be int64, got int32"),
        (
            {"block_tokens": lambda t: t[:-1]},
            r"commit_: block_tokens must have size 5 \(rows of logits\)",
        ),
        ({"is_masked": lambda t: t.int()}, "commit_: is_masked must be bool, got int32"),
        (
            {"cu_seqlens": lambda t: t[:0]},
            r"commit_: cu_seqlens must have batch \+ 1 elements, got none",
        ),
        ({"rule": lambda t: t[:-1]}, "commit_: rule must have size 2"),
        (
            {"rule": lambda t: t + 4},
            r"commit_: rule must be a CommitRule \(0 to 4\), got 5 for request 1",
        ),
        ({"threshold": lambda t: t.double()}, "commit_: threshold must be float32, got float64"),
        ({"eos_token_ids": lambda t: t[:1]}, "commit_: eos_token_ids must have size 2"),
        ({"seed": lambda t: None}, "commit_: seed must be given with temperature, got none"),
        (
            {"positions": lambda t: None},
            "commit_: positions must be given with temperature, got none",
        ),
        ({"positions": lambda t: t.long()}, "commit_: positions must be int32, got int64"),
        ({"purpose": lambda t: 4}, r"commit_: purpose must be 0 \(sample\)"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    data = make(Case((3, 2), 33, (CommitRule.THRESHOLD, CommitRule.QUOTA), sampled=True)) | {
        "purpose": 0
    }
    for name, fn in change.items():
        data[name] = fn(data[name])
    before = data["block_tokens"].clone()
    with pytest.raises(RuntimeError, match=message):
        ops.commit_(*(data[n] for n in POSITIONAL), mask_token_id=MASK,
                    **{n: t for n, t in data.items() if n not in POSITIONAL})  # fmt: skip
    assert_equal(data["block_tokens"], before, "block_tokens after a refused call")


def test_compiles_with_dynamic_shapes() -> None:
    def step(*args: torch.Tensor, **named: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = ops.commit_(*args, mask_token_id=MASK, **named)
        return tuple(result)

    compiled = torch.compile(step, backend=COMPILE_BACKEND, fullgraph=True, dynamic=True)
    for lens in ((3, 2), (4, 4, 1), (9, 2)):
        data = make(
            Case(lens, 50 + len(lens), (CommitRule.THRESHOLD, CommitRule.QUOTA), sampled=True)
        )
        data["logits"] = data["logits"].contiguous()
        expected = run(ops.commit_, data)
        actual = run(lambda *args, mask_token_id, **named: compiled(*args, **named), data)
        for name in WRITTEN:
            assert_equal(actual[name], expected[name], name)
