"""The model of time: what it must say of simple cells, of published kernels, and what it wrote."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from nld_cuda.bench import grid, plans, time_model, traffic
from nld_cuda.bench.time_model import GPUS, Machine, predict, run_items

RESULTS = Path(__file__).parent.parent / "benchmarks/results"
H100, H200 = GPUS["H100"], GPUS["H200"]
LATENCY = H100.latency
WAIT = LATENCY.first_keys * 1e3


def attention_cell(rows: int, batch: int, context: int) -> grid.Attention:
    cell = grid.BY_NAME[f"attention/q{rows}/b{batch}/c{context}"]
    assert isinstance(cell, grid.Attention)
    return cell


def test_one_item_after_the_other() -> None:
    """By hand: a CTA waits, takes its keys, writes; the next item waits half as long."""
    one = Machine(1, 10.0, 0.0, ("tensor", "memory"), WAIT)
    assert run_items(one, [], []) == 0.0
    assert run_items(one, [100.0], [7.0]) == WAIT + 1007
    assert run_items(one, [100.0, 50.0], [7.0, 7.0]) == WAIT + 1007 + WAIT / 2 + 507


def test_memory_is_shared_by_those_who_read() -> None:
    shared = Machine(4, 1.0, 5.0, ("tensor", "memory"), WAIT)
    assert run_items(shared, [100.0] * 4, [0.0] * 4) == pytest.approx(WAIT + 4 * 5 * 100)
    # alone, at the rate of one: 50 keys of four, then 50 of one
    alone = run_items(shared, [100.0, 50.0, 50.0, 50.0], [0.0] * 4)
    assert alone == pytest.approx(WAIT + 50 * 4 * 5 + 50 * 5)
    fast = replace(shared, shared_key_ns=0.1)
    assert run_items(fast, [100.0] * 4, [0.0] * 4) == pytest.approx(WAIT + 100)


def test_rounds_go_forth_and_back() -> None:
    """Two CTAs, items of 4, 3, 2, 1: 4 + 1 and 3 + 2 rather than 4 + 2 and 3 + 1."""
    two = Machine(2, 1000.0, 0.0, ("tensor", "memory"), WAIT)
    waits = 1.5 * WAIT
    assert run_items(two, [4.0, 3.0, 2.0, 1.0], [0.0] * 4) == pytest.approx(waits + 5000)


def test_bounds_and_floors() -> None:
    long_tokens = predict(attention_cell(1, 32, 32768), H100)
    assert long_tokens.bound == "memory"
    assert long_tokens.floor_us < long_tokens.us < 1.05 * long_tokens.floor_us
    short = predict(attention_cell(1, 1, 512), H100)
    assert short.bound == "latency" and short.us < 15
    prompt = predict(grid.BY_NAME["attention/prefill/causal/b1/c16384"], H100)
    assert prompt.bound == "tensor"
    assert 0.8 * 350 < prompt.flops / prompt.us / 1e6 * 350 / rate(prompt) < 350


def rate(prediction: time_model.Prediction) -> float:
    return H100.wgmma_tflops if prediction.choice["kernel"] == "sm90" else H100.mma_tflops


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_every_cell_has_a_time_above_its_floor(gpu: time_model.Gpu) -> None:
    for cell in grid.CELLS:
        if isinstance(cell, grid.Attention) and (cell.total_q > 5000 or not cell.headline):
            continue
        made = predict(cell, gpu)
        assert LATENCY.kernel < made.us < 1e5
        assert made.us > made.floor_us, cell.name


def test_h200_is_never_slower() -> None:
    for cell in grid.CELLS:
        if cell.headline:
            assert predict(cell, H200).us <= predict(cell, H100).us * 1.001, cell.name


def test_commit_by_hand() -> None:
    cell = grid.Commit(1, 32)
    latency = LATENCY.kernel + LATENCY.first_keys + LATENCY.finish
    assert predict(cell, H100).us == pytest.approx(latency + 32 * 131072 * 2 / 3e6)
    assert predict(replace(cell, masked=0.5), H100).us < predict(cell, H100).us
    two_launches = grid.Verify(grid.VerifyMode.REJECTION, 1, 32, 6, draft_probs=True)
    one_launch = replace(two_launches, draft_probs=False)
    a100 = GPUS["A100"]
    assert predict(two_launches, a100).us > predict(one_launch, a100).us + LATENCY.next_kernel
    many = replace(two_launches, batch=8)  # more than clusters hold at once
    for cell, clusters in ((two_launches, True), (one_launch, False), (many, False)):
        assert time_model.verify_has_clusters(cell, H100) == clusters
    plain = grid.Verify(grid.VerifyMode.GREEDY, 8, 1, 0)
    assert time_model.verify_has_clusters(plain, H100)
    assert not time_model.verify_has_clusters(plain, a100)


def test_clusters_are_as_the_launcher_has_them() -> None:
    """csrc/attention/cluster.h, for the clusters that 8 groups of 16 SMs hold."""
    sizes = {}
    for rows, batch, keys in (
        (32, 1, 1024),
        (32, 1, 512),
        (32, 8, 512),
        (1, 1, 32768),
        (64, 2, 4096),
    ):
        cell = attention_cell(rows, batch, keys)
        sizes[rows, batch, keys] = time_model.attention(cell, H100).choice["cluster"]
        assert time_model.attention(cell, GPUS["A100"]).choice["cluster"] == 1
    assert list(sizes.values()) == [16, 8, 2, 1, 4]
    for (rows, batch, keys), size in sizes.items():
        cell = attention_cell(rows, batch, keys)
        without = time_model.attention(cell, H100, plans.plan_of(cell, H100.sms)).us
        own = time_model.attention(cell, H100).us
        assert own < without if size > 1 else own == without


def test_clusters_lose_nowhere_by_much() -> None:
    """What the launcher gives to clusters, against the plan's own cuts and a second launch."""
    for cell in grid.ATTENTION:
        if cell.group not in ("decode", "mixed") or len(cell.requests) > 8:
            continue
        for gpu in (H100, H200):
            own = time_model.attention(cell, gpu)
            if own.choice["cluster"] > 1:
                cut = time_model.attention(cell, gpu, plans.plan_of(cell, gpu.sms)).us
                assert own.us < 1.1 * cut, (cell.name, gpu.name)


