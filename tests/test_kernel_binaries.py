"""scripts/check_kernels.py finds what it looks for, and finds nothing in the library as built."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch

import check_kernels
import kernel_rules
from check_kernels import Code, problems_of
from kernel_rules import LOAD_16, Kernel, Rule
from nld_cuda import _library

needs_tools = pytest.mark.skipif(
    not all(map(check_kernels.tool, ("cuobjdump", "nvdisasm"))),
    reason="no cuobjdump and nvdisasm here: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm",
)

RULE = Rule("k<.*>", min_ctas={"all": 2, "sm_120": 1}, instructions={LOAD_16: 2, "HMMA": 1})


def code(**changes: object) -> Code:
    good = {
        "symbol": "k", "arch": "sm_80", "registers": 64, "max_threads": 256,
        "opcodes": Counter({"LDG.E.128.CONSTANT": 2, "HMMA.16816.F32.BF16": 4}),
    }  # fmt: skip
    return Code(**{**good, **changes})  # type: ignore[arg-type]


def test_a_good_kernel_has_no_problems() -> None:
    assert list(problems_of(code(), "k<1>", [RULE])) == []


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"stack_bytes": 8}, "no local memory, got 8 bytes of stack"),
        ({"local_bytes": 8}, "no local memory"),
        ({"opcodes": Counter({"LDG.E.128": 2, "HMMA.1": 1, "LDL.64": 1})}, "1 LDL and STL"),
        ({"opcodes": Counter({"LDG.E.128": 1, "HMMA.1": 1})}, "at least 2 of LDG"),
        ({"opcodes": Counter({"LDG.E.64": 9, "HMMA.1": 1})}, "at least 2 of LDG"),
        ({"opcodes": Counter({"LDG.E.128": 2})}, "at least 1 of HMMA"),
        ({"registers": 129}, "must fit 2 CTAs on a multiprocessor, got 1 "),
        ({"static_smem_bytes": 90 * 1024}, "must fit 2 CTAs on a multiprocessor, got 1 "),
        ({"static_smem_bytes": 100 * 1024, "arch": "sm_120"}, "must fit 1 CTAs .* got 0 "),
        ({"max_threads": 0}, "must have __launch_bounds__"),
    ],
    ids=str,
)
def test_problems_are_found(changes: dict[str, object], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert list(problems_of(code(**changes), "k<1>", [RULE])) == []


def test_schedules() -> None:
    """The exponentials must stand between the two waits; elsewhere than on `only` nothing must."""
    rule = Rule("k<.*>", min_ctas={"all": 1}, schedule="MMwE{4}", only="sm_90a")
    good, bad = (code(arch="sm_90a", schedule=s) for s in ("MMwEEEEW", "MMwEEWEE"))
    assert list(problems_of(good, "k<1>", [rule])) == []
    assert "must hold the schedule MMwE{4}, got M2 w1 E2 W1 E2" in next(
        problems_of(bad, "k<1>", [rule])
    )
    assert list(problems_of(code(schedule=""), "k<1>", [rule])) == []


def test_every_kernel_needs_one_rule() -> None:
    assert "must match one rule" in next(problems_of(code(), "other", [RULE]))
    assert "must match one rule" in next(problems_of(code(), "k<1>", [RULE, RULE]))


def test_occupancy() -> None:
    """Numbers of the occupancy calculator's kind, worked out by hand."""

    def ctas(registers: int, threads: int, smem: int, arch: str) -> int:
        kernel = Kernel("k", registers, threads, smem)
        return kernel_rules.ctas_per_sm(kernel, Rule("k", {"all": 1}), arch)

    assert ctas(32, 256, 0, "sm_80") == 8  # 2048 threads
    assert (
        ctas(33, 256, 0, "sm_80") == 6
    )  # 40 registers a thread are handed out: 12 warps of a part
    assert ctas(255, 256, 0, "sm_90a") == 1
    assert ctas(128, 128, 0, "sm_90a") == 4
    assert ctas(32, 128, 50 * 1024, "sm_90a") == 4  # 51 KiB of 228
    assert ctas(32, 128, 50 * 1024, "sm_120") == 1
    assert ctas(16, 32, 0, "sm_80") == 32 and ctas(16, 32, 0, "sm_120") == 24


