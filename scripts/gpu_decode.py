"""Decode with nld-tiny in every mode on the CPU and on CUDA, and compare token by token.

Usage: python scripts/gpu_decode.py [--problems N] [--rehearse]

float32: every token of every mode must be equal, greedy and sampled (the random numbers are equal
bit for bit, so only a near-tie in the logits could tell the devices apart; where tokens differ, the
margin at that place is printed, and a difference at a margin above 1e-4 fails). bfloat16, greedy:
the CPU's float32 logits judge the first place where the texts part: the two best logits there must
lie within 0.25. --rehearse runs the whole script on a machine without a GPU, on tensors that only
pretend to be on one (tests/pretend_cuda.py), and counts the host's reads.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

import nld_cuda
from nld_cuda.decode.kv_cache import KVCache
from nld_cuda.ops import MaskMode

MODES: dict[str, dict[str, Any]] = {
    "ar": {"mode": "ar"},
    "linear_spec": {"mode": "linear_spec"},
    "linear_spec, no LoRA": {"mode": "linear_spec", "lora": False},
    "linear_spec, threshold": {"mode": "linear_spec", "threshold": 0.3},
    "linear_spec, rejection": {"mode": "linear_spec", "spec_sampling": "rejection"},
    "quadratic_spec": {"mode": "quadratic_spec"},
    "diffusion": {"mode": "diffusion"},
    "diffusion 0.9": {"mode": "diffusion", "threshold": 0.9},
    "diffusion entropy": {"mode": "diffusion", "rule": "entropy", "threshold": 0.5},
    "diffusion revise": {
        "mode": "diffusion", "rule": "revise", "threshold": 0.9, "revise_threshold": 0.5,
    },
}  # fmt: skip
SAME_AS_AR = ("ar", "linear_spec", "linear_spec, no LoRA", "linear_spec, threshold",
              "quadratic_spec")  # fmt: skip
NEAR_TIE = {torch.float32: 1e-4, torch.bfloat16: 0.25}


def prompts(per_kind: int) -> list[str]:
    """Return the first held-out problems of each kind."""
    path = Path(nld_cuda.__file__).parent / "assets/nld-tiny/heldout.jsonl"
    kinds: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        problem = json.loads(line)
        kinds.setdefault(problem["kind"], []).append(problem["prompt"])
    return [p for group in zip(*kinds.values(), strict=False) for p in group][
        : per_kind * len(kinds)
    ]


@torch.inference_mode()
def margin(model: Any, tokens: list[int], noise_at: tuple[int, float] | None = None) -> float:
    """Return how far apart the two best next tokens are after `tokens`, on the CPU in float32.

    noise_at: seed and temperature of a sampled request: the margin is then one of noisy logits.
    """
    total = len(tokens)
    cache = KVCache(model.config, KVCache.pages_for(total, 16), 16, "cpu", model.dtype)
    table = cache.allocate(1, total)
    places = torch.arange(total, dtype=torch.int32)
    logits = model.forward(
        torch.tensor(tokens), places, cache.slots(table, torch.zeros(total).long(), places), cache,
        table, torch.tensor([total], dtype=torch.int32),
        torch.tensor([0, total], dtype=torch.int32),
        torch.tensor([int(MaskMode.CAUSAL)], dtype=torch.int32),
        logits_rows=torch.tensor([total - 1]),
    ).float()  # fmt: skip
    if noise_at is not None:
        noise = torch.zeros_like(logits)
        nld_cuda.ops.gumbel_noise_(
            noise, torch.tensor([noise_at[0]]), torch.tensor([total], dtype=torch.int32)
        )
        logits = logits / noise_at[1] + noise
    best = logits[0].topk(2).values
    return float(best[0] - best[1])


def first_difference(a: list[int], b: list[int]) -> int:
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


class Comparison:
    """Runs a mode on both devices and judges the differences."""

    def __init__(self, texts: list[str], dtype: torch.dtype, cuda_context: Any) -> None:
        self.texts, self.dtype = texts, dtype
        # float32 on the CPU in either case: it also judges the margins.
        self.on_cpu = nld_cuda.load("nld-tiny", device="cpu", dtype=torch.float32)
        self.cuda_context = cuda_context
        with cuda_context():
            self.on_cuda = nld_cuda.load("nld-tiny", device="cuda", dtype=dtype)

    def run(self, name: str, temperature: float) -> tuple[bool, str]:
        options = {"max_new_tokens": 160, "temperature": temperature, "seed": 11, **MODES[name]}
        begin = time.perf_counter()
        expected = nld_cuda.generate(self.on_cpu, self.texts, **options).tokens
        with self.cuda_context() as mode:
            actual = nld_cuda.generate(self.on_cuda, self.texts, **options).tokens
        seconds = time.perf_counter() - begin
        different = [i for i, (a, b) in enumerate(zip(actual, expected, strict=True)) if a != b]
        passed, notes = True, []
        for i in different:
            at = first_difference(actual[i], expected[i])
            if name not in SAME_AS_AR:
                # A denoised token hangs on confidences too: only float32 must agree.
                passed &= self.dtype != torch.float32
                notes.append(f"prompt {i} at {at}")
                continue
            prefix = self.on_cpu.tokenizer.encode(self.texts[i]) + expected[i][:at]
            heat = (11 + i, temperature) if temperature > 0 else None
            gap = margin(self.on_cpu, prefix, heat)
            passed &= gap <= NEAR_TIE[self.dtype]
            notes.append(f"prompt {i} at {at}, margin {gap:.2g}")
        equal = len(self.texts) - len(different)
        text = f"{name}, T={temperature:g}, {str(self.dtype).removeprefix('torch.')}: "
        text += f"{equal} of {len(self.texts)} equal, {sum(map(len, expected))} tokens"
        if mode is not None:
            text += f", {mode.num_syncs} host waits"
        text += f", {seconds:.1f} s" + ("; parted: " + "; ".join(notes[:4]) if notes else "")
        return passed, text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", type=int, default=3, help="of each kind")
    parser.add_argument("--rehearse", action="store_true", help="pretend that there is a GPU")
    options = parser.parse_args()
    context: Any = contextlib.nullcontext
    if options.rehearse:
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
        import pretend_cuda

        context = pretend_cuda.rehearsal
    torch.backends.cuda.matmul.allow_tf32 = False
    texts = prompts(options.problems)
    failed = total = 0
    for dtype, heats in ((torch.float32, (0.0, 0.8)), (torch.bfloat16, (0.0,))):
        comparison = Comparison(texts, dtype, context)
        for name in MODES:
            for heat in heats:
                if name.endswith("rejection") and heat == 0:
                    continue
                passed, text = comparison.run(name, heat)
                print(("ok      " if passed else "FAILED  ") + text, flush=True)
                failed, total = failed + (not passed), total + 1
    print(f"decode: {total - failed} of {total} comparisons passed, {len(texts)} prompts each")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
