"""The wrappers of common/ptx*.cuh: their emulated twins against independent layouts and values.

The kernels and their checks are C++ (csrc/emulator/tests), because the same files run on a GPU too.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import emulated

CSRC = Path(__file__).parents[1] / "csrc"
TESTS = CSRC / "emulator" / "tests"
WRAPPER_FILES = sorted((CSRC / "common").glob("ptx*.cuh"))


def program(variant: str) -> Path:
    emulated.make(f"nld_ptx_{variant}")
    return emulated.BUILD / f"nld_ptx_{variant}"


def num_cases() -> int:
    source = (TESTS / "ptx_device.cu").read_text(encoding="utf-8")
    return len(re.findall(r'^    \{"[^"]+", (?:test|misuse)_', source, re.MULTILINE))


def run(command: list[str]) -> str:
    # A launch that fails abandons the stacks of its threads: leaks there are none of ours.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout}{done.stderr}"
    return done.stdout


def check(variant: str, order: str, landing: str, seed: int = 1) -> None:
    numbers = [emulated.ORDERS.index(order), emulated.LANDINGS.index(landing), seed]
    output = run([str(program(variant)), *map(str, numbers)])
    assert len(re.findall(r"^ok ", output, re.MULTILINE)) == num_cases(), output
    assert "\n0 failed" in output, output


@pytest.mark.parametrize("landing", emulated.LANDINGS)
@pytest.mark.parametrize("order", emulated.ORDERS)
def test_wrappers(order: str, landing: str) -> None:
    check("plain", order, landing)


@pytest.mark.parametrize("landing", emulated.LANDINGS)
@pytest.mark.parametrize("order", emulated.ORDERS)
def test_wrappers_under_the_race_checker(order: str, landing: str) -> None:
    check("checked", order, landing, seed=5)


def test_wrappers_under_address_sanitizer() -> None:
    check("asan", "random", "random", seed=7)


def test_layouts_equal_those_of_cute() -> None:
    spec = importlib.util.find_spec("cutlass_library")
    assert spec is not None and spec.origin, (
        "pip install --no-deps nvidia-cutlass==4.2.0.0 for the layouts to compare with"
    )
    include = Path(spec.origin).parent / "source" / "include"
    emulated.make("nld_ptx_cute", f"-DNLD_CUTLASS_INCLUDE={include}")
    output = run([str(emulated.BUILD / "nld_ptx_cute")])
    assert len(re.findall(r"^ok ", output, re.MULTILINE)) == 27, output


def wrappers() -> set[str]:
    """Names of the functions declared PTX_FN."""
    names: set[str] = set()
    for path in WRAPPER_FILES:
        text = re.sub(r"//[^\n]*", "", path.read_text(encoding="utf-8"))
        names |= set(re.findall(r"^\s*PTX_FN\b[^(;{]*?\b(\w+)\(", text, re.MULTILINE))
    return names


def test_every_wrapper_is_tested() -> None:
    names = wrappers()
    assert {"cp_async", "ldmatrix_x4", "mma_m16n8k16", "exp2_approx", "tma_load", "wgmma"} <= names
    used = "".join(path.read_text(encoding="utf-8") for path in TESTS.glob("*.cuh"))
    untested = {name for name in names if not re.search(rf"\bptx::{name}\b", used)}
    assert not untested, f"csrc/emulator/tests must call every wrapper, not {sorted(untested)}"


def test_no_asm_outside_the_wrappers() -> None:
    for path in (p for suffix in ("h", "cuh", "cu", "cpp") for p in CSRC.rglob(f"*.{suffix}")):
        text = re.sub(r"//[^\n]*", "", path.read_text(encoding="utf-8"))
        if path not in WRAPPER_FILES and CSRC / "emulator" not in path.parents:
            assert not re.search(r"\basm\b", text), f"{path.name} must use common/ptx.cuh, not asm"


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc here")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_120"])
def test_device_program_compiles(arch: str, tmp_path: Path) -> None:
    source = TESTS / "ptx_device.cu"
    out = tmp_path / "ptx_device"
    run(["nvcc", "-std=c++20", f"-arch={arch}", f"-I{CSRC}", str(source), "-o", str(out)])
    assert out.stat().st_size > 0
