"""nld_cuda.bench.tune without a GPU: alternatives, results that must agree, losses, the fit."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from nld_cuda import _library
from nld_cuda.bench import grid, plans, time_model, tune
from nld_cuda.bench.timing import RehearsalClock
from nld_cuda.bench.tune import Alternative, Timed

H100 = time_model.GPUS["H100"]


def cell_named(name: str) -> grid.Attention:
    cell = grid.BY_NAME[name]
    assert isinstance(cell, grid.Attention)
    return cell


def test_rehearsal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every step of a run; what it judges and fits is pretended."""
    out = tmp_path / "tune.json"
    tune.main(["--rehearse", "--out", str(out)])
    document = json.loads(out.read_text())
    assert document["tuned"].startswith("pretended")
    assert document["mean_error_after"] < 0.03 < 0.08 < document["mean_error_before"]
    assert document["fitted"]["copy_gbps"] == pytest.approx(3000 * 2.718**-0.2, rel=0.03)
    assert document["fitted"]["wgmma_tflops"] == pytest.approx(560 * 2.718**-0.3, rel=0.03)
    assert document["fitted"]["mma_tflops"] == pytest.approx(350, rel=0.02), "no time depends on it"
    for row in document["cells"]:
        assert next(iter(row["times"])) == "chosen" and len(row["times"]) > 4
    text = capsys.readouterr().out
    assert "kMemoryKeyNs" in text and "mean error" in text


def test_alternatives_differ_in_what_they_say() -> None:
    cell = cell_named("attention/q32/b1/c4096")
    ways = list(tune.alternatives(cell, 132, 90))
    assert [w.name for w in ways[:2]] == ["chosen", "portable"]
    assert ways[1].capability == 80 and ways[0].plan is None
    assert len({w.name for w in ways}) == len(ways) > 8
    for way in ways[2:]:
        assert way.plan is not None
        assert way.name == f"rows {way.plan.tile_rows}, {way.plan.longest} keys"
        assert way.cell.visible_pairs == cell.visible_pairs
    assert {w.plan.tile_rows for w in ways if w.plan} == {64, 128}
    assert any(w.plan.num_slots == 0 for w in ways if w.plan)
    assert not any(w.capability for w in tune.alternatives(cell, 132, 80))


def test_a_wrong_result_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """An alternative that computes something else is not timed."""
    cell = tune.rehearsal_cells()[0]
    wrong = Alternative("wrong", plans.with_tile_rows(cell, 128))
    made = tune.problem_of

    def broken(base: Any, way: Alternative) -> Any:
        problem = made(base, way)
        problem.seq_lens = problem.seq_lens - (way.name == "wrong") * 100
        return problem

    ways = [Alternative("chosen", cell), wrong]
    device = torch.device("cpu")
    timed = tune.measure(cell, ways, device, RehearsalClock(), 2, 0.0)
    assert [t.alternative.name for t in timed] == ["chosen", "wrong"]
    monkeypatch.setattr(tune, "problem_of", broken)
    with pytest.raises(RuntimeError, match="wrong: the result differs"):
        tune.measure(cell, ways, device, RehearsalClock(), 2, 0.0)


def test_losses_are_those_above_three_percent() -> None:
    cell = tune.rehearsal_cells()[0]
    times = {"chosen": 103.5, "a": 100.0, "b": 101.0, "c": 90.0, "d": 120.0}
    found = tune.losses([Timed(Alternative(name, cell), us) for name, us in times.items()])
    assert [row["way"] for row in found] == ["c", "a"]
    assert found[0]["loss"] == pytest.approx(0.15)


def test_the_fit_finds_the_constants() -> None:
    """From exact times of another GPU: its rates, and the sum of what is always paid."""
    logs = torch.tensor([0.3, 0.3, -0.4, -0.4, 0, 0, 0.25, 0, -0.2, -0.3], dtype=torch.float64)
    truth = tune.with_constants(H100, logs)
    names = ("q1/b1/c1024", "q1/b32/c4096", "q32/b1/c4096", "q32/b8/c16384", "q64/b32/c1024")
    ways = []
    for name in names:
        ways += list(tune.alternatives(cell_named(f"attention/{name}"), 132, 90))
    timed = [Timed(w, tune.model_us(w, truth)) for w in ways]
    fitted, before, after = tune.fit(H100, timed)
    assert after < 0.005 < 0.1 < before
    for rate in ("copy_gbps", "mma_tflops", "wgmma_tflops"):
        assert getattr(fitted, rate) == pytest.approx(getattr(truth, rate), rel=0.05), rate
    paid = [g.latency.kernel + g.latency.first_keys + g.latency.epilogue for g in (fitted, truth)]
    assert paid[0] == pytest.approx(paid[1], rel=0.2)


def test_constants_of_the_heuristic_follow_from_the_model() -> None:
    """What heuristic.h has is what the model would give it, between H100 and H200, to a third."""
    have = {
        "kMemoryKeyNs": 20, "attention_key_ns(128)": 20, "attention_key_ns(16)": 16,
        "kItemNs": 2000, "kPartialRowNs": 25, "kMergeNs": 1000,
    }  # fmt: skip
    source = (Path(__file__).parent.parent / "csrc/attention/heuristic.h").read_text()
    for name in ("kMemoryKeyNs", "kItemNs", "kPartialRowNs", "kMergeNs"):
        assert f"{name} = {have[name]};" in source
    assert "return tile_rows == 128 ? 20 : 16;" in source
    by_gpu = [tune.heuristic_constants(time_model.GPUS[name]) for name in ("H100", "H200")]
    for name, value in have.items():
        low, high = (f(c[name] for c in by_gpu) for f in (min, max))
        assert low / 1.4 < value < high * 1.4, name


def test_pretended_noise_is_small() -> None:
    ways = [Alternative("chosen", tune.rehearsal_cells()[0])]
    us = [tune.pretended(ways, H100, random.Random(i))[0].us for i in range(20)]
    assert max(us) / min(us) < 1.08


def test_capability_is_limited_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(tune._library, "C", type("C", (), {"set_max_capability": seen.append}))
    with pytest.raises(KeyError), tune.limited(80):
        raise KeyError
    assert seen == [80, 0]


def test_wrong_capability() -> None:
    with pytest.raises(ValueError, match=r"capability must be 0 .* or at least 80, got 7"):
        _library.C.set_max_capability(7)
    _library.C.set_max_capability(80)
    _library.C.set_max_capability(0)


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="a CUDA device must be there"):
        tune.main([])
