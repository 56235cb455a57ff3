"""Runs cells: makes inputs, checks every baseline against ours, times all in turns, makes rows."""

from __future__ import annotations

import gc
import math
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from nld_cuda.bench import append, attention, commit, grid, time_model, traffic, verify
from nld_cuda.bench.base import Baseline, NotRun, Prepared, copy_of
from nld_cuda.bench.baselines.attention import BASELINES as ATTENTION_BASELINES
from nld_cuda.bench.ceilings import Ceilings
from nld_cuda.bench.timing import Clock, Contender, CpuClock, Measured

OURS = "nld"
L2_TIMES = 5  # inputs rotate over so many times the L2 cache of a GPU,
CPU_ROTATED_BYTES = 256 << 20  # or over so much on a CPU
MOST_INPUTS, MOST_HOST_INPUTS = 64, 8
MEMORY_SHARE = 0.8  # of what is free, for the inputs of a cell and the copies of its baselines


@dataclass(frozen=True)
class OpBench:
    """How the cells of an op are run."""

    problem: Callable[[Any, torch.device], Any]
    problem_bytes: Callable[[Any], float]
    baselines: tuple[Baseline, ...]


OP_BENCHES = {
    "attention": OpBench(attention.AttentionProblem, attention.problem_bytes, ATTENTION_BASELINES),
    "commit": OpBench(commit.CommitProblem, commit.problem_bytes, commit.BASELINES),
    "verify": OpBench(verify.VerifyProblem, verify.problem_bytes, verify.BASELINES),
    "append": OpBench(append.AppendProblem, append.append_bytes, append.BASELINES),
    "compact": OpBench(append.CompactProblem, append.compact_bytes, append.COMPACT_BASELINES),
}


def baseline_names() -> list[str]:
    """Return the names of all baselines, those of attention first."""
    names = [b.name for op in OP_BENCHES.values() for b in op.baselines]
    return list(dict.fromkeys(names))


