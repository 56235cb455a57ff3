"""One small call of every op on the GPU, in every variant of its lengths: for compute-sanitizer.

Usage: compute-sanitizer --tool memcheck python scripts/gpu_small_ops.py

Results are compared too, so that a run that computes nothing does not pass as clean.
"""

from __future__ import annotations

import torch

from replay_cases import NUM_VARIANTS, REPLAY_CASES, Call


def main() -> None:
    calls = 0
    for case in REPLAY_CASES:
        call = Call(case, "cuda")
        for variant in range(NUM_VARIANTS):
            call.fill(variant)
            call()
            torch.cuda.synchronize()
            call.check(variant)
            calls += 1
    print(f"gpu_small_ops: {calls} calls of {len(REPLAY_CASES)} cases were right")


if __name__ == "__main__":
    main()
