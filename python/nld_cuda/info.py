"""What was built and what this machine offers: `nld info` and the versions in statistics."""

from __future__ import annotations

import platform
from typing import Any

import torch

from nld_cuda import _library
from nld_cuda.version import __version__


def build_info() -> dict[str, Any]:
    """Return versions, the CPU instruction set in use, compiled GPU architectures and devices."""
    c = _library.C
    archs = (
        c.cuda_archs() if c is not None else "unknown (nld_cuda._C is not built for this Python)"
    )
    devices = ["cpu"]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            devices.append(f"cuda:{index} {torch.cuda.get_device_name(index)} (sm_{major}{minor})")
    return {
        "nld_cuda": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu_isa": c.cpu_isa() if c is not None else "unknown",
        "best_cpu_isa": c.best_cpu_isa() if c is not None else "unknown",
        "cpu_threads": torch.get_num_threads(),
        "cuda_archs": archs,
        "devices": devices,
        "library": str(_library.LIBRARY_PATH),
    }
