"""Backends of the test bodies: the CPU kernels of each ISA, emulated CUDA, and CUDA itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch

import emulated
import pretend_cuda
from nld_cuda import _library

ISAS = ("baseline", "avx2", "avx512")


@dataclass(frozen=True)
class Backend:
    name: str
    device: str
    order: str = "random"  # these three: of emulated kernels
    landing: str = "late"
    seed: int = 1
    id: str = ""
    capability: int = 80  # of the GPU whose kernels are emulated


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        action="append",
        default=[],
        choices=("cpu", "emulated", "cuda", "rehearsal"),
        help="run the op tests on this backend only (repeatable), and no other tests; rehearsal: "
        "pretend that there is a GPU (see pretend_cuda.py)",
    )
    group = parser.getgroup("emulated CUDA kernels")
    group.addoption(
        "--emulated",
        choices=emulated.VARIANTS,
        help="run the emulated test bodies only, with this variant of the library",
    )
    group.addoption(
        "--emulated-sample",
        type=int,
        metavar="N",
        help="with --emulated: at most N cases of each test, spread over its list",
    )
    group.addoption(
        "--emulated-schedules",
        action="store_true",
        help="with --emulated: every order of threads x copies that land at once or late",
    )


def pytest_configure(config: pytest.Config) -> None:
    # Compiled graphs are kept by their code, which does not tell when the fake of an op changes.
    torch.compiler.config.force_disable_caches = True
    emulated.default_variant = config.getoption("--emulated") or "plain"
    config.addinivalue_line("markers", "backends(*names): the test is for these backends only")
    config.addinivalue_line(
        "markers", "gpus(*capabilities): emulate these GPUs, one after the other (default: 80)"
    )
    config.addinivalue_line("markers", "slow_emulated: left out of runs with --emulated")


def _backends(config: pytest.Config) -> list[Backend]:
    if config.getoption("--emulated-schedules"):
        return [
            Backend("emulated", "cpu", order, landing, seed, f"emulated-{order}-{landing}")
            for seed, order in enumerate(emulated.ORDERS)
            for landing in ("eager", "late")
        ]
    isas = ISAS[: ISAS.index(_library.C.best_cpu_isa()) + 1]
    backends = [Backend(f"cpu-{isa}", "cpu") for isa in isas]
    backends.append(Backend("emulated", "cpu"))
    if torch.cuda.is_available() and _library.C.cuda_archs():
        backends.append(Backend("cuda", "cuda"))
    wanted = config.getoption("--backend")
    if "rehearsal" in wanted:
        backends.append(Backend("rehearsal", "cuda"))
    return [b for b in backends if not wanted or b.name.split("-")[0] in wanted]


def _emulated_gpus(backend: Backend, capabilities: tuple[int, ...]) -> list[Backend]:
    if backend.name != "emulated":
        return [backend]
    name = backend.id or backend.name
    return [
        replace(backend, capability=c, id=name if c == 80 else name.replace("ed", f"ed_sm{c}", 1))
        for c in capabilities
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        backends = _backends(metafunc.config)
        for mark in metafunc.definition.iter_markers("backends"):
            backends = [b for b in backends if b.name in mark.args]
        if mark := metafunc.definition.get_closest_marker("gpus"):
            backends = [gpu for b in backends for gpu in _emulated_gpus(b, mark.args)]
        metafunc.parametrize("backend", backends, ids=lambda b: b.id or b.name, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if wanted := config.getoption("--backend"):
        kept = [
            item
            for item in items
            if "backend" in getattr(item, "fixturenames", ())
            or ("cuda" in wanted and item.get_closest_marker("cuda"))
        ]
        config.hook.pytest_deselected(items=list(set(items) - set(kept)))
        items[:] = kept
    if config.getoption("--emulated") is None:
        return
    chosen: dict[tuple, list[pytest.Item]] = {}
    for item in items:
        backend = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
        is_slow = item.get_closest_marker("slow_emulated") is not None
        if isinstance(backend, Backend) and backend.name == "emulated" and not is_slow:
            chosen.setdefault((item.path, item.originalname, backend.id), []).append(item)
    most = config.getoption("--emulated-sample")
    kept = []
    for group in chosen.values():
        num = min(most or len(group), len(group))
        kept += [group[(2 * i + 1) * len(group) // (2 * num)] for i in range(num)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """Run a test body once per backend; what the backend needs is set up for its duration."""
    chosen: Backend = request.param
    if chosen.name == "emulated":
        library = emulated.load()
        library.configure(order=chosen.order, landing=chosen.landing, seed=chosen.seed)
        monkeypatch.setattr(_library, "nld", library.ops)
        with library.gpu(chosen.capability):
            yield chosen
        return
    elif chosen.name == "rehearsal":
        with pretend_cuda.rehearsal():
            yield chosen
        return
    elif chosen.device == "cpu":
        _library.C.set_cpu_isa(chosen.name.removeprefix("cpu-"))
    yield chosen
    _library.C.set_cpu_isa(_library.C.best_cpu_isa())


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Ops run as emulated kernels, their bytes counted: `with traffic(tensor) as t: ops.x(tensor)`
    leaves `t.read_bytes` and `t.written_bytes`."""
    library = emulated.load("checked")
    library.configure()
    monkeypatch.setattr(_library, "nld", library.ops)
    return library.traffic


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
