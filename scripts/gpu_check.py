"""Prove and measure nld_cuda on a machine with a GPU: one command, one report.

    python scripts/gpu_check.py                              # everything
    python scripts/gpu_check.py --sections env,build,tests   # some of it
    python scripts/gpu_check.py --library libnld_ops.so --sections bench --out DIR
    python scripts/gpu_check.py --list                       # sections; needs no GPU

Needs Python >= 3.10, torch >= 2.11 with CUDA, pytest, and for the sections that compile nvcc, a C++
compiler, cmake, ninja and pybind11; no internet, no git. A section that fails does not stop the
others; the exit code is the number of sections that did not pass. Written to --out: report.json,
report.md (one readable page), log.txt (all that the sections printed), and of the benchmarks
kernels.json and kernels.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python/nld_cuda"


@dataclass
class Result:
    """What came of a section."""

    name: str
    passed: bool
    seconds: float = 0.0
    summary: str = ""
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class Check:
    """What all sections share: options, the log, the deadline."""

    options: argparse.Namespace
    out: Path
    deadline: float

    def log(self, text: str) -> None:
        with (self.out / "log.txt").open("a") as file:
            file.write(text if text.endswith("\n") else text + "\n")

    def run(
        self, command: Sequence[str], limit_s: float, env: dict[str, str] | None = None
    ) -> tuple[int, str]:
        """Run a command in the repository root; return its exit code (124: too slow) and output."""
        limit_s = max(min(limit_s, self.deadline - time.monotonic()), 1)
        self.log(f"\n$ {' '.join(command)}    (at most {limit_s:.0f} s)")
        paths = [str(ROOT / p) for p in ("python", "tests", "examples", "benchmarks", "scripts")]
        inherited = os.environ.get("PYTHONPATH")
        full_env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths + ([inherited] if inherited else [])),
            "PYTHONUNBUFFERED": "1",
            **(env or {}),
        }
        process = subprocess.Popen(
            command, cwd=ROOT, env=full_env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        try:
            output = process.communicate(timeout=limit_s)[0]
            code = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the command and what it has started
            output = (process.communicate()[0] or "") + f"\nstopped after {limit_s:.0f} s"
            code = 124
        self.log(output)
        self.log(f"exit code {code}")
        return code, output

    def python(
        self, script: str, *arguments: str, limit_s: float, env: dict[str, str] | None = None
    ) -> tuple[int, str]:
        return self.run([sys.executable, str(ROOT / script), *arguments], limit_s, env)


def cuda_tool(name: str) -> str | None:
    """Find a program of the CUDA toolkit on PATH or below /usr/local/cuda."""
    places = [Path(p) for p in os.environ.get("PATH", "").split(os.pathsep) if p]
    for cuda in [Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"), reverse=True)]:
        places += [cuda / "bin", cuda / "compute-sanitizer"]
    return next((str(p / name) for p in places if os.access(p / name, os.X_OK)), None)


def last_lines(text: str, num: int = 1) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " / ".join(lines[-num:])


def source_hash() -> str:
    """Name the sources where git cannot: a hash over all that is built and run."""
    digest = hashlib.sha256()
    for folder in ("csrc", "python/nld_cuda", "scripts", "tests", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".h", ".cuh", ".cu", ".cpp", ".py"):
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def failures(output: str) -> list[str]:
    """Lines by which our programs and pytest name what failed."""
    return [x for x in output.splitlines() if x.startswith(("FAILED", "FAIL ", "ERROR"))][:100]


def first_line(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return "none"
    return last_lines(done.stdout) if done.returncode == 0 else "none"


# ---- sections --------------------------------------------------------------------------------


def env(check: Check) -> Result:
    """What the machine is: device, driver, versions, sources."""
    probe = (
        "import json, torch, platform\n"
        "d = {'torch': torch.__version__, 'python': platform.python_version(),"
        " 'cuda': torch.version.cuda, 'devices': []}\n"
        "for i in range(torch.cuda.device_count()):\n"
        "    p = torch.cuda.get_device_properties(i)\n"
        "    d['devices'].append({'name': p.name, 'sm': f'{p.major}{p.minor}',"
        " 'num_sms': p.multi_processor_count, 'memory_gib': round(p.total_memory / 2**30, 1),"
        " 'l2_mib': getattr(p, 'L2_cache_size', 0) / 2**20})\n"
        "print(json.dumps(d))"
    )
    code, output = check.run([sys.executable, "-c", probe], 120)
    details: dict[str, Any] = json.loads(output.splitlines()[-1]) if code == 0 else {}
    nvcc, smi = cuda_tool("nvcc"), shutil.which("nvidia-smi")
    query = ["--query-gpu=driver_version,clocks.sm,clocks.max.sm", "--format=csv,noheader"]
    details |= {
        "nvcc": first_line([nvcc, "--version"]) if nvcc else "none",
        "driver, SM clock now, at most": first_line([smi, *query]) if smi else "none",
        "commit": check.options.commit
        or first_line(["git", "describe", "--always", "--dirty", "--abbrev=12"]),
        "sources": source_hash(),
        "cpu_cores": os.cpu_count(),
        "machine": platform.machine(),
    }
    devices = details.get("devices", [])
    names = ", ".join(f"{d['name']} (sm_{d['sm']})" for d in devices) or "no CUDA device"
    summary = f"{names}; torch {details.get('torch')}, sources {details['sources']}"
    return Result("env", bool(devices), summary=summary, details=details)


def build(check: Check) -> Result:
    """Compile the library in place (or take --library), and check its machine code."""
    details: dict[str, Any] = {}
    begin = time.monotonic()
    if check.options.library:
        source = check.options.library.resolve()
        for path in [source, *source.parent.glob("_C*.so")]:
            name = "libnld_ops.so" if path == source else path.name
            if path != PACKAGE / name:
                shutil.copy2(path, PACKAGE / name)
        how = f"took {source.name}"
    else:
        jobs = str(os.cpu_count() or 2)
        settings = {"MAX_JOBS": jobs}
        if check.options.archs:
            settings["NLD_CUDA_ARCHS"] = check.options.archs
        if nvcc := cuda_tool("nvcc"):
            settings["CUDACXX"] = nvcc
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        code, output = check.run(command, 570, settings)
        if code != 0:
            return Result("build", False, summary=f"failed: {last_lines(output, 3)}")
        how = f"compiled with {jobs} jobs"
    details["build_s"] = round(time.monotonic() - begin, 1)
    # The library must load, and without nld_cuda._C where that is for another Python.
    probe = (
        "import nld_cuda, json; from nld_cuda.info import build_info; "
        "print(json.dumps(build_info()))"
    )
    code, output = check.run([sys.executable, "-c", probe], 120)
    if code != 0:
        return Result("build", False, summary=f"{how}, does not load: {last_lines(output, 2)}")
    details |= json.loads(output.splitlines()[-1])
    details["library_mib"] = round((PACKAGE / "libnld_ops.so").stat().st_size / 2**20, 2)
    archs = details["cuda_archs"]
    wanted = ["--archs", "sm_90a"] if check.options.archs else []
    code, output = check.python("scripts/check_kernels.py", *wanted, limit_s=200)
    details["kernels"] = last_lines(output)
    summary = (
        f"{how} in {details['build_s']} s: {archs}, {details['library_mib']} MiB; "
        f"{last_lines(output)}"
    )
    return Result("build", code == 0 and bool(archs), summary=summary, details=details)


def runtime(check: Check) -> Result:
    """Our static CUDA runtime beside torch's: streams, graphs, threads, device guard."""
    code, output = check.python("scripts/gpu_runtime.py", limit_s=200)
    details = {"failed": failures(output)}
    return Result("runtime", code == 0, summary=last_lines(output), details=details)


