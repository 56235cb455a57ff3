"""Measure nld-tiny on its held-out problems with the package's own decoder.

    python examples/eval_tiny.py                  # the packaged model, 64 problems a kind
    python examples/eval_tiny.py --model build/nld-tiny --json build/eval.json

Prints Markdown tables: exact answers, tokens per forward and per draft+verify cycle for each mode
and kind, and diffusion's accuracy against its threshold.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import nld_cuda
import tiny_tasks as tasks

MODES: dict[str, dict[str, Any]] = {
    "ar": {"mode": "ar"},
    "linear_spec, no LoRA": {"mode": "linear_spec", "lora": False},
    "linear_spec": {"mode": "linear_spec", "lora": True},
    "quadratic_spec": {"mode": "quadratic_spec"},
    **{
        f"diffusion {t}": {"mode": "diffusion", "threshold": t}
        for t in (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
    },
}
KEYS = ("exact", "same_as_ar", "tokens_per_forward", "tokens_per_cycle")


def measure(
    model: nld_cuda.NLDModel, problems: list[tasks.Problem], block_length: int, batch: int
) -> list[dict[str, Any]]:
    """Decode every problem in every mode; return one row per mode and kind, and one for all."""
    rows, ar_tokens = [], {}
    for name, options in MODES.items():
        if options["mode"] != "ar":
            options = {**options, "block_length": block_length}
        done: list[dict[str, Any]] = []
        for start in range(0, len(problems), batch):
            part = problems[start : start + batch]
            prompts = [p.prompt for p in part]
            result = nld_cuda.generate(model, prompts, max_new_tokens=192, **options)
            records = zip(part, result.tokens, result.text, result.stats.requests, strict=True)
            for problem, tokens, text, stats in records:
                tokens = list(tokens)
                same = tokens == ar_tokens.setdefault(problem.prompt, tokens)
                done.append({
                    "kind": problem.kind, "same": same, "tokens": stats.new_tokens,
                    "exact": tokens[-1] == tasks.EOS and tasks.check(problem, text),
                    "nfe": stats.nfe, "cycles": stats.verify_forwards,
                })  # fmt: skip
        for kind in ("all", *tasks.KINDS):
            of_kind = [d for d in done if kind in ("all", d["kind"])]
            count = len(of_kind)
            tokens, nfe, cycles = (sum(d[k] for d in of_kind) for k in ("tokens", "nfe", "cycles"))
            rows.append({
                "mode": name, "kind": kind, "problems": count,
                "exact": sum(d["exact"] for d in of_kind) / count,
                "same_as_ar": sum(d["same"] for d in of_kind) / count,
                "tokens_per_forward": tokens / nfe,
                # The first token of a speculative run comes from the prompt's forward.
                "tokens_per_cycle": (tokens - count) / cycles if "linear" in name else None,
            })  # fmt: skip
    return rows


def table(rows: list[dict[str, Any]], key: str) -> str:
    """Format one measure as a Markdown table: modes down, kinds across."""
    kinds = ("all", *tasks.KINDS)
    lines = [f"| {key.replace('_', ' ')} | " + " | ".join(kinds) + " |", "|---" * 6 + "|"]
    cell = "{:.1%}" if key in ("exact", "same_as_ar") else "{:.2f}"
    for name in MODES:
        values = [r[key] for kind in kinds for r in rows if (r["mode"], r["kind"]) == (name, kind)]
        if values and values[0] is not None:
            lines.append(f"| {name} | " + " | ".join(map(cell.format, values)) + " |")
    return "\n".join(lines)


def main() -> None:
    """Load, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="nld-tiny", help="packaged name or checkpoint folder")
    parser.add_argument("--problems", type=int, default=64, help="held-out problems of each kind")
    parser.add_argument("--block-length", type=int, default=16)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--kv-dtype", default="auto", choices=("auto", "fp8"))
    parser.add_argument("--products", default="auto", choices=("auto", "dense", "fp8"))
    parser.add_argument("--calibrate", action="store_true", help="scales of fp8 from 8 problems")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args()
    model = nld_cuda.load(args.model, kv_dtype=args.kv_dtype, products=args.products)
    problems = tasks.make_heldout(args.problems)
    if args.calibrate:
        nld_cuda.calibrate_kv(model, [p.prompt + p.answer for p in problems[:8]])
    rows = measure(model, problems, args.block_length, args.batch)
    print("\n\n".join(table(rows, key) for key in KEYS))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
