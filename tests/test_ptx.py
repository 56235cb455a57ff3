"""The wrappers of common/ptx*.cuh: their emulated twins against independent layouts and values.

The kernels and their checks are C++ (csrc/emulator/tests), because the same files run on a GPU too.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import check_kernels
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


needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc here")


@pytest.fixture(scope="module")
def device_program(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The program that the GPU script runs, compiled for one architecture."""

    @functools.cache
    def build(arch: str) -> Path:
        out = tmp_path_factory.mktemp(arch) / "ptx_device"
        source = str(TESTS / "ptx_device.cu")
        run(["nvcc", "-std=c++20", f"-arch={arch}", f"-I{CSRC}", source, "-o", str(out)])
        return out

    return build


@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_120"])
def test_device_program_compiles(device_program: Callable[[str], Path], arch: str) -> None:
    assert device_program(arch).stat().st_size > 0


# Machine instructions that the test kernels must hold, as regular expressions.
PORTABLE = {
    "cp_async_kernel<16, 128>": [r"LDGSTS\.E\.BYPASS\.LTC128B\.128", "LDGDEPBAR", r"DEPBAR\.LE"],
    "cp_async_kernel<4, 0>": [r"LDGSTS\.E"],
    "ldmatrix_kernel<4, false>": [r"LDSM\.16\.M88\.4"],
    "ldmatrix_kernel<2, true>": [r"LDSM\.16\.MT88\.2"],
    "mma_kernel<bf16>": [r"HMMA\.16816\.F32\.BF16"],
    "mma_kernel<f16>": [r"HMMA\.16816\.F32$"],
    "mul_bf16x2_kernel": [r"H(FMA|MUL)2\.(?:\w+\.)*BF16"],
    "approx_kernel": [r"MUFU\.EX2", r"MUFU\.LG2", r"MUFU\.TANH"],
    "barrier_kernel": [r"BAR\.ARV", r"BAR\.SYNC"],
    "stream_kernel": [r"LDG\.E\.NA\.LTC128B\.128\.CONSTANT", r"STG\.E\.EF\.128"],
    "ticket_kernel<(ptx_test::Ordering)0>": [r"ATOMG\.E\.ADD\.STRONG\.GPU", r"MEMBAR\..*GPU"],
    "message_kernel": [r"LDG\.E\.STRONG\.GPU", r"STG\.E\.STRONG\.GPU", r"REDG?\.E\.ADD\.STRONG"],
}
HOPPER = {
    "late_kernel": ["ACQBULK"],
    "early_kernel": ["PREEXIT"],
    "mbar_kernel<false>": [r"SYNCS\.EXCH", r"SYNCS\.ARRIVE", r"SYNCS\.PHASECHK.*TRYWAIT"],
    "bulk_kernel": [r"UBLKCP\.S\.G", r"SYNCS\.ARRIVE\..*A0TR"],
    "tma_kernel<1>": [r"UTMALDG\.1D", r"UTMACCTL\.PF"],
    "tma_kernel<5>": [r"UTMALDG\.5D"],
    "cluster_kernel": ["UCGABAR_ARV", "UCGABAR_WAIT"],
    "elect_kernel": ["ELECT"],
    "registers_kernel": [r"USETMAXREG\.DEALLOC", r"USETMAXREG\.TRY_ALLOC"],
    "wgmma_kernel<bf16, 256, (Swizzle)128, false, false, false>": [r"HGMMA\.64x256x16\.F32\.BF16"],
    "wgmma_kernel<f16, 8, (Swizzle)128, true, false, false>": [r"HGMMA\.64x8x16\.F32$"],
}


@needs_nvcc
@pytest.mark.skipif(
    not all(map(check_kernels.tool, ("cuobjdump", "nvdisasm"))),
    reason="no cuobjdump and nvdisasm here: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm",
)
@pytest.mark.parametrize("arch,wanted", [("sm_80", PORTABLE), ("sm_90a", {**PORTABLE, **HOPPER})])
def test_wrappers_become_the_instructions_they_name(
    device_program: Callable[[str], Path], arch: str, wanted: dict[str, list[str]]
) -> None:
    codes = check_kernels.read_codes(device_program(arch)).values()
    names = check_kernels.demangle([code.symbol for code in codes])
    by_name = {names[code.symbol].removeprefix("ptx_test::"): code for code in codes}
    for name, patterns in wanted.items():
        code = by_name[name]
        for pattern in patterns:
            assert any(re.match(pattern, o) for o in code.opcodes), f"{name}: {pattern} not found"
    for name, code in by_name.items():
        local = [o for o in code.opcodes if re.match(r"(LDL|STL)\b", o)]
        assert code.stack_bytes == 0 and not local, f"{name} uses local memory on {arch}"
