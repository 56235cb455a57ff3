"""Shared parts of the benchmarks: interleaved timer, measured copy bandwidth, table, JSON.

A benchmark checks its results first, then times every implementation of a case *in turns*, so that
noise and frequency changes hit all of them alike; compare ratios within a row, never between runs.

    timings = interleave({"nld": run_nld, "torch": run_torch})
    report = Report("attention")
    report.add(case="ctx 1024", timings=timings, ours="nld", num_bytes=..., flops=...)
    report.finish()          # prints the table, writes benchmarks/results/attention.json
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Timing:
    """Distribution of one implementation's run time, in microseconds."""

    median_us: float
    p10_us: float
    p90_us: float
    num_runs: int


def rotate(functions: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """Return one function that calls the given ones in turn: same work on other, cold inputs."""
    state = {"next": 0}

    def call() -> object:
        index = state["next"]
        state["next"] = (index + 1) % len(functions)
        return functions[index]()

    return call


def _time_us(function: Callable[[], object], device: str, clock: str) -> float:
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3
    now = time.process_time if clock == "cpu" else time.perf_counter
    begin = now()
    function()
    return (now() - begin) * 1e6


def interleave(
    functions: Mapping[str, Callable[[], object]],
    *,
    device: str = "cpu",
    budget_s: float = 2.0,
    min_runs: int = 11,
    max_runs: int = 1000,
    warmup: int = 3,
    clock: str = "wall",
) -> dict[str, Timing]:
    """Time the functions in turns (a, b, a, b, ...) until the budget is spent.

    At least `min_runs` runs each whatever the budget. Odd rounds go through the functions
    backwards, so that none of them always follows the same neighbour. `clock="cpu"` counts the
    process's CPU time instead of the wall's: on a busy machine the only fair number, with one
    thread (several would have their waiting counted as work).
    """
    for function in functions.values():
        for _ in range(warmup):
            function()
    if device == "cuda":
        torch.cuda.synchronize()
    samples: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    deadline = time.perf_counter() + budget_s
    for run in range(max_runs):
        if run >= min_runs and time.perf_counter() > deadline:
            break
        for name in names if run % 2 == 0 else reversed(names):
            samples[name].append(_time_us(functions[name], device, clock))
    return {name: _summary(values) for name, values in samples.items()}


def _summary(values: list[float]) -> Timing:
    ordered = sorted(values)
    last = len(ordered) - 1
    return Timing(
        median_us=statistics.median(ordered),
        p10_us=ordered[round(0.1 * last)],
        p90_us=ordered[round(0.9 * last)],
        num_runs=len(ordered),
    )


def copy_gbps(device: str = "cpu", num_bytes: int = 256 << 20) -> float:
    """Measure memory bandwidth in GB/s: a copy far larger than the caches, read + written bytes."""
    source = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    timing = interleave(
        {"copy": lambda: target.copy_(source)}, device=device, budget_s=1.0, min_runs=9
    )
    return 2 * num_bytes / timing["copy"].median_us / 1e3


def read_gbps(device: str = "cpu", num_bytes: int = 256 << 20) -> float:
    """Measure read-only bandwidth in GB/s (a torch sum): the roof of kernels that only read."""
    source = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    timing = interleave({"sum": lambda: source.sum()}, device=device, budget_s=1.0, min_runs=9)
    return num_bytes / timing["sum"].median_us / 1e3


def environment(device: str = "cpu") -> dict[str, Any]:
    """Describe where the numbers come from: versions, CPU or GPU, threads, commit."""
    from nld_cuda import _library

    root = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=root,
            capture_output=True,
            text=True,
        ).stdout.strip()
    except OSError:  # a machine without git
        commit = ""
    info: dict[str, Any] = {
        "commit": commit or "unknown",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device,
        "cpu": _cpu_name(),
        "cpu_isa": _library.C.cpu_isa(),
        "num_cpus": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
    }
    if device == "cuda":
        info["gpu"] = torch.cuda.get_device_name()
        info["cuda"] = torch.version.cuda
    return info


def _cpu_name() -> str:
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    except OSError:
        return platform.processor()
    family, model = fields.get("cpu family"), fields.get("model")
    return f"{fields.get('model name', '?')} family {family} model {model}"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lay rows (equal keys) out as a Markdown table."""
    if not rows:
        return "(no rows)"
    columns = list(rows[0])
    cells = [columns] + [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return "-" if value is None else str(value)


def command() -> str:
    """Return the command line; of absolute paths only the name, which means more elsewhere."""
    arguments = [Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:]]
    return f"python benchmarks/{Path(sys.argv[0]).name} {shlex.join(arguments)}".strip()


class Report:
    """Collects the rows of one benchmark, prints them, writes them and the environment to JSON."""

    def __init__(self, name: str, device: str = "cpu") -> None:
        self.name = name
        self.device = device
        self.copy_gbps = copy_gbps(device)
        self.rows: list[dict[str, Any]] = []

    def add(
        self,
        case: str,
        timings: Mapping[str, Timing],
        ours: str,
        *,
        num_bytes: float | None = None,
        flops: float | None = None,
        **extra: Any,
    ) -> None:
        """Add one case. `num_bytes`, `flops`: what our op must move and compute, by its formula.

        Every other timing is a baseline; its `x` column is baseline median / our median (above 1:
        we are faster).
        """
        mine = timings[ours]
        row: dict[str, Any] = {
            "case": case,
            **extra,
            "us": mine.median_us,
            "p10_us": mine.p10_us,
            "p90_us": mine.p90_us,
        }
        if num_bytes is not None:
            row["GB/s"] = num_bytes / mine.median_us / 1e3
            row["% of copy"] = 100 * row["GB/s"] / self.copy_gbps
        if flops is not None:
            row["GFLOP/s"] = flops / mine.median_us / 1e3
        for name, timing in timings.items():
            if name != ours:
                row[f"{name} us"] = timing.median_us
                row[f"x {name}"] = timing.median_us / mine.median_us
        self.rows.append(
            {**row, "timings": {name: asdict(timing) for name, timing in timings.items()}}
        )
        print(f"{case}: {mine.median_us:.0f} us", file=sys.stderr, flush=True)

    def finish(self, path: Path | None = None) -> None:
        """Print the table and write benchmarks/results/<name>.json."""
        shown = [
            {key: value for key, value in row.items() if key != "timings"} for row in self.rows
        ]
        print(table(shown))
        print(f"measured copy bandwidth: {self.copy_gbps:.1f} GB/s (read + written)")
        path = path or RESULTS / f"{self.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        document = {
            "benchmark": self.name,
            "command": command(),
            "environment": environment(self.device),
            "copy_gbps": self.copy_gbps,
            "rows": self.rows,
        }
        path.write_text(json.dumps(document, indent=1) + "\n")
        print(f"written: benchmarks/results/{path.name}")
