"""Backends of the test bodies: the CPU kernels of each ISA this machine runs, CUDA when present."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from nld_cuda import _library

ISAS = ("baseline", "avx2", "avx512")


@dataclass(frozen=True)
class Backend:
    name: str
    device: str


def _backends() -> list[Backend]:
    isas = ISAS[: ISAS.index(_library.C.best_cpu_isa()) + 1]
    backends = [Backend(f"cpu-{isa}", "cpu") for isa in isas]
    if torch.cuda.is_available() and _library.C.cuda_archs():
        backends.append(Backend("cuda", "cuda"))
    return backends


@pytest.fixture(params=_backends(), ids=lambda b: b.name)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Run a test body once per backend; CPU backends force their ISA for its duration."""
    chosen: Backend = request.param
    if chosen.device == "cpu":
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
