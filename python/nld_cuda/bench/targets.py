"""The targets of issue 4, as checks of measured rows. They hold for H100 and H200."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nld_cuda.bench.ceilings import Ceilings

Row = Mapping[str, Any]
GPUS = ("H100", "H200", "GH200")


@dataclass(frozen=True)
class Target:
    """A figure that rows must reach.

    Attributes:
        applies: which rows it speaks of.
        figure: of a row.
        limit: to reach (`at_least`) or not to exceed.
    """

    text: str
    applies: Callable[[Row, Ceilings], bool]
    figure: Callable[[Row, Ceilings], float]
    limit: float
    at_least: bool
    unit: str = "us"


def _block(row: Row, rows: int = 32) -> bool:
    return row["op"] == "attention" and row.get("group") == "decode" and row.get("rows") == rows


def _named(*names: str) -> Callable[[Row, Ceilings], bool]:
    return lambda row, _: row["name"] in names


def _us(row: Row, _: Ceilings) -> float:
    return float(row["us"])


def _floor_us(row: Row, c: Ceilings) -> float:
    return float(row["floor_bytes"]) / c.copy_gbps / 1e3


def _least_ratio(row: Row, _: Ceilings) -> float:
    return min(b["ratio"] for b in rivals(row).values())


def rivals(row: Row) -> dict[str, Mapping[str, Any]]:
    """Return the measured baselines of a row that do the op's work ("read" only reads)."""
    return {
        name: record
        for name, record in row.get("baselines", {}).items()
        if record["status"] == "measured" and not name.startswith("read")
    }


TARGETS = (
    Target(
        "blocks of 32 rows whose floor is above 40 us: % of the copy bandwidth",
        lambda row, c: _block(row) and _floor_us(row, c) > 40,
        lambda row, _: float(row["percent_of_copy"]), 85, True, "%",
    ),
    Target("32 rows, 1 x 1k keys", _named("attention/q32/b1/c1024"), _us, 8, False),
    Target("32 rows, 1 x 4k keys", _named("attention/q32/b1/c4096"), _us, 11, False),
    Target(
        "never slower than a baseline: least ratio", lambda row, _: bool(rivals(row)),
        _least_ratio, 1, True, "x",
    ),
    Target(
        "causal prefill of 8k", _named("attention/prefill/causal/b1/c8192"),
        lambda row, _: float(row["tflops"]), 500, True, "TFLOP/s",
    ),
    Target("commit 32 x 131072 bfloat16", _named("commit/b1/q32/v131072/bfloat16"), _us, 8, False),
    Target(
        "verify and rollback, 32 x 131072 bfloat16 greedy",
        _named("verify/greedy/b1/q32/accept6/v131072/bfloat16"), _us, 6, False,
    ),
    Target(
        "append: times (floor + launch)", lambda row, _: row["op"] == "append",
        lambda row, c: float(row["us"]) / (_floor_us(row, c) + c.launch_us), 1.3, False, "x",
    ),
)  # fmt: skip


def check(rows: Sequence[Row], ceilings: Ceilings, gpu: str) -> list[dict[str, Any]]:
    """Judge every target by its worst row; no verdict on other GPUs than the targets are for."""
    judged = any(name in gpu for name in GPUS)
    found = []
    for target in TARGETS:
        mine = [r for r in rows if r["status"] == "measured" and target.applies(r, ceilings)]
        record: dict[str, Any] = {
            "target": target.text,
            "goal": f"{'>=' if target.at_least else '<='} {target.limit:g} {target.unit}",
            "cells": len(mine),
        }
        if mine:
            figures = {r["name"]: target.figure(r, ceilings) for r in mine}
            worst = (min if target.at_least else max)(figures, key=lambda name: figures[name])
            missed = [
                name
                for name, value in figures.items()
                if (value < target.limit) == target.at_least and value != target.limit
            ]
            record |= {"worst": figures[worst], "worst_cell": worst, "missed": len(missed)}
        if not mine:
            record["verdict"] = "not measured"
        elif not judged:
            record["verdict"] = "for H100 and H200 only"
        else:
            record["verdict"] = "missed" if record["missed"] else "met"
        found.append(record)
    return found
