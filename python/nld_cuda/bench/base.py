"""What the parts of the suite share: problems, baselines, and why something is not run."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from nld_cuda.bench.timing import Call


class NotRun(Exception):
    """A cell or a baseline that cannot run here; the text says why."""


class Problem(Protocol):
    """Inputs of a cell on a device, and our op on them."""

    cell: Any

    def run(self) -> object:
        """Call our op."""

    def reset(self) -> object:
        """Restore the inputs that a call changes."""


ProblemT = TypeVar("ProblemT")


def copy_of(problem: ProblemT) -> ProblemT:
    """Return the same problem elsewhere in memory: its tensors are copied, nothing is shared."""

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.clone()
        if isinstance(value, dict):
            return {key: copied(item) for key, item in value.items()}
        return list(map(copied, value)) if isinstance(value, list) else value

    other = object.__new__(type(problem))
    other.__dict__.update({name: copied(value) for name, value in vars(problem).items()})
    return other


@dataclass(frozen=True)
class Prepared:
    """A baseline made ready for one problem.

    Attributes:
        call: what is timed.
        result: turns what the call returns into the layout of our own result.
        reset: restores what the call changes.
    """

    call: Call
    result: Callable[[Any], Any] = lambda returned: returned
    reset: Call = lambda: None


def never(*_: Any) -> str | None:
    """Nothing speaks against it."""
    return None


@dataclass(frozen=True)
class Baseline:
    """Another implementation of an op, timed in turns with ours.

    Attributes:
        make: lays out the inputs of a problem (untimed) and returns the call.
        differs: compares a baseline's result with ours: None, or in what they differ.
        missing: why it cannot run on this kind of device ("cpu", "cuda") at all.
        refuses: why it has no answer for a cell on this kind of device.
        costly: why it is left out of a cell unless it is asked for by name.
        in_graph: False where it reads results on the host.
        around: a context that its calls need.
        layout: name of the copies that `make` lays out; equal names share one copy.
        layout_bytes: size of them for a cell.
        note: what of its work is not timed.
    """

    name: str
    make: Callable[[Any], Prepared]
    differs: Callable[[Any, Any], str | None]
    missing: Callable[[str], str | None] = never
    refuses: Callable[[Any, str], str | None] = never
    costly: Callable[[Any], str | None] = never
    in_graph: bool = True
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    layout: str = ""
    layout_bytes: Callable[[Any], float] = lambda cell: 0.0
    note: str = ""


def compiled(eager: Baseline, make: Callable[[Any], Prepared]) -> Baseline:
    """Return the torch.compile twin of an eager baseline."""
    return replace(
        eager,
        name=f"{eager.name} compiled",
        make=make,
        missing=lambda device: None if device == "cuda" else "is measured on CUDA only",
        costly=lambda cell: None if cell.headline else "compiles some seconds for every shape",
        note="torch.compile of the eager pipeline",
    )


def needs_cuda_module(*modules: str) -> Callable[[str], str | None]:
    """Return the `missing` of a baseline for GPUs that lives in one of these modules."""

    def missing(device: str) -> str | None:
        if device != "cuda":
            return "runs on CUDA only"
        if any(_is_there(module) for module in modules):
            return None
        return f"not installed: {' or '.join(modules)}"

    return missing


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError, AttributeError):  # a parent that is not there or is broken
        return False


def dtype_of(name: str) -> torch.dtype:
    """Return the dtype that a cell names."""
    return getattr(torch, name)  # type: ignore[no-any-return]
