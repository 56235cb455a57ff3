"""verify_ against its reference and against hand-worked cases: accept, emit, cut, roll back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import emulated
from compare import COMPILE_BACKEND, assert_equal
from nld_cuda import ops, reference
from nld_cuda.ops import VerifyMode

GREEDY, SAMPLED, REJECTION, COMMIT = VerifyMode
MUTATED = ("out_tokens", "out_lens", "next_tokens", "seq_lens", "done", "force_positions")
COUNTS = ("num_emitted", "num_accepted")
POSITIONAL = (
    "logits", "block_tokens", "cu_seqlens", "verify_mode", "out_tokens", "out_lens", "max_out_lens",
    "next_tokens", "seq_lens", "done",
)  # fmt: skip
UNTOUCHED = -99  # what output buffers hold before the call

Arguments = dict[str, Any]


def call(fn: Any, args: Arguments) -> None:
    fn(*(args[n] for n in POSITIONAL), **{n: v for n, v in args.items() if n not in POSITIONAL})


def clone(args: Arguments, device: str) -> Arguments:
    """Copy to the device, strides kept (a strided slice stays one)."""
    copy: Arguments = {}
    for name, value in args.items():
        if isinstance(value, Tensor):
            moved = torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device=device
            )
            copy[name] = moved.copy_(value)
        else:
            copy[name] = value
    return copy


def check(args: Arguments, device: str = "cpu") -> Arguments:
    """Run op and reference on copies; every written tensor must agree and no other may change."""
    actual, expected = clone(args, device), clone(args, "cpu")
    call(ops.verify_, actual)
    call(reference.verify_, expected)
    for name, value in expected.items():
        if isinstance(value, Tensor):
            assert_equal(actual[name], value, name)
            if name not in (*MUTATED, *COUNTS):
                assert_equal(value, args[name], f"{name} after the reference")
    return actual


def make(
    counts: list[int],
    vocab: int,
    modes: list[int],
    *,
    dtype: torch.dtype = torch.float32,
    capacity: int = 40,
    agreement: float = 0.8,
    draft_probs: bool = True,
    sharpness: float = 2.0,
    spare: int = 3,
) -> Arguments:
    """Random requests whose drafts mostly agree with what their mode would draw, and `spare` rows
    that belong to nobody."""
    batch, rows = len(counts), sum(counts)
    cu_seqlens = torch.tensor([0, *counts]).cumsum(0).int()
    logits = (torch.randn(rows + spare, vocab + 5) * sharpness).to(dtype)[:, :vocab]
    logits[rows:] = torch.nan
    starts = torch.randint(0, 3000, (batch,))
    positions = torch.zeros(rows + spare, dtype=torch.int32)
    temperature = torch.rand(batch) * 1.5 + 0.2
    temperature[::5] = 0
    seed = torch.randint(-(2**62), 2**62, (batch,))
    block_tokens = torch.randint(0, vocab, (rows + spare,))
    q = torch.softmax(torch.randn(rows + spare, vocab + 1), -1)[:, :vocab]
    allowed = torch.ones(vocab, dtype=torch.bool)
    for b, n in enumerate(counts):
        begin = int(cu_seqlens[b])
        positions[begin : begin + n] = starts[b] + torch.arange(n)
        if modes[b] in (GREEDY, SAMPLED) and n > 1:
            heat = temperature[b].repeat(n) if modes[b] == SAMPLED else torch.zeros(n)
            places = positions[begin : begin + n] + 1
            drawn = reference.draw_tokens(
                logits[begin : begin + n], heat, seed[b].repeat(n), places, 0, allowed
            )
            keep = torch.rand(n - 1) < agreement
            block_tokens[begin + 1 : begin + n][keep] = drawn[:-1][keep]
    return {
        "logits": logits,
        "block_tokens": block_tokens,
        "cu_seqlens": cu_seqlens,
        "verify_mode": torch.tensor([int(m) for m in modes], dtype=torch.int32),
        "out_tokens": torch.full((batch, capacity + 2), UNTOUCHED)[:, :capacity],
        "out_lens": torch.randint(0, 4, (batch,), dtype=torch.int32),
        "max_out_lens": torch.full((batch,), capacity, dtype=torch.int32),
        "next_tokens": torch.full((batch,), UNTOUCHED),
        "seq_lens": (starts + torch.tensor(counts)).int(),
        "done": torch.zeros(batch, dtype=torch.bool),
        "positions": positions,
        "temperature": temperature,
        "seed": seed,
        "draft_probs": q if draft_probs else None,
        "num_emitted": torch.full((batch,), UNTOUCHED, dtype=torch.int32),
        "num_accepted": torch.full((batch,), UNTOUCHED, dtype=torch.int32),
    }


# Below and above 9.0 the emulated kernels differ.
GPUS = pytest.mark.gpus(80, 90)


@dataclass(frozen=True)
class Case:
    counts: tuple[int, ...]
    vocab: int
    dtype: torch.dtype = torch.float32
    draft_probs: bool = True


CASES = [
    Case((1,), 1),
    Case((1, 1, 1, 1), 33),
    Case((5, 0, 1, 32, 2, 7, 16, 3, 4), 3),
    Case((5, 0, 1, 32, 2, 7, 16, 3, 4), 113, torch.bfloat16),
    Case((6, 6, 6, 6, 6, 6, 6, 6), 1000, torch.float16, draft_probs=False),
    Case((1, 3, 2, 2), 2 * 16384 + 2049, torch.bfloat16),
    Case((2, 2, 3, 1), 16384, draft_probs=False),
    Case((2, 3, 2, 1), 2 * 8192 + 3, torch.float16),  # rows at multiples of 16 bytes
    Case((1, 2, 2, 2), 8192 - 5, torch.bfloat16, draft_probs=False),
    Case((0, 0), 7),
]


@GPUS
@pytest.mark.parametrize("case", CASES, ids=str)
def test_random_batches(case: Case, backend) -> None:
    for trial in range(1 if case.vocab > 10000 else 4):
        batch = len(case.counts)
        modes = [(b + trial) % 4 for b in range(batch)]
        args = make(
            list(case.counts), case.vocab, modes, dtype=case.dtype, draft_probs=case.draft_probs
        )
        if trial % 2:
            args["max_out_lens"] = torch.randint(0, 12, (batch,), dtype=torch.int32)
            args["eos_token_ids"] = torch.randint(-1, case.vocab, (batch, 2))
        if trial % 3 == 1:
            args["banned_token_ids"] = torch.tensor([-1, 2, case.vocab + 5, 1])
        if trial % 3 == 2:
            first = torch.zeros(batch, dtype=torch.int32)
            for b, n in enumerate(case.counts):
                first[b] = args["positions"][int(args["cu_seqlens"][b])] if n else 0
            args["force_positions"] = first + torch.randint(-1, 6, (batch,), dtype=torch.int32)
            args["force_tokens"] = torch.randint(0, case.vocab, (batch,))
        check(args, backend.device)


@GPUS
def test_long_requests(backend) -> None:
    """The walk over more rows than a warp has lanes, ended at every place around that number."""
    counts = [33, 34, 65, 32, 31, 70, 1, 64]
    for refused in (None, 31, 32, 63):
        args = make(counts, 5, [GREEDY, SAMPLED] * 4, agreement=2.0)
        begins = args["cu_seqlens"].tolist()
        for begin, n in zip(begins, counts, strict=False):
            if refused is not None and n > refused + 1:
                args["block_tokens"][begin + refused + 1] = -1
        args["max_out_lens"][:] = 100
        args["out_tokens"] = torch.full((8, 100), UNTOUCHED)
        args["eos_token_ids"] = torch.full((8, 1), -1)
        args["verify_mode"][5] = COMMIT
        result = check(args, backend.device)
        kept = [min(n - 1, n if refused is None else refused) for n in counts]
        kept[5] = 69
        assert result["num_accepted"].tolist() == kept


@GPUS
def test_many_requests(backend) -> None:
    """More requests than a CTA has threads."""
    counts = [b % 3 for b in range(300)]
    check(make(counts, 4, [b % 4 for b in range(300)]), backend.device)


@GPUS
def test_tickets_are_zero_again(backend) -> None:
    """The scratch memory serves one call after the other, in any order of the threads."""
    counts = [3, 0, 5, 1, 2, 4]
    tickets = torch.zeros(len(counts), dtype=torch.int32, device=backend.device)
    for seed, order in enumerate(emulated.ORDERS):
        if backend.name == "emulated":
            emulated.configure(order=order, seed=seed)
        args = make(counts, 8192 + 9, [2, 0, 1, 2, 3, 2], draft_probs=seed != 1)
        args["done"][5] = seed == 2
        actual, expected = clone(args, backend.device), clone(args, "cpu")
        call(ops.verify_, actual | {"tickets": tickets})
        call(reference.verify_, expected)
        for name in (*MUTATED[:-1], *COUNTS):
            assert_equal(actual[name], expected[name], f"{name}, {order}")
        assert not tickets.any()


@GPUS
@pytest.mark.parametrize("heated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_plain_steps(dtype: torch.dtype, heated: bool, backend) -> None:
    """Mostly one row a request, as in autoregressive decoding."""
    counts = [1, 0, 2, 1, 1, 1, 0, 2, 1]
    modes = [GREEDY, SAMPLED, SAMPLED, REJECTION, COMMIT, GREEDY, GREEDY, COMMIT, SAMPLED]
    for vocab in (70, 8192 + 77):
        args = make(counts, vocab, modes, dtype=dtype, draft_probs=False, spare=0)
        assert len(args["logits"]) == len(counts)  # what chooses the kernel
        if not heated:
            args["temperature"] = args["seed"] = None
        args["done"][4] = True
        args["eos_token_ids"] = torch.randint(-1, vocab, (9, 2))
        args["force_positions"] = torch.full((9,), -1, dtype=torch.int32)
        args["force_positions"][[0, 2]] = args["positions"][[0, 2]] + 1
        args["force_tokens"] = torch.randint(0, vocab, (9,))
        check(args, backend.device)


@pytest.mark.parametrize("probs", [False, True])
@pytest.mark.backends("emulated")
def test_clusters_and_tickets_give_the_same_bits(probs: bool, backend) -> None:
    """Two rounds of slices (17 slices in clusters of 9); a residual that hangs on the last bit."""
    counts = [2, 1] if probs else [1, 1]
    args = make(counts, 16 * 8192 + 5, [REJECTION, SAMPLED], dtype=torch.bfloat16, spare=0)
    args["temperature"][:] = 1.3
    args["draft_probs"] = args["draft_probs"] if probs else None
    results = []
    for capability in (80, 90):
        actual = clone(args, "cpu")
        with emulated.load().gpu(capability):
            call(ops.verify_, actual)
        results.append(actual)
    for name in (*MUTATED[:-1], *COUNTS):
        assert_equal(results[0][name], results[1][name], name)


@GPUS
def test_odd_logits(backend) -> None:
    """NaN, infinities and rows without any finite allowed logit, in every mode."""
    for banned in (None, torch.tensor([0, 4])):
        args = make([4] * 8, 9, [0, 1, 2, 3] * 2)
        args["temperature"] = torch.tensor([0.1, 5.0]).repeat_interleave(4)
        logits = args["logits"]
        logits[0::4, 3] = torch.nan
        logits[1::4, 5] = torch.inf
        logits[1::4, 7] = torch.inf
        logits[2::4] = -torch.inf
        logits[[6, 22]] = torch.tensor([3.0, -torch.inf, 1.0, torch.nan] + [-torch.inf] * 5)
        logits[3::4] = torch.nan
        logits[8] = 3e38
        args["draft_probs"][9] = torch.nan  # counts as 0
        args["draft_probs"][10] = torch.tensor([2.0, -1.0, torch.inf] + [0.1] * 6)
        args["banned_token_ids"] = banned
        for draft in range(9):
            args["block_tokens"][:] = draft
            check(args, backend.device)
    args["banned_token_ids"] = torch.arange(9)  # everything: id 0 is drawn
    done = check(args, backend.device)
    assert done["out_tokens"][0, int(args["out_lens"][0])] == 0


@GPUS
def test_drafts_outside_the_vocabulary(backend) -> None:
    for token in (-1, 9, 2**40, -(2**63), -(2**63) + 1):
        args = make([3] * 8, 9, [0, 1, 2, 3] * 2, draft_probs=token == 9)
        args["block_tokens"][1::3] = token
        result = check(args, backend.device)
        assert result["num_accepted"].tolist() == [0, 0, 0, 2] * 2


# ---- hand-worked cases -------------------------------------------------------------------------

EOS, ROOM = 9, 10


def request(drafts: list[int], targets: list[int], mode: int = GREEDY, **changes: Any) -> Arguments:
    """One request at place 100, seed token 1, cache length 100 + rows, given argmax targets."""
    rows = len(targets)
    args: Arguments = {
        "logits": torch.nn.functional.one_hot(torch.tensor(targets), ROOM).float(),
        "block_tokens": torch.tensor([1, *drafts]),
        "cu_seqlens": torch.tensor([0, rows], dtype=torch.int32),
        "verify_mode": torch.tensor([int(mode)], dtype=torch.int32),
        "out_tokens": torch.full((1, 12), UNTOUCHED),
        "out_lens": torch.tensor([2], dtype=torch.int32),
        "max_out_lens": torch.tensor([12], dtype=torch.int32),
        "next_tokens": torch.tensor([1]),
        "seq_lens": torch.tensor([100 + rows], dtype=torch.int32),
        "done": torch.tensor([False]),
        "positions": torch.arange(100, 100 + rows, dtype=torch.int32),
        "eos_token_ids": torch.tensor([[-1, EOS]]),
        "num_emitted": torch.tensor([UNTOUCHED], dtype=torch.int32),
        "num_accepted": torch.tensor([UNTOUCHED], dtype=torch.int32),
    }
    for name, value in changes.items():
        dtype = torch.int64 if name in ("force_tokens", "eos_token_ids") else torch.int32
        args[name] = torch.tensor([value], dtype=dtype)
    return args


@dataclass(frozen=True)
class Worked:
    name: str
    args: Arguments
    emitted: list[int]
    accepted: int
    done: bool
    force_left: int | None


def case(
    name: str,
    drafts: list[int],
    targets: list[int],
    emitted: list[int],
    accepted: int,
    *,
    mode: int = GREEDY,
    done: bool = False,
    force: tuple[int, int] | None = None,
    left: int | None = None,
    **changes: Any,
) -> Worked:
    """`force`: (place, token), `left`: force_positions afterwards."""
    if force is not None:
        changes |= {"force_positions": force[0], "force_tokens": force[1]}
    return Worked(name, request(drafts, targets, mode, **changes), emitted, accepted, done, left)


WORKED = [
    case("all accepted", [2, 3, 4], [2, 3, 4, 5], [2, 3, 4, 5], 3),
    case("none accepted", [2, 3, 4], [7, 3, 4, 5], [7], 0),
    case("first three", [2, 3, 4, 5], [2, 3, 4, 8, 6], [2, 3, 4, 8], 3),
    case("plain step", [], [6], [6], 0),
    case("eos drafted", [2, EOS, 4], [2, EOS, 4, 5], [2, EOS], 3, done=True),
    case("eos as bonus", [2, 3], [2, EOS, 5], [2, EOS], 1, done=True),
    case("eos drafted but refused", [2, EOS], [2, 3, 5], [2, 3], 1),
    case("eos as seed is no end", [2], [2, 3], [2, 3], 1, eos_token_ids=[1, 1]),
    case("budget inside drafts", [2, 3, 4], [2, 3, 4, 5], [2, 3], 3, done=True, max_out_lens=4),
    case("budget just met", [2, 3], [2, 3, 4], [2, 3, 4], 2, done=True, max_out_lens=5),
    case("budget used up before", [2, 3], [2, 3, 4], [], 2, done=True, max_out_lens=2),
    case("capacity", [2, 3], [2, 3, 4], [2], 2, done=True, max_out_lens=99, out_lens=11),
    case("eos before the budget", [EOS, 3], [EOS, 3, 4], [EOS], 2, done=True, max_out_lens=4),
    case("unknown mode", [2, 3], [2, 8, 4], [2, 8], 1, mode=7),
    case("commit", [2, 3], [7, 7, 7], [2, 3, 7], 2, mode=COMMIT),
    case("commit, eos drafted", [2, EOS, 3], [7] * 4, [2, EOS], 3, mode=COMMIT, done=True),
    case("commit, eos as bonus", [2, 3], [7, 7, EOS], [2, 3, EOS], 2, mode=COMMIT),
    case("commit, eos as seed", [2, 3], [7] * 3, [], 2, mode=COMMIT, done=True, eos_token_ids=[1]),
    case("commit, budget", [2, 3], [7] * 3, [2], 2, mode=COMMIT, done=True, max_out_lens=3),
    case("commit, full", [2], [7, EOS], [2, EOS], 1, mode=COMMIT, done=True, max_out_lens=4),
    case("commit, one row", [], [7], [7], 0, mode=COMMIT),
    # place 102 is that of the token drawn from row 1
    case("force refuses", [2, 3, 4], [2, 3, 4, 6], [2, 5], 1, force=(102, 5), left=-1),
    case("force accepts", [2, 5, 4], [2, 3, 4, 6], [2, 5, 4, 6], 3, force=(102, 5), left=-1),
    case("force came before", [5, 3, 4], [5, 3, 4, 6], [5, 3, 4, 6], 3, force=(102, 5), left=-1),
    case("force came as bonus", [2, 3], [5, 3, 4], [5], 0, force=(103, 5), left=-1),
    case("force not yet", [2, 3], [2, 3, 4], [2, 3, 4], 2, force=(104, 5), left=104),
    case("force as last", [2, 3], [2, 3, 4], [2, 3, 5], 2, force=(103, 5), left=-1),
    case("force is past", [5, 3], [5, 3, 4], [5, 3, 4], 2, force=(100, 5), left=100),
    case("force as eos", [2, 3], [2, 3, 4], [2, EOS], 1, force=(102, EOS), left=-1, done=True),
    case("cut", [2, 5], [2, 3, 4], [2], 2, force=(102, 5), left=102, done=True, max_out_lens=3),
    case("force in one row", [], [6], [5], 0, force=(101, 5), left=-1),
    case("force at a commit", [2, 3], [7] * 3, [2, 3, 5], 2, mode=COMMIT, force=(103, 5), left=-1),
    case("force committed", [5, 3], [7] * 3, [5, 3, 7], 2, mode=COMMIT, force=(103, 5), left=-1),
    case("force ignored", [2, 3], [7] * 3, [2, 3, 7], 2, mode=COMMIT, force=(102, 5), left=102),
]  # fmt: skip


@GPUS
@pytest.mark.parametrize("worked", WORKED, ids=lambda w: w.name)
def test_worked(worked: Worked, backend) -> None:
    """The op and the reference both give what the contract's text says."""
    count = len(worked.emitted)
    for fn, device in ((ops.verify_, backend.device), (reference.verify_, "cpu")):
        args = clone(worked.args, device)
        before = int(args["out_lens"])
        call(fn, args)
        written = args["out_tokens"][0].tolist()
        assert written[before : before + count] == worked.emitted
        assert written[:before] + written[before + count :] == [UNTOUCHED] * (12 - count)
        assert int(args["num_emitted"]) == count
        assert int(args["num_accepted"]) == worked.accepted
        assert int(args["out_lens"]) == before + count
        assert int(args["seq_lens"]) == 100 + count
        assert int(args["next_tokens"]) == (worked.emitted[-1] if count else 1)
        assert bool(args["done"]) == worked.done
        if worked.force_left is not None:
            assert int(args["force_positions"]) == worked.force_left


