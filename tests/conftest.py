"""Backends of the test bodies: the CPU kernels of each ISA, emulated CUDA, and CUDA itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

import emulated
from nld_cuda import _library, ops

ISAS = ("baseline", "avx2", "avx512")


@dataclass(frozen=True)
class Backend:
    name: str
    device: str


def _backends() -> list[Backend]:
    isas = ISAS[: ISAS.index(_library.C.best_cpu_isa()) + 1]
    backends = [Backend(f"cpu-{isa}", "cpu") for isa in isas]
    backends.append(Backend("emulated", "cpu"))
    if torch.cuda.is_available() and _library.C.cuda_archs():
        backends.append(Backend("cuda", "cuda"))
    return backends


@pytest.fixture(params=_backends(), ids=lambda b: b.name)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """Run a test body once per backend; what the backend needs is set up for its duration."""
    chosen: Backend = request.param
    if chosen.name == "emulated":
        emulated.configure()
        monkeypatch.setattr(ops, "_nld", emulated.Ops())
    elif chosen.device == "cpu":
        _library.C.set_cpu_isa(chosen.name.removeprefix("cpu-"))
    yield chosen
    _library.C.set_cpu_isa(_library.C.best_cpu_isa())


# Test inputs are small: on a busy machine threads would mostly wait for each other. Tests of
# threads set their own number.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20261121)
