"""What a clean build takes and how big the wheel is: for every GPU architecture, without ccache.

    python benchmarks/bench_build.py [--jobs 2] [--out benchmarks/results/build.json]

The tracked files are copied to an empty folder and made into a wheel there, as `pip install .`
does. Wall time on a busy machine says little, so the processor time of all compilers is reported
beside: divided by the cores it is the least a build takes on an idle one.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

from nld_cuda.bench.environment import cpu_name, script_command
from nld_cuda.bench.text import table

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks/results/build.json"
# Goals of issue 4: four architectures on two cores, and the wheel.
GOAL_CORES, GOAL_WALL_S, GOAL_WHEEL_MB = 2, 360, 20


def first_line(*command: str) -> str:
    """Return the last line that a program prints, or nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    except OSError:
        return ""
    lines = done.stdout.strip().splitlines()
    return lines[-1] if lines else ""


def copy_sources(target: Path) -> None:
    """Copy what git tracks."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def steps(ninja_log: str) -> list[tuple[float, str]]:
    """Return (seconds, output) of every step of a ninja log, the longest first."""
    found = {}
    for line in ninja_log.splitlines():
        if line.startswith("#"):
            continue
        begin, end, _, output, *_ = line.split("\t")
        found[output] = (int(end) - int(begin)) / 1e3
    return sorted(((seconds, name) for name, seconds in found.items()), reverse=True)


def processor_s() -> float:
    """Return the processor time of all finished children."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def build(sources: Path, wheels: Path, jobs: int) -> dict[str, Any]:
    """Make the wheel and return its figures; on failure print what was said and stop."""
    settings = {**os.environ, "CCACHE_DISABLE": "1", "MAX_JOBS": str(jobs), "NLD_WITH_CUDA": "1"}
    settings["PATH"] = f"{Path(sys.executable).parent}:{settings['PATH']}"
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    load, begin, used = os.getloadavg()[0], time.monotonic(), processor_s()
    done = subprocess.run(
        [*command, "-w", str(wheels), str(sources)], capture_output=True, text=True, env=settings
    )
    if done.returncode != 0:
        sys.exit(f"bench_build: the build failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    figures: dict[str, Any] = {
        "wall_s": round(time.monotonic() - begin, 1),
        "processor_s": round(processor_s() - used, 1),
        "jobs": jobs,
        "load_average": [round(load, 2), round(os.getloadavg()[0], 2)],
    }
    (wheel,) = wheels.glob("*.whl")
    figures["wheel_mb"] = round(wheel.stat().st_size / 1e6, 2)
    with zipfile.ZipFile(wheel) as archive:
        library = archive.getinfo("nld_cuda/libnld_ops.so")
    figures["library_mb"] = round(library.file_size / 1e6, 2)
    figures["library_in_wheel_mb"] = round(library.compress_size / 1e6, 2)
    logs = list(sources.glob("build/cmake-*/.ninja_log"))
    found = steps(logs[0].read_text()) if logs else []
    figures["cuda_files"] = sum(name.endswith(".cu.o") for _, name in found)
    figures["longest_s"] = {short(name): round(seconds, 1) for seconds, name in found[:12]}
    return figures


def short(output: str) -> str:
    """Name an object by its source and, for CPU files, its instruction set."""
    isa = re.search(r"nld_cpu_(\w+)\.dir", output)
    source = re.sub(r"^.*\.dir/|\.o$", "", output)
    return f"{source} ({isa[1]})" if isa else source


def document(figures: dict[str, Any], archs: str, commit: str) -> dict[str, Any]:
    """Return what is written."""
    return {
        "benchmark": "build",
        "command": script_command(),
        "environment": {
            "commit": commit,
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "cpu": cpu_name(),
            "num_cpus": os.cpu_count(),
            "compiler": first_line("c++", "-dumpfullversion"),
            "nvcc": first_line(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc", "--version"),
        },
        "archs": archs,
        "goal": f"{GOAL_WALL_S} s on {GOAL_CORES} cores, wheel below {GOAL_WHEEL_MB} MB",
        **figures,
    }


def default_archs() -> str:
    """Return the architectures that CMakeLists.txt compiles for."""
    if os.environ.get("NLD_CUDA_ARCHS"):
        return os.environ["NLD_CUDA_ARCHS"]
    found = re.search(r'set\(NLD_CUDA_ARCHS "([^"]*)"', (ROOT / "CMakeLists.txt").read_text())
    return found[1] if found else "unknown"


def readable(made: dict[str, Any]) -> str:
    """Lay the figures out."""
    cores = GOAL_CORES
    rows = [
        {"what": "wall time", "value": f"{made['wall_s']:.0f} s with {made['jobs']} jobs, load "
         f"{made['load_average'][0]} before and {made['load_average'][1]} after"},
        {"what": "processor time", "value": f"{made['processor_s']:.0f} s, "
         f"{made['processor_s'] / cores:.0f} s on {cores} idle cores at the least"},
        {"what": "wheel", "value": f"{made['wheel_mb']:.1f} MB"},
        {"what": "library", "value": f"{made['library_mb']:.1f} MB, "
         f"{made['library_in_wheel_mb']:.1f} MB in the wheel"},
        {"what": "CUDA files", "value": f"{made['cuda_files']} for {made['archs']}"},
        {"what": "goal", "value": made["goal"]},
    ]  # fmt: skip
    longest = [{"longest steps": k, "wall seconds": v} for k, v in made["longest_s"].items()]
    return f"{table(rows)}\n\n{table(longest)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sources, wheels = Path(folder, "sources"), Path(folder, "wheels")
        sources.mkdir()
        commit = first_line("git", "describe", "--always", "--dirty", "--abbrev=12")
        copy_sources(sources)
        figures = build(sources, wheels, options.jobs)
    made = document(figures, default_archs(), commit)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(made, indent=1) + "\n")
    print(readable(made))


if __name__ == "__main__":
    main()
