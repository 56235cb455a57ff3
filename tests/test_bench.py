"""The benchmark suite: cells, rows, files, exit codes, targets, plots. No time means anything."""

from __future__ import annotations

import builtins
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from nld_cuda import cli
from nld_cuda.bench import ceilings, grid, plots, rehearsal, report, suite, targets, timing
from nld_cuda.bench.base import Baseline, Prepared, copy_of
from nld_cuda.bench.ceilings import Ceilings

QUICK_BASELINES = "sdpa flash,sdpa math,gather + sdpa,torch,read (sum)"
ROOFS = Ceilings(3000.0, 3100.0, 6000.0, 700.0, 2.0, 50 << 20)


def run(capsys: Any, *argv: str) -> tuple[int, str, str]:
    """Return exit code, standard output and standard error of `nld bench kernels argv`."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "kernels", *argv])
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


@pytest.fixture
def tiny_grid(monkeypatch: pytest.MonkeyPatch) -> list[grid.Cell]:
    """Let the whole grid be the tiny cells, and inputs few."""
    monkeypatch.setattr(grid, "CELLS", rehearsal.cells())
    monkeypatch.setattr(suite, "CPU_ROTATED_BYTES", 1)
    measure = ceilings.measure
    small = lambda device, clock, small: measure(device, clock, small=True)  # noqa: E731
    monkeypatch.setattr(ceilings, "measure", small)
    return grid.CELLS


def check_document(document: dict[str, Any], cells: list[grid.Cell]) -> None:
    """Check the format that readers of the JSON rely on."""
    assert document["format"] == 1 and document["benchmark"] == "kernels"
    assert document["command"].startswith("nld bench kernels --")
    assert {"torch", "commit", "library", "device", "cpu"} <= set(document["environment"])
    assert all(document["ceilings"][k] > 0 for k in ("copy_gbps", "matmul_tflops", "launch_us"))
    assert [row["name"] for row in document["rows"]] == [cell.name for cell in cells]
    for row in document["rows"]:
        assert row["status"] in ("measured", "not run"), row
        assert row["floor_bytes"] > 0 and row["op"] in suite.OP_BENCHES
        if row["status"] == "not run":
            assert row["reason"]
            continue
        assert 0 < row["p10_us"] <= row["us"] <= row["p90_us"]
        assert row["gbps"] == pytest.approx(row["floor_bytes"] / row["us"] / 1e3)
        names = {b.name for b in suite.OP_BENCHES[row["op"]].baselines}
        assert set(row["baselines"]) == names, "every baseline has a record, whatever came of it"
        for name, record in row["baselines"].items():
            assert record["status"] in ("measured", "not run"), (row["name"], name, record)
            if record["status"] == "measured":
                assert record["us"] > 0 and record["ratio"] > 0
            else:
                assert record["reason"]


def test_rehearsal_of_a_gpu_run(capsys: Any, tmp_path: Path) -> None:
    """Graph timing, own plans, predictions, targets: every step but the GPU."""
    code, out, err = run(
        capsys, "--rehearse", "--baselines", QUICK_BASELINES, "--out", str(tmp_path)
    )
    assert code == 0, err
    document = json.loads((tmp_path / "kernels.json").read_text())
    check_document(document, rehearsal.cells())
    measured = [row for row in document["rows"] if row["status"] == "measured"]
    assert {row["op"] for row in measured} == set(suite.OP_BENCHES)
    assert all(row["predicted_us"] > 0 and row["eager_us"] > 0 for row in measured)
    assert "rehearsal" in document["environment"]
    assert {t["verdict"] for t in document["targets"]} <= {
        "not measured", "for H100 and H200 only"
    }  # fmt: skip
    verify = next(row for row in measured if row["op"] == "verify")
    assert "reads results" in verify["baselines"]["torch"]["timed"], "no graph for host reads"
    page = (tmp_path / "kernels.md").read_text()
    assert page.strip() in out and "### Targets" in page
    assert "sdpa cudnn" not in page, "nobody asked for it"
    assert re.search(r"bench: \d+ cells measured, \d+ not run, 0 failures", out)


def test_cpu_run(tiny_grid: list[grid.Cell], capsys: Any, tmp_path: Path) -> None:
    code, out, err = run(
        capsys, "--device", "cpu", "--full", "--budget", "0", "--out", str(tmp_path),
        "--threads", "1",
    )  # fmt: skip
    assert code == 0, err
    document = json.loads((tmp_path / "kernels.json").read_text())
    check_document(document, tiny_grid)
    assert "targets" not in document and "predicted" not in out, "both are for GPUs"
    for row in document["rows"]:
        if row["status"] == "measured" and row["op"] == "attention":
            assert row["baselines"]["sdpa flash"]["status"] == "measured"
            assert "CUDA" in row["baselines"]["flashinfer"]["reason"]
            assert row["num_runs"] == 11


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_gpu_run(tiny_grid: list[grid.Cell], capsys: Any, tmp_path: Path) -> None:
    """Graphs, events, real ceilings: small cells with what is installed, flex left out."""
    names = ",".join(n for n in suite.baseline_names() if n not in ("flex", "torch compiled"))
    code, _, err = run(
        capsys, "--device", "cuda", "--full", "--budget", "0.01", "--baselines", names, "--out",
        str(tmp_path),
    )  # fmt: skip
    assert code == 0, err
    document = json.loads((tmp_path / "kernels.json").read_text())
    check_document(document, tiny_grid)
    assert all(
        row["eager_us"] > row["us"] for row in document["rows"] if row["status"] == "measured"
    ), "a launch from the host takes longer than one in a graph"


def test_same_cells_for_every_device_and_op(capsys: Any) -> None:
    code, out, _ = run(capsys, "--full", "--list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == [cell.name for cell in grid.CELLS]
    default = run(capsys, "--list")[1].splitlines()
    assert default == run(capsys, "--quick", "--list")[1].splitlines()
    assert len(default) == sum(cell.headline for cell in grid.CELLS)
    by_op = [run(capsys, "--full", "--list", "--ops", op)[1].splitlines() for op in cli_ops()]
    assert sum(map(len, by_op)) == len(grid.CELLS) and all(by_op)
    some = run(capsys, "--list", "--cells", "q32/b8/c4096")[1].splitlines()
    assert some and all("q32/b8/c4096" in line for line in some)


def cli_ops() -> tuple[str, ...]:
    from nld_cuda.bench import runner

    return runner.OPS


def test_models_share_cells(capsys: Any) -> None:
    lines = run(capsys, "--full", "--list", "--models", "3B")[1].splitlines()
    assert any(line.startswith("compact/3B") for line in lines)
    assert not any(line.startswith(("compact/8B", "compact/14B")) for line in lines)
    assert not any(grid.models_of(c) == [] for c in grid.CELLS if f"{c.name}  " in "\n".join(lines))
    assert grid.models_of(grid.BY_NAME["attention/q32/b1/c1024"]) == ["3B", "8B", "14B"]
    assert grid.models_of(grid.Commit(1, 32, vocab=2048)) == []


@pytest.mark.parametrize(
    "argv,message",
    [
        (["--ops", "attention,nothing"], "--ops must be of attention, commit, verify, append"),
        (["--models", "9B"], "--models must be of 3B, 8B, 14B, got 9B"),
        (["--baselines", "nobody"], "--baselines must be of"),
        (["--cells", "no such cell"], "--cells must be part of a cell's name"),
        (["--plot"], "--plot must have a folder"),
        (["--threads", "0"], "--threads must be >= 1, got 0"),
        (["--unknown"], "unrecognized arguments: --unknown"),
        (["--quick", "--full"], "not allowed with"),
        (["--clock", "sun"], "invalid choice"),
    ],
)
def test_wrong_options(argv: list[str], message: str, capsys: Any) -> None:
    code, _, err = run(capsys, *argv)
    assert code == 2
    assert message in " ".join(err.split())


def test_other_commands_still_refuse_unknown_options(capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["info", "--nothing"])
    assert stop.value.code == 2 and "unrecognized arguments" in capsys.readouterr().err


def test_every_baseline_can_be_asked_for() -> None:
    from nld_cuda.bench import runner

    names = suite.baseline_names()
    assert runner.baselines_of(",".join(names)) == names
    assert runner.baselines_of("all") is None and runner.baselines_of("none") == []


def only(op: str, **more: Any) -> suite.Suite:
    """Return a suite that is quick."""
    return suite.Suite(
        torch.device("cpu"), timing.CpuClock(min_runs=1, max_runs=1), ROOFS, budget_s=0.0,
        tiny=True, **more,
    )  # fmt: skip


CELL = next(c for c in rehearsal.cells() if isinstance(c, grid.Append) and c.dtype == "float32")


def with_baseline(monkeypatch: pytest.MonkeyPatch, baseline: Baseline) -> None:
    bench = replace(suite.OP_BENCHES["append"], baselines=(baseline,))
    monkeypatch.setitem(suite.OP_BENCHES, "append", bench)


def test_a_baseline_with_another_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Baseline("wrong", lambda p: Prepared(p.run), lambda p, result: "is another")
    with_baseline(monkeypatch, wrong)
    bench = only("append")
    row = bench.run(CELL)
    assert row["status"] == "measured"
    assert row["baselines"]["wrong"] == {"status": "other result", "reason": "is another"}
    assert bench.failures == [f"{CELL.name}: wrong is another"]


def test_a_baseline_that_breaks_does_not_stop_the_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(problem: Any) -> Prepared:
        raise RuntimeError("no such kernel")

    with_baseline(monkeypatch, Baseline("broken", broken, lambda p, r: None))
    bench = only("append")
    row = bench.run(CELL)
    assert row["status"] == "measured" and not bench.failures
    assert row["baselines"]["broken"]["reason"] == "RuntimeError: no such kernel"

    calls = []

    def breaks_later() -> None:
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("cannot be captured")

    with_baseline(
        monkeypatch, Baseline("later", lambda p: Prepared(breaks_later), lambda p, r: None)
    )
    row = only("append").run(CELL)
    assert row["status"] == "measured"
    assert "cannot be captured" in row["baselines"]["later"]["reason"]


@pytest.mark.parametrize("cell", [c for c in rehearsal.cells() if isinstance(c, grid.Append)])
def test_append_is_compared_with_the_eager_ops(cell: grid.Append) -> None:
    bench = suite.OP_BENCHES["append"]
    problem = bench.problem(cell, torch.device("cpu"))
    torch_ops = bench.baselines[0]
    made = torch_ops.make(problem)
    result = made.result(made.call())
    assert torch_ops.differs(problem, result) is None
    written = result.v_cache.float() != 0
    result.v_cache.copy_(torch.where(written, result.v_cache.float() * 1.5, 0))
    assert "differs" in str(torch_ops.differs(problem, result))


def test_our_own_failure_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = replace(suite.OP_BENCHES["append"], problem=lambda cell, device: 1 / 0)
    monkeypatch.setitem(suite.OP_BENCHES, "append", bench)
    one = only("append")
    row = one.run(CELL)
    assert row["status"] == "failed" and "ZeroDivisionError" in row["reason"]
    assert len(one.failures) == 1


def test_a_cell_without_prediction_is_measured() -> None:
    one = only("append", predict=lambda cell: 1 / 0)
    row = one.run(CELL)
    assert row["status"] == "measured" and "predicted_us" not in row
    assert one.failures == [f"{CELL.name}: no prediction: ZeroDivisionError: division by zero"]


def test_failures_are_the_exit_code(
    tiny_grid: list[grid.Cell], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    wrong = Baseline("torch", lambda p: Prepared(p.run), lambda p, result: "is another")
    with_baseline(monkeypatch, wrong)
    code, out, _ = run(
        capsys, "--device", "cpu", "--ops", "append", "--full", "--budget", "0", "--threads", "1"
    )
    assert code == 1 and "is another" in out


def test_what_does_not_fit_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    big = grid.Append(10**6)
    monkeypatch.setattr(suite, "free_bytes", lambda device: 1e6)
    memory = replace_tiny(only("append")).run(big)
    assert memory["status"] == "not run" and re.match(r"needs \d", memory["reason"])
    slow = only("append", max_call_s=1e-9).run(CELL)
    assert "--max-call-s" in slow["reason"]
    late = only("append", deadline=-1.0).run(CELL)
    assert "--limit-s" in late["reason"]
    lines = report.not_run([memory, slow, late])
    assert len(lines) == 3 and any(big.name in line for line in lines)
    copies = Baseline(
        "copies", lambda p: Prepared(p.run), lambda p, r: None, layout="x",
        layout_bytes=lambda cell: 1e12,
    )  # fmt: skip
    with_baseline(monkeypatch, copies)
    row = only("append").run(CELL)
    assert "its copies need" in row["baselines"]["copies"]["reason"]


def replace_tiny(bench: suite.Suite) -> suite.Suite:
    bench.tiny = False
    return bench


def test_copies_of_a_problem_share_nothing() -> None:
    problem = suite.OP_BENCHES["verify"].problem(
        next(c for c in rehearsal.cells() if isinstance(c, grid.Verify)), torch.device("cpu")
    )
    other = copy_of(problem)
    for name, value in vars(problem).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, getattr(other, name))
            assert value.data_ptr() != getattr(other, name).data_ptr(), name


# ---- timing ----------------------------------------------------------------------------------


def test_inputs_rotate_and_are_reset() -> None:
    seen: list[str] = []
    contender = timing.Contender(
        [lambda: seen.append("a"), lambda: seen.append("b")],
        [lambda: seen.append("reset a"), lambda: seen.append("reset b")],
    )
    timing.CpuClock(min_runs=2, max_runs=2).measure({"x": contender}, 0.0)
    pairs = list(zip(seen[::2], seen[1::2], strict=True))
    assert all(second == first.removeprefix("reset ") for first, second in pairs)
    assert [b for _, b in pairs] == ["b", "a", "b", "a", "b"], "warm-up, then two runs"


def test_graphs_hold_one_call_per_input() -> None:
    calls = []
    clock = timing.RehearsalClock()
    measured = clock.measure(
        {
            "graph": timing.Contender([lambda i=i: calls.append(i) for i in range(4)]),
            "host": timing.Contender([lambda: None], in_graph=False),
        },
        0.0,
    )
    assert clock.num_captures == 1 and set(calls) == {0, 1, 2, 3}
    assert measured["graph"].us is not None and measured["host"].us is None
    assert measured["host"].best is measured["host"].eager


def test_the_first_contender_must_not_fail() -> None:
    def fail() -> None:
        raise RuntimeError("no")

    broken, fine = timing.Contender([fail]), timing.Contender([lambda: None])
    for clock in (timing.CpuClock(min_runs=1, max_runs=1), timing.RehearsalClock()):
        dropped: dict[str, str] = {}
        assert list(clock.measure({"ours": fine, "other": broken}, 0.0, dropped)) == ["ours"]
        assert dropped == {"other": "RuntimeError: no"}
        with pytest.raises(RuntimeError):
            clock.measure({"ours": broken, "other": fine}, 0.0, dropped)


def test_summary() -> None:
    made = timing.summary([5.0, 1.0, 3.0, 2.0, 4.0])
    assert made == timing.Timing(3.0, 1.0, 5.0, 5)


# ---- targets, plots --------------------------------------------------------------------------


def row(name: str, us: float, **more: Any) -> dict[str, Any]:
    """Return a measured row as the suite makes it."""
    made = suite.describe(grid.BY_NAME[name]) | {"status": "measured", "us": us, "baselines": {}}
    gbps = made["floor_bytes"] / us / 1e3
    made |= {"p10_us": us, "p90_us": us, "percent_of_copy": 100 * gbps / ROOFS.copy_gbps}
    return made | {"tflops": made["flops"] / us / 1e6} | more


def verdicts(rows: list[dict[str, Any]], gpu: str = "NVIDIA H100") -> dict[str, str]:
    return {t["target"]: t["verdict"] for t in targets.check(rows, ROOFS, gpu)}


def test_targets_judge_the_worst_row() -> None:
    fast, slow = 200.0, 300.0  # 541 MB: 180 us at the copy bandwidth
    name = "attention/q32/b8/c16384"
    key = next(t.text for t in targets.TARGETS if "blocks of 32" in t.text)
    assert verdicts([row(name, fast)])[key] == "met"
    assert verdicts([row(name, fast), row("attention/q32/b64/c4096", 1e6)])[key] == "missed"
    assert verdicts([row(name, slow)], "NVIDIA A100")[key] == "for H100 and H200 only"
    assert verdicts([])[key] == "not measured"
    small = row("attention/q32/b1/c1024", 100.0)  # its floor is below 40 us
    assert verdicts([small])[key] == "not measured"


@pytest.mark.parametrize(
    "name,limit",
    [
        ("attention/q32/b1/c1024", 8),
        ("attention/q32/b1/c4096", 11),
        ("commit/b1/q32/v131072/bfloat16", 8),
        ("verify/greedy/b1/q32/accept6/v131072/bfloat16", 6),
        ("attention/prefill/causal/b1/c8192", 1099.6),  # 500 TFLOP/s
        ("append/t1024/bfloat16", 1.3 * (8.39 + 2.0)),
    ],
)
def test_targets_have_their_cells(name: str, limit: float) -> None:
    found = [
        [v for v in verdicts([row(name, us)]).values() if v != "not measured"]
        for us in (0.99 * limit, 1.01 * limit)
    ]
    assert found == [["met"], ["missed"]]


def test_losses_are_listed() -> None:
    name = "commit/b1/q32/v131072/bfloat16"
    records = {
        "a": {"status": "measured", "ratio": 0.9}, "b": {"status": "measured", "ratio": 1.1},
        "read (sum)": {"status": "measured", "ratio": 0.5},
    }  # fmt: skip
    rows = [
        row(name, 5, baselines=records),
        row(name, 5, baselines={"c": records["a"] | {"ratio": 0.2}}),
    ]
    assert report.slower(rows) == [f"{name}: 0.20x c", f"{name}: 0.90x a"]


def test_never_slower_than_a_rival() -> None:
    rivals = {"a": {"status": "measured", "ratio": 1.2}, "b": {"status": "not run"}}
    reading = {"read (sum)": {"status": "measured", "ratio": 0.5}}
    name = "commit/b1/q32/v131072/bfloat16"
    key = next(t.text for t in targets.TARGETS if "never slower" in t.text)
    assert verdicts([row(name, 5, baselines=rivals | reading)])[key] == "met"
    rivals["c"] = {"status": "measured", "ratio": 0.9}
    assert verdicts([row(name, 5, baselines=rivals)])[key] == "missed"
    (found,) = (t for t in targets.check([row(name, 5, baselines=rivals)], ROOFS, "H200")
                if t["target"] == key)  # fmt: skip
    assert found["worst"] == 0.9 and found["worst_cell"] == name and found["missed"] == 1


class FakePlot(ModuleType):
    """Takes what matplotlib.pyplot is asked for; figures become files that say what was drawn."""

    def __init__(self) -> None:
        super().__init__("matplotlib.pyplot")
        self.drawn: list[str] = []

    def subplots(self, **_: Any) -> tuple[Any, Any]:
        return self, self

    def figure(self, **_: Any) -> Any:
        return self

    def add_subplot(self, rows: int, columns: int, index: int) -> Any:
        assert 1 <= index <= rows * columns
        return self

    def set_xticks(self, ticks: Any, labels: Any, minor: bool = False) -> None:
        assert len(ticks) == len(labels)

    def plot(self, x: Any, y: Any, *_: Any, label: str, **__: Any) -> None:
        assert len(x) == len(y) and all(value > 0 for value in [*x, *y])
        self.drawn.append(label)

    def savefig(self, path: Path, **_: Any) -> None:
        path.write_text("\n".join(self.drawn))
        self.drawn = []

    def set(self, **_: Any) -> None:
        pass

    set_title = suptitle = legend = tight_layout = close = lambda self, *_, **__: None


def test_plots(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    fake, pyplot = ModuleType("matplotlib"), FakePlot()
    fake.use = lambda backend: None  # type: ignore[attr-defined]
    fake.pyplot = pyplot  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "matplotlib", fake)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", pyplot)
    code, out, _ = run(
        capsys, "--rehearse", "--ops", "attention", "--baselines", "sdpa math", "--out",
        str(tmp_path), "--plot",
    )  # fmt: skip
    assert code == 0
    assert "decode" in (tmp_path / "roofline.png").read_text().splitlines()
    lines = (tmp_path / "latency_q4.png").read_text().splitlines()
    assert {"nld", "predicted", "sdpa math"} == set(lines)
    assert f"written: {tmp_path / 'roofline.png'}" in out


def test_plot_without_matplotlib_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    code, _, err = run(capsys, "--rehearse", "--plot", "--out", str(tmp_path))
    assert code == 2 and "pip install 'nld-cuda[bench]'" in err
    assert not list(tmp_path.iterdir()), "found out before anything was measured"


def test_plots_have_a_line_for_every_context() -> None:
    rows = [row(f"attention/q32/b1/c{n}", n / 100) for n in (4096, 1024)]
    document = {"rows": rows}
    assert plots.latency_lines(document, 32) == {1: {"nld": [(1024, 10.24), (4096, 40.96)]}}
    x, y = plots.roofline_points(document)["decode"][0]
    assert x == pytest.approx(rows[0]["flops"] / rows[0]["floor_bytes"]) and y > 0


def test_kept_results_have_the_format_of_the_suite() -> None:
    folder = Path(__file__).parents[1] / "benchmarks/results"
    found = sorted(folder.glob("kernels_*.json"))
    assert found
    for path in found:
        document = json.loads(path.read_text())
        assert document["format"] == 1 and document["rows"] and not document["failures"]
        for made in document["rows"]:
            assert made["name"] in grid.BY_NAME, f"{path.name}: {made['name']} is no cell"
            assert made["status"] in ("measured", "not run")
        assert report.markdown(document).startswith("### ")


@pytest.mark.parametrize("op", ["attention", "commit", "verify", "append"])
def test_scripts_are_the_command_with_an_op(
    op: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import runpy

    script = Path(__file__).parents[1] / f"benchmarks/bench_{op}.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--list", "--full"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0
    assert {line.split("/")[0] for line in lines} == {op} | (
        {"compact"} if op == "append" else set()
    )


def test_the_wheel_has_every_package() -> None:
    root = Path(__file__).parents[1]
    listed = re.search(r"^packages = \[(.*?)\]", (root / "pyproject.toml").read_text(), re.M | re.S)
    assert listed
    names = set(re.findall(r'"([\w.]+)"', listed[1]))
    folders = {p.parent for p in (root / "python/nld_cuda").rglob("*.py")}
    assert {".".join(f.relative_to(root / "python").parts) for f in folders} <= names
