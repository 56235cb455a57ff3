"""Write the README's tables from the JSON in benchmarks/results, or check that they agree.

Usage: python scripts/readme_numbers.py [--check]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.resolve()
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


def kernels() -> Iterator[str]:
    yield "**Ops against eager torch and others**, medians; above 1x: we are faster."
    for name in ("attention", "commit", "verify", "append"):
        document = load(name)
        baselines = sorted({key[2:] for r in document["rows"] for key in r if key.startswith("x ")})
        yield ""
        yield "| " + " | ".join([name, "time", *(f"x {b}" for b in baselines)]) + " |"
        yield "|---" * (2 + len(baselines)) + "|"
        for row in document["rows"]:
            ratios = [f"{row[f'x {b}']:.2f}" if f"x {b}" in row else "-" for b in baselines]
            label = " ".join(str(row[k]) for k in ("case", "dtype") if k in row)
            yield "| " + " | ".join([label, us(row["us"]), *ratios]) + " |"
        yield ""
        yield source(document)


def main() -> None:
    text = README.read_text()
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    numbers = "\n".join([*decoding(), "", *kernels()])
    new = f"{head}{BEGIN}\n{numbers}\n{END}{tail}"
    if "--check" in sys.argv[1:]:
        if new != text:
            sys.exit(
                "README.md: numbers differ from the JSON: run python scripts/readme_numbers.py"
            )
    else:
        README.write_text(new)


if __name__ == "__main__":
    main()
