"""Write the tables of README, docs/benchmarks.md and docs/gpu.md, or check them.

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
from nld_cuda.bench import grid  # noqa: E402
from nld_cuda.bench.ceilings import Ceilings  # noqa: E402
from nld_cuda.bench.report import markdown  # noqa: E402
from nld_cuda.bench.suite import describe  # noqa: E402
from nld_cuda.bench.targets import check, rivals  # noqa: E402

README = ROOT / "README.md"
BEGIN, END = "<!-- numbers: scripts/readme_numbers.py writes this part -->", "<!-- end -->"
BEGIN_PREDICTIONS = "<!-- predictions: scripts/readme_numbers.py writes this part -->"


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
    yield from loading()


def loading() -> Iterator[str]:
    """Lay out how long checkpoints take to load, and the memory."""
    names = sorted(path.stem for path in (ROOT / "benchmarks/results").glob("load_*.json"))
    if not names:
        return
    yield ""
    yield "## Loading: `python benchmarks/bench_load.py`"
    yield ""
    yield "| command | weights | device | files | time | GB/s | peak resident memory |"
    yield "|---|---|---|---|---|---|---|"
    for document in map(load, names):
        over = document["peak_over_weights"]
        memory = f"{document['peak_bytes'] / 2**20:.0f} MiB"
        yield (
            f"| `{document['command'].partition('.py ')[2]}` "
            f"| {document['weight_bytes'] / 2**20:.0f} MiB | {document['device']} "
            f"| {'cold' if document['cold'] else 'in the page cache'} "
            f"| {document['seconds']:.1f} s | {document['gb_per_second']:.2f} "
            f"| {memory}{'' if over is None else f', {over:.3f} x the weights'} |"
        )
    yield ""
    yield source(document).partition(", ")[2]


def predictions() -> Iterator[str]:
    """Lay out what the model says of the headline cells, and of the targets."""
    names = ("h100", "h200")
    documents = [load(f"predictions_{name}") for name in names]
    gpus = [d["gpu"]["name"] for d in documents]
    yield "| cell | MB | " + " | ".join(f"{gpu} | bound" for gpu in gpus) + " |"
    yield "|---" * (2 + 2 * len(gpus)) + "|"
    rows = [{row["name"]: row for row in d["rows"]} for d in documents]
    for cell in (c for c in grid.CELLS if c.headline):
        mine = [r[cell.name] for r in rows]
        cells = " | ".join(f"{r['us']:.1f} us | {r['bound']}" for r in mine)
        yield f"| {cell.name} | {mine[0]['floor_bytes'] / 1e6:.2f} | {cells} |"
    yield ""
    yield "The targets, by the model (the worst cell of each; what rivals take it does not know):"
    yield ""
    yield "| target | goal | " + " | ".join(f"{gpu} | verdict" for gpu in gpus) + " |"
    yield "|---" * (2 + 2 * len(gpus)) + "|"
    for judged in zip(*(predicted_targets(d) for d in documents), strict=True):
        if all("worst" in target for target in judged):
            cells = " | ".join(f"{t['worst']:.3g} | {t['verdict']}" for t in judged)
            yield f"| {judged[0]['target']} | {judged[0]['goal']} | {cells} |"


def predicted_targets(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Judge the targets by predictions as if they were measured."""
    gpu = document["gpu"]
    roofs = Ceilings(
        gpu["copy_gbps"], gpu["copy_gbps"], gpu["l2_gbps"], gpu["wgmma_tflops"],
        gpu["latency"]["kernel"],
    )  # fmt: skip
    rows = []
    for made in document["rows"]:
        row = describe(grid.BY_NAME[made["name"]]) | {"status": "measured", "us": made["us"]}
        row["percent_of_copy"] = 100 * row["floor_bytes"] / made["us"] / 1e3 / roofs.copy_gbps
        row["tflops"] = row["flops"] / made["us"] / 1e6
        rows.append(row)
    return check(rows, roofs, gpu["name"])


def between(text: str, begin: str, new: str) -> str:
    """Replace what stands between a marker and the end of its part."""
    head, _, rest = text.partition(begin)
    _, _, tail = rest.partition(END)
    return f"{head}{begin}\n{new}\n{END}{tail}"


def main() -> None:
    numbers = "\n".join([*decoding(), "", *summary()])
    gpu_page = ROOT / "docs/gpu.md"
    pages = {
        README: between(README.read_text(), BEGIN, numbers),
        gpu_page: between(gpu_page.read_text(), BEGIN_PREDICTIONS, "\n".join(predictions())),
        ROOT / "docs/benchmarks.md": "\n".join(details()) + "\n",
    }
    for path, new in pages.items():
        if "--check" not in sys.argv[1:]:
            path.write_text(new)
        elif path.read_text() != new:
            sys.exit(f"{path.name} differs from the JSON: run python scripts/readme_numbers.py")


if __name__ == "__main__":
    main()
