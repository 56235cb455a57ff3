"""Measure what the heuristic did not choose, say where it loses, and fit the model of time.

    python -m nld_cuda.bench.tune [--cells PART] [--budget S] [--out FILE]
    python -m nld_cuda.bench.tune --rehearse

For every attention cell: the plan it gets, the same tiles in fewer and in more splits, tiles of
other sizes, and on Hopper the kernels of older GPUs (and so without clusters). Plans are data
(plans.py), the capability is limited for the library (`_C.set_max_capability`): no option of an op.
Where an alternative wins by more than 3 % it is printed. The times of all of them, taken or not,
then fit the constants of time_model.py by least squares of logarithms; the constants of
csrc/attention/heuristic.h follow from those and are printed beside what it has.

--rehearse runs all of it without a GPU, on small cells; the times that it judges and fits are made
by a model whose constants are other than ours, so the fit has something to find.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nld_cuda import _library
from nld_cuda.bench import ceilings, grid, plans, time_model
from nld_cuda.bench.attention import AttentionProblem
from nld_cuda.bench.base import copy_of
from nld_cuda.bench.environment import environment
from nld_cuda.bench.time_model import Gpu, Latency
from nld_cuda.bench.timing import Clock, Contender, CudaClock, RehearsalClock

LOSS = 0.03  # alternatives that win by more are printed
PORTABLE = 80  # compute capability of the portable kernels


@dataclass(frozen=True)
class Alternative:
    """One way to run a cell.

    Attributes:
        name: "chosen", or what is other: "rows 64, 256 keys", "portable".
        cell: padded where other tiles are wanted.
        plan: to run by; None: the op's own.
        capability: highest that launchers see; 0: that of the GPU.
    """

    name: str
    cell: grid.Attention
    plan: plans.Plan | None = None
    capability: int = 0


@dataclass(frozen=True)
class Timed:
    """An alternative and its time."""

    alternative: Alternative
    us: float


def alternatives(cell: grid.Attention, num_sms: int, capability: int) -> Iterator[Alternative]:
    """Yield the way that is chosen, then the others."""
    yield Alternative("chosen", cell)
    if capability > PORTABLE:
        yield Alternative("portable", cell, capability=PORTABLE)
    chosen = plans.plan_of(cell, num_sms)
    place = plans.TILE_ROWS.index(chosen.tile_rows)
    for rows in plans.TILE_ROWS[max(place - 1, 0) : place + 2]:
        padded = plans.with_tile_rows(cell, rows)
        plan = plans.plan_of(padded, num_sms)
        if plan.tile_rows != rows:
            continue
        longest = max((plan.tile_keys(t) for t in range(len(plan.tiles))), default=0)
        lengths = {longest // 4, longest // 2, longest, plan.longest}
        lengths |= {plan.longest * num // den for num, den in ((1, 2), (3, 4), (3, 2), (2, 1))}
        seen = set()
        for keys in sorted(lengths):
            cut = plans.recut(plan, max(-(-keys // plans.KEY_STEP) * plans.KEY_STEP, 64))
            if cut.longest in seen or len(cut.items) > len(cut.tiles) + 4 * num_sms:
                continue
            seen.add(cut.longest)
            yield Alternative(f"rows {rows}, {cut.longest} keys", padded, cut)


# ---- measuring -------------------------------------------------------------------------------


def problem_of(base: AttentionProblem, way: Alternative) -> AttentionProblem:
    """Let a problem run another way: the same cache, padded arguments, another plan."""
    made = copy.copy(base)
    cell, requests = way.cell, way.cell.requests
    more = len(requests) - len(base.cell.requests)
    made.cell = cell
    made.table = torch.cat((base.table, base.table.new_zeros(more, base.table.shape[1])))
    (seq_lens, starts, mode), options = plans.plan_arguments(cell)
    block_len = options["block_len"]
    assert isinstance(block_len, torch.Tensor)
    made.seq_lens, made.starts, made.mode, made.block_len = (
        t.to(base.device) for t in (seq_lens, starts, mode, block_len)
    )
    made.q = torch.cat((base.q, base.q.new_zeros(cell.extra_rows, *base.q.shape[1:])))
    made.out = torch.empty_like(made.q)
    made.lse = base.lse.new_empty(cell.heads, cell.total_q)
    if way.plan is not None:
        made.plan = way.plan.words.to(base.device)
    return made


@contextlib.contextmanager
def limited(capability: int) -> Iterator[None]:
    """Let launchers see an older GPU."""
    _library.C.set_max_capability(capability)
    try:
        yield
    finally:
        _library.C.set_max_capability(0)


def measure(
    cell: grid.Attention,
    ways: Sequence[Alternative],
    device: torch.device,
    clock: Clock,
    num_inputs: int,
    budget_s: float,
) -> list[Timed]:
    """Time all ways in turns on rotating inputs; every result must be the chosen way's."""
    first = AttentionProblem(cell, device)
    bases = [first, *(copy_of(first) for _ in range(num_inputs - 1))]
    expected = first.run().float()
    contenders = {}
    for way in ways:
        problems = [problem_of(base, way) for base in bases]
        with limited(way.capability):
            error = (problems[0].run()[: len(expected)].float() - expected).abs().max().item()
        if not error < 0.03:
            raise RuntimeError(f"{cell.name}, {way.name}: the result differs by {error:.3g}")
        around = _limits(way.capability)
        contenders[way.name] = Contender([p.run for p in problems], around=around)
    measured = clock.measure(contenders, budget_s)
    return [Timed(way, measured[way.name].best.median_us) for way in ways]


