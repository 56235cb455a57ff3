"""`nld bench kernels`: choose cells, measure the ceilings, run the cells, print and write.

    nld bench kernels                          what this machine has, the cells of some minutes
    nld bench kernels --full --out results     every cell of the grid
    nld bench kernels --ops commit --cells float32 --baselines none
    nld bench kernels --list                   the cells, nothing is run

A row has the measured time beside the time that the model predicts, the share of the copy bandwidth
and of the matmul rate measured in the same run, and every baseline's time / ours. Whatever is not
run is listed with its reason.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nld_cuda.bench import ceilings as roofs
from nld_cuda.bench import grid, plots, rehearsal, report, suite, targets
from nld_cuda.bench.environment import command, environment
from nld_cuda.bench.timing import Clock, CpuClock, CudaClock, RehearsalClock

OPS = ("attention", "commit", "verify", "append")  # append: compact_ too
PROGRAM = "nld bench kernels"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--quick", action="store_true", help="the headline cells, some minutes (the default)"
    )
    size.add_argument("--full", action="store_true", help="every cell of the grid")
    size.add_argument(
        "--rehearse", action="store_true",
        help="take every step of a GPU run on tiny cells, without one; figures mean nothing",
    )  # fmt: skip
    parser.add_argument(
        "--ops", default=",".join(OPS), metavar="LIST", help="of %(default)s (default: all)"
    )
    models = ",".join(grid.MODELS)
    parser.add_argument(
        "--models", default=models, metavar="LIST",
        help=f"cells of these models only, of {models}; they share most of them (default: all, "
        "and cells of no model)",
    )  # fmt: skip
    parser.add_argument(
        "--cells", metavar="TEXT", help="cells whose name has this text, of the whole grid"
    )
    parser.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="(default: %(default)s)"
    )
    parser.add_argument(
        "--baselines", default="all", metavar="LIST",
        help="all, none, or names: " + ", ".join(suite.baseline_names()) + " (default: all that "
        "can be imported)",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    parser.add_argument(
        "--clock", default="wall", choices=("wall", "cpu"),
        help="of CPU runs: the wall's, or the process's CPU time (busy machines, one thread)",
    )  # fmt: skip
    parser.add_argument(
        "--budget", type=float, default=1.0, metavar="S", help="seconds of timing per cell "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--max-call-s", type=float, default=0.5, metavar="S",
        help="leave cells out whose call cannot be faster than this (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--limit-s", type=float, metavar="S", help="start no cell after so many seconds"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="write kernels.json, kernels.md")
    parser.add_argument(
        "--plot", action="store_true", help="draw rooflines and latencies into --out (matplotlib)"
    )
    parser.add_argument("--vllm-cpu", metavar="FILE", help="vLLM's CPU op library, to run beside")
    parser.add_argument("--list", action="store_true", help="print the cells and stop")


def _names(text: str, known: Sequence[str], option: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(f"{option} must be of {', '.join(known)}, got {', '.join(unknown)}")
    return names


def chosen_cells(options: argparse.Namespace) -> list[grid.Cell]:
    """Return the cells that the options ask for, in the order of the grid."""
    ops = _names(options.ops, OPS, "--ops")
    wanted_models = _names(options.models, list(grid.MODELS), "--models")
    if options.rehearse:
        cells = rehearsal.cells()
    else:
        cells = [c for c in grid.CELLS if options.full or options.cells or c.headline]
        if set(wanted_models) != set(grid.MODELS):
            cells = [c for c in cells if set(wanted_models) & set(grid.models_of(c))]
    cells = [c for c in cells if {"compact": "append"}.get(grid.op_of(c), grid.op_of(c)) in ops]
    if options.cells:
        cells = [c for c in cells if options.cells in c.name]
        if not cells:
            raise ValueError(f"--cells must be part of a cell's name (--list), got {options.cells}")
    return cells


def baselines_of(text: str) -> list[str] | None:
    """Return the names asked for; None: all."""
    if text in ("all", "none"):
        return None if text == "all" else []
    return _names(text, suite.baseline_names(), "--baselines")


def device_of(options: argparse.Namespace) -> tuple[torch.device, Clock]:
    """Return where tensors live and what times."""
    if options.rehearse:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu"), RehearsalClock()
    kind = options.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda must find a CUDA device, torch finds none")
    return torch.device(kind), CpuClock(options.clock) if kind == "cpu" else CudaClock()


def run(options: argparse.Namespace, command_line: str) -> int:
    """Run the command; return its exit code: 0 done, 1 something failed or differs."""
    cells = chosen_cells(options)
    names = baselines_of(options.baselines)
    if options.list:
        for cell in cells:
            print(f"{cell.name}  {','.join(grid.models_of(cell))}")
        return 0
    if options.plot and options.out is None:
        raise ValueError("--plot must have a folder: --out DIR")
    if options.plot:
        plots.need_matplotlib()
    if options.threads is not None:
        if options.threads < 1:
            raise ValueError(f"--threads must be >= 1, got {options.threads}")
        torch.set_num_threads(options.threads)
    if options.vllm_cpu:
        torch.ops.load_library(options.vllm_cpu)
    device, clock = device_of(options)
    bench = suite.Suite(
        device=device, clock=clock, ceilings=roofs.measure(device, clock, small=options.rehearse),
        baselines=names, budget_s=0.0 if options.rehearse else options.budget,
        max_call_s=options.max_call_s, tiny=options.rehearse,
    )  # fmt: skip
    if options.limit_s is not None:
        bench.deadline = time.monotonic() + options.limit_s
    where = environment("cpu" if options.rehearse else device.type)
    if options.rehearse:
        where["rehearsal"] = "no figure of this run means anything"
    gpu = "H100" if options.rehearse else str(where.get("gpu", ""))
    if bench.kind == "cuda":
        sms = 0 if options.rehearse else num_sms(device)
        bench.predict = suite.time_model_prediction(gpu, bench.ceilings, sms)
    rows: list[dict[str, Any]] = []
    document = suite.document(bench, rows, command_line, where)
    for cell in cells:
        rows.append(bench.run(cell))
        print(report.row_line(rows[-1]), file=sys.stderr, flush=True)
        if bench.kind == "cuda":
            judged = "" if options.rehearse else gpu
            document["targets"] = targets.check(rows, bench.ceilings, judged)
        if options.out is not None:  # after every cell: a run that is stopped leaves what it had
            report.write(document, options.out)
    print(report.markdown(document))
    if options.plot:
        for path in plots.draw(document, options.out):
            print(f"written: {path}")
    num_measured = sum(row["status"] == "measured" for row in rows)
    num_not_run = sum(row["status"] == "not run" for row in rows)
    print(
        f"bench: {num_measured} cells measured, {num_not_run} not run, "
        f"{len(bench.failures)} failures"
    )
    return 1 if bench.failures else 0


def num_sms(device: torch.device) -> int:
    """Return the multiprocessors of a device; 0 where there is none."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def main(ops: str) -> None:
    """Run a script under benchmarks/: the command with its op chosen."""
    from nld_cuda.cli import main as nld

    arguments = sys.argv[1:]
    if not any(a == "--ops" or a.startswith("--ops=") for a in arguments):
        arguments = ["--ops", ops, *arguments]
    nld(["bench", "kernels", *arguments])


def command_text(arguments: Sequence[str]) -> str:
    """Return the command line as it is written into results."""
    return command(PROGRAM, list(arguments))