@GPUS
def test_forced_row_in_rejection_mode(backend) -> None:
    """Force is certain in every mode, and its row is not even read."""
    for mode in (GREEDY, SAMPLED, REJECTION):
        args = request([2, 5, 3], [2, 3, 4, 4], mode, force_positions=102, force_tokens=5)
        args["logits"] *= 1000
        args["logits"][1] = torch.nan
        args |= {"temperature": torch.ones(1), "seed": torch.tensor([3])}
        result = check(args, backend.device)
        assert result["out_tokens"][0, 2:5].tolist() == [2, 5, 4]


@GPUS
def test_done_and_empty_requests_stay_as_they_are(backend) -> None:
    args = make([3, 0, 3], 11, [REJECTION, SAMPLED, COMMIT])
    args["done"] = torch.tensor([True, False, True])
    result = check(args, backend.device)
    for name in MUTATED[:-1]:
        assert_equal(result[name], args[name], name)
    assert result["num_emitted"].tolist() == result["num_accepted"].tolist() == [0, 0, 0]


def test_empty_batch() -> None:
    args = make([], 5, [])
    check(args)


@GPUS
def test_rows_after_a_rejection_do_not_matter(backend) -> None:
    args = request([2, 3, 4], [2, 8, 4, 5])
    args["logits"][2:] = torch.nan
    assert check(args, backend.device)["num_emitted"] == 2


