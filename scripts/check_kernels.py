"""Check the machine code of every CUDA kernel in libnld_ops.so: what no emulator can see.

Usage: python scripts/check_kernels.py [--library FILE] [--archs sm_80 ...] [--json FILE]

For each kernel and architecture: no local memory (stack, LDL, STL: spills and arrays that did not
fit registers), the instructions its design rests on (16-byte global loads, tensor-core and
asynchronous-copy instructions), and registers and shared memory that allow the intended number of
CTAs per multiprocessor. What each kernel must show stands in scripts/kernel_rules.py; a kernel
without a rule is an error.

Needs cuobjdump and nvdisasm (CUDA toolkit, or `pip install nvidia-cuda-cuobjdump
nvidia-cuda-nvdisasm`) and c++filt. A library without CUDA code is an error where nvcc is found, and
a loud note where it is not.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from kernel_rules import ARCHS, CTA_RESERVED_SMEM, RULES, Kernel, Rule, ctas_per_sm

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "python/nld_cuda/libnld_ops.so"
REQUIRED_ARCHS = ("sm_80", "sm_90a", "sm_100a", "sm_120")


def tool(name: str) -> str | None:
    """Find a program of the CUDA toolkit: on PATH, beside nvcc, or in its PyPI package."""
    places = [Path(p) for p in os.environ.get("PATH", "").split(os.pathsep) if p]
    places += [Path("/usr/local/cuda/bin"), Path(sys.executable).parent]
    places += [Path(sysconfig.get_path(key)) / "nvidia/cu13/bin" for key in ("purelib", "platlib")]
    return next((str(p / name) for p in places if os.access(p / name, os.X_OK)), None)


def cuobjdump(library: Path, *options: str) -> str:
    """Run cuobjdump on a library; it finds nvdisasm on PATH."""
    programs = {name: tool(name) for name in ("cuobjdump", "nvdisasm")}
    for name, path in programs.items():
        if path is None:
            raise FileNotFoundError(f"{name} not found: pip install nvidia-cuda-{name}")
    folders = [str(Path(p).parent) for p in programs.values() if p]
    env = {**os.environ, "PATH": os.pathsep.join([*folders, os.environ.get("PATH", "")])}
    done = subprocess.run(
        [str(programs["cuobjdump"]), *options, str(library)],
        capture_output=True,
        text=True,
        env=env,
    )
    if done.returncode != 0 and "does not contain device code" not in done.stdout + done.stderr:
        raise RuntimeError(f"cuobjdump {' '.join(options)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


@dataclass
class Code:
    """One kernel on one architecture, as compiled."""

    symbol: str
    arch: str
    registers: int = 0
    stack_bytes: int = 0
    local_bytes: int = 0
    static_smem_bytes: int = 0
    max_threads: int = 0  # from __launch_bounds__; 0: not given
    opcodes: Counter[str] = field(default_factory=Counter)
    schedule: str = ""  # what overlaps on Hopper, a letter per instruction: see SCHEDULED


Codes = dict[tuple[str, str], Code]

ARCH = re.compile(r"^arch = (\w+)")
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
# wgmma, the wait until one group is under way, until none is, exp2.
SCHEDULED = {
    "M": r"HGMMA\.",
    "w": r"WARPGROUP\.DEPBAR\.LE gsb0, 0x1\b",
    "W": r"WARPGROUP\.DEPBAR\.LE gsb0, 0x0\b",
    "E": r"MUFU\.EX2\b",
}
SCHEDULE = re.compile("|".join(f"(?P<{name}>{text})" for name, text in SCHEDULED.items()))
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")


def parse_resources(text: str, codes: Codes) -> None:
    """Read `cuobjdump --dump-resource-usage`."""
    arch = symbol = ""
    for line in text.splitlines():
        if found := ARCH.match(line):
            arch = found[1]
        elif found := re.match(r"\s*Function (\S+):", line):
            symbol = found[1]
        elif found := RESOURCES.search(line):
            code = codes.setdefault((symbol, arch), Code(symbol, arch))
            code.registers, code.stack_bytes, code.static_smem_bytes, code.local_bytes = map(
                int, found.groups()
            )
            # From sm_90 on the driver's own KiB of a CTA is counted where a kernel has any.
            if arch != "sm_80" and code.static_smem_bytes >= CTA_RESERVED_SMEM:
                code.static_smem_bytes -= CTA_RESERVED_SMEM


def parse_sass(text: str, codes: Codes) -> None:
    """Read `cuobjdump --dump-sass`: how often each instruction stands in a kernel."""
    arch, current = "", None
    for line in text.splitlines():
        if found := ARCH.match(line):
            arch, current = found[1], None
        elif found := re.match(r"\s*Function : (\S+)", line):
            current = codes.setdefault((found[1], arch), Code(found[1], arch))
        elif current is not None and (found := INSTRUCTION.match(line)):
            current.opcodes[found[1]] += 1
            if scheduled := SCHEDULE.match(line, found.start(1)):
                current.schedule += str(scheduled.lastgroup)


def parse_launch_bounds(text: str, codes: Codes) -> None:
    """Read the most threads of a CTA from `cuobjdump --dump-elf`."""
    arch, symbol, wanted = "", "", False
    for line in text.splitlines():
        if found := ARCH.match(line):
            arch = found[1]
        elif found := re.match(r"\.nv\.info\.(\S+)", line):
            symbol = found[1]
        elif "EIATTR_MAX_THREADS" in line:
            wanted = True
        elif wanted and (found := re.search(r"Value:\s+(0x\w+) (0x\w+) (0x\w+)", line)):
            wanted = False
            if (symbol, arch) in codes:
                x, y, z = (int(v, 16) for v in found.groups())
                codes[symbol, arch].max_threads = x * y * z


def read_codes(library: Path) -> Codes:
    """Return every kernel of a library, by (symbol, architecture)."""
    codes: Codes = {}
    parse_resources(cuobjdump(library, "--dump-resource-usage"), codes)
    if codes:
        parse_sass(cuobjdump(library, "--dump-sass"), codes)
        parse_launch_bounds(cuobjdump(library, "--dump-elf"), codes)
    return codes


def demangle(symbols: Sequence[str]) -> dict[str, str]:
    """Return readable names: `rope_append_kernel<bf16, 8>`, without namespaces and arguments."""
    out = subprocess.run(
        ["c++filt"], input="\n".join(symbols), check=True, capture_output=True, text=True
    ).stdout
    return {s: short_name(n) for s, n in zip(symbols, out.splitlines(), strict=True)}


def short_name(name: str) -> str:
    name = re.sub(r"\b(?:nld|ptx|\(anonymous namespace\))::", "", name)
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    depth = 0
    for i, c in enumerate(name):
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            name = name[:i]
            break
    return re.sub(r"\((?:bool|int|unsigned int|long|unsigned long)\)", "", name)


def count(opcodes: Counter[str], pattern: str) -> int:
    return sum(n for op, n in opcodes.items() if re.match(pattern, op))


def problems_of(code: Code, name: str, rules: Sequence[Rule] = RULES) -> Iterator[str]:
    """Yield what is wrong with one kernel on one architecture."""
    where = f"{name} on {code.arch}"
    if code.stack_bytes or code.local_bytes:
        yield f"{where}: must use no local memory, got {code.stack_bytes} bytes of stack"
    if local := count(code.opcodes, r"(LDL|STL)\b"):
        yield f"{where}: must use no local memory, got {local} LDL and STL instructions"
    matching = [r for r in rules if re.fullmatch(r.kernel, name)]
    if len(matching) != 1:
        yield f"{name}: must match one rule of kernel_rules.py, got {len(matching)}"
        return
    rule = matching[0]
    if rule.only and code.arch not in rule.only:
        return
    for pattern, least in rule.instructions.items():
        if (found := count(code.opcodes, pattern)) < least:
            yield f"{where}: must have at least {least} of {pattern}, got {found}"
    for pattern in rule.forbidden:
        if found := count(code.opcodes, pattern):
            yield f"{where}: must have no {pattern}, got {found}"
    if rule.schedule and not re.search(rule.schedule, code.schedule):
        short = re.sub(r"((.)\2*)", lambda m: f"{m[2]}{len(m[1])} ", code.schedule)
        yield f"{where}: must hold the schedule {rule.schedule}, got {short}"
    if not code.max_threads:
        yield f"{where}: must have __launch_bounds__"
        return
    if code.arch in ARCHS:
        kernel = Kernel(name, code.registers, code.max_threads, code.static_smem_bytes)
        fits = ctas_per_sm(kernel, rule, code.arch)
        least = rule.min_ctas.get(code.arch, rule.min_ctas["all"])
        if fits < least:
            yield (
                f"{where}: must fit {least} CTAs on a multiprocessor, got {fits} "
                f"({code.registers} registers x {code.max_threads} threads, "
                f"{rule.smem_bytes(name) + code.static_smem_bytes} bytes of shared memory)"
            )


def table(codes: Codes, names: dict[str, str]) -> str:
    """Registers of each kernel per architecture, and its least occupancy over them."""
    archs = sorted({arch for _, arch in codes}, key=lambda a: int(re.sub(r"\D", "", a)))
    width = max(len(n) for n in names.values())
    lines = [f"{'registers'.ljust(width)}  threads " + " ".join(a.rjust(7) for a in archs)]
    for symbol in sorted(names, key=lambda s: names[s]):
        row = [codes.get((symbol, arch)) for arch in archs]
        threads = max((c.max_threads for c in row if c), default=0)
        cells = " ".join((str(c.registers) if c else "-").rjust(7) for c in row)
        lines.append(f"{names[symbol].ljust(width)}  {threads:7d} {cells}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--library", type=Path, default=LIBRARY)
    parser.add_argument("--archs", nargs="+", default=REQUIRED_ARCHS, help="must all be there")
    parser.add_argument("--json", type=Path, help="write what was found")
    options = parser.parse_args()
    codes = read_codes(options.library)
    if not codes:
        if tool("nvcc"):
            sys.exit(f"check_kernels: {options.library} holds no CUDA code although nvcc is here")
        print("=" * 80)
        print("check_kernels: NOTHING WAS CHECKED: built without CUDA kernels, nvcc is not here")
        print("=" * 80)
        return
    names = demangle(sorted({symbol for symbol, _ in codes}))
    # A kernel without a rule is one problem, not one per architecture.
    problems = list(
        dict.fromkeys(p for c in codes.values() for p in problems_of(c, names[c.symbol]))
    )
    for arch in options.archs:
        if absent := [n for s, n in names.items() if (s, arch) not in codes]:
            problems.append(f"{arch}: must have code of every kernel, lacks {', '.join(absent)}")
    print(table(codes, names))
    if options.json:
        rows = [{**asdict(c), "name": names[c.symbol]} for c in codes.values()]
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    size = options.library.stat().st_size / 2**20
    print(f"check_kernels: {len(names)} kernels, {len(codes)} binaries, library {size:.1f} MiB")
    if problems:
        sys.exit("\n".join([f"check_kernels: {len(problems)} problems", *problems]))


if __name__ == "__main__":
    if not shutil.which("c++filt"):
        sys.exit("check_kernels: c++filt not found (Debian and Ubuntu: apt install binutils)")
    main()
