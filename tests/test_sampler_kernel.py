"""commit_ as one CUDA launch: slices, alignment, tickets, schedules, races, bytes read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import emulated
from compare import assert_equal
from nld_cuda import _library, ops, reference
from nld_cuda.ops import CommitRule
from test_sampler import EVERY_RULE, WRITTEN, Case, assert_same_result, make, run, small

SLICE = 8192  # ids a CTA scans
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(data: dict, backend) -> None:
    plain = run(reference.commit_, data)
    exact = run(reference.commit_, data | {"logits": data["logits"].double()})
    assert_same_result(run(ops.commit_, data, backend.device), plain, exact)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize(
    "vocab", [1, 7, 1023, 1025, SLICE - 1, SLICE, SLICE + 1, 2 * SLICE - 1, 2 * SLICE + 1]
)
def test_edges_of_slices(vocab: int, sampled: bool, backend) -> None:
    """Also where the best id is the last one, and the only one that counts."""
    dtype = DTYPES[vocab % 3]
    data = make(Case((3, 2), vocab, (CommitRule.REVISE, CommitRule.ENTROPY), sampled), dtype)
    data["is_masked"][:2] = True
    data["logits"][0, vocab - 1] = 14.0
    data["logits"][1, : vocab - 1] = -torch.inf
    data["logits"][1, vocab - 1] = -3.0
    data["block_tokens"][2] = vocab - 1  # judged by REVISE
    data["is_masked"][2] = data["is_fixed"][2] = False
    data["banned_token_ids"] = torch.tensor([-1, vocab, vocab + 3])
    check(data, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_alignment_changes_no_bit(dtype: torch.dtype, backend) -> None:
    """Rows are read 16 bytes at a time from any address."""
    vocab = SLICE + 1024 + 13
    data = make(Case((4,), vocab, (CommitRule.ENTROPY,), sampled=True), dtype)
    data["is_masked"][:] = True
    values = data["logits"].nan_to_num()
    results = []
    for offset in range(9):
        stride = vocab + 3 * offset
        flat = torch.full((offset + 4 * stride,), torch.nan, dtype=dtype)
        rows = torch.as_strided(flat, (4, vocab), (stride, 1), offset)
        rows.copy_(values)
        if backend.device == "cpu":
            results.append(run(ops.commit_, data | {"logits": rows}))
        else:  # keep the address: a copy of the whole storage
            moved = torch.as_strided(flat.to(backend.device), (4, vocab), (stride, 1), offset)
            results.append(run(ops.commit_, data | {"logits": moved}, backend.device))
    for offset, result in enumerate(results):
        for name in WRITTEN:
            assert_equal(result[name], results[0][name], f"{name} at offset {offset}")


@pytest.mark.parametrize("rule", EVERY_RULE, ids=lambda r: r.name)
def test_long_blocks(rule: CommitRule, backend) -> None:
    """More rows than shared memory has room for, and more than a CTA has threads."""
    data = make(Case((290,) if backend.name.startswith("emulated") else (1100,), 37, (rule,)))
    data["is_fixed"][:] = False
    data["quota"][:] = 100
    if rule == CommitRule.ENTROPY:
        data["threshold"][:] = 60.0
    check(data, backend)
    del data["eos_token_ids"]  # an early EOS would hide the rest
    check(data, backend)


@pytest.mark.slow_emulated
def test_many_requests(backend) -> None:
    """The request of a row is found in two rounds; requests without rows lie everywhere."""
    lens = (0, 0, *(b % 3 for b in range(330)), 0)
    check(make(Case(lens, 11, EVERY_RULE, extra_rows=2)), backend)


def test_rows_before_the_first_request_are_of_nobody(backend) -> None:
    data = small(torch.randn(6, 30))
    data["cu_seqlens"] = torch.tensor([2, 5]).int()
    result = run(ops.commit_, data, backend.device)
    assert result["is_masked"].tolist() == [True, True, False, False, False, True]
    assert int(result["num_committed"]) == 3


def test_default_ban_is_the_mask_id(backend) -> None:
    logits = torch.zeros(3, 9)
    logits[0, 3] = logits[0, 5] = 4.0  # 3 is the mask id
    logits[1] = -torch.inf
    result = run(ops.commit_, small(logits), backend.device)
    assert result["candidates"].tolist() == [5, 0, 0]
    data = small(logits, banned_token_ids=torch.tensor([], dtype=torch.int64))
    assert run(ops.commit_, data, backend.device)["candidates"].tolist() == [3, 0, 0]


@pytest.mark.parametrize("sampled", [False, True])
def test_tickets_are_zero_again(sampled: bool, backend) -> None:
    """Calls can share them: nothing of one call is left for the next."""
    data = make(Case((7, 0, 33, 1, 12), SLICE + 77, EVERY_RULE, sampled), torch.bfloat16)
    expected = run(ops.commit_, data, backend.device)
    tickets = torch.zeros(5, dtype=torch.int32, device=backend.device)
    for _ in range(2):
        moved = {n: t.to(backend.device) for n, t in data.items()} | {"tickets": tickets}
        result = run(ops.commit_, moved, backend.device)
        assert not tickets.any()
        for name in WRITTEN:
            assert_equal(result[name], expected[name], name)


def test_tickets_are_checked(backend) -> None:
    data = small(torch.zeros(2, 5))
    for tickets, message in (
        (torch.zeros(2, dtype=torch.int32), "commit_: tickets must have size 1"),
        (torch.zeros(1, dtype=torch.int64), "commit_: tickets must be int32, got int64"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(ops.commit_, data | {"tickets": tickets}, backend.device)


# ---- under the emulator only ------------------------------------------------------------------


@pytest.mark.parametrize("sampled", [False, True])
def test_every_schedule_gives_the_same_bits(sampled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever CTA comes last."""
    data = make(Case((3, 0, 5, 2), SLICE + 1, EVERY_RULE, sampled), torch.bfloat16)
    library = emulated.load()
    monkeypatch.setattr(_library, "nld", library.ops)
    expected = None
    try:
        for order in emulated.ORDERS:
            for seed in (0, 5, 11):
                for resident in (0, 1024):
                    library.configure(order=order, seed=seed, max_resident=resident)
                    result = run(ops.commit_, data)
                    expected = expected or result
                    for name in WRITTEN:
                        assert_equal(result[name], expected[name], f"{name}, {order} {seed}")
    finally:
        library.configure()


