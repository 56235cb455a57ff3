"""commit_ against the eager torch pipeline and the memory bandwidth, measured in turns with it.

    python benchmarks/bench_commit.py            # all cases
    python benchmarks/bench_commit.py --quick    # the 32 x 131072 cases only

Inputs rotate so that every call reads its logits from memory. "read" is a torch sum over as many
bytes with the same threads: the time that reading the logits takes at least. "torch" is the usual
pipeline: max, softmax, gather, where, topk.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

from bench import Report, interleave, rotate
from nld_cuda import ops
from nld_cuda.ops import CommitRule

ROTATED_BYTES = 256 << 20  # far more than the caches hold
MASK = 100


@dataclass(frozen=True)
class Case:
    rows: int
    vocab: int
    dtype: torch.dtype
    rule: CommitRule = CommitRule.THRESHOLD
    temperature: float = 0.0
    masked: float = 1.0  # share of masked rows

    def __str__(self) -> str:
        name = f"{self.rows} x {self.vocab} {str(self.dtype).removeprefix('torch.')}"
        return f"{name} {self.rule.name.lower()} T={self.temperature:g} masked {self.masked:.0%}"


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
GOALS = [Case(32, 131072, dtype) for dtype in (F32, BF16)]
CASES = [
    *GOALS,
    Case(32, 131072, F16),
    *(Case(32, 131072, dtype, CommitRule.ENTROPY) for dtype in (F32, BF16)),
    *(Case(32, 131072, dtype, temperature=1.0) for dtype in (F32, BF16)),
    Case(32, 131072, BF16, masked=0.25),
    Case(1, 131072, BF16),
    Case(256, 131072, BF16),
    Case(32, 2048, F32),  # the size of a toy model: the cost of a call
]


def model_like_logits(case: Case) -> torch.Tensor:
    """Return normal logits with one raised id a row: most rows confident, as in a real block."""
    logits = torch.randn(case.rows, case.vocab) * 2
    logits[torch.arange(case.rows), torch.randint(0, case.vocab, (case.rows,))] += 14
    return logits.to(case.dtype)


class Problem:
    """One set of arguments; `nld` restores the block first, as a step would fill it."""

    def __init__(self, case: Case) -> None:
        self.case = case
        rows = case.rows
        self.logits = model_like_logits(case)
        self.fresh_mask = torch.arange(rows) >= round(rows * (1 - case.masked))
        self.is_masked = self.fresh_mask.clone()
        self.tokens = torch.full((rows,), MASK)
        self.cu_seqlens = torch.tensor([0, rows], dtype=torch.int32)
        self.rule = torch.tensor([case.rule], dtype=torch.int32)
        self.threshold = torch.tensor([0.9])
        self.outputs = {
            "candidates": torch.zeros(rows, dtype=torch.int64),
            "confidence": torch.zeros(rows),
            "num_committed": torch.zeros(1, dtype=torch.int32),
            "num_remaining": torch.zeros(1, dtype=torch.int32),
            "done": torch.zeros(1, dtype=torch.bool),
        }
        self.draw = {}
        if case.temperature > 0:
            self.draw = {
                "temperature": torch.tensor([case.temperature]),
                "seed": torch.tensor([1]),
                "positions": torch.arange(rows, dtype=torch.int32),
            }

    def copy(self) -> Problem:
        """Return the same problem with its own copy of the logits, elsewhere in memory."""
        other = Problem.__new__(Problem)
        other.__dict__.update(self.__dict__, logits=self.logits.clone(), outputs=dict(self.outputs))
        return other

    def nld(self) -> torch.Tensor:
        self.is_masked.copy_(self.fresh_mask)
        ops.commit_(
            self.logits, self.tokens, self.is_masked, self.cu_seqlens, self.rule, self.threshold,
            mask_token_id=MASK, **self.draw, **self.outputs,
        )  # fmt: skip
        return self.tokens

    def torch(self) -> torch.Tensor:
        """Judge every row, as eager pipelines do: gathering the masked ones needs a host read."""
        case, is_masked = self.case, self.fresh_mask
        logits = self.logits.float()
        noisy = logits
        if case.temperature > 0:
            noisy = logits / case.temperature - torch.empty_like(logits).exponential_().log_()
        candidates = noisy.max(-1).indices
        probs = logits.softmax(-1)
        confidence = probs.gather(-1, candidates[:, None])[:, 0]
        score = torch.where(is_masked, confidence, -torch.inf)
        if case.rule == CommitRule.ENTROPY:
            score = torch.where(
                is_masked, (probs * probs.clamp_min(1e-10).log()).sum(-1), -torch.inf
            )
        commits = is_masked & (score >= 0.9)
        commits[score.topk(1).indices] = True
        return torch.where(commits, candidates, MASK)


def check(problem: Problem) -> None:
    problem.tokens.fill_(MASK)
    if problem.case.temperature == 0 and problem.case.rule == CommitRule.THRESHOLD:
        assert torch.equal(problem.nld(), problem.torch()), "commit_ and torch disagree"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--budget", type=float, default=4.0, help="seconds a case")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report = Report("commit")
    for case in GOALS if args.quick else CASES:
        torch.manual_seed(0)
        first = Problem(case)
        check(first)
        num_bytes = int(first.fresh_mask.sum()) * case.vocab * case.dtype.itemsize
        num_inputs = min(max(ROTATED_BYTES // num_bytes, 3), 64)
        problems = [first] + [first.copy() for _ in range(num_inputs - 1)]
        memory = torch.ones(num_inputs, num_bytes // 4)
        ours = rotate([p.nld for p in problems])
        # Apart, because torch leaves a cache full of unwritten probabilities to the next in turn.
        memory_timings = interleave(
            {"nld": ours, "read": rotate([row.sum for row in memory])}, budget_s=args.budget / 2
        )
        torch_timings = interleave(
            {"nld": ours, "torch": rotate([p.torch for p in problems])}, budget_s=args.budget / 2
        )
        read_us = memory_timings["read"].median_us
        extra = {
            "read us": read_us,
            "% of read": 100 * read_us / memory_timings["nld"].median_us,
            "us beside torch": torch_timings["nld"].median_us,
        }
        timings = {"nld": memory_timings["nld"], "torch": torch_timings["torch"]}
        report.add(str(case), timings, "nld", num_bytes=num_bytes, **extra)
    report.finish()


if __name__ == "__main__":
    main()
