"""Where figures come from: versions, device, driver, commit, command line."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from nld_cuda import _library
from nld_cuda.version import __version__


def environment(device: str = "cpu") -> dict[str, Any]:
    """Describe machine, versions and commit."""
    c = _library.C
    describe = ("git", "describe", "--always", "--dirty", "--abbrev=12")
    info: dict[str, Any] = {
        "nld_cuda": __version__,
        "commit": (source_tree() and _output(*describe)) or "unknown",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "library": hashlib.sha256(_library.LIBRARY_PATH.read_bytes()).hexdigest()[:12],
        "torch": torch.__version__,
        "packages": dict(_versions()),
        "python": platform.python_version(),
        "device": device,
        "cpu": cpu_name(),
        "cpu_isa": c.cpu_isa() if c is not None else "unknown",
        "num_cpus": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
    }
    if device == "cuda":
        info["gpu"] = torch.cuda.get_device_name()
        info["cuda"] = torch.version.cuda
        info["cudnn"] = torch.backends.cudnn.version()
        query = "--query-gpu=driver_version,clocks.sm,clocks.max.sm,power.limit"
        smi = _output("nvidia-smi", query, "--format=csv,noheader", "-i", "0")
        info["driver, SM clock now, at most, power limit"] = smi or "unknown"
    return info


# What is timed beside, or compiles it.
PACKAGES = (
    "triton", "flashinfer-python", "flash-attn", "flash-attn-3", "vllm", "sglang", "sgl-kernel",
)  # fmt: skip


def _versions() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield name, importlib.metadata.version(name)


def source_tree() -> Path | None:
    """Return the root of the sources that this package runs from; None for an installed one."""
    root = Path(__file__).resolve().parents[3]
    return root if (root / "CMakeLists.txt").is_file() else None


def _output(*command: str) -> str:
    """Return what a program prints, or nothing."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(
            command, cwd=source_tree(), capture_output=True, text=True, timeout=20
        )
        if done.returncode == 0:
            return done.stdout.strip()
    return ""


def cpu_name() -> str:
    """Name the processor: some virtual machines hide its name, family and model tell."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    except OSError:
        return platform.processor()
    family, model = fields.get("cpu family"), fields.get("model")
    return f"{fields.get('model name', '?')} family {family} model {model}"


def command(program: str, arguments: list[str]) -> str:
    """Return the command line; of absolute paths only the name, which means more elsewhere."""
    named = [Path(a).name if Path(a).is_absolute() else a for a in arguments]
    return f"{program} {shlex.join(named)}".strip()


def script_command() -> str:
    """Return the command line of a script under benchmarks/."""
    return command(f"python benchmarks/{Path(sys.argv[0]).name}", sys.argv[1:])