@GPUS
def test_ties_go_to_the_lowest_id(backend) -> None:
    args = request([4, 7], [4, 7, 3])
    args["logits"][0] = 0.0
    args["logits"][0, [4, 5]] = args["logits"][1, [0, 6, 7]] = 3.0
    result = check(args, backend.device)
    assert result["out_tokens"][0, 2:5].tolist() == [4, 0, UNTOUCHED]


# ---- invariance --------------------------------------------------------------------------------


@GPUS
def test_result_depends_on_the_request_only(backend) -> None:
    """At another batch position, row offset and output position the request ends the same."""
    together = make([6, 3, 9, 1, 5, 6, 2, 8], 500, [1, 2, 3, 1, 0, 2, 1, 2], capacity=30)
    whole = clone(together, backend.device)
    call(ops.verify_, whole)
    for b in range(8):
        begin, end = together["cu_seqlens"][b : b + 2].tolist()
        alone = {
            n: v[begin:end] if v.shape[0] == together["logits"].shape[0] else v[b : b + 1]
            for n, v in together.items()
            if n != "cu_seqlens"
        }
        alone["cu_seqlens"] = torch.tensor([0, end - begin], dtype=torch.int32)
        alone = clone(alone, backend.device)
        call(ops.verify_, alone)
        for name in (*MUTATED[:-1], *COUNTS):
            assert_equal(alone[name][0], whole[name][b], f"{name} of request {b}")