def ptx(check: Check) -> Result:
    """Every PTX wrapper on the device against its host twin."""
    source = ROOT / "csrc/emulator/tests/ptx_device.cu"
    nvcc = cuda_tool("nvcc")
    if not source.is_file() or nvcc is None:
        missing = source.name if nvcc else "nvcc"
        return Result("ptx", False, summary=f"{missing} is not here")
    major_minor = first_line(
        [sys.executable, "-c", "import torch; print(*torch.cuda.get_device_capability(), sep='')"]
    )
    arch = "90a" if major_minor == "90" else "100a" if major_minor == "100" else major_minor
    program = ROOT / "build/ptx_device"
    program.parent.mkdir(exist_ok=True)
    command = [nvcc, "-std=c++20", "-O2", f"-I{ROOT / 'csrc'}", "-o", str(program), str(source)]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    code, output = check.run(command, 300)
    if code != 0:
        return Result("ptx", False, summary=f"does not compile: {last_lines(output, 2)}")
    code, output = check.run([str(program)], 120)
    details = {"failed": failures(output)}
    return Result("ptx", code == 0, summary=last_lines(output), details=details)


def run_pytest(check: Check, name: str, arguments: Sequence[str], limit_s: float) -> Result:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-ra", "--tb=short"]
    command += ["--maxfail=40", "--backend=cuda", "--durations=5", *arguments]
    code, output = check.run(command, limit_s)
    summary = last_lines(output).strip("= ")
    return Result(name, code == 0, summary=summary, details={"failed": failures(output)})