@pytest.mark.parametrize("sampled", [False, True])
def test_no_races(sampled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checked library reports unordered accesses, also between CTAs, and what is read before
    anybody wrote it."""
    library = emulated.load("checked")
    library.configure()
    monkeypatch.setattr(_library, "nld", library.ops)
    tickets = torch.zeros(4, dtype=torch.int32)
    data = make(Case((3, 0, 5, 2), SLICE + 1, EVERY_RULE, sampled), torch.bfloat16)
    plain = run(reference.commit_, data)
    result = run(ops.commit_, data | {"tickets": tickets})
    assert_equal(result["block_tokens"], plain["block_tokens"], "block_tokens")
    data = make(Case((290,), 5, (CommitRule.REVISE,), sampled))
    plain = run(reference.commit_, data)
    result = run(ops.commit_, data)
    assert_equal(result["block_tokens"], plain["block_tokens"], "block_tokens")


@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_judged_rows_are_read_once(
    dtype: torch.dtype, sampled: bool, offset: int, traffic: Callable
) -> None:
    """`commit_logits_bytes` of sampler.h: the traffic is the op's own minimum, to the byte."""
    vocab, rows = SLICE + 8 * 5, 6
    case = Case((3, 2), vocab, (CommitRule.REVISE, CommitRule.THRESHOLD), sampled, extra_rows=1)
    data = make(case, dtype)
    data["is_masked"] = torch.tensor([True, False, False, True, False, True])
    data["is_fixed"] = torch.tensor([False, False, True, False, False, False])
    stride = vocab if offset == 0 else vocab + offset
    flat = torch.zeros(offset + rows * stride, dtype=dtype)
    logits = torch.as_strided(flat, (rows, vocab), (stride, 1), offset)
    logits.copy_(data["logits"].nan_to_num())
    judged = [True, True, False, True, False, False]  # row 5 belongs to nobody
    with traffic(flat) as whole:
        run(lambda *args, **kw: ops.commit_(logits, *args[1:], **kw), data)
    least = sum(judged) * vocab * dtype.itemsize
    # Unaligned vectors overlap with their neighbours' at the ends of a warp's 1024 ids.
    most = least if offset == 0 else least + sum(judged) * (vocab // 1024 + 2) * 16
    assert least <= whole.read_bytes <= most
    assert whole.written_bytes == 0
    if offset == 0:
        for row, is_judged in enumerate(judged):
            with traffic(logits[row]) as one:
                run(lambda *args, **kw: ops.commit_(logits, *args[1:], **kw), data)
            assert one.read_bytes == is_judged * vocab * dtype.itemsize, row