@GPUS
def test_sampled_verification_equals_plain_sampled_steps(backend) -> None:
    """Whatever is drafted, the emitted tokens are those n = 1 calls draw at the same places."""
    vocab, n, batch = 40, 6, 16
    args = make([n] * batch, vocab, [SAMPLED] * batch, agreement=0.7)
    result = clone(args, backend.device)
    call(ops.verify_, result)
    assert 0.3 < result["num_accepted"].float().mean() < n - 1.5
    for i in range(n):
        pick = torch.arange(batch) * n + i
        step = {k: v[pick] if v.shape[0] == len(args["positions"]) else v for k, v in args.items()}
        step["cu_seqlens"] = torch.arange(batch + 1, dtype=torch.int32)
        step["out_lens"] = args["out_lens"] + i
        step = clone(step, backend.device)
        call(ops.verify_, step)
        for b in range(batch):
            if i < result["num_emitted"][b]:
                place = int(args["out_lens"][b]) + i
                assert step["out_tokens"][b, place] == result["out_tokens"][b, place]


def test_bits_do_not_depend_on_the_thread_count() -> None:
    args = make([5, 4, 1, 7, 3], 5 * 16384 + 77, [0, 1, 1, 2, 2])
    args["draft_probs"][:] = 0
    args["temperature"][:] = 1.0
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 2, 2):
            torch.set_num_threads(count)
            results.append(clone(args, "cpu"))
            call(ops.verify_, results[-1])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name in (*MUTATED[:-1], *COUNTS):
            assert_equal(other[name], results[0][name], name)