@dataclass
class Suite:
    """Where and how cells are run, and what came of them.

    Attributes:
        device: of the tensors.
        clock: what times.
        ceilings: of the device.
        predict: a cell's predicted time and what bounds it; None where nothing is predicted.
        baselines: names of those to run; None: all.
        budget_s: seconds of timing per cell.
        max_call_s: cells whose call cannot be faster than that by the ceilings are not run.
        deadline: of time.monotonic(): cells after it are not run.
        tiny: a rehearsal: two inputs, whatever their size.
        failures: what must not happen: ours fails, or a baseline has another result.
    """

    device: torch.device
    clock: Clock
    ceilings: Ceilings
    predict: Callable[[grid.Cell], dict[str, Any]] = lambda cell: {}
    baselines: Sequence[str] | None = None
    budget_s: float = 1.0
    max_call_s: float = 1.0
    deadline: float = math.inf
    tiny: bool = False
    failures: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """cpu or cuda: what is timed as, in a rehearsal too."""
        return "cpu" if isinstance(self.clock, CpuClock) else "cuda"

    def run(self, cell: grid.Cell) -> dict[str, Any]:
        """Run a cell; a row comes of it whatever happens."""
        row = describe(cell)
        try:
            row |= self.predict(cell)
        except Exception as error:  # the measurement is worth more than the prediction
            traceback.print_exc()
            self.failures.append(f"{cell.name}: no prediction: {type(error).__name__}: {error}")
        try:
            row |= self._measure(cell)
        except NotRun as reason:
            row |= {"status": "not run", "reason": str(reason)}
        except torch.OutOfMemoryError as error:
            row |= {"status": "not run", "reason": f"memory: {str(error)[:120]}"}
        except Exception as error:
            traceback.print_exc()
            text = f"{type(error).__name__}: {str(error)[:300]}"
            self.failures.append(f"{cell.name}: {text}")
            row |= {"status": "failed", "reason": text}
        finally:
            gc.collect()
            # Else dynamo gives up after some shapes and the compiled baselines run uncompiled.
            if "torch._dynamo" in sys.modules:
                torch.compiler.reset()
            if self.device.type == "cuda" and not self.tiny:
                torch.cuda.empty_cache()
        return row

    def _measure(self, cell: grid.Cell) -> dict[str, Any]:
        if time.monotonic() > self.deadline:
            raise NotRun("no time was left: --limit-s")
        work = traffic.of(cell)
        seconds = self.roof_us(work) / 1e6
        if seconds > self.max_call_s:
            raise NotRun(
                f"by the ceilings a call takes longer than --max-call-s {self.max_call_s:g}"
            )
        op = OP_BENCHES[grid.op_of(cell)]
        problems, free = self.problems(cell, op, work)
        first = problems[0]
        first.reset()
        first.run()
        contenders = {OURS: Contender([p.run for p in problems], [p.reset for p in problems])}
        if isinstance(first, attention.AttentionProblem) and first.plan is not None:
            contenders["nld, own plan"] = Contender([p.run_without_plan for p in problems])
        records: dict[str, dict[str, Any]] = {}
        layouts: set[str] = set()
        for baseline in op.baselines:
            record = records[baseline.name] = {"status": "not run"}
            try:
                free -= self.add(baseline, cell, problems, free, layouts, contenders)
            except (NotRun, torch.OutOfMemoryError) as why:
                record["reason"] = str(why)[:200]
            except Different as difference:
                record |= {"status": "other result", "reason": str(difference)}
                self.failures.append(f"{cell.name}: {baseline.name} {difference}")
            except Exception as error:  # a baseline that does not run is no failure of ours
                record["reason"] = f"{type(error).__name__}: {str(error)[:200]}"
            if baseline.note:
                record["note"] = baseline.note
        dropped: dict[str, str] = {}
        measured = self.clock.measure(contenders, self.budget_s, dropped)
        for name, reason in dropped.items():
            if name in records:
                records[name]["reason"] = reason
            else:  # ours, called another way
                self.failures.append(f"{cell.name}: {name}: {reason}")
        made = self.figures(work, measured)
        made["inputs"] = len(problems)
        own = measured.get("nld, own plan")
        if own is not None:
            made["variants"] = {"own plan": _times(own)}
        for name, record in records.items():
            if name in measured:
                record |= {"status": "measured"} | compare(measured[name], measured[OURS])
        return made | {"baselines": records}

    def problems(self, cell: grid.Cell, op: OpBench, work: traffic.Work) -> tuple[list[Any], float]:
        """Return enough inputs to come from memory, and the bytes that are left."""
        free = 1e9 if self.tiny else MEMORY_SHARE * free_bytes(self.device)
        each = op.problem_bytes(cell)
        if each > free:
            raise NotRun(f"needs {each / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
        rotated = CPU_ROTATED_BYTES if self.kind == "cpu" else L2_TIMES * self.ceilings.l2_bytes
        wanted = math.ceil(rotated / max(work.floor_bytes, 1))
        least = 2 if self.kind == "cpu" else 1
        num = 2 if self.tiny else min(max(wanted, least), MOST_INPUTS)
        num = max(min(num, int(0.5 * free / each)), 1)
        first = op.problem(cell, self.device)
        return [first, *(copy_of(first) for _ in range(num - 1))], free - num * each

    def add(
        self,
        baseline: Baseline,
        cell: grid.Cell,
        problems: list[Any],
        free: float,
        layouts: set[str],
        contenders: dict[str, Contender],
    ) -> float:
        """Prepare a baseline and compare its result with ours; return the bytes it takes."""
        if self.baselines is not None and baseline.name not in self.baselines:
            raise NotRun("not asked for")
        if reason := baseline.missing(self.kind) or baseline.refuses(cell, self.kind):
            raise NotRun(reason)
        if self.baselines is None and (reason := baseline.costly(cell)):
            raise NotRun(f"{reason}; ask for it with --baselines")
        chosen = problems if baseline.in_graph else problems[:MOST_HOST_INPUTS]
        size = 0.0
        if baseline.layout not in layouts:
            size = baseline.layout_bytes(cell) * len(chosen)
        if size > free:
            raise NotRun(f"its copies need {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
        with baseline.around():
            one: Prepared = baseline.make(chosen[0])
            difference = baseline.differs(chosen[0], one.result(one.call()))
            if difference is not None:
                raise Different(difference)
            made = [one, *(baseline.make(p) for p in chosen[1:])]
        contenders[baseline.name] = Contender(
            [m.call for m in made], [m.reset for m in made], baseline.in_graph, baseline.around
        )
        layouts.add(baseline.layout)
        return size

    def roof_us(self, work: traffic.Work) -> float:
        """Return the time that no kernel can beat on this device: bytes or products."""
        memory = work.floor_bytes / self.ceilings.copy_gbps / 1e3
        return max(memory, work.flops / self.ceilings.matmul_tflops / 1e6)

    def figures(self, work: traffic.Work, measured: dict[str, Measured]) -> dict[str, Any]:
        """Return what is said of our own time."""
        mine = measured[OURS]
        us = mine.best.median_us
        gbps = work.floor_bytes / us / 1e3
        made = {"status": "measured", **_times(mine), "gbps": gbps}
        made["percent_of_copy"] = 100 * gbps / self.ceilings.copy_gbps
        made["percent_of_roof"] = 100 * self.roof_us(work) / us
        if work.flops:
            made["tflops"] = work.flops / us / 1e6
            made["percent_of_matmul"] = 100 * made["tflops"] / self.ceilings.matmul_tflops
        return made


class Different(Exception):
    """A baseline has another result than our op."""


def describe(cell: grid.Cell) -> dict[str, Any]:
    """Return the part of a row that is known beforehand."""
    work = traffic.of(cell)
    row: dict[str, Any] = {
        "name": cell.name,
        "op": grid.op_of(cell),
        "models": grid.models_of(cell),
        "floor_bytes": work.floor_bytes,
        "asked_bytes": work.num_bytes,
        "flops": work.flops,
    }
    if isinstance(cell, grid.Attention):
        row |= {"group": cell.group, "batch": len(cell.requests), "dtype": cell.dtype}
        row |= {"kv_dtype": cell.kv_dtype, "context": max(r.seq_len for r in cell.requests)}
        if len(set(cell.requests)) == 1:
            row |= {"rows": cell.requests[0].rows, "mode": cell.requests[0].mode.name.lower()}
    return row


def _times(measured: Measured) -> dict[str, Any]:
    best = measured.best
    made: dict[str, Any] = {
        "us": best.median_us, "p10_us": best.p10_us, "p90_us": best.p90_us,
        "num_runs": best.num_runs,
    }  # fmt: skip
    if measured.us is not measured.eager:
        made["eager_us"] = measured.eager.median_us
    return made


def compare(other: Measured, mine: Measured) -> dict[str, Any]:
    """Return a baseline's times and its time / ours: both in graphs, or both from the host."""
    made = _times(other)
    if other.us is None:
        made["timed"] = "with the host, ours too: it reads results there"
        made["ratio"] = other.eager.median_us / mine.eager.median_us
    else:
        made["ratio"] = other.best.median_us / mine.best.median_us
    return made


def free_bytes(device: torch.device) -> float:
    """Return the memory that is free for tensors."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 4e9
    fields = dict(line.split(":", 1) for line in lines)
    return 1024.0 * int(fields["MemAvailable"].split()[0])


def time_model_prediction(gpu_name: str, ceilings: Ceilings, num_sms: int) -> Any:
    """Return what predicts cells on a GPU."""
    gpu = time_model.gpu_named(gpu_name, ceilings.copy_gbps, num_sms)

    def predict(cell: grid.Cell) -> dict[str, Any]:
        made = time_model.predict(cell, gpu)
        return {"predicted_us": made.us, "predicted_bound": made.bound}

    return predict


def document(
    suite: Suite, rows: list[dict[str, Any]], command: str, environment: dict[str, Any]
) -> dict[str, Any]:
    """Return everything that is written of a run."""
    on_cpu = suite.kind == "cpu"
    return {
        "format": 1,
        "benchmark": "kernels",
        "command": command,
        "environment": environment,
        "ceilings": asdict(suite.ceilings),
        "timing": {
            "clock": getattr(suite.clock, "clock", "events around replays of a CUDA graph of one "
                             "call per input, by the number of inputs"),
            "inputs": f"other ones in every call, {CPU_ROTATED_BYTES >> 20} MiB together, at most "
            f"{MOST_INPUTS}" if on_cpu else f"other ones in every call, {L2_TIMES} times the L2 "
            f"cache together, at most {MOST_INPUTS}",
            "budget_s": suite.budget_s,
            "times": "median, p10, p90 in microseconds; all contenders of a row in turns",
        },
        "rows": rows,
        "failures": suite.failures,
    }  # fmt: skip