def test_the_drivers_shared_memory_is_not_counted_twice() -> None:
    codes: dict = {}
    text = """
arch = sm_{}
 Function k:
  REG:40 STACK:0 SHARED:{} LOCAL:0 CONSTANT[0]:592 TEXTURE:0 SURFACE:0 SAMPLER:0"""
    for arch, smem in (("80", 0), ("90a", 1024), ("100a", 3072), ("120", 0)):
        check_kernels.parse_resources(text.format(arch, smem), codes)
    assert [c.static_smem_bytes for c in codes.values()] == [0, 0, 2048, 0]
    assert {c.registers for c in codes.values()} == {40}


def test_names_are_short() -> None:
    name = "void nld::(anonymous namespace)::k<nld::bf16, 8, (int)4, (bool)1>(nld::P, float*)"
    assert check_kernels.short_name(name) == "k<bf16, 8, 4, 1>"
    assert kernel_rules.arguments("k<bf16, 8, 4, 1>") == ["bf16", "8", "4", "1"]


BAD_KERNEL = """
__global__ void __launch_bounds__(64) bad(float* x, int n) {
  float held[64];
  for (int i = 0; i < 64; ++i) held[i] = x[threadIdx.x * 64 + i];
  for (int i = 0; i < n; ++i) held[(i * 7 + n) % 64] += held[i % 64];
  for (int i = 0; i < 64; ++i) x[threadIdx.x * 64 + i] = held[i];
}
__global__ void __launch_bounds__(96) good(float4* x) { x[threadIdx.x] = x[threadIdx.x + 96]; }
"""


@needs_tools
@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc here")
def test_compiled_kernels(tmp_path: Path) -> None:
    (tmp_path / "k.cu").write_text(BAD_KERNEL)
    command = ["nvcc", "-arch=sm_80", "-c", str(tmp_path / "k.cu"), "-o", str(tmp_path / "k.o")]
    subprocess.run(command, check=True, capture_output=True)
    codes = check_kernels.read_codes(tmp_path / "k.o")
    names = check_kernels.demangle([symbol for symbol, _ in codes])
    by_name = {names[c.symbol]: c for c in codes.values()}
    assert {(n, c.arch, c.max_threads) for n, c in by_name.items()} == {
        ("bad", "sm_80", 64), ("good", "sm_80", 96),
    }  # fmt: skip
    rules = [Rule("good", {"all": 1}, {LOAD_16: 1}), Rule("bad", {"all": 1}, {LOAD_16: 1})]
    assert list(problems_of(by_name["good"], "good", rules)) == []
    found = " ".join(problems_of(by_name["bad"], "bad", rules))
    assert "bytes of stack" in found and "LDL and STL" in found and "at least 1 of LDG" in found


@needs_tools
def test_the_library() -> None:
    """What `make kernels` checks: every kernel, all architectures it was built for."""
    if not _library.C.cuda_archs():
        pytest.skip("the library was built without CUDA kernels (no nvcc)")
    codes = check_kernels.read_codes(_library.LIBRARY_PATH)
    names = check_kernels.demangle(sorted({symbol for symbol, _ in codes}))
    problems = [p for c in codes.values() for p in problems_of(c, names[c.symbol])]
    assert not problems, "\n".join(problems)


def test_ops_without_cuda_code_say_so() -> None:
    """A CPU-only build: the dispatcher's CUDA entry tells what to do."""
    library = torch.library.Library("nld_built_without_cuda", "DEF")
    library.define("double_(Tensor(a!) x) -> ()")
    library.impl("double_", lambda x: None if x.mul_(2) is x else x, "CPU")
    _library.explain_missing_cuda("nld_built_without_cuda")
    op = torch.ops.nld_built_without_cuda.double_.default
    x = torch.ones(3)
    op(x)
    assert x.tolist() == [2, 2, 2]
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    message = r"^double_: tensors must be on the CPU, got CUDA tensors"
    with pytest.raises(RuntimeError, match=message):
        op.redispatch(cuda, x)
    assert x.tolist() == [2, 2, 2]
    library._destroy()


def test_every_op_answers_on_cuda() -> None:
    """Kernels where they are built, else the explanation: never torch's own puzzle."""
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("nld::")]
    assert names
    for name in names:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"), name