# ---- traffic of the CUDA kernels ---------------------------------------------------------------


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_traffic(dtype: torch.dtype, capability: int, traffic) -> None:
    """Every row that can matter is read once; the others, and requests that are done, never."""
    vocab = 8192 + 27  # rows at multiples of 16 bytes, with an odd end
    modes = [GREEDY, SAMPLED, COMMIT, GREEDY, SAMPLED, COMMIT]
    args = make([3, 2, 4, 3, 0, 2], vocab, modes, dtype=dtype)
    args["done"][[3, 5]] = True
    args["force_positions"] = torch.full((6,), -1, dtype=torch.int32)
    args["force_tokens"] = torch.zeros(6, dtype=torch.int64)
    args["force_positions"][0] = args["positions"][1] + 1  # the target of row 1
    args["block_tokens"][1] = 1
    rows = 2 + 2 + 1  # two of request 0, two of request 1, the bonus row of request 2
    for name, read in (("logits", rows * vocab * dtype.itemsize), ("draft_probs", 0)):
        step = clone(args, "cpu")
        with emulated.load("checked").gpu(capability), traffic(step[name]) as counted:
            call(ops.verify_, step)
        assert (counted.read_bytes, counted.written_bytes) == (read, 0), name


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("certain", [False, True])
def test_traffic_of_rejection(certain: bool, capability: int, traffic) -> None:
    """A refused draft costs one more row of logits and of probabilities, unless it was certain."""
    vocab, counts = 8192 + 27, [3, 2, 1]
    args = make(counts, vocab, [REJECTION] * 3, draft_probs=not certain)
    args["temperature"][:] = 1.0
    args["block_tokens"][[1, 4]] = torch.tensor([7, 9])
    args["logits"][0, 7] = args["logits"][3, 9] = -torch.inf  # so both requests refuse
    step = clone(args, "cpu")
    gpu = emulated.load("checked").gpu
    with gpu(capability), traffic(step["logits"]) as counted:
        call(ops.verify_, step)
    drafts = sum(counts) - len(counts)  # the logit of each is looked up
    refused = 0 if certain else 2
    assert step["num_accepted"].tolist() == [0, 0, 0]
    assert counted.read_bytes == ((sum(counts) + refused) * vocab + drafts) * 4
    if not certain:
        step = clone(args, "cpu")
        with gpu(capability), traffic(step["draft_probs"]) as counted:
            call(ops.verify_, step)
        assert counted.read_bytes == (refused * vocab + drafts) * 4


