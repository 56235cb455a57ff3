"""Loads libnld_ops.so (the torch ops) and nld_cuda._C (build information) once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

try:
    import torch
except ModuleNotFoundError:
    raise ImportError(
        "nld_cuda: torch >= 2.11 must be installed, found none: pip install torch"
    ) from None

LIBRARY_PATH = Path(__file__).with_name("libnld_ops.so")


def _load() -> ModuleType | None:
    version = torch.__version__.split("+")[0].split(".")[:2]
    if tuple(map(int, version)) < (2, 11):
        raise ImportError(f"nld_cuda: torch must be >= 2.11, got {torch.__version__}")
    if not LIBRARY_PATH.is_file():
        raise ImportError(
            f"nld_cuda: {LIBRARY_PATH.name} must lie beside the package, found none in "
            f"{LIBRARY_PATH.parent}: build it with `pip install .` "
            "(in a source tree: `python setup.py build_ext --inplace`)"
        )
    torch.ops.load_library(str(LIBRARY_PATH))
    try:
        # Built for one Python version; the ops work without it.
        from nld_cuda import _C  # type: ignore[attr-defined]
    except ImportError:
        return None
    return _C


_explained: list[torch.library.Library] = []  # a registration lasts as long as its object


def explain_missing_cuda(namespace: str) -> None:
    """Make the ops of a library that have no CUDA code say so when they meet a CUDA tensor.

    Torch's own message ("could not run with arguments from the 'CUDA' backend") leaves the reader
    to guess why. Ops without CUDA code: the library was built where no nvcc was found.
    """

    def refuse(op: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            raise RuntimeError(
                f"{op}: tensors must be on the CPU, got CUDA tensors: {LIBRARY_PATH.name} was "
                "built without CUDA kernels. Put nvcc (CUDA >= 12.8) on PATH and reinstall: "
                "pip install --no-build-isolation --force-reinstall --no-deps ."
            )

        return call

    library = torch.library.Library(namespace, "IMPL")
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith(f"{namespace}::") and not (
            torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
            or torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeExplicitAutograd")
        ):
            short = name.partition("::")[2]
            library.impl(short, refuse(short.partition(".")[0]), "CUDA")
    _explained.append(library)


C: Any = _load()
explain_missing_cuda("nld")
nld: Any = torch.ops.nld  # what the wrappers call; tests put the emulated kernels here
