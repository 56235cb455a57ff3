"""Figures of a run: rooflines, and latency by context. Needs matplotlib: nld-cuda[bench]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Document = Mapping[str, Any]


def need_matplotlib() -> Any:
    """Import matplotlib, or say how to get it."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError(
            "--plot must have matplotlib, found none: pip install 'nld-cuda[bench]'"
        ) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def device_name(document: Document) -> str:
    """Return GPU or CPU of a run."""
    env = document["environment"]
    return str(env.get("gpu") or env["cpu"])


def roofline_points(document: Document) -> dict[str, list[tuple[float, float]]]:
    """Return (FLOP per byte of the floor, TFLOP/s) of the attention cells, by group."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in document["rows"]:
        if row["status"] == "measured" and row.get("tflops"):
            at = (row["flops"] / row["floor_bytes"], row["tflops"])
            points.setdefault(row["group"], []).append(at)
    return points


def latency_lines(document: Document, rows: int) -> dict[int, dict[str, list[tuple[int, float]]]]:
    """Return (context, us) of the uniform blocks of so many rows, by batch and contender."""
    panels: dict[int, dict[str, list[tuple[int, float]]]] = {}
    for row in document["rows"]:
        if row["status"] != "measured" or row.get("group") != "decode" or row.get("rows") != rows:
            continue
        lines, context = panels.setdefault(row["batch"], {}), row["context"]
        lines.setdefault("nld", []).append((context, row["us"]))
        if "predicted_us" in row:
            lines.setdefault("predicted", []).append((context, row["predicted_us"]))
        for name, b in row["baselines"].items():
            if b["status"] == "measured":
                lines.setdefault(name, []).append((context, b["us"]))
    return {
        batch: {name: sorted(points) for name, points in lines.items()}
        for batch, lines in sorted(panels.items())
    }


def draw(document: Document, folder: Path) -> list[Path]:
    """Write roofline.png and latency_q<rows>.png into a folder; return what was written."""
    plt = need_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    points = roofline_points(document)
    if points:
        made.append(_roofline(plt, document, points, folder / "roofline.png"))
    counts = sorted({row.get("rows") for row in document["rows"]} - {None})
    for rows in counts:
        lines = latency_lines(document, rows)
        if lines:
            made.append(_latency(plt, document, rows, lines, folder / f"latency_q{rows}.png"))
    return made


def _roofline(
    plt: Any, document: Document, points: Mapping[str, Sequence[tuple[float, float]]], path: Path
) -> Path:
    ceilings = document["ceilings"]
    figure, axes = plt.subplots(figsize=(7, 5))
    intensities = [x for group in points.values() for x, _ in group]
    low, high = min(intensities) / 2, max(intensities) * 2
    rate, top = ceilings["copy_gbps"] / 1e3, ceilings["matmul_tflops"]
    ridge = top / rate
    corners = sorted({low, high, *([ridge] if low < ridge < high else [])})
    axes.plot(corners, [min(rate * x, top) for x in corners], "k-", label="copy, matmul measured")
    for group, group_points in points.items():
        axes.plot(*zip(*group_points, strict=True), ".", label=group)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte of the floor", ylabel="TFLOP/s")
    axes.set_title(f"block_attention on {device_name(document)}", fontsize=10)
    axes.legend(fontsize=8)
    return _save(plt, figure, path)


def _latency(
    plt: Any, document: Document, rows: int, panels: Mapping[int, Any], path: Path
) -> Path:
    """A panel for every batch, a line for every contender, in the same colours."""
    columns = min(len(panels), 4)
    lines_of_panels = -(-len(panels) // columns)
    figure = plt.figure(figsize=(1 + 4 * columns, 0.5 + 3.5 * lines_of_panels))
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    for index, (batch, lines) in enumerate(panels.items()):
        axes = figure.add_subplot(lines_of_panels, columns, index + 1)
        for name, points in lines.items():
            style = {"nld": "o-", "predicted": ":"}.get(name, ".--")
            width = 2 if name == "nld" else 1
            colour = f"C{names.index(name) % 10}"
            x, y = zip(*points, strict=True)
            axes.plot(x, y, style, label=name, linewidth=width, color=colour)
        contexts = sorted({x for points in lines.values() for x, _ in points})
        axes.set(xscale="log", yscale="log", xlabel="keys", ylabel="us", title=f"batch {batch}")
        axes.set_xticks(contexts, [f"{x // 1024}k" if x >= 1024 else str(x) for x in contexts])
        axes.set_xticks([], [], minor=True)
        axes.legend(fontsize=6)
    unit = "row" if rows == 1 else "rows"
    figure.suptitle(f"{rows} {unit} a request on {device_name(document)}", fontsize=10)
    return _save(plt, figure, path)


def _save(plt: Any, figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
