"""The rules of dependency: who may include, import, change or read what."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nld_cuda import _library

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "python" / "nld_cuda"
CPP = sorted(p for p in CSRC.rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"})
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)
TORCH_HEADER = re.compile(r"^(torch|ATen|c10|caffe2)/")
# What a function of these headers would put into the library as a shared inline copy.
INLINE_FREE_HEADERS = {
    "cstdint",
    "cstddef",
    "cstring",
    "stdint.h",
    "stddef.h",
    "string.h",
    "math.h",
}
INLINE_FREE_HEADERS |= {"float.h", "limits.h", "immintrin.h"}


def code(path: Path) -> str:
    """Source without comments (string contents stay)."""
    text = path.read_text(encoding="utf-8")
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)


def includes(path: Path) -> list[str]:
    return INCLUDE.findall(code(path))


def op_folders() -> set[str]:
    return {p.parent.name for p in CSRC.glob("*/op.cpp")}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_rules_see_the_sources() -> None:
    assert {"attention", "kv_cache", "sampler", "verify"} <= op_folders()
    assert len(CPP) > 15
    assert "common/stream.h" in includes(CSRC / "kv_cache" / "op.cpp")


# ---- C++ -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CPP, ids=name)
def test_torch_headers_only_where_tensors_are_known(path: Path) -> None:
    may = path.name == "op.cpp" or name(path) in ("csrc/common/check.h", "csrc/common/stream.h")
    seen = [h for h in includes(path) if TORCH_HEADER.match(h)]
    assert may or not seen, f"{name(path)} must not include torch headers, got {seen}"
    stable = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/")
    outside = [h for h in seen if not h.startswith(stable)]
    assert not outside, f"{name(path)} must include the stable ABI only, got {outside}"
    if not may:  # check.h brings torch with it
        assert not {"common/check.h", "common/stream.h"} & set(includes(path)), name(path)


@pytest.mark.parametrize("path", CPP, ids=name)
def test_ops_do_not_include_each_other(path: Path) -> None:
    own = path.relative_to(CSRC).parts[0]
    allowed = {own, "common"}
    if path.name in ("prelude.cuh", "ptx.cuh"):  # where nvcc and the emulator part ways
        allowed.add("emulator")
    for header in includes(path):
        folder = header.split("/")[0] if "/" in header else None
        if folder in op_folders() | {"common", "emulator"}:
            assert folder in allowed, f"{name(path)} must not include {header}"
        assert ".." not in header.split("/"), (
            f"{name(path)} must include by full path, not {header}"
        )


@pytest.mark.parametrize("path", sorted(CSRC.glob("*/cpu.cpp")), ids=name)
def test_cpu_code_shares_nothing_inline_between_isas(path: Path) -> None:
    """The linker keeps one copy of an inline function, and it may be the AVX-512 one."""
    seen: set[Path] = set()

    def visit(file: Path) -> None:
        seen.add(file)
        for header in includes(file):
            if (CSRC / header).is_file():
                if CSRC / header not in seen:
                    visit(CSRC / header)
            else:
                assert header in INLINE_FREE_HEADERS, f"{name(file)} must not include <{header}>"

    visit(path)
    assert re.search(r"namespace nld::NLD_ISA\b", code(path)), name(path)
    for file in seen:
        assert "std::" not in re.sub(
            r"std::(u?int\d+_t|size_t|mem(cpy|set|move))", "", code(file)
        ), f"{name(file)} must not use inline code of the standard library"


def test_cpu_objects_hold_no_weak_symbols() -> None:
    """The same rule on the compiled objects, where a build folder is there."""
    objects = sorted(ROOT.glob("build/**/nld_cpu_*.dir/**/cpu.cpp.o"))
    if not objects or not shutil.which("nm"):
        pytest.skip("no build folder or no nm here")
    for file in objects:
        listing = run_nm("-C", str(file))
        weak = [line for line in listing if re.match(r"^\S*\s+[WVu] ", line)]
        assert not weak, f"{file.name} of {file.parents[2].name}: {weak[:3]}"


@pytest.mark.parametrize("path", CPP, ids=name)
def test_no_environment_variables(path: Path) -> None:
    found = re.findall(r"\b(?:secure_)?getenv\b|\benviron\b|\bsetenv\b", code(path))
    assert not found, f"{name(path)} must not read the environment, got {found}"


def run_nm(*arguments: str) -> list[str]:
    return subprocess.run(
        ["nm", *arguments], check=True, capture_output=True, text=True
    ).stdout.splitlines()


@pytest.mark.skipif(not shutil.which("nm"), reason="no nm here")
def test_library_needs_only_the_c_interface_of_torch() -> None:
    """A mangled torch symbol would tie the library to one torch version."""
    needed = run_nm("-D", "-C", "--undefined-only", str(_library.LIBRARY_PATH))
    mangled = [line for line in needed if re.search(r"\b(at|c10|torch|caffe2)::", line)]
    assert not mangled, mangled
    assert any("aoti_torch_" in line for line in needed), "the shim must be found among the symbols"
    python = [line for line in needed if re.search(r"\b_?Py[A-Z]\w*", line)]
    assert not python, f"the library must not need Python, got {python}"


# ---- Python --------------------------------------------------------------------------------------

# A module may import what stands in a lower row, and its own row (its own package).
RANKS = (
    ("reference", "version"),  # import nothing of ours
    ("_library", "_C"),
    ("ops",),
    ("model", "parallel"),
    ("decode",),
    ("", "cli", "info", "__main__"),  # "" is the package itself
)


def rank(module: str) -> int:
    """Row of a module given without the leading `nld_cuda.`."""
    top = module.split(".")[0]
    for row, names in enumerate(RANKS):
        if top in names:
            return row
    return len(RANKS) - 1  # modules for users: may import everything, are imported by none below


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports anywhere, without the leading `nld_cuda.`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "nld_cuda":
                    yield alias.name.partition(".")[2]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)} must import by full name"
            if node.module == "nld_cuda":
                for alias in node.names:
                    is_module = (PACKAGE / alias.name).is_dir() or (
                        PACKAGE / f"{alias.name}.py"
                    ).is_file()
                    yield alias.name if is_module or alias.name == "_C" else ""
            elif node.module and node.module.startswith("nld_cuda."):
                yield node.module.removeprefix("nld_cuda.")


PYTHON = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", PYTHON, ids=name)
def test_imports_never_go_upward(path: Path) -> None:
    own = module_of(path)
    for imported in imported_modules(path):
        same = rank(own) == rank(imported)
        assert rank(imported) < rank(own) or same, f"{name(path)} must not import {imported}"


def test_reference_needs_torch_only() -> None:
    found = set()
    for path in (PACKAGE / "reference").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                module = node.module or ""
                ours = module.startswith("nld_cuda.reference.")
                found.add("reference" if ours else module.split(".")[0])
    plain = {"__future__", "torch", "math", "collections", "dataclasses", "enum", "typing"}
    assert "torch" in found and found <= plain | {"reference"}


def test_ops_are_called_through_their_wrappers() -> None:
    """The library is for ops/: its docstrings and defaults hold everywhere else."""
    for path in PYTHON:
        text = path.read_text(encoding="utf-8")
        if path.name != "_library.py":
            code_only = text.replace("`torch.ops.nld`", "")
            assert "torch.ops.nld" not in code_only, name(path)
            assert "_library.nld" not in text or path.parent.name == "ops", name(path)


def cache_writes(tree: ast.AST) -> Iterator[int]:
    """Lines that assign into `<...>cache.k`, `.v`, or their layers, or call a mutating method."""

    def is_cache_memory(node: ast.AST) -> bool:
        while isinstance(node, ast.Subscript):
            node = node.value
        if isinstance(node, ast.Name):
            return node.id in ("k_cache", "v_cache")
        owner = node.value if isinstance(node, ast.Attribute) else None
        owner_name = getattr(owner, "attr", getattr(owner, "id", ""))
        return (
            isinstance(node, ast.Attribute)
            and node.attr in ("k", "v", "k_layers", "v_layers")
            and owner_name.endswith("cache")
        )

    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = [t for t in node.targets if not isinstance(t, ast.Name)]
        elif isinstance(node, ast.AugAssign):
            targets = [node.target]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            method = node.func.attr
            if method.endswith("_") and not method.endswith("__"):
                targets = [node.func.value]
        if any(is_cache_memory(target) for target in targets):
            yield node.lineno  # type: ignore[attr-defined]


@pytest.mark.parametrize("folder", ["model", "decode"])
def test_only_the_cache_and_ops_change_cache_memory(folder: str) -> None:
    for path in (PACKAGE / folder).rglob("*.py"):
        if path.name != "kv_cache.py":
            lines = list(cache_writes(ast.parse(path.read_text(encoding="utf-8"))))
            assert not lines, f"{name(path)} must not write cache memory, lines {lines}"
    bad = "cache.k[0] = 1\nself.cache.v.zero_()\nk_cache[1] += 2\ncache.k_layers[0].copy_(x)"
    assert sorted(cache_writes(ast.parse(bad))) == [1, 2, 3, 4]
    good = "k_cache = cache.k\nops.compact_(cache.k, cache.v)\nx.copy_(cache.k[0])"
    assert not list(cache_writes(ast.parse(good)))
