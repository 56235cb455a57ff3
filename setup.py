"""Calls CMake, which alone describes the build. Usage: pip install ."""

from __future__ import annotations

import importlib.util
import os
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


class CMakeBuild(build_ext):
    """Builds libnld_ops.so and nld_cuda._C with CMake and Ninja."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        build_dir = Path(self.build_temp).resolve()

        configure = [
            "cmake",
            "-S", str(ROOT),
            "-B", str(build_dir),
            "-G", "Ninja",
            f"-DTORCH_DIR={find_torch()}",
            f"-DNLD_VERSION={self.distribution.get_version()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]  # fmt: skip
        if "NLD_CUDA_ARCHS" in os.environ:
            configure.append(f"-DNLD_CUDA_ARCHS={os.environ['NLD_CUDA_ARCHS'].replace(',', ';')}")
        if os.environ.get("NLD_WITH_CUDA") == "0":
            configure.append("-DNLD_WITH_CUDA=OFF")
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 2))
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build_dir), "--parallel", jobs], check=True)
        self.install_libraries(Path(self.build_lib).resolve())
        if getattr(self, "editable_mode", False):
            self.copy_extensions_to_source()

    def install_libraries(self, prefix: Path) -> None:
        command = ["cmake", "--install", str(Path(self.build_temp).resolve()), "--prefix"]
        subprocess.run([*command, str(prefix)], check=True)

    def copy_extensions_to_source(self) -> None:
        """Install beside the sources: an editable or in-place build imports the package from there."""
        self.install_libraries(ROOT / "python")


setup(ext_modules=[Extension("nld_cuda._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