def tests(check: Check) -> Result:
    """Every test body that takes a backend, with backend cuda."""
    arguments = ["tests", "--ignore=tests/test_cuda.py", "--continue-on-collection-errors"]
    return run_pytest(check, "tests", arguments, 570)


def graphs(check: Check) -> Result:
    """tests/test_cuda.py: streams, graph capture and replay, no host sync, device errors."""
    return run_pytest(check, "graphs", ["tests/test_cuda.py"], 400)


def decode(check: Check) -> Result:
    """Whole decoding of nld-tiny in every mode: CUDA against CPU."""
    code, output = check.python("scripts/gpu_decode.py", limit_s=500)
    details = {"failed": failures(output)}
    return Result("decode", code == 0, summary=last_lines(output), details=details)


def sanitizer(check: Check) -> Result:
    """compute-sanitizer over a small call of every op: memory, races, barriers, initialisation."""
    program = cuda_tool("compute-sanitizer")
    if program is None:
        return Result("sanitizer", False, summary="compute-sanitizer is not here")
    found, passed = {}, True
    # One allocation per tensor, so that a read past its end is seen.
    settings = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for name in ("memcheck", "racecheck", "synccheck", "initcheck"):
        command = [program, "--tool", name, "--error-exitcode", "9", "--print-limit", "20"]
        # Failed launches raise in our own code; torch probes the driver with calls that may fail.
        command += {
            "memcheck": ["--report-api-errors", "no"],
            "racecheck": ["--racecheck-report", "all"],
        }.get(name, [])
        command += [sys.executable, str(ROOT / "scripts/gpu_small_ops.py")]
        code, output = check.run(command, 170, settings)
        lines = [line for line in output.splitlines() if "SUMMARY" in line]
        found[name] = lines[-1].strip("= ") if lines else last_lines(output)
        if code != 0:
            passed = False
            found[name] += f" (exit code {code})"
    summary = "; ".join(f"{name}: {text}" for name, text in found.items())
    return Result("sanitizer", passed, summary=summary, details=found)


def bench(check: Check) -> Result:
    """`nld bench kernels`: the headline cells against what is installed, beside predictions."""
    left = min(570, max(check.deadline - time.monotonic(), 60))
    command = [sys.executable, "-m", "nld_cuda", "bench", "kernels", "--device", "cuda"]
    command += ["--out", str(check.out), "--limit-s", str(int(left - 45))]
    command += ["--budget", "0.3"] if check.options.quick else []
    code, output = check.run(command, left)
    details: dict[str, Any] = {}
    page = check.out / "kernels.md"
    if page.is_file():  # written after every cell: a run that was stopped leaves what it had
        details["tables"] = page.read_text()
    return Result("bench", code == 0, summary=last_lines(output), details=details)


