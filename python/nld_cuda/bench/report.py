"""What is printed and written of a run: tables, what was not run, targets, JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nld_cuda.bench import targets
from nld_cuda.bench.text import table, time_text

Row = Mapping[str, Any]


def row_line(row: Row) -> str:
    """Return the progress line of a row."""
    if row["status"] != "measured":
        return f"{row['name']}: {row['status']}: {row['reason']}"
    predicted = row.get("predicted_us")
    text = f"{row['name']}: {time_text(row['us'])}"
    text += f", predicted {time_text(predicted)}" if predicted else ""
    best = best_rival(row)
    return text + (f", best other {best[0]} {best[1]:.2f}x" if best else "")


def best_rival(row: Row) -> tuple[str, float] | None:
    """Return the fastest baseline of a row, and its time / ours."""
    ratios = {name: b["ratio"] for name, b in targets.rivals(row).items()}
    name = min(ratios, key=lambda n: ratios[n], default=None)
    return None if name is None else (name, ratios[name])


def op_table(rows: Sequence[Row]) -> str:
    """Lay out the measured rows of one op: our figures, then every baseline's time / ours."""
    names = dict.fromkeys(
        name
        for row in rows
        for name, b in row.get("baselines", {}).items()
        if b["status"] == "measured"
    )
    lines = []
    for row in rows:
        if row["status"] != "measured":
            continue
        line: dict[str, Any] = {
            "cell": row["name"].partition("/")[2],
            "time": time_text(row["us"]),
            "p10 .. p90": f"{time_text(row['p10_us'])} .. {time_text(row['p90_us'])}",
        }
        if "predicted_us" in row:
            line["predicted"] = time_text(row["predicted_us"])
        if "eager_us" in row:
            line["from the host"] = time_text(row["eager_us"])
        line["MB"] = row["floor_bytes"] / 1e6
        line["% copy"] = row.get("percent_of_copy")
        if "percent_of_matmul" in row:
            line["% matmul"] = row["percent_of_matmul"]
        for name in names:
            line[f"x {name}"] = row["baselines"].get(name, {}).get("ratio")
        lines.append(line)
    return table(lines)


def not_run(rows: Iterable[Row]) -> list[str]:
    """Say what was not run and why, cells first; equal reasons together."""
    cells: dict[str, list[str]] = {}
    baselines: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["status"] != "measured":
            cells.setdefault(row["reason"], []).append(row["name"])
        for name, b in row.get("baselines", {}).items():
            if b["status"] != "measured":
                baselines.setdefault((name, b.get("reason", "")), []).append(row["name"])
    lines = [f"{_count(names)}: {reason}" for reason, names in cells.items()]
    lines += [
        f"{name}, {_count(names)}: {reason}"
        for (name, reason), names in baselines.items()
        if reason != "not asked for"
    ]
    return lines


def _count(names: list[str]) -> str:
    if len(names) <= 2:
        return ", ".join(names)
    return f"{len(names)} cells ({names[0]} ...)"


def slower(rows: Iterable[Row]) -> list[str]:
    """Name every row where a baseline wins, the largest loss first."""
    found = [
        (b["ratio"], f"{row['name']}: {b['ratio']:.2f}x {name}")
        for row in rows
        if row["status"] == "measured"
        for name, b in targets.rivals(row).items()
        if b["ratio"] < 1
    ]
    return [line for _, line in sorted(found)]


def target_table(document: Mapping[str, Any]) -> str:
    """Lay out the targets."""
    return table(
        [
            {
                "target": t["target"],
                "goal": t["goal"],
                "worst": t.get("worst"),
                "of": t.get("worst_cell"),
                "cells": t["cells"],
                "verdict": t["verdict"],
            }
            for t in document["targets"]
        ]
    )


def ceilings_line(document: Mapping[str, Any]) -> str:
    """Say what the device can do."""
    c = document["ceilings"]
    parts = [f"copy {c['copy_gbps']:.4g} GB/s (read + written)"]
    for name, text in (
        ("read_gbps", "read {:.4g} GB/s"), ("l2_gbps", "copy in cache {:.4g} GB/s"),
        ("matmul_tflops", "bf16 matmul {:.4g} TFLOP/s"), ("launch_us", "launch {:.3g} us"),
    ):  # fmt: skip
        if c.get(name):
            parts.append(text.format(c[name]))
    return "measured in this run: " + ", ".join(parts)


def markdown(document: Mapping[str, Any], *, level: str = "###") -> str:
    """Return the readable page of a run."""
    rows = document["rows"]
    parts = []
    for op in dict.fromkeys(row["op"] for row in rows):
        parts.append(f"{level} {op}\n\n{op_table([r for r in rows if r['op'] == op])}")
    lost = slower(rows)
    if lost:
        parts.append("A baseline is faster:\n\n" + "\n".join(f"- {line}" for line in lost))
    left_out = not_run(rows)
    if left_out:
        parts.append("Not run:\n\n" + "\n".join(f"- {line}" for line in left_out))
    if document.get("targets"):
        parts.append(f"{level} Targets\n\n{target_table(document)}")
    if document["failures"]:
        parts.append("Failed:\n\n" + "\n".join(f"- {line}" for line in document["failures"]))
    parts.append(ceilings_line(document))
    return "\n\n".join(parts)


def write(document: Mapping[str, Any], folder: Path) -> None:
    """Write kernels.json and kernels.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kernels.json").write_text(json.dumps(document, indent=1) + "\n")
    (folder / "kernels.md").write_text(markdown(document) + "\n")