# ---- the torch side ----------------------------------------------------------------------------


def full_arguments() -> Arguments:
    args = make([3, 4, 1], 20, [0, 1, 2])
    args["eos_token_ids"] = torch.tensor([[3, -1]] * 3)
    args["banned_token_ids"] = torch.tensor([7])
    args["force_positions"] = torch.tensor([-1, 5, -1], dtype=torch.int32)
    args["force_tokens"] = torch.tensor([0, 1, 2])
    args["tickets"] = torch.zeros(3, dtype=torch.int32)
    return args


def test_opcheck() -> None:
    for args in (full_arguments(), request([2, 3], [2, 3, 4])):
        keywords = {n: v for n, v in args.items() if n not in POSITIONAL}
        torch.library.opcheck(torch.ops.nld.verify_, tuple(args[n] for n in POSITIONAL), keywords)


def test_counts_are_allocated_when_not_given() -> None:
    args = request([2, 3], [2, 8, 4])
    del args["num_emitted"], args["num_accepted"]
    result = ops.verify_(**args)
    assert (int(result.num_emitted), int(result.num_accepted)) == (2, 1)


def test_compiles_with_dynamic_shapes() -> None:
    def step(args: Arguments) -> Tensor:
        counts = ops.verify_(**args)
        return counts.num_emitted + args["out_lens"]

    compiled = torch.compile(step, backend=COMPILE_BACKEND, fullgraph=True, dynamic=True)
    for counts in ([3, 4, 1], [2, 2, 5, 6], [9, 1]):
        args = make(counts, 30, [1] * len(counts))
        del args["num_emitted"], args["num_accepted"]
        args["force_positions"] = torch.full((len(counts),), -1, dtype=torch.int32)
        args["force_tokens"] = torch.zeros(len(counts), dtype=torch.int64)
        eager = clone(args, "cpu")
        assert_equal(compiled(args), step(eager), "compiled result")
        for name in MUTATED:
            assert_equal(args[name], eager[name], name)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"logits": lambda t: t.double()}, "verify_: logits must be float32, .* got float64"),
        ({"logits": lambda t: t[0]}, "logits must have 2 dimensions"),
        ({"logits": lambda t: t.t().contiguous().t()}, "logits must have stride 1"),
        ({"logits": lambda t: t[:, :0]}, "logits must have at least one column"),
        ({"block_tokens": lambda t: t.int()}, "block_tokens must be int64, got int32"),
        ({"block_tokens": lambda t: t[1:]}, r"block_tokens must have size 11 \(rows of logits\)"),
        ({"cu_seqlens": lambda t: t[1:]}, r"cu_seqlens must have size 4 \(batch of verify_mode \+"),
        ({"verify_mode": lambda t: t.long()}, "verify_mode must be int32"),
        ({"out_tokens": lambda t: t[:2]}, "out_tokens must have size 3"),
        ({"out_tokens": lambda t: t.int()}, "out_tokens must be int64"),
        ({"out_lens": lambda t: t.long()}, "out_lens must be int32"),
        ({"max_out_lens": lambda t: t[:1]}, "max_out_lens must have size 3"),
        ({"next_tokens": lambda t: t.int()}, "next_tokens must be int64"),
        ({"seq_lens": lambda t: t.float()}, "seq_lens must be int32"),
        ({"done": lambda t: t.byte()}, "done must be bool, got uint8"),
        ({"positions": lambda t: None}, "positions must be given with temperature, got None"),
        ({"seed": lambda t: None}, "seed must be given with temperature, got None"),
        ({"force_tokens": lambda t: None}, "force_tokens must be given with force_positions"),
        ({"force_positions": lambda t: None}, "force_positions must be given with force_tokens"),
        ({"draft_probs": lambda t: t.half()}, "draft_probs must be float32, got float16"),
        ({"draft_probs": lambda t: t[:, 1:]}, r"draft_probs must have size 20 \(vocab of logits\)"),
        ({"eos_token_ids": lambda t: t[0]}, "eos_token_ids must have 2 dimensions"),
        ({"eos_token_ids": lambda t: t[:, :1]}, "eos_token_ids must be contiguous"),
        ({"banned_token_ids": lambda t: t.int()}, "banned_token_ids must be int64"),
        ({"num_emitted": lambda t: t.long()}, "num_emitted must be int32"),
        ({"tickets": lambda t: t[1:]}, r"tickets must have size 3 \(batch of verify_mode\)"),
    ],
)  # fmt: skip
def test_bad_arguments(change: dict, message: str) -> None:
    args = full_arguments()
    before = clone(args, "cpu")
    for name, fn in change.items():
        args[name] = fn(args[name])
    with pytest.raises(RuntimeError, match=message):
        call(ops.verify_, args)
    for name in set(MUTATED) - set(change):
        assert_equal(args[name], before[name], f"{name} after a refused call")
