"""attention_plan: CPU, emulated kernel and reference agree word for word; what a plan promises."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import emulated
from cases import BLOCK_CAUSAL, CAUSAL, FULL, MIXED, QUADRATIC, Request
from compare import COMPILE_BACKEND, assert_equal
from nld_cuda import _library, ops, reference

INT = torch.int32


@dataclass(frozen=True)
class Batch:
    """Arguments of attention_plan."""

    requests: tuple[Request, ...]
    heads: int = 4
    kv_heads: int = 2
    extra_rows: int = 0
    split_len: int = 0
    num_sms: int = 0
    max_seq_len: int | None = None

    def arguments(self, device: str = "cpu") -> tuple[list[Tensor], dict]:
        rows = torch.tensor([r.rows for r in self.requests], dtype=INT)
        columns = {
            "seq_lens": [r.seq_len for r in self.requests],
            "cu_seqlens_q": [0, *rows.cumsum(0).tolist()],
            "mask_mode": [r.mode for r in self.requests],
            "block_len": [r.block_len for r in self.requests],
            "block_phase": [r.phase for r in self.requests],
        }
        t = {n: torch.tensor(v, dtype=INT, device=device) for n, v in columns.items()}
        longest = max((r.seq_len for r in self.requests), default=0)
        options = {
            "total_q": int(rows.sum()) + self.extra_rows,
            "num_heads": self.heads,
            "num_kv_heads": self.kv_heads,
            "max_seq_len": longest if self.max_seq_len is None else self.max_seq_len,
            "block_len": t["block_len"],
            "block_phase": t["block_phase"],
            "split_len": self.split_len,
            "num_sms": self.num_sms,
        }
        return [t["seq_lens"], t["cu_seqlens_q"], t["mask_mode"]], options


@dataclass(frozen=True)
class Parsed:
    """The words of a plan by name, as csrc/attention/plan.h lays them out."""

    header: dict[str, int]
    tiles: list[dict[str, int]]
    split_tiles: list[int]
    items: list[tuple[int, int, int, int]]  # tile, split, key_begin, key_end
    max_items: int
    max_tiles: int


def parse(plan: Tensor, batch: Batch) -> Parsed:
    words = plan.tolist()
    names = "version batch total_q heads_per_kv tile_rows split_len num_tiles num_items"
    names += " num_split_tiles num_slots max_item_keys unused"
    header = dict(zip(names.split(), words, strict=False))
    total = header["total_q"] * header["heads_per_kv"]
    requests = len(batch.requests)
    max_tiles = total // header["tile_rows"] + min(requests, header["total_q"]) if requests else 0
    fields = "request row_begin num_rows key_end num_splits split_keys first_slot first_item"
    fields += " hole_begin hole_end heads_begin unused"
    tiles = [
        dict(zip(fields.split(), words[12 + 12 * t : 24 + 12 * t], strict=True))
        for t in range(header["num_tiles"])
    ]
    at = 12 + 12 * max_tiles
    split_tiles = words[at : at + header["num_split_tiles"]]
    at = (at + max_tiles + 3) // 4 * 4
    items = [tuple(words[i : i + 4]) for i in range(at, at + 4 * header["num_items"], 4)]
    return Parsed(header, tiles, split_tiles, items, (len(words) - at) // 4, max_tiles)


def seen_keys(request: Request) -> Tensor:
    """The mask of a request, its keys in the order in which kernels read them."""
    r = request
    visible = reference.visible_keys(r.mode, r.seq_len, r.rows, r.block_len, r.phase)
    return visible[:, reference.reading_order(r.mode, r.seq_len, r.rows, r.block_len)]


def counted_before(tile: dict[str, int], key: int, split_len: int) -> int:
    """Keys below `key` without those whole steps of the tile's hole that items leave out."""
    step = split_len or 64
    begin, end = -(-tile["hole_begin"] // step) * step, tile["hole_end"] // step * step
    return key - max(min(key, end) - begin, 0)


def check_promises(plan: Parsed, batch: Batch) -> None:
    """Everything that the kernels rely on, from the definition of the masks."""
    header, per_kv = plan.header, batch.heads // batch.kv_heads
    assert header["num_tiles"] <= plan.max_tiles and header["num_items"] <= plan.max_items
    max_slots = min(2 * (plan.max_items - plan.max_tiles), plan.max_items)
    assert header["num_slots"] <= max_slots, "the workspace is too small"
    by_tile: dict[int, list] = {t: [] for t in range(header["num_tiles"])}
    for item in plan.items:
        by_tile[item[0]].append(item[1:])
    rows_of: dict[int, int] = dict.fromkeys(range(len(batch.requests)), 0)
    slots: list[int] = []
    masks = [seen_keys(r) for r in batch.requests]
    for t, tile in enumerate(plan.tiles):
        request, begin, rows = tile["request"], tile["row_begin"], tile["num_rows"]
        assert begin == rows_of[request] and 0 < rows <= header["tile_rows"]
        rows_of[request] += rows
        splits = sorted(by_tile[t])
        assert [s for s, *_ in splits] == list(range(tile["num_splits"]))
        covered = torch.zeros(batch.requests[request].seq_len, dtype=torch.int32)
        for split, key_begin, key_end in splits:
            begin_counted = counted_before(tile, key_begin, batch.split_len)
            assert begin_counted == split * tile["split_keys"], "a split must start at its multiple"
            assert key_begin % (batch.split_len or 64) == 0, "not an absolute multiple"
            assert tile["num_splits"] == 1 or key_begin < key_end
            covered[key_begin:key_end] += 1
        assert (covered <= 1).all(), "a key is counted twice"
        mask = masks[request][begin // per_kv : (begin + rows - 1) // per_kv + 1]
        assert not (mask & (covered == 0)).any(), "a visible key is left out"
        last = int(mask.any(0).nonzero().max()) + 1 if mask.any() else 0
        assert tile["key_end"] == last, "keys are read that no row sees"
        assert mask[:, : tile["hole_begin"]].any(0).all(), "the hole begins too late"
        assert not mask[:, tile["hole_begin"] : tile["hole_end"]].any(), "the hole is seen"
        assert mask[:, tile["hole_end"] : last].any(0).all(), "the hole ends too early"
        if batch.split_len > 0:
            assert tile["split_keys"] == batch.split_len
        else:
            assert tile["num_splits"] == 1 or tile["split_keys"] % 64 == 0
        if tile["num_splits"] > 1:
            slots += range(tile["first_slot"], tile["first_slot"] + tile["num_splits"])
        else:
            assert tile["first_slot"] == -1
    for request, rows in rows_of.items():
        assert rows == batch.requests[request].rows * per_kv, "rows are left out"
    assert slots == list(range(header["num_slots"])), "slots must be numbered in order"
    assert plan.split_tiles == [t for t, x in enumerate(plan.tiles) if x["num_splits"] > 1]
    lengths = []
    for t, _, *ends in plan.items:
        begin, end = (counted_before(plan.tiles[t], key, batch.split_len) for key in ends)
        lengths.append(end - begin)
    longest = max(lengths, default=0)
    assert header["max_item_keys"] == longest
    order = [
        (length // (longest // 256 + 1), -t, -s)
        for length, (t, s, *_) in zip(lengths, plan.items, strict=True)
    ]
    assert order == sorted(order, reverse=True), "longest first, then by tile and split"


def check(batch: Batch) -> Parsed:
    """The three implementations agree in every word, and keep the promises."""
    arguments, options = batch.arguments()
    plan = ops.attention_plan(*arguments, **options)
    assert_equal(plan, reference.attention_plan(*arguments, **options), "plan against reference")
    emulated.configure()
    twin = emulated.Ops().attention_plan(*arguments, **options)
    assert_equal(twin, plan, "emulated plan against the CPU's")
    parsed = parse(plan, batch)
    check_promises(parsed, batch)
    return parsed


LONG = (Request(1, 4000), Request(1, 130), Request(32, 70), Request(5, 3000, FULL))
BATCHES = {
    "mixed": Batch(MIXED),
    "mixed-split": Batch(MIXED, split_len=37),
    "extra-rows": Batch(MIXED, extra_rows=9),
    "empty": Batch(()),
    "empty-with-rows": Batch((), extra_rows=3),
    "no-rows": Batch((Request(0, 20), Request(0, 0)), extra_rows=2),
    "no-keys": Batch((Request(5, 0), Request(3, 0, QUADRATIC, 2), Request(9, 4, CAUSAL))),
    "long": Batch(LONG, heads=32, kv_heads=8, num_sms=132),
    "long-one-sm": Batch(LONG, heads=32, kv_heads=8, num_sms=1),
    "long-fixed": Batch(LONG, heads=32, kv_heads=8, split_len=512, max_seq_len=8192),
    "too-long": Batch(LONG, heads=32, kv_heads=8, split_len=512, max_seq_len=1024),
    "one-block": Batch((Request(32, 8192, FULL),), heads=32, kv_heads=8, num_sms=132),
    "few-keys": Batch((Request(32, 2048, FULL),), heads=32, kv_heads=8, num_sms=132),
    "decode": Batch((Request(1, 8192),), heads=32, kv_heads=8, num_sms=132),
    "prompt": Batch((Request(1500, 1500), Request(33, 1500)), heads=32, kv_heads=8, num_sms=8),
    "many": Batch(tuple(Request(i % 3, 50 * i % 977) for i in range(600)), num_sms=16),
    "equals": Batch(tuple(Request(1, 40 + i % 3) for i in range(300)), num_sms=16),
    "split-1": Batch((Request(3, 300), Request(2, 9)), split_len=1),
    "block-causal": Batch(
        tuple(Request(70, 261, BLOCK_CAUSAL, 24, phase) for phase in (0, 5, -7)), num_sms=40
    ),
    "groups": Batch((Request(272, 1272, QUADRATIC, 16), Request(40, 40, QUADRATIC, 3)), num_sms=64),
    "groups-split": Batch(
        (Request(272, 472, QUADRATIC, 16), Request(99, 99, QUADRATIC, 1)), split_len=50
    ),
    "groups-lost": Batch(tuple(Request(300, 230 + i, QUADRATIC, 2) for i in range(4)), num_sms=1),
}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_plans_agree(batch: Batch) -> None:
    if batch is BATCHES["too-long"]:  # slow, but right: the last split takes the rest
        arguments, options = batch.arguments()
        plan = ops.attention_plan(*arguments, **options)
        assert_equal(plan, reference.attention_plan(*arguments, **options))
        emulated.configure()
        assert_equal(emulated.Ops().attention_plan(*arguments, **options), plan)
        parsed = parse(plan, batch)
        assert max(end for *_, end in parsed.items) == 4000
        assert all(split < 2 for _, split, *_ in parsed.items)
        return
    check(batch)


@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_batch(data) -> None:
    request = st.builds(
        Request,
        rows=st.one_of(st.integers(0, 5), st.integers(0, 150)),
        seq_len=st.one_of(st.integers(0, 90), st.integers(0, 3000)),
        mode=st.integers(0, 3),
        block_len=st.integers(1, 40),
        phase=st.integers(-50, 50),
    )
    kv_heads = data.draw(st.integers(1, 3))
    check(
        Batch(
            tuple(data.draw(st.lists(request, max_size=5))),
            heads=kv_heads * data.draw(st.integers(1, 9)),
            kv_heads=kv_heads,
            extra_rows=data.draw(st.integers(0, 70)),
            split_len=data.draw(st.one_of(st.just(0), st.integers(1, 700))),
            num_sms=data.draw(st.integers(1, 200)),
        )
    )


def test_a_long_context_fills_the_gpu_and_a_full_gpu_is_not_cut() -> None:
    alone = check(BATCHES["one-block"])
    assert 120 <= len(alone.items) * 8 <= 132, "132 SMs, 8 kv heads: one wave, nearly full"
    assert alone.header["tile_rows"] == 128 and alone.header["max_item_keys"] == 512
    few = check(BATCHES["few-keys"])
    assert few.header["max_item_keys"] == 128, "128 CTAs of 128 keys rather than 64 of 256"
    crowd = check(Batch(tuple(Request(32, 2048, FULL) for _ in range(40)), 32, 8, num_sms=132))
    assert crowd.header["num_slots"] == 0, "320 CTAs fill 132 SMs without splits"
    half = check(Batch(tuple(Request(32, 4096, FULL) for _ in range(8)), 32, 8, num_sms=132))
    assert len(half.items) == 16, "128 CTAs of 2048 keys: one wave, not two of 1408"
    prompt = check(Batch((Request(600, 600),), 32, 8, num_sms=40))
    assert prompt.header["num_slots"] == 0, "lengths from 32 to 600 even out by themselves"


def test_workspace_does_not_grow_with_the_context() -> None:
    sizes = set()
    for context in (1000, 100_000):
        batch = Batch((Request(32, context, FULL),), heads=32, kv_heads=8, num_sms=132)
        arguments, options = batch.arguments()
        plan = ops.attention_plan(*arguments, **options)
        sizes.add(plan.numel())
        assert parse(plan, batch).header["num_slots"] <= 4 * 16
    assert len(sizes) == 1


@pytest.mark.parametrize("order", emulated.ORDERS)
def test_out_is_written_as_far_as_it_counts(order: str, monkeypatch) -> None:
    batch = BATCHES["many"]
    arguments, options = batch.arguments()
    fresh = ops.attention_plan(*arguments, **options)
    again = torch.full_like(fresh, -7)
    emulated.configure(order=order)
    monkeypatch.setattr(_library, "nld", emulated.Ops())
    assert ops.attention_plan(*arguments, **options, plan=again) is again
    assert parse(again, batch) == parse(fresh, batch)
    assert ((again == fresh) | (again == -7)).all() and (again == -7).any()


def test_opcheck() -> None:
    for batch in (BATCHES["mixed"], BATCHES["mixed-split"], BATCHES["empty"]):
        arguments, options = batch.arguments()
        torch.library.opcheck(torch.ops.nld.attention_plan.default, tuple(arguments), options)
        out = {**options, "plan": ops.attention_plan(*arguments, **options).zero_()}
        torch.library.opcheck(torch.ops.nld.attention_plan.out, tuple(arguments), out)


def test_compiles() -> None:
    arguments, options = BATCHES["mixed"].arguments()
    compiled = torch.compile(
        lambda *a: ops.attention_plan(*a, **options) * 2, backend=COMPILE_BACKEND, fullgraph=True
    )
    assert_equal(compiled(*arguments), ops.attention_plan(*arguments, **options) * 2)


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_length_is_known_beforehand(batch: Batch) -> None:
    arguments, options = batch.arguments()
    names = ("total_q", "num_heads", "num_kv_heads", "max_seq_len", "split_len")
    sizes = {n: options[n] for n in names} | {"num_sms": batch.num_sms or 4}
    words = ops.attention_plan_len(len(batch.requests), **sizes)
    assert ops.attention_plan(*arguments, **options).shape == (words,)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"seq_lens": lambda t: t.long()}, "seq_lens must be int32, got int64"),
        ({"cu_seqlens_q": lambda t: t[1:]}, "cu_seqlens_q must have size 6"),
        ({"cu_seqlens_q": lambda t: t.flip(0)}, "cu_seqlens_q must grow from 0 to at most 111"),
        ({"mask_mode": lambda t: t + 4}, r"mask_mode must lie in \[0, 4\), got 5 at request 0"),
        ({"seq_lens": lambda t: -t}, "seq_lens must be >= 0, got -70 at request 0"),
        ({"block_len": lambda t: None}, "block_len must be given for mask_mode 2, got None"),
        ({"block_phase": lambda t: t[:2]}, "block_phase must have size 5"),
        ({"num_heads": lambda n: 5}, "num_heads must be a multiple of num_kv_heads = 2, got 5"),
        ({"num_kv_heads": lambda n: 0}, "num_kv_heads must be >= 1, got 0"),
        ({"total_q": lambda n: -1}, "total_q must be >= 0, got -1"),
        ({"max_seq_len": lambda n: -1}, "max_seq_len must be >= 0, got -1"),
        ({"split_len": lambda n: -1}, "split_len must be >= 0"),
        ({"num_sms": lambda n: -2}, r"num_sms must lie in \[0, 65535\]"),
        ({"total_q": lambda n: 2**40}, "total_q must be at most"),
        (
            {"split_len": lambda n: 1, "max_seq_len": lambda n: 2**40},
            "split_len must leave at most",
        ),
        ({"plan": lambda t: torch.zeros(3, dtype=INT)}, "plan must have size"),
        ({"plan": lambda t: torch.zeros(3)}, "plan must be int32, got float32"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    arguments, options = BATCHES["mixed"].arguments()
    names = ("seq_lens", "cu_seqlens_q", "mask_mode")
    call = {**dict(zip(names, arguments, strict=True)), **options, "plan": None}
    for name, fn in change.items():
        call[name] = fn(call[name])
    with pytest.raises(RuntimeError, match="attention_plan: .*" + message):
        ops.attention_plan(**call)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"seq_lens": lambda t: -t}, "seq_lens are not negative"),
        ({"cu_seqlens_q": lambda t: t.flip(0)}, "cu_seqlens_q grows from 0"),
        ({"mask_mode": lambda t: t - 2}, "mask_mode is a MaskMode"),
        ({"block_len": lambda t: None}, "block_len is at least 1"),
    ],
)
def test_the_kernel_checks_values_in_debug_builds(change: dict, message: str) -> None:
    arguments, options = BATCHES["mixed"].arguments()
    names = ("seq_lens", "cu_seqlens_q", "mask_mode")
    call = {**dict(zip(names, arguments, strict=True)), **options}
    for name, fn in change.items():
        call[name] = fn(call[name])
    emulated.configure()
    with pytest.raises(RuntimeError, match=message):
        emulated.Ops().attention_plan(**call)