def test_devices_by_name() -> None:
    assert time_model.gpu_named("NVIDIA H100 80GB HBM3") is H100
    other = time_model.gpu_named("another", 123.0, 7)
    assert (other.copy_gbps, other.sms) == (123.0, 7)


# FlashAttention-3 and XQA, 32/8 heads of 128, bfloat16, pages of 16, one token a request, on a GPU
# that copies 4.3 TB/s, as published: docs/tuning.md. Batch, keys, microseconds.
FA3 = [
    (1, 1024, 11.0), (1, 4096, 14.5), (1, 16384, 27.2), (1, 32768, 43.5),
    (8, 1024, 17.5), (8, 4096, 41.6), (8, 16384, 132.7), (8, 32768, 253.5),
]  # fmt: skip
XQA = [(1, 1024, 10.8), (1, 4096, 14.0), (1, 16384, 26.8), (1, 32768, 46.0), (8, 16384, 155.6)]


def as_published(launches: int, monkeypatch: pytest.MonkeyPatch, published: list) -> list[float]:
    """What the model says of a kernel with so many launches / what was published."""
    combine = "inside" if launches == 1 else "kernel"
    kernel = time_model.Kernel("published", "wgmma", {16: 64 << 10}, {16: 1}, combine)
    monkeypatch.setattr(time_model, "kernel_of", lambda *args: kernel)
    more = LATENCY.next_kernel * max(launches - 2, 0)
    return [
        (predict(attention_cell(1, batch, keys), H200).us + more) / us
        for batch, keys, us in published
    ]


def test_published_times_of_three_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention-3: scheduling, attention, merge. Nothing was fitted to these."""
    ratios = as_published(3, monkeypatch, FA3)
    assert max(abs(ratio - 1) for ratio in ratios) < 0.15, ratios


def test_published_times_of_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """XQA takes 4 us more than the model says, and 15 % more where memory counts: the model's
    latency of one launch may be too short by as much."""
    ratios = as_published(1, monkeypatch, XQA)
    assert all(0.6 < ratio < 1 for ratio in ratios), ratios
    missing = [us * (1 - ratio) for (_, _, us), ratio in zip(XQA[:3], ratios, strict=False)]
    assert all(3 < us < 5 for us in missing), missing


def test_predictions_are_written_down() -> None:
    for gpu in (H100, H200):
        path = RESULTS / f"predictions_{gpu.name.lower()}.json"
        document = json.loads(path.read_text())
        assert document["predictions"] == "made by a model, not measured"
        rows = {row["name"]: row for row in document["rows"]}
        assert len(rows) == len(document["rows"]) >= 400
        assert {c.name for c in grid.CELLS if c.headline} <= rows.keys() <= grid.BY_NAME.keys()
        assert all(row["us"] > row["floor_us"] for row in rows.values())


def test_traffic_agrees_with_the_plan() -> None:
    """The bytes of the floor are the keys of the plan's items where one tile reads each request."""
    cell = attention_cell(32, 8, 4096)
    plan = plans.plan_of(cell, 132)
    keys = sum(plan.item_keys(item) for item in plan.items)
    q_and_out = cell.total_q * cell.heads * (2 * cell.head_dim * 2 + 4)
    assert traffic.of(cell).floor_bytes == keys * 4096 + q_and_out