def products(check: Check) -> Result:
    """benchmarks/bench_products.py: int4 and fp8 products against dense ones, by rows."""
    arguments = ["--device", "cuda", "--out", str(check.out / "products.json")]
    arguments += ["--budget", "0.5"]
    code, output = check.python("benchmarks/bench_products.py", *arguments, limit_s=300)
    return Result("products", code == 0, summary=last_lines(output), details={"tables": output})


SECTIONS: dict[str, Callable[[Check], Result]] = {
    f.__name__: f
    for f in (env, build, runtime, ptx, graphs, tests, decode, sanitizer, bench, products)
}


# ---- report ----------------------------------------------------------------------------------


def readable(results: Sequence[Result]) -> str:
    """Lay the report out as Markdown."""
    lines = ["# GPU check", "", "| section | result | seconds | |", "|---|---|---|---|"]
    for r in results:
        summary = r.summary.replace("|", "/")[:600]
        word = "passed" if r.passed else "FAILED"
        lines.append(f"| {r.name} | {word} | {r.seconds:.0f} | {summary} |")
    for r in results:
        if failed := r.details.get("failed"):
            lines += ["", f"## {r.name}: what failed", *(f"- {line[:300]}" for line in failed)]
        if tables := r.details.get("tables"):
            lines += ["", f"## {r.name}", "", tables]
    return "\n".join(lines) + "\n"


def write_report(check: Check, results: Sequence[Result]) -> None:
    document = {"sections": [asdict(r) for r in results]}
    (check.out / "report.json").write_text(json.dumps(document, indent=1) + "\n")
    (check.out / "report.md").write_text(readable(results))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sections", default=",".join(SECTIONS), help=f"of {','.join(SECTIONS)}; default: all"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build/gpu_check")
    parser.add_argument("--library", type=Path, help="take this libnld_ops.so, compile nothing")
    parser.add_argument("--archs", help="narrow the build, for example 90a-real (faster)")
    parser.add_argument("--commit", help="name of the sources, where there is no git")
    parser.add_argument("--quick", action="store_true", help="less time for a benchmark")
    parser.add_argument(
        "--limit-s", type=float, default=1e9, help="time for everything; the rest is stopped"
    )
    parser.add_argument("--list", action="store_true", help="say what the sections are, and stop")
    options = parser.parse_args()
    if options.list:
        for name, section in SECTIONS.items():
            print(f"{name:10} {(section.__doc__ or '').strip()}")
        return 0
    names = [n for n in options.sections.split(",") if n]
    if unknown := [n for n in names if n not in SECTIONS]:
        parser.error(f"--sections must be of {','.join(SECTIONS)}, got {','.join(unknown)}")
    if options.library and not options.library.is_file():
        parser.error(f"--library must be a file, got {options.library}")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "log.txt").write_text("")
    check = Check(options, options.out.resolve(), time.monotonic() + options.limit_s)
    results: list[Result] = []
    for name in names:
        print(f"{name} ...", flush=True)
        begin = time.monotonic()
        if begin >= check.deadline:
            result = Result(name, False, summary="not started: no time was left")
        else:
            try:
                result = SECTIONS[name](check)
            except Exception as error:
                result = Result(name, False, summary=f"{type(error).__name__}: {error}")
        result.seconds = round(time.monotonic() - begin, 1)
        results.append(result)
        write_report(check, results)
        word = "passed" if result.passed else "FAILED"
        print(f"{name}: {word} in {result.seconds:.0f} s: {result.summary[:1500]}", flush=True)
        for line in result.details.get("failed", [])[:20]:
            print(f"  {line[:200]}")
    print(readable(results)[-6000:])
    return sum(not r.passed for r in results)


if __name__ == "__main__":
    sys.exit(main())
