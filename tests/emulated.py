"""Build and load libnld_emulated: the CUDA kernels, run and checked on the CPU."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / f"emulator-{sys.implementation.cache_tag}-{torch.__version__}"
ORDERS = ("forward", "reverse", "random")  # in which the threads of a CTA take turns
LANDINGS = ("eager", "late", "random")  # when asynchronous copies arrive


def tool(name: str) -> str:
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    assert found, f"{name} must be installed to build the emulator: pip install {name}"
    return found


@functools.cache
def make(target: str, *options: str) -> None:
    """Build a target of CMakeLists.txt in the emulator's own build folder."""
    configure = [
        tool("cmake"), "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", f"-DTORCH_DIR={Path(torch.__file__).parent}",
        "-DNLD_EMULATOR=ON", "-DNLD_WITH_CUDA=OFF", "-DNLD_PYTHON_MODULE=OFF", *options,
    ]  # fmt: skip
    for command in (configure, [tool("cmake"), "--build", str(BUILD), "--target", target]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{target} does not build:\n{done.stdout}{done.stderr}"


@functools.cache
def build(variant: str) -> Path:
    """Return libnld_emulated of a variant: "plain", "checked" (races) or "asan"."""
    make(f"nld_emulated_{variant}")
    return BUILD / f"libnld_emulated_{variant}.so"


@functools.cache
def load(variant: str = "plain") -> ctypes.CDLL:
    """Register `torch.ops.nld_emulated` and return the library."""
    path = build(variant)
    torch.ops.load_library(str(path))
    library = ctypes.CDLL(str(path))
    library.nld_emulator_set.argtypes = (
        ctypes.c_int, ctypes.c_int, ctypes.c_uint64, ctypes.c_uint,
    )  # fmt: skip
    library.nld_emulator_set_bug.argtypes = (ctypes.c_char_p,)
    return library


def configure(
    order: str = "random", landing: str = "late", seed: int = 1, workers: int = 1
) -> None:
    """Choose the order of threads, the landing of copies and the seed of both for the next ops."""
    load().nld_emulator_set(ORDERS.index(order), LANDINGS.index(landing), seed, workers)


class Ops:
    """`torch.ops.nld_emulated`; an op without CUDA kernels falls back to the CPU's."""

    def __getattr__(self, name: str) -> object:
        try:
            return getattr(torch.ops.nld_emulated, name)
        except AttributeError:
            return getattr(torch.ops.nld, name)
