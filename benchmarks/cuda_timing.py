"""Timing on a GPU: kernels alone (a graph's replay) and with the host that launches them.

A call of a few microseconds is shorter than its launch, so events around single calls measure the
host. Here the calls on all rotating inputs are captured in one graph; events around its replay,
divided by the number of calls, give the time of a call with cold inputs. The stream is kept busy
while the graph is launched, so that the first event does not wait for the host. The eager time of
a loop on the host, launches included, is measured beside.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from bench import Timing, _summary

Calls = Sequence[Callable[[], object]]


@dataclass
class Contender:
    """One implementation.

    Attributes:
        calls: the same work on different inputs.
        prepare: restores what the calls have changed; not timed.
        in_graph: False where the host reads results: then only the eager time exists.
    """

    calls: Calls
    prepare: Callable[[], object] = field(default=lambda: None)
    in_graph: bool = True


@dataclass(frozen=True)
class Measured:
    """kernel: per call, of graph replays (None: cannot be captured); eager: with the host."""

    kernel: Timing | None
    eager: Timing


def _capture(calls: Calls) -> Callable[[], None]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def _replay_us(replay: Callable[[], None]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(2_000_000)  # 1 ms: longer than launching the graph takes
    start.record()
    replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def _eager_us(calls: Calls) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for call in calls:
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e6


def measure(
    contenders: Mapping[str, Contender], *, budget_s: float = 1.0, min_runs: int = 9
) -> dict[str, Measured]:
    """Time the contenders in turns until the budget is spent, at least `min_runs` times each."""
    replays = {}
    for name, c in contenders.items():
        c.prepare()
        for call in c.calls[:3]:
            call()
        c.prepare()
        if c.in_graph:
            replays[name] = _capture(c.calls)
            c.prepare()
            replays[name]()
    kernel: dict[str, list[float]] = {name: [] for name in contenders}
    eager: dict[str, list[float]] = {name: [] for name in contenders}
    deadline, runs = time.perf_counter() + budget_s, 0
    while runs < min_runs or (time.perf_counter() < deadline and runs < 300):
        names = list(contenders)
        for name in names if runs % 2 == 0 else reversed(names):
            c = contenders[name]
            if name in replays:
                c.prepare()
                torch.cuda.synchronize()
                kernel[name].append(_replay_us(replays[name]) / len(c.calls))
            if runs < min_runs:
                c.prepare()
                eager[name].append(_eager_us(c.calls) / len(c.calls))
        runs += 1
    return {
        name: Measured(_summary(kernel[name]) if kernel[name] else None, _summary(eager[name]))
        for name in contenders
    }