def _limits(capability: int) -> Callable[[], contextlib.AbstractContextManager[None]]:
    return lambda: limited(capability)


def pretended(ways: Sequence[Alternative], truth: Gpu, noise: random.Random) -> list[Timed]:
    """Times that a GPU with the constants of `truth` would show."""
    return [
        Timed(way, model_us(way, truth) * math.exp(noise.gauss(0, 0.01)))
        for way in ways
        if way.capability == 0
    ]


def model_us(way: Alternative, gpu: Gpu) -> float:
    """What the model says of a way; of an older kernel, on a GPU without wgmma."""
    if way.capability:
        gpu = replace(gpu, wgmma_tflops=0.0)
    return time_model.attention(way.cell, gpu, way.plan).us


# ---- judging and fitting ---------------------------------------------------------------------


def losses(timed: Sequence[Timed]) -> list[dict[str, Any]]:
    """The ways that beat the chosen one, best first."""
    chosen = timed[0].us
    rows = [
        {"way": t.alternative.name, "us": t.us, "chosen us": chosen, "loss": chosen / t.us - 1}
        for t in timed[1:]
        if chosen / t.us - 1 > LOSS
    ]
    return sorted(rows, key=lambda row: -row["loss"])


LATENCIES = ("kernel", "next_kernel", "first_keys", "epilogue", "merge", "load")
RATES = ("copy_gbps", "l2_gbps", "mma_tflops", "wgmma_tflops")
PRIOR = 0.05  # what no time depends on stays where it was: its residual per unit of the logarithm


def with_constants(gpu: Gpu, logs: torch.Tensor) -> Gpu:
    """Multiply the constants by the exponentials of `logs`."""
    factors = dict(zip(LATENCIES + RATES, logs.exp().tolist(), strict=True))
    latency: Latency = replace(
        gpu.latency, **{n: getattr(gpu.latency, n) * factors[n] for n in LATENCIES}
    )
    return replace(gpu, latency=latency, **{n: getattr(gpu, n) * factors[n] for n in RATES})


def fit(gpu: Gpu, timed: Sequence[Timed], steps: int = 8) -> tuple[Gpu, float, float]:
    """Least squares of log(model / measured) over the constants, by damped Gauss-Newton steps.

    Returns the fitted constants and the mean errors before and after (0.1: 10 %).
    """
    measured = torch.tensor([t.us for t in timed], dtype=torch.float64).log()

    def residuals(logs: torch.Tensor) -> torch.Tensor:
        there = with_constants(gpu, logs)
        made = torch.tensor([model_us(t.alternative, there) for t in timed], dtype=torch.float64)
        return torch.cat((made.log() - measured, PRIOR * logs))

    logs = torch.zeros(len(LATENCIES) + len(RATES), dtype=torch.float64)
    now = residuals(logs)
    first = now[: len(timed)].abs().mean().item()
    for _ in range(steps):
        columns = [(residuals(logs + 0.02 * unit) - now) / 0.02 for unit in torch.eye(len(logs))]
        step = torch.linalg.lstsq(torch.stack(columns, 1), -now[:, None]).solution[:, 0]
        for shrink in (1.0, 0.5, 0.25):
            tried = (logs + shrink * step.clamp(-0.7, 0.7)).clamp(-2, 2)
            there = residuals(tried)
            if there.square().sum() < now.square().sum():
                logs, now = tried, there
                break
        else:
            break
    return with_constants(gpu, logs), first, now[: len(timed)].abs().mean().item()


def heuristic_constants(gpu: Gpu) -> dict[str, float]:
    """What csrc/attention/heuristic.h would have by these constants, in nanoseconds."""
    key = 512.0
    per_sm = gpu.copy_gbps / gpu.sms
    rate = (gpu.wgmma_tflops or gpu.mma_tflops) * 1e3 / gpu.sms
    loads = min(gpu.latency.sm_gbps, (32 << 10) / (gpu.latency.load * 1e3))
    return {
        "kMemoryKeyNs": key / per_sm,
        "attention_key_ns(128)": 4 * 128 * 128 / rate,
        "attention_key_ns(16)": key / loads,
        "kItemNs": 1e3 * (gpu.latency.first_keys + gpu.latency.epilogue),
        "kPartialRowNs": 130 * 4 * 2 / (gpu.l2_gbps / gpu.sms),
        "kMergeNs": 1e3 * gpu.latency.merge,
    }


# ---- command ---------------------------------------------------------------------------------


