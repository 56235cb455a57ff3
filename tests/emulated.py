"""Build and load libnld_emulated: the CUDA kernels, run and checked on the CPU.

Three variants: "plain" is fast; "checked" reports data races and counts bytes; "asan" runs under
AddressSanitizer and UBSan (the process must have been started with their libraries preloaded).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / f"emulator-{sys.implementation.cache_tag}-{torch.__version__}"
VARIANTS = ("plain", "checked", "asan")
ORDERS = ("forward", "reverse", "random")  # in which threads and CTAs take turns
LANDINGS = ("eager", "late", "random")  # when asynchronous copies arrive
default_variant = "plain"


def tool(name: str) -> str:
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    assert found, f"{name} must be installed to build the emulator: pip install {name}"
    return found


def cuda_headers() -> Path:
    """Headers of the CUDA toolkit, or of the PyPI packages that the `test` extra names."""
    folders = [
        Path(os.environ[n]) / "include" for n in ("CUDA_HOME", "CUDA_PATH") if n in os.environ
    ]
    folders.append(Path("/usr/local/cuda/include"))
    folders += [Path(p) / "nvidia" / "cu13" / "include" for p in sys.path]
    for folder in folders:
        if all((folder / h).is_file() for h in ("cuda_bf16.h", "crt/host_defines.h", "nv/target")):
            return folder
    raise AssertionError(
        "CUDA headers must be there to build the emulator: pip install nvidia-cuda-runtime "
        "nvidia-cuda-crt nvidia-cuda-cccl"
    )


@functools.cache
def make(target: str, *options: str) -> None:
    """Build a target of CMakeLists.txt in the emulator's own build folder."""
    configure = [
        tool("cmake"), "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", f"-DTORCH_DIR={Path(torch.__file__).parent}",
        f"-DNLD_CUDA_INCLUDE={cuda_headers()}",
        "-DNLD_EMULATOR=ON", "-DNLD_WITH_CUDA=OFF", "-DNLD_PYTHON_MODULE=OFF", *options,
    ]  # fmt: skip
    compilers = {
        name: v for name, v in os.environ.items() if name != "LD_PRELOAD"
    }  # not under ASan
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # pytest -n: the first worker builds
        for command in (configure, [tool("cmake"), "--build", str(BUILD), "--target", target]):
            done = subprocess.run(command, capture_output=True, text=True, env=compilers)
            assert done.returncode == 0, f"{target} does not build:\n{done.stdout}{done.stderr}"


@functools.cache
def build(variant: str) -> Path:
    """Return the library of a variant, built if anything has changed."""
    make(f"nld_emulated_{variant}")
    return BUILD / f"libnld_emulated_{variant}.so"


class Ops:
    """`torch.ops.nld_emulated_<variant>`, with the names of `torch.ops.nld`."""

    def __init__(self, variant: str | None = None) -> None:
        self.emulated = getattr(torch.ops, f"nld_emulated_{variant or default_variant}")

    def __getattr__(self, name: str) -> object:
        return getattr(self.emulated, name)


class Library:
    """One variant, loaded: its ops, its options."""

    def __init__(self, variant: str) -> None:
        path = build(variant)
        torch.ops.load_library(str(path))
        self.variant = variant
        self.ops = Ops(variant)
        self.c = ctypes.CDLL(str(path))
        c = self.c
        c.nld_emulator_set.argtypes = (
            ctypes.c_int, ctypes.c_int, ctypes.c_uint64, ctypes.c_uint, ctypes.c_uint,
        )  # fmt: skip
        c.nld_emulator_set_bug.argtypes = (ctypes.c_char_p,)
        c.nld_emulator_set_gpu.argtypes = (ctypes.c_int, ctypes.c_int)
        self.current_gpu = (80, 4)
        c.nld_emulator_set_gpu(*self.current_gpu)
        c.nld_emulator_track.argtypes = (ctypes.c_void_p, ctypes.c_uint64)
        c.nld_emulator_untrack.argtypes = (ctypes.c_int,)
        c.nld_emulator_traffic.argtypes = (
            ctypes.c_int, ctypes.POINTER(ctypes.c_uint64), ctypes.POINTER(ctypes.c_uint64),
        )  # fmt: skip

    def configure(
        self,
        order: str = "random",
        landing: str = "late",
        seed: int = 1,
        workers: int = 1,
        max_resident: int = 1024,
    ) -> None:
        """Choose how the next ops run.

        `order` and `seed`: who goes first; "forward" and "reverse" start at the seed-th CTA of the
        grid. `max_resident`: threads whose CTAs take turns (0: one CTA or cluster after the other).
        `workers`: OS threads; more than one is faster but not repeatable ("checked": always one).
        """
        self.c.nld_emulator_set(
            ORDERS.index(order), LANDINGS.index(landing), seed, workers, max_resident
        )

    @contextlib.contextmanager
    def gpu(self, capability: int, num_sms: int = 4) -> Iterator[None]:
        """Let launchers choose as on a GPU of that compute capability (10 * major + minor)."""
        before, self.current_gpu = self.current_gpu, (capability, num_sms)
        try:
            self.c.nld_emulator_set_gpu(*self.current_gpu)
            yield
        finally:
            self.current_gpu = before
            self.c.nld_emulator_set_gpu(*before)

    @contextlib.contextmanager
    def bug(self, name: str) -> Iterator[None]:
        """Switch on `NLD_BUG(name)` in the kernels."""
        self.c.nld_emulator_set_bug(name.encode())
        try:
            yield
        finally:
            self.c.nld_emulator_set_bug(b"")

    @contextlib.contextmanager
    def traffic(self, tensor: torch.Tensor | None = None) -> Iterator[Traffic]:
        """Count the bytes that kernels read and write between the tensor's first and last byte, or
        in all of global memory."""
        assert self.variant == "checked", "only the checked variant sees every access"
        if tensor is None:
            id = self.c.nld_emulator_track(None, 2**64 - 1)
        else:
            last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            span = (last + 1) * tensor.element_size() if tensor.numel() else 0
            id = self.c.nld_emulator_track(tensor.data_ptr(), span)
        result = Traffic()
        try:
            yield result
        finally:
            read, written = ctypes.c_uint64(), ctypes.c_uint64()
            self.c.nld_emulator_traffic(id, ctypes.byref(read), ctypes.byref(written))
            result.read_bytes, result.written_bytes = read.value, written.value
            self.c.nld_emulator_untrack(id)


class Traffic:
    """Filled at the end of `with library.traffic(tensor) as t`. Every lane's access counts."""

    read_bytes = -1
    written_bytes = -1


@functools.cache
def _load(variant: str) -> Library:
    return Library(variant)


def load(variant: str | None = None) -> Library:
    """Return a variant, by default the one that `pytest --emulated` names."""
    return _load(variant or default_variant)


def configure(*arguments: object, **options: object) -> None:
    """`Library.configure` of the default variant."""
    load().configure(*arguments, **options)
