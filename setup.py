"""Calls CMake, which alone describes the build. Usage: pip install ."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def find_torch() -> Path:
    """Locate torch without importing it, so that pip's isolated builds find the user's own copy."""
    candidates = []
    if "NLD_TORCH_DIR" in os.environ:
        candidates.append(Path(os.environ["NLD_TORCH_DIR"]))
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.submodule_search_locations:
        candidates.append(Path(next(iter(spec.submodule_search_locations))))
    for key in ("platlib", "purelib"):
        candidates.append(Path(sysconfig.get_path(key)) / "torch")
    for path in candidates:
        if (path / "include/torch/csrc/stable/library.h").is_file():
            return path
    sys.exit(
        "nld_cuda: torch >= 2.11 not found: install torch first, then run "
        "`pip install .` (or, in a separate build environment, "
        "`pip install --no-build-isolation .`)"
    )


def find_tool(name: str) -> str:
    """Locate cmake or ninja: beside this Python first, so that an unactivated environment works."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    return found or sys.exit(f"nld_cuda: {name} not found: run `pip install {name}`")


def debug_wanted() -> bool:
    return os.environ.get("NLD_DEBUG", "0") != "0"


class CMakeBuild(build_ext):
    """Builds libnld_ops.so and nld_cuda._C with CMake and Ninja."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        build_dir = self.build_dir()
        configure = [
            find_tool("cmake"),
            "-S", str(ROOT),
            "-B", str(build_dir),
            "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            f"-DTORCH_DIR={find_torch()}",
            f"-DNLD_VERSION={self.distribution.get_version()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]  # fmt: skip
        # Said in every build, or the folder would remember what an earlier one was told.
        archs = os.environ.get("NLD_CUDA_ARCHS", "").replace(",", ";")
        configure.append(f"-DNLD_CUDA_ARCHS={archs}" if archs else "-UNLD_CUDA_ARCHS")
        configure.append(
            f"-DNLD_WITH_CUDA={'OFF' if os.environ.get('NLD_WITH_CUDA') == '0' else 'ON'}"
        )
        configure.append(f"-DNLD_DEBUG={'ON' if debug_wanted() else 'OFF'}")
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 2))
        subprocess.run(configure, check=True)
        build = [find_tool("cmake"), "--build", str(build_dir), "--parallel", jobs]
        subprocess.run(build, check=True)
        self.install_libraries(Path(self.build_lib).resolve())
        if getattr(self, "editable_mode", False):
            self.copy_extensions_to_source()

    def build_dir(self) -> Path:
        # One folder for wheels, editable and in-place builds: what one has compiled serves all.
        debug = "-debug" if debug_wanted() else ""
        return ROOT / "build" / f"cmake-{sys.implementation.cache_tag}{debug}"

    def install_libraries(self, prefix: Path) -> None:
        command = [find_tool("cmake"), "--install", str(self.build_dir()), "--prefix"]
        subprocess.run([*command, str(prefix)], check=True)

    def copy_extensions_to_source(self) -> None:
        """Install beside the sources, from where an editable or in-place build is imported."""
        self.install_libraries(ROOT / "python")


setup(ext_modules=[Extension("nld_cuda._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
