"""Timers: implementations of the same work in turns, on the CPU's clock or in replayed CUDA graphs.

All contenders of a cell are timed in turns (a, b, a, b, ... and every other round backwards), so
that noise and changes of the clock rate hit all of them alike: compare within a row, never between
runs. Every call gets other inputs than the one before, so that they come from memory.

On a GPU a call of a few microseconds is shorter than its launch, so events around single calls
would measure the host. There the calls on all rotating inputs are captured in one graph; events
around its replay, divided by the number of calls, give the time of a call. The stream is kept busy
while the graph is launched, so that the first event does not wait for the host. The eager time of a
loop on the host, launches included, is measured beside.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Call = Callable[[], object]
# Calls slower than this are timed fewer times than min_runs.
SLOW_CALL_S, SLOW_RUNS = 1.0, 3


@dataclass(frozen=True)
class Timing:
    """Distribution of one implementation's time per call, in microseconds."""

    median_us: float
    p10_us: float
    p90_us: float
    num_runs: int


@dataclass
class Contender:
    """One implementation of the work of a cell.

    Attributes:
        calls: the same work on different inputs.
        resets: of each call, what restores the inputs it changes; not timed. Empty: nothing to do.
        in_graph: False where the host reads results: then only the eager time exists.
        around: a context that the calls need; entered outside of the timed part.
    """

    calls: Sequence[Call]
    resets: Sequence[Call] = ()
    in_graph: bool = True
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    def reset(self) -> None:
        """Restore all inputs."""
        for reset in self.resets:
            reset()


@dataclass(frozen=True)
class Measured:
    """us: the figure of the row; eager: with the host that launches (CUDA; else the same).

    `us` is None for what cannot be captured in a graph.
    """

    us: Timing | None
    eager: Timing

    @property
    def best(self) -> Timing:
        """The kernel's time where there is one, else the eager time."""
        return self.us or self.eager


