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
OPS = ("attention", "commit", "verify", "append")
README = ROOT / "README.md"
BEGIN, END = "<!-- numbers: scripts/readme_numbers.py writes this part -->", "<!-- end -->"


def load(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
    return document


def source(document: dict[str, Any]) -> str:
    """Say where a table comes from: command, machine, torch."""
    env = document["environment"]
    where = f"{env['num_threads']} of {env['num_cpus']} CPU cores ({env['cpu_isa']})"
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


def ratios(document: dict[str, Any]) -> dict[str, list[float]]:
    """Return baseline time / our time of every case, by baseline; CPU-time twins left out."""
    found: dict[str, list[float]] = {}
    for row in document["rows"]:
        for key, value in row.items():
            if key.startswith("x ") and key != "x cpu":
                found.setdefault(key[2:], []).append(value)
    return found


def summary() -> Iterator[str]:
    yield "**Ops**: the baseline's time / ours over all cases of a benchmark (above 1: we win)."
    yield ""
    yield "| op | baseline | cases | least | median | most |"
    yield "|---|---|---|---|---|---|"
    for name in OPS:
        for baseline, values in ratios(load(name)).items():
            low, mid, high = min(values), statistics.median(values), max(values)
            yield f"| {name} | {baseline} | {len(values)} | {low:.2f} | {mid:.2f} | {high:.2f} |"
    yield ""
    yield "Every case, with commands: [docs/benchmarks.md](docs/benchmarks.md)."


def details() -> Iterator[str]:
    yield "# Benchmarks of the ops"
    yield ""
    yield "Written by `python scripts/readme_numbers.py` from `benchmarks/results/`. Medians;"
    yield "`x` is the baseline's time / ours in the same run. On a GPU: [gpu.md](gpu.md)."
    for name in OPS:
        document = load(name)
        baselines = list(ratios(document))
        yield ""
        yield "| " + " | ".join([name, "time", *(f"x {b}" for b in baselines)]) + " |"
        yield "|---" * (2 + len(baselines)) + "|"
        for row in document["rows"]:
            cells = [f"{row[f'x {b}']:.2f}" if f"x {b}" in row else "-" for b in baselines]
            label = " ".join(str(row[k]) for k in ("case", "dtype") if k in row)
            yield "| " + " | ".join([label, us(row["us"]), *cells]) + " |"
        yield ""
        yield f"{source(document)}; measured copy bandwidth {document['copy_gbps']:.1f} GB/s"
    for path in sorted((ROOT / "benchmarks/results").glob("cuda*.json")):
        document = load(path.stem)
        env = document["environment"]
        yield ""
        yield f"# On {env['gpu']}"
        yield ""
        yield document["tables"]
        yield ""
        where = f"{env['gpu']}, torch {env['torch']}, {env['date'][:10]}"
        rate = f"measured copy bandwidth {document['copy_gbps']:.0f} GB/s"
        yield f"`{document['command']}`, {where}; {rate}"


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
