"""Whole decoding on nld-tiny: tokens/s of each mode against ar, and where the time of a step goes.

Usage: python benchmarks/bench_generate.py [--problems N] [--batch 1 8] [--rounds 5] [--threads 1]

The held-out problems that ship with the model are decoded in every mode in turns, so that noise
hits all of them alike. Answers are compared: text that differs from ar's is told apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import nld_cuda
from nld_cuda.bench.environment import environment, script_command
from nld_cuda.bench.text import table

RESULTS = Path(__file__).resolve().parent / "results"
MODES: dict[str, dict[str, Any]] = {
    "ar": {"mode": "ar"},
    "linear_spec": {"mode": "linear_spec"},
    "linear_spec, no LoRA": {"mode": "linear_spec", "lora": False},
    "quadratic_spec": {"mode": "quadratic_spec"},
    "diffusion 0.9": {"mode": "diffusion", "threshold": 0.9},
}


def heldout(per_kind: int) -> list[dict[str, str]]:
    """Return the first problems of each kind, kinds in turn."""
    path = Path(nld_cuda.__file__).parent / "assets/nld-tiny/heldout.jsonl"
    kinds: dict[str, list[dict[str, str]]] = {}
    for line in path.read_text().splitlines():
        problem = json.loads(line)
        kinds.setdefault(problem["kind"], []).append(problem)
    return [p for group in zip(*kinds.values(), strict=False) for p in group][
        : per_kind * len(kinds)
    ]


def decode_all(
    model: nld_cuda.NLDModel, prompts: Sequence[str], batch: int, options: dict[str, Any]
) -> tuple[float, int, int, list[list[int]]]:
    """Return seconds, new tokens, forwards (nfe), and the tokens of every prompt."""
    tokens: list[list[int]] = []
    new_tokens = forwards = 0
    start = time.perf_counter()
    for first in range(0, len(prompts), batch):
        result = nld_cuda.generate(
            model, list(prompts[first : first + batch]), max_new_tokens=400, **options
        )
        tokens += result.tokens
        new_tokens += result.stats.new_tokens
        forwards += result.stats.nfe
    return time.perf_counter() - start, new_tokens, forwards, tokens


def speed_rows(model: Any, prompts: Sequence[str], batch: int, rounds: int) -> list[dict[str, Any]]:
    """Decode all prompts in every mode, `rounds` times in turns."""
    samples: dict[str, list[float]] = {name: [] for name in MODES}
    last: dict[str, tuple[float, int, int, list[list[int]]]] = {}
    for turn in range(rounds + 1):
        for name, options in MODES.items():
            last[name] = decode_all(model, prompts, batch, options)
            if turn > 0:  # the first round warms up
                samples[name].append(last[name][0])
    rows = []
    for name in MODES:
        _, new_tokens, forwards, tokens = last[name]
        ratios = [ar / own for ar, own in zip(samples["ar"], samples[name], strict=True)]
        rows.append(
            {
                "mode": name,
                "batch": batch,
                "tokens/s": new_tokens / statistics.median(samples[name]),
                "x ar": statistics.median(ratios) * new_tokens / last["ar"][1],
                "tokens/forward": new_tokens / forwards,
                "equal to ar": sum(a == b for a, b in zip(tokens, last["ar"][3], strict=True)),
                "problems": len(prompts),
                "seconds": samples[name],
            }
        )
    return rows


def step_row(model: Any, prompt: str, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Split the time of a decode call: inside torch operators and outside of them (Python)."""

    def call() -> int:
        result = nld_cuda.generate(model, prompt, max_new_tokens=400, **options)
        return sum(result.stats.batch_forwards.values())

    call()
    start = time.perf_counter()
    forwards = call()
    plain_us = (time.perf_counter() - start) * 1e6
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    # Operators that no other operator called; everything between them is Python.
    events = [e for e in profile.events() if e.cpu_parent is None]
    inside_us = sum(e.cpu_time_total for e in events)
    first, last = min(e.time_range.start for e in events), max(e.time_range.end for e in events)
    by_name: dict[str, float] = {}
    for event in events:
        by_name[event.name] = by_name.get(event.name, 0.0) + event.cpu_time_total
    top = sorted(by_name.items(), key=lambda item: -item[1])[:8]
    return {
        "mode": name,
        "us per forward": plain_us / forwards,
        "operators per forward": len(events) / forwards,
        # The profiler slows operators and Python alike; the share is of the profiled run.
        "% outside operators": 100 * (1 - inside_us / (last - first)),
        "top operators": ", ".join(f"{n} {100 * t / inside_us:.0f}%" for n, t in top),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=int, default=4, help="of each kind")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="nld-tiny is too small to share")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = nld_cuda.load("nld-tiny")
    prompts = [p["prompt"] for p in heldout(args.problems)]
    speed = [row for b in args.batch for row in speed_rows(model, prompts, b, args.rounds)]
    steps = [step_row(model, prompts[0], name, MODES[name]) for name in MODES]
    print(table([{k: v for k, v in row.items() if k != "seconds"} for row in speed]))
    print()
    print(table(steps))
    RESULTS.mkdir(exist_ok=True)
    document = {
        "benchmark": "generate",
        "command": script_command(),
        "environment": environment(),
        "speed": speed,
        "steps": steps,
    }
    path = RESULTS / "generate.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"written: benchmarks/results/{path.name}")


if __name__ == "__main__":
    main()
