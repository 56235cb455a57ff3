"""Loads libnld_ops.so (the torch ops) and nld_cuda._C (build information) once."""

from __future__ import annotations

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


C: Any = _load()
