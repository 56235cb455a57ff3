"""Write the tables of README and docs/benchmarks.md from benchmarks/results, or check them.

Usage: python scripts/readme_numbers.py [--check]
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.resolve()
sys.path[:0] = [str(ROOT / "python"), str(ROOT / "benchmarks")]

from bench_build import readable as build_tables  # noqa: E402
from nld_cuda.bench.report import markdown  # noqa: E402
from nld_cuda.bench.targets import rivals  # noqa: E402

README = ROOT / "README.md"
BEGIN, END = "<!-- numbers: scripts/readme_numbers.py writes this part -->", "<!-- end -->"


def load(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
    return document


def source(document: dict[str, Any]) -> str:
    """Say where a table comes from: command, machine, torch."""
    env = document["environment"]
    where = f"{env['num_threads']} of {env['num_cpus']} CPU cores ({env['cpu_isa']})"
    if env["device"] == "cuda":
        where = f"{env['gpu']}, driver {env['driver, SM clock now, at most, power limit']}"
    return f"`{document['command']}`, {where}, torch {env['torch']}, {env['date'][:10]}"


def us(value: float) -> str:
    return f"{value / 1e3:.1f} ms" if value >= 1e4 else f"{value:.0f} µs"


def decoding() -> Iterator[str]:
    document = load("generate")
    yield "**Whole decoding** on the packaged model, held-out problems; `x ar` in the same run."
    yield ""
    yield "| mode | batch | tokens/s | x ar | tokens per forward | same text as ar |"
    yield "|---|---|---|---|---|---|"
    for row in document["speed"]:
        yield (
            f"| {row['mode']} | {row['batch']} | {row['tokens/s']:.0f} | {row['x ar']:.2f} "
            f"| {row['tokens/forward']:.2f} | {row['equal to ar']} of {row['problems']} |"
        )
    yield ""
    yield source(document)


def runs(prefix: str = "kernels_") -> Iterator[dict[str, Any]]:
    """Yield the runs of `nld bench kernels` that are kept, those of CPUs first."""
    names = sorted(p.stem for p in (ROOT / "benchmarks/results").glob(f"{prefix}*.json"))
    yield from (load(name) for name in sorted(names, key=lambda n: not n.startswith("kernels_cpu")))


def summary() -> Iterator[str]:
    """Lay out, for every op and baseline, how much faster ours is."""
    yield "**Ops**: the baseline's time / ours over all cells of a run (above 1: we win)."
    yield ""
    yield "| op | baseline | on | cells | least | median | most |"
    yield "|---|---|---|---|---|---|---|"
    for document in runs():
        if document["timing"].get("clock") == "cpu":
            continue  # one thread on a busy machine: in the details
        found: dict[tuple[str, str], list[float]] = {}
        for row in document["rows"]:
            for name, record in rivals(row).items():
                found.setdefault((row["op"], name), []).append(record["ratio"])
        for (op, name), values in found.items():
            least, middle, most = min(values), statistics.median(values), max(values)
            yield (
                f"| {op} | {name} | {place(document)} | {len(values)} | {least:.2f} "
                f"| {middle:.2f} | {most:.2f} |"
            )
    yield ""
    yield "Every cell, with commands: [docs/benchmarks.md](docs/benchmarks.md)."


def place(document: dict[str, Any]) -> str:
    """Name the device in a word or two."""
    env = document["environment"]
    if env["device"] == "cuda":
        return str(env["gpu"])
    threads = env["num_threads"]
    return f"{threads} CPU core{'s' if threads > 1 else ''}"


def details() -> Iterator[str]:
    """Lay out every run."""
    yield "# Measured"
    yield ""
    yield "Written by `python scripts/readme_numbers.py` from `benchmarks/results/`; how it is"
    yield "measured: [benchmarking.md](benchmarking.md). Medians; `x` is a baseline's time / ours"
    yield "in the same run, `% copy` our share of the copy bandwidth by the bytes that must move."
    for document in runs():
        yield ""
        yield f"## {place(document)}: `{document['command']}`"
        yield ""
        yield markdown(document)
        yield ""
        note = document["timing"].get("note")
        yield f"{source(document)}, commit {document['environment']['commit']}" + (
            f". {note[0].upper()}{note[1:]}." if note else ""
        )
    if (ROOT / "benchmarks/results/build.json").is_file():
        document = load("build")
        env = document["environment"]
        yield ""
        yield f"## Building: `{document['command']}`"
        yield ""
        yield build_tables(document)
        yield ""
        yield f"{env['cpu']}, {env['num_cpus']} cores, {env['date'][:10]}, commit {env['commit']}"


def main() -> None:
    head, _, rest = README.read_text().partition(BEGIN)
    _, _, tail = rest.partition(END)
    numbers = "\n".join([*decoding(), "", *summary()])
    pages = {
        README: f"{head}{BEGIN}\n{numbers}\n{END}{tail}",
        ROOT / "docs/benchmarks.md": "\n".join(details()) + "\n",
    }
    for path, new in pages.items():
        if "--check" not in sys.argv[1:]:
            path.write_text(new)
        elif path.read_text() != new:
            sys.exit(f"{path.name} differs from the JSON: run python scripts/readme_numbers.py")


if __name__ == "__main__":
    main()
