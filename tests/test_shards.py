"""commit_ and verify_ from shards of the vocabulary: as from whole rows, however they are cut."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import test_sampler
import test_verify
from compare import assert_accurate, assert_equal
from nld_cuda import ops, reference
from nld_cuda.ops import CommitRule, VerifyMode
from sharded import DRAWS, ROWS, sharded_commit, sharded_verify
from test_sampler import MASK, WRITTEN

GREEDY, SAMPLED, REJECTION, COMMIT = VerifyMode


def random_cuts(vocab: int, shards: int) -> list[int]:
    return sorted(torch.randint(0, vocab + 1, (shards - 1,)).tolist())


def check_commit(
    data: dict, cuts: list[int], device: str = "cpu", *, same_bits: bool = False
) -> dict:
    whole = test_sampler.run(ops.commit_, data, device)
    actual = test_sampler.run(sharded_commit(cuts), data, device)
    for name in WRITTEN:
        if name == "confidence" and not same_bits:
            torch.testing.assert_close(actual[name], whole[name], rtol=1e-5, atol=1e-7)
        else:
            assert_equal(actual[name], whole[name], f"{name} of shards {cuts}")
    return actual


def check_verify(args: dict, cuts: list[int], device: str = "cpu") -> None:
    whole, actual = test_verify.clone(args, device), test_verify.clone(args, device)
    test_verify.call(ops.verify_, whole)
    test_verify.call(sharded_verify(cuts), actual)
    for name, value in whole.items():
        if isinstance(value, Tensor):
            assert_equal(actual[name], value, f"{name} of shards {cuts}")


@pytest.mark.parametrize(
    "case,dtype,cuts",
    [
        (1, torch.float32, [40, 41, 41]),
        (2, torch.bfloat16, [0, 101, 203]),
        (3, torch.float16, [50, 100, 150]),
        (3, torch.float32, []),
        (4, torch.bfloat16, [1, 1027]),
        (4, torch.float32, [1026, 2048]),
        (5, torch.bfloat16, [8193]),
        (6, torch.float32, [32]),
        (7, torch.float32, [32]),
    ],
    ids=str,
)
def test_commit(case: int, dtype: torch.dtype, cuts: list[int], backend) -> None:
    """Also with rows of nobody, fixed rows, all rules in a batch, banned ids, rows of NaN."""
    check_commit(test_sampler.make(test_sampler.CASES[case], dtype), cuts, backend.device)


def test_commit_with_default_bans(backend) -> None:
    data = test_sampler.make(test_sampler.Case((6,), 40))
    del data["banned_token_ids"]
    data["logits"][:, MASK] = 99.0
    check_commit(data, [2, 5, 30], backend.device)
    data["logits"][:] = -torch.inf
    data["block_tokens"][:] = 0
    result = check_commit(data, [MASK, MASK + 1], backend.device)
    assert (result["candidates"] == 0).all()


def strange_rows(vocab: int) -> Tensor:
    """Ties, infinities and NaN on both sides of every cut, rows without anything to choose."""
    rows = torch.randn(12, vocab)
    rows[0] = 1.0
    rows[1] = -torch.inf
    rows[2] = torch.nan
    rows[3, ::7] = torch.inf
    rows[4, vocab // 2 :] = -torch.inf
    rows[5, : vocab // 2] = torch.nan
    rows[6] = -torch.inf
    rows[6, -1] = -3e38
    rows[7] = 3e38
    rows[8, [0, vocab - 1]] = 50.0
    rows[9] *= 1e6
    rows[10] = -torch.inf
    rows[10, 0] = 0.0  # the only value is banned
    return rows


@pytest.mark.parametrize("heat", [None, 0.8])
def test_strange_rows(heat: float | None, backend) -> None:
    vocab = 61
    rows = strange_rows(vocab)
    draws: dict[str, Any] = {}
    if heat is not None:
        draws = {
            "temperature": torch.tensor([heat]), "seed": torch.tensor([7]),
            "positions": torch.arange(len(rows)).int(),
        }  # fmt: skip
    for banned in ([0, 8, 30, 31], list(range(vocab)), list(range(30))):
        for cuts in ([30], [1, 2, 3], [20, 20, 60]):
            rule = CommitRule.ENTROPY if len(cuts) > 1 else CommitRule.QUOTA
            data = test_sampler.small(rows, rule, 4.0, quota=torch.tensor([5]).int(), **draws)
            data["banned_token_ids"] = torch.tensor(banned)
            check_commit(data, cuts, backend.device)


def test_held_tokens_that_no_shard_has(backend) -> None:
    data = test_sampler.make(test_sampler.Case((6,), 40, (CommitRule.REVISE,)))
    data["is_masked"][:], data["is_fixed"][:] = False, False
    data["logits"].nan_to_num_()
    data["block_tokens"] = torch.tensor([-1, 40, 2**40, 0, 39, 20])
    data["revise_threshold"] = torch.tensor([1e-30])
    result = check_commit(data, [10, 20, 20], backend.device)
    assert (result["confidence"] == 0).tolist() == [True] * 3 + [False] * 3


@pytest.mark.parametrize("sampled", [False, True])
def test_commit_bits(sampled: bool, backend) -> None:
    """Where the slices of shards are those of whole rows, confidences have equal bits."""
    length = 16384 if backend.name.startswith("cpu") else 8192
    case = test_sampler.Case((2,), 2 * length + 77, (CommitRule.ENTROPY,), sampled=sampled)
    cuts = [length, 2 * length]
    check_commit(test_sampler.make(case), cuts, backend.device, same_bits=True)


@pytest.mark.parametrize(
    "case,cuts",
    [
        (test_verify.Case((1, 1, 1, 1), 33), [0, 32]),
        (test_verify.Case((5, 0, 1, 33, 2, 7, 16, 3, 4), 113, torch.bfloat16), [30, 30, 77]),
        (test_verify.Case((3, 2, 1), 1000, torch.float16), [1, 998]),
        (test_verify.Case((2, 2, 1), 8200), [4099]),
    ],
    ids=str,
)
def test_verify_modes(case: test_verify.Case, cuts: list[int], backend) -> None:
    for trial in range(1 if case.vocab > 5000 else 3):
        modes = [(GREEDY, SAMPLED, COMMIT)[(b + trial) % 3] for b in range(len(case.counts))]
        args = test_verify.make(
            list(case.counts), case.vocab, modes, dtype=case.dtype, draft_probs=False
        )
        batch = len(modes)
        if trial == 0:
            args["banned_token_ids"] = torch.tensor([-1, 2, case.vocab + 5, 31])
            args["done"][batch // 2] = True
        if trial == 1:
            args["eos_token_ids"] = torch.randint(-1, case.vocab, (batch, 2))
            args["max_out_lens"] = torch.randint(0, 12, (batch,), dtype=torch.int32)
        if trial == 2:
            first = args["positions"][args["cu_seqlens"][:-1].long()]
            args["force_positions"] = first + torch.randint(-1, 6, (batch,), dtype=torch.int32)
            args["force_tokens"] = torch.randint(0, case.vocab, (batch,))
        check_verify(args, cuts, backend.device)


def test_verify_strange_rows(backend) -> None:
    for banned in ([0, 8, 30, 31], list(range(61))):
        args = test_verify.make([1] * 12, 61, [GREEDY, SAMPLED, COMMIT] * 4, spare=0)
        args["logits"] = strange_rows(61)
        args["banned_token_ids"] = torch.tensor(banned)
        check_verify(args, [30, 31], backend.device)


def test_parts_that_are_not_needed(backend) -> None:
    """Rows not judged, and room for longer shards, say nothing; what is said does not change."""
    nothing = torch.zeros(8, dtype=torch.int32)
    nothing[[0, 3]] = torch.tensor(-torch.inf).view(torch.int32)
    nothing[4] = -1
    data = test_sampler.make(test_sampler.Case((2, 3), 50, extra_rows=2))
    data["is_masked"] = torch.tensor([True, False, True, True, False, True, False])
    at = [data[n].to(backend.device) for n in test_sampler.POSITIONAL]
    few = ops.commit_scan(*at[:5], first_token_id=7, mask_token_id=MASK).cpu()
    many = ops.commit_scan(*at[:5], first_token_id=7, mask_token_id=MASK, num_parts=3).cpu()
    assert few.shape == (7, 1, 8)
    assert_equal(many[:, :1], few)
    assert (many[:, 1:] == nothing).all() and (few[[1, 4, 5, 6]] == nothing).all()
    assert (few[[0, 2, 3], 0, 4] >= 7).all()

    args = test_verify.make([3, 2, 2], 20, [COMMIT, SAMPLED, GREEDY], spare=2)
    args["done"][2] = True
    moved = test_verify.clone(args, backend.device)
    named = {n: moved[n] for n in DRAWS}
    state = (moved["cu_seqlens"], moved["verify_mode"], moved["done"])
    parts = ops.verify_scan(moved["logits"], *state, first_token_id=0, **named).cpu()
    assert (parts[[0, 1, 5, 6, 7, 8]] == nothing).all()
    assert (parts[2:5, 0, 4] >= 0).all()


@settings(max_examples=60, deadline=None)
@given(
    vocab=st.integers(1, 40),
    shards=st.integers(1, 6),
    levels=st.integers(1, 4),
    rule=st.sampled_from(tuple(CommitRule)),
    heat=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 2**20),
)
def test_random_splits(
    vocab: int, shards: int, levels: int, rule: CommitRule, heat: float, seed: int
) -> None:
    """Rows of few levels: many ties, between shards too."""
    torch.manual_seed(seed)
    rows = torch.randint(0, levels, (5, vocab)).float()
    rows[torch.rand(5, vocab) < 0.2] = -torch.inf
    cuts = random_cuts(vocab, shards)
    data = test_sampler.small(rows, rule, 0.3) | {
        "is_masked": torch.tensor([True, True, False, True, True]),
        "temperature": torch.tensor([heat]), "seed": torch.tensor([seed]),
        "positions": torch.arange(5).int(), "revise_threshold": torch.tensor([0.2]),
        "banned_token_ids": torch.randint(-1, vocab, (3,)),
    }  # fmt: skip
    data["block_tokens"][2] = vocab - 1
    whole = test_sampler.run(ops.commit_, data)
    actual = test_sampler.run(sharded_commit(cuts), data)
    assert_equal(actual["candidates"], whole["candidates"], f"candidates of shards {cuts}")
    torch.testing.assert_close(actual["confidence"], whole["confidence"])
    args = test_verify.make([2, 1, 2], vocab, [SAMPLED, COMMIT, GREEDY], draft_probs=False, spare=0)
    args["logits"], args["banned_token_ids"] = rows, data["banned_token_ids"]
    check_verify(args, cuts)


@pytest.mark.parametrize("case", [2, 3])
def test_reference(case: int) -> None:
    """The meaning of the halves is that of the whole, and each half's is that of the kernels'."""
    data = test_sampler.make(test_sampler.CASES[case])
    plain = test_sampler.run(reference.commit_, data)
    exact = test_sampler.run(reference.commit_, data | {"logits": data["logits"].double()})
    for commit_scan, commit_parts_ in (
        (reference.commit_scan, reference.commit_parts_),
        (reference.commit_scan, ops.commit_parts_),
        (ops.commit_scan, reference.commit_parts_),
    ):
        halves = ModuleType("halves")
        halves.__dict__.update(commit_scan=commit_scan, commit_parts_=commit_parts_)
        actual = test_sampler.run(sharded_commit([50, 101], halves), data)
        for name in WRITTEN:
            if name == "confidence":
                assert_accurate(actual[name], exact[name], plain[name], name)
            else:
                assert_equal(actual[name], plain[name], name)


def test_verify_reference() -> None:
    args = test_verify.make([3, 1, 4, 2], 40, [SAMPLED, GREEDY, COMMIT, SAMPLED], draft_probs=False)
    args["banned_token_ids"] = torch.tensor([5, 6])
    expected = test_verify.clone(args, "cpu")
    test_verify.call(reference.verify_, expected)
    for verify_scan, verify_parts_ in (
        (reference.verify_scan, reference.verify_parts_),
        (reference.verify_scan, ops.verify_parts_),
        (ops.verify_scan, reference.verify_parts_),
    ):
        halves = ModuleType("halves")
        halves.__dict__.update(verify_scan=verify_scan, verify_parts_=verify_parts_)
        actual = test_verify.clone(args, "cpu")
        test_verify.call(sharded_verify([13, 30], halves), actual)
        for name in (*test_verify.MUTATED[:-1], *test_verify.COUNTS):
            assert_equal(actual[name], expected[name], name)


def test_any_number_of_threads_gives_the_same_parts() -> None:
    data = test_sampler.make(test_sampler.Case((3,), 40001, (CommitRule.ENTROPY,), sampled=True))
    at = [data[n] for n in test_sampler.POSITIONAL[:5]]
    named = {n: data[n] for n in DRAWS}
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(ops.commit_scan(*at, first_token_id=5, mask_token_id=MASK, **named))
    assert_equal(results[1], results[0])
    assert_equal(results[2], results[0])


def commit_arguments() -> dict:
    data = test_sampler.make(test_sampler.Case((3, 2), 33, (CommitRule.QUOTA,), sampled=True))
    data["logits"] = data["logits"].nan_to_num()
    scan = {n: data[n] for n in ("logits", *test_sampler.POSITIONAL[1:5], *ROWS, *DRAWS)}
    return data | {"scan": scan | {"first_token_id": 3, "mask_token_id": MASK}}


def test_opcheck() -> None:
    data = commit_arguments()
    scan = data.pop("scan")
    at = [scan.pop(n) for n in test_sampler.POSITIONAL[:5]]
    torch.library.opcheck(torch.ops.nld.commit_scan, tuple(at), scan)
    parts = ops.commit_scan(*at, **scan)[None]
    ints = torch.zeros(2, dtype=torch.int32)
    outputs = {
        "candidates": torch.zeros(5, dtype=torch.int64), "confidence": torch.zeros(5),
        "num_committed": ints, "num_remaining": ints.clone(), "done": ints.bool(),
    }  # fmt: skip
    rest = {n: t for n, t in data.items() if n not in (*test_sampler.POSITIONAL, *DRAWS)}
    torch.library.opcheck(
        torch.ops.nld.commit_parts_, (parts, *at[1:], data["threshold"]),
        rest | outputs | {"vocab": 36, "mask_token_id": MASK},
    )  # fmt: skip

    args = test_verify.make([3, 2], 20, [SAMPLED, COMMIT], spare=0)
    state = (args["cu_seqlens"], args["verify_mode"], args["done"])
    named = {n: args[n] for n in DRAWS} | {"first_token_id": 4}
    torch.library.opcheck(torch.ops.nld.verify_scan, (args["logits"], *state), named)
    parts = ops.verify_scan(args["logits"], *state, **named)[None]
    torch.library.opcheck(
        torch.ops.nld.verify_parts_,
        (parts, *(args[n] for n in test_verify.POSITIONAL[1:])),
        {"vocab": 24, **{n: args[n] for n in test_verify.COUNTS}},
    )


@pytest.mark.parametrize(
    "change,message",
    [
        ({"logits": lambda t: t.double()}, "commit_scan: logits must be float32"),
        ({"logits": lambda t: t[:, ::2]}, "commit_scan: logits must have stride 1"),
        ({"first_token_id": lambda _: -1}, "commit_scan: first_token_id must be at least 0, got"),
        (
            {"first_token_id": lambda _: 2**31 - 33},
            r"commit_scan: first_token_id \+ columns of logits must be below 2\^31, got 2147483615",
        ),
        ({"num_parts": lambda _: -1}, "commit_scan: num_parts must be 0 or at least 1"),
        ({"rule": lambda t: t - 9}, r"commit_scan: rule must be a CommitRule \(0 to 4\), got -8"),
        ({"seed": lambda _: None}, "commit_scan: seed must be given with temperature, got none"),
        ({"is_masked": lambda t: t[:3]}, r"must have size 5 \(rows of logits\)"),
    ],
)
def test_bad_arguments_of_a_scan(change: dict, message: str) -> None:
    scan = commit_arguments()["scan"]
    for name, fn in change.items():
        scan[name] = fn(scan.get(name))
    with pytest.raises(RuntimeError, match=message):
        ops.commit_scan(**scan)


@pytest.mark.parametrize(
    "parts,vocab,message",
    [
        (torch.zeros(5, 1, 8, dtype=torch.int32), 33, "parts must have 4 dimensions, got shape"),
        (torch.zeros(1, 5, 1, 8), 33, "parts must be int32, got float32"),
        (torch.zeros(1, 5, 1, 7, dtype=torch.int32), 33, "parts must be"),
        (torch.zeros(0, 5, 1, 8, dtype=torch.int32), 33, "parts must be"),
        (torch.zeros(1, 5, 1, 16, dtype=torch.int32)[..., ::2], 33, "parts must be contiguous"),
        (torch.zeros(41, dtype=torch.int32)[1:].view(1, 5, 1, 8), 33, "a multiple of 16 bytes"),
        (torch.zeros(1, 4, 1, 8, dtype=torch.int32), 33, r"must have size 4 \(rows of parts\)"),
        (torch.zeros(1, 5, 1, 8, dtype=torch.int32), 0, r"vocab must be 1 to 2\^31 - 1, got 0"),
    ],
)
def test_bad_parts(parts: Tensor, vocab: int, message: str) -> None:
    data = commit_arguments()
    tokens = data["block_tokens"].clone()
    with pytest.raises(RuntimeError, match="commit_parts_: .*" + message):
        ops.commit_parts_(
            parts, *(data[n] for n in test_sampler.POSITIONAL[1:]), vocab=vocab, mask_token_id=MASK
        )
    assert_equal(data["block_tokens"], tokens)
    args = test_verify.make([3, 2], 33, [GREEDY, GREEDY], spare=0)
    with pytest.raises(RuntimeError, match="verify_parts_: .*" + message):
        ops.verify_parts_(
            parts, *(args[n] for n in test_verify.POSITIONAL[1:]), vocab=vocab,
            num_emitted=args["num_emitted"], num_accepted=args["num_accepted"],
        )  # fmt: skip


def test_rejection_is_refused() -> None:
    args = test_verify.make([3, 2], 33, [SAMPLED, REJECTION], spare=0)
    for verify in (
        lambda: test_verify.call(sharded_verify([10]), args),
        lambda: ops.verify_parts_(
            torch.zeros(1, 5, 1, 8, dtype=torch.int32),
            *(args[n] for n in test_verify.POSITIONAL[1:]), vocab=33,
        ),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="got REJECTION for request 1: gather its logits"):
            verify()


def as_rejection(args: dict) -> dict:
    return args | {"verify_mode": torch.full_like(args["verify_mode"], int(REJECTION))}


@pytest.mark.backends("emulated")
def test_rejection_is_refused_in_debug_builds(backend) -> None:
    args = test_verify.make([3, 2], 33, [SAMPLED, SAMPLED], spare=0)
    args["temperature"][:] = 1.0
    with pytest.raises(RuntimeError, match="must not be REJECTION where the vocabulary is sharded"):
        test_verify.call(sharded_verify([10]), as_rejection(args))


@pytest.mark.backends("emulated", "cuda")
def test_rejection_counts_as_sampled_on_cuda(backend) -> None:
    args = test_verify.make([3, 2], 33, [SAMPLED, SAMPLED], spare=0, draft_probs=False)
    expected = test_verify.clone(args, backend.device)
    actual = test_verify.clone(args, backend.device)
    rows = (expected["logits"], expected["cu_seqlens"], expected["verify_mode"], expected["done"])
    parts = ops.verify_scan(*rows, first_token_id=0, **{n: expected[n] for n in DRAWS})[None]
    for data in (expected, as_rejection(actual)):
        at = [data[n] for n in test_verify.POSITIONAL[1:]]
        counts = {n: data[n] for n in test_verify.COUNTS}
        ops.verify_parts_(parts, *at, vocab=33, positions=data["positions"], **counts)
    assert int(expected["num_emitted"].sum()) > 0
    for name in (*test_verify.MUTATED[:-1], *test_verify.COUNTS):
        assert_equal(actual[name], expected[name], name)


def test_judged_rows_are_read_once(traffic: Callable) -> None:
    """To the byte: what is judged, once; nothing else, nothing past the shard."""
    shard, flat = 8192 + 40, torch.zeros(6, 8192 + 48).bfloat16()
    logits = flat[:, :shard]
    starts, no = torch.tensor([0, 3, 5]).int(), torch.zeros(6, dtype=torch.bool)
    masked = torch.tensor([True, False, False, True, False, True])
    rule = torch.tensor([CommitRule.THRESHOLD, CommitRule.REVISE]).int()
    tokens, draws = (
        torch.full((6,), 8200),
        {"temperature": torch.ones(2), "seed": torch.ones(2).long()},
    )
    with traffic(flat) as read:
        ops.commit_scan(
            logits, tokens, masked, starts, rule, first_token_id=6, mask_token_id=MASK,
            is_fixed=no, positions=torch.arange(6).int(), **draws,
        )  # fmt: skip
    assert read.read_bytes == 3 * shard * 2  # rows 0, 3 and 4; row 5 belongs to nobody
    with traffic(flat) as read:
        ops.verify_scan(
            logits, starts, torch.tensor([COMMIT, SAMPLED]).int(), torch.tensor([False, True]),
            first_token_id=6, positions=torch.arange(6).int(), **draws,
        )  # fmt: skip
    assert read.read_bytes == shard * 2 and read.written_bytes == 0  # the bonus of a block