def rehearsal_cells() -> list[grid.Attention]:
    """Small enough for a CPU, long enough to be cut."""
    sizes: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_dim": 64}
    return [
        grid.Attention("attention/q8/b1/c700", (grid.Request(8, 700),), "decode", **sizes),
        grid.Attention("attention/q40/b2/c300", (grid.Request(40, 300),) * 2, "decode", **sizes),
    ]


def chosen_cells(part: str) -> list[grid.Attention]:
    """Attention cells whose name has `part`; without: decode, mixed and quadratic headlines."""
    cells = [c for c in grid.ATTENTION if c.dtype == c.kv_dtype == "bfloat16"]
    if part:
        return [c for c in cells if part in c.name]
    few = {"decode", "mixed", "quadratic"}
    batches, contexts = (1, 4, 8, 32), (1024, 4096, 32768)
    return [
        c
        for c in cells
        if c.group in few
        and (
            c.headline
            or (
                c.group == "decode"
                and len(c.requests) in batches
                and c.requests[0].seq_len in contexts
            )
        )
    ]


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, judge, fit; return everything that is written."""
    if options.rehearse:
        device, gpu = torch.device("cpu"), time_model.GPUS["H100"]
        clock: Clock = RehearsalClock()
        rotated, where = 0.0, environment("cpu")
        capability, cells = 0, rehearsal_cells()
        truth = with_constants(gpu, torch.tensor([0.3, 0, 0.4, 0, 0, 0, -0.2, 0, -0.1, -0.3]))
    else:
        if not torch.cuda.is_available():
            sys.exit(
                "tune: a CUDA device must be there, torch finds none (--rehearse goes without)"
            )
        device, clock = torch.device("cuda"), CudaClock()
        where = environment("cuda")
        measured = ceilings.measure(device, clock)
        rotated = 5 * measured.l2_bytes
        properties = torch.cuda.get_device_properties(device)
        gpu = time_model.gpu_named(properties.name, measured.copy_gbps)
        gpu = replace(gpu, sms=properties.multi_processor_count)
        capability = 10 * properties.major + properties.minor
        cells = chosen_cells(options.cells)
    timed: list[Timed] = []
    rows = []
    for cell in cells:
        ways = list(alternatives(cell, gpu.sms, capability))
        num = int(min(max(rotated // max(cell.cache_bytes, 1), 2), 16))
        of_cell = measure(cell, ways, device, clock, num, options.budget)
        if options.rehearse:
            of_cell = pretended(ways, truth, random.Random(cell.name))
        rows.append(
            {
                "name": cell.name,
                "times": {t.alternative.name: t.us for t in of_cell},
                "model": {t.alternative.name: model_us(t.alternative, gpu) for t in of_cell},
                "losses": losses(of_cell),
            }
        )
        print(row_text(rows[-1]), flush=True)
        timed += of_cell
    if options.rehearse:  # the fit has the whole grid to look at
        for cell in chosen_cells("attention/q")[::40]:
            ways = list(alternatives(cell, gpu.sms, capability))
            timed += pretended(ways, truth, random.Random(cell.name))
    fitted, before, after = fit(gpu, timed)
    return {
        "tuned": "pretended times: no figure means anything" if options.rehearse else where["gpu"],
        "environment": where, "cells": rows, "constants": asdict(gpu), "fitted": asdict(fitted),
        "mean_error_before": before, "mean_error_after": after,
        "heuristic": heuristic_constants(fitted),
    }  # fmt: skip


def row_text(row: dict[str, Any]) -> str:
    """A cell in a line, and a line for each way that wins."""
    chosen = row["times"]["chosen"]
    lines = [f"{row['name']}: {chosen:.1f} us, model {row['model']['chosen']:.1f}"]
    lines += [
        f"    loses {100 * loss['loss']:.0f} % to {loss['way']}: {loss['us']:.1f} us"
        for loss in row["losses"]
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m nld_cuda.bench.tune", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--cells", default="", metavar="PART", help="cells whose name has it")
    parser.add_argument("--budget", type=float, default=0.5, metavar="S", help="seconds a cell")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON of everything")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU")
    options = parser.parse_args(arguments)
    with torch.no_grad():
        document = run(options)
    losing = [row["name"] for row in document["cells"] if row["losses"]]
    print(f"{len(losing)} of {len(document['cells'])} cells lose more than {100 * LOSS:.0f} %")
    error = "model against times: mean error {:.1f} % before, {:.1f} % after the fit"
    print(error.format(*(100 * document[f"mean_error_{w}"] for w in ("before", "after"))))
    for name, value in document["constants"].items():
        if isinstance(value, float | int) and name in RATES:
            print(f"  {name}: {value:g}, fitted {document['fitted'][name]:.4g}")
    for name in LATENCIES:
        was, now = (document[which]["latency"][name] for which in ("constants", "fitted"))
        print(f"  {name}: {was:g} us, fitted {now:.3g} us")
    print("constants of csrc/attention/heuristic.h by the fit, in ns:")
    for name, value in document["heuristic"].items():
        print(f"  {name} = {value:.0f}")
    if options.out is not None:
        options.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