def summary(values: Sequence[float]) -> Timing:
    """Condense samples."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return Timing(
        statistics.median(ordered),
        ordered[round(0.1 * last)],
        ordered[round(0.9 * last)],
        len(ordered),
    )


def _kept(
    contenders: Mapping[str, Contender],
    prepare: Callable[[str], None],
    dropped: dict[str, str] | None,
) -> dict[str, Contender]:
    """Prepare the contenders; leave out those that fail, where that is wanted."""
    kept = {}
    for index, (name, contender) in enumerate(contenders.items()):
        try:
            prepare(name)
        except Exception as error:
            if dropped is None or index == 0:
                raise
            dropped[name] = f"{type(error).__name__}: {str(error)[:200]}"
        else:
            kept[name] = contender
    return kept


@dataclass
class CpuClock:
    """Times single calls; inputs rotate from call to call.

    `clock="cpu"` counts the process's CPU time instead of the wall's: on a busy machine the only
    fair number, with one thread (several would have their waiting counted as work).
    """

    clock: str = "wall"
    min_runs: int = 11
    max_runs: int = 1000

    def measure(
        self,
        contenders: Mapping[str, Contender],
        budget_s: float,
        dropped: dict[str, str] | None = None,
    ) -> dict[str, Measured]:
        """Time the contenders in turns until the budget is spent, `min_runs` times at least.

        With `dropped`, what fails in its first calls, the first contender excepted, is left out and
        noted there.
        """
        now = time.process_time if self.clock == "cpu" else time.perf_counter
        turn = dict.fromkeys(contenders, 0)

        def sample(name: str) -> float:
            c = contenders[name]
            index = turn[name] = (turn[name] + 1) % len(c.calls)
            if c.resets:
                c.resets[index]()
            with c.around():
                begin = now()
                c.calls[index]()
                return (now() - begin) * 1e6

        most = {name: self.max_runs for name in contenders}

        def warm_up(name: str) -> None:
            for _ in range(3):
                if sample(name) > SLOW_CALL_S * 1e6:
                    most[name] = SLOW_RUNS
                    break

        contenders = _kept(contenders, warm_up, dropped)
        samples: dict[str, list[float]] = {name: [] for name in contenders}
        deadline = time.perf_counter() + budget_s
        for run in range(self.max_runs):
            if run >= self.min_runs and time.perf_counter() > deadline:
                break
            names = list(contenders)
            for name in names if run % 2 == 0 else reversed(names):
                if run < most[name]:
                    samples[name].append(sample(name))
        timings = {name: summary(values) for name, values in samples.items()}
        return {name: Measured(timing, timing) for name, timing in timings.items()}


@dataclass
class CudaClock:
    """Times replays of graphs, and the host that launches."""

    min_runs: int = 9
    max_runs: int = 300

    def measure(
        self,
        contenders: Mapping[str, Contender],
        budget_s: float,
        dropped: dict[str, str] | None = None,
    ) -> dict[str, Measured]:
        """Time the contenders in turns; as `CpuClock.measure`."""
        replays: dict[str, Call] = {}

        def prepare(name: str) -> None:
            c = contenders[name]
            with c.around():
                c.reset()
                for call in c.calls[:3]:
                    call()
                c.reset()
                if c.in_graph:
                    replays[name] = self.capture(c.calls)
                    c.reset()
                    replays[name]()
                    self.synchronize()

        contenders = _kept(contenders, prepare, dropped)
        kernel: dict[str, list[float]] = {name: [] for name in contenders}
        eager: dict[str, list[float]] = {name: [] for name in contenders}
        deadline = time.perf_counter() + budget_s
        for run in range(self.max_runs):
            if run >= self.min_runs and time.perf_counter() > deadline:
                break
            names = list(contenders)
            for name in names if run % 2 == 0 else reversed(names):
                c = contenders[name]
                if name in replays:
                    c.reset()
                    self.synchronize()
                    kernel[name].append(self.replay_us(replays[name]) / len(c.calls))
                if run < self.min_runs:
                    c.reset()
                    with c.around():
                        eager[name].append(self.eager_us(c.calls) / len(c.calls))
        return {
            name: Measured(summary(kernel[name]) if kernel[name] else None, summary(eager[name]))
            for name in contenders
        }

    def synchronize(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize()

    def capture(self, calls: Sequence[Call]) -> Call:
        """Return what replays a graph of the calls, one after the other."""
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

    def replay_us(self, replay: Call) -> float:
        """Time one replay by events."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(2_000_000)  # 1 ms: longer than launching the graph takes
        start.record()
        replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end) * 1e3)

    def eager_us(self, calls: Sequence[Call]) -> float:
        """Time a loop on the host, until the device is done."""
        self.synchronize()
        begin = time.perf_counter()
        for call in calls:
            call()
        self.synchronize()
        return (time.perf_counter() - begin) * 1e6


@dataclass
class RehearsalClock(CudaClock):
    """Takes every step of a CUDA timing where there is no GPU; its figures mean nothing."""

    min_runs: int = 2
    max_runs: int = 2
    num_captures: int = field(default=0)

    def synchronize(self) -> None:
        """Wait for nothing."""

    def capture(self, calls: Sequence[Call]) -> Call:
        """Return what makes the calls."""
        self.num_captures += 1

        def replay() -> None:
            for call in calls:
                call()

        return replay

    def replay_us(self, replay: Call) -> float:
        """Time one replay on the host."""
        return self.eager_us([replay])


Clock = CpuClock | CudaClock


def interleave(
    functions: Mapping[str, Call], *, budget_s: float = 2.0, min_runs: int = 11
) -> dict[str, Timing]:
    """Time plain functions in turns on the CPU's wall clock."""
    contenders = {name: Contender([function]) for name, function in functions.items()}
    measured = CpuClock(min_runs=min_runs).measure(contenders, budget_s)
    return {name: m.eager for name, m in measured.items()}
