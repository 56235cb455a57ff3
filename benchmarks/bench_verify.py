"""verify_ against the eager torch pipeline it replaces, on CPU: 32 rows of a 131072-id vocabulary.

    python benchmarks/bench_verify.py [--quick] [--threads N]

Baseline: argmax, or softmax + multinomial, or softmax + gather + rand + residual + multinomial over
all rows; then match, cumprod, gather, and the host-side slicing that appends to each request's list
of tokens, cuts at EOS and budget, and moves the lengths back. Every call of both gets other, cold
logits. "accept 31" is the op's worst case: no row can be skipped. With --threads 1 CPU time is
measured beside wall time: the number to trust on a busy machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import Report, interleave, rotate
from nld_cuda import ops
from nld_cuda.ops import VerifyMode

EOS = 11


@dataclass(frozen=True)
class Case:
    mode: VerifyMode
    batch: int
    rows: int  # per request
    accept: int  # drafts accepted in each request
    dtype: torch.dtype = torch.float32
    vocab: int = 131072

    def name(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        size = f"{self.batch} x {self.rows} x {self.vocab}"
        return f"{self.mode.name.lower()} {size} {kind}, accept {self.accept}"


CASES = [
    Case(mode, batch, rows, accept, dtype)
    for mode in (VerifyMode.GREEDY, VerifyMode.SAMPLED, VerifyMode.REJECTION)
    for batch, rows, accept, dtype in (
        (1, 32, 31, torch.float32),
        (1, 32, 6, torch.float32),
        (4, 8, 7, torch.float32),
        (1, 32, 31, torch.bfloat16),
        (1, 1, 0, torch.float32),
    )
] + [Case(VerifyMode.SAMPLED, 4, 16, 10, torch.float32, 2048)]  # the size of a tiny model


class Problem:
    """One set of inputs with a known number of accepted drafts, and both ways to verify it."""

    def __init__(self, case: Case, seed: int) -> None:
        torch.manual_seed(seed)
        batch, n, vocab = case.batch, case.rows, case.vocab
        self.case = case
        self.logits = (torch.randn(batch * n, vocab) * 2).to(case.dtype)
        self.temperature = torch.full((batch,), 0.8)
        self.seeds = torch.arange(batch) + 1000 * seed
        self.positions = (torch.arange(batch * n) % n + 500).int()
        self.cu_seqlens = torch.arange(0, batch * n + 1, n).int()
        self.mode = torch.full((batch,), int(case.mode), dtype=torch.int32)
        self.eos = torch.full((batch, 1), EOS)
        self.draft_probs: Tensor | None = None
        self.out_tokens = torch.zeros(batch, 64, dtype=torch.int64)
        self.next_tokens = torch.zeros(batch, dtype=torch.int64)
        self.out_lens, self.seq_lens, self.num_emitted, self.num_accepted = (
            torch.zeros(batch, dtype=torch.int32) for _ in range(4)
        )
        self.max_out_lens = torch.full((batch,), 64, dtype=torch.int32)
        self.done = torch.zeros(batch, dtype=torch.bool)
        self.lists: list[list[int]] = []
        self.block = self.drafts()

    def drafts(self) -> Tensor:
        """Draft what the mode accepts, up to the wanted number."""
        case, (rows, vocab) = self.case, self.logits.shape
        n = case.rows
        self.logits[:, EOS] = -torch.inf
        if case.mode == VerifyMode.REJECTION:
            self.draft_probs = torch.softmax(self.logits.float() / 0.8, -1).roll(1, 0)
            judge = torch.multinomial(self.draft_probs, 1)[:, 0]
        else:  # one-row steps tell the targets
            judge = torch.zeros(rows, dtype=torch.int64)
            ops.verify_(
                self.logits, judge.clone(), torch.arange(rows + 1).int(),
                self.mode.repeat_interleave(n), torch.zeros(rows, 1, dtype=torch.int64),
                torch.zeros(rows).int(), torch.ones(rows).int(), judge, torch.ones(rows).int(),
                torch.zeros(rows, dtype=torch.bool), positions=self.positions,
                temperature=self.temperature.repeat_interleave(n),
                seed=self.seeds.repeat_interleave(n),
            )  # fmt: skip
            judge = judge.roll(1)
        block = judge.view(case.batch, n)
        if case.accept < n - 1:
            refused = case.accept + 1
            block[:, refused] = (block[:, refused] + 12345) % vocab
            row = torch.arange(case.batch) * n + refused
            self.logits[row - 1, block[:, refused]] = -torch.inf
            if self.draft_probs is not None:
                self.draft_probs[row] = torch.softmax(torch.randn(len(row), vocab), -1)
                self.draft_probs[row, block[:, refused]] = 0.5
        return block.contiguous()

    def reset(self) -> None:
        self.out_lens.zero_()
        self.seq_lens.fill_(600)
        self.done.zero_()
        self.lists = [[] for _ in range(self.case.batch)]

    def run_op(self) -> None:
        self.reset()
        ops.verify_(
            self.logits, self.block.view(-1), self.cu_seqlens, self.mode, self.out_tokens,
            self.out_lens, self.max_out_lens, self.next_tokens, self.seq_lens, self.done,
            positions=self.positions, temperature=self.temperature, seed=self.seeds,
            draft_probs=self.draft_probs, eos_token_ids=self.eos,
            num_emitted=self.num_emitted, num_accepted=self.num_accepted,
        )  # fmt: skip

    def run_torch(self) -> None:
        """Do the same with torch ops, as a decode loop without the op would."""
        self.reset()
        batch, n = self.block.shape
        logits = self.logits.view(batch, n, -1)
        drafts = self.block[:, 1:]
        if self.case.mode == VerifyMode.REJECTION:
            assert self.draft_probs is not None
            p = torch.softmax(logits.float() / self.temperature[:, None, None], -1)
            q = self.draft_probs.view(batch, n, -1)[:, 1:]
            p_draft = p[:, :-1].gather(2, drafts[..., None])[..., 0]
            q_draft = q.gather(2, drafts[..., None])[..., 0]
            keep = torch.rand_like(p_draft) * q_draft < p_draft
            accepted = keep.long().cumprod(1).sum(1)
            which = torch.arange(batch)
            left = p[which, accepted]
            for b, count in enumerate(accepted.tolist()):
                if count < n - 1:
                    left[b] = (left[b] - q[b, count]).clamp_min(0)
            bonus = torch.multinomial(left, 1)[:, 0]
        else:
            if self.case.mode == VerifyMode.GREEDY:
                target = logits.argmax(-1)
            else:
                p = torch.softmax(logits.float() / self.temperature[:, None, None], -1)
                target = torch.multinomial(p.view(batch * n, -1), 1).view(batch, n)
            accepted = (target[:, :-1] == drafts).long().cumprod(1).sum(1)
            bonus = target.gather(1, accepted[:, None])[:, 0]
        self.emit(accepted.tolist(), bonus.tolist())

    def emit(self, accepted: list[int], bonus: list[int]) -> None:
        for b, (count, token) in enumerate(zip(accepted, bonus, strict=True)):
            tokens = [*self.block[b, 1 : count + 1].tolist(), token]
            if EOS in tokens:
                tokens = tokens[: tokens.index(EOS) + 1]
                self.done[b] = True
            self.lists[b] += tokens
            if len(self.lists[b]) >= int(self.max_out_lens[b]):
                self.done[b] = True
            self.next_tokens[b] = tokens[-1]
            self.seq_lens[b] -= self.case.rows - len(tokens)

    def num_bytes(self) -> int:
        """What the op must read: logits up to the row that ends the walk, and one residual's q."""
        rows = self.case.batch * (self.case.accept + 1)
        total = rows * self.case.vocab * self.logits.element_size()
        if self.draft_probs is not None and self.case.accept < self.case.rows - 1:
            total += self.case.batch * self.case.vocab * (4 + self.logits.element_size())
        return total


def cpu_medians(functions: dict[str, Callable[[], Any]], num_runs: int) -> dict[str, float]:
    """Measure the thread's CPU time in turns, us: what one thread needs on a busy machine too."""
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(num_runs):
        for name, function in functions.items():
            begin = time.thread_time()
            function()
            samples[name].append((time.thread_time() - begin) * 1e6)
    return {name: statistics.median(values) for name, values in samples.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few runs, nothing written")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report = Report("verify")
    for case in CASES:
        copies = max(2, (96 << 20) // (case.batch * case.rows * case.vocab * 4) + 1)
        problems = [Problem(case, seed) for seed in range(min(copies, 8))]
        for problem in problems:
            problem.run_op()
            assert problem.num_accepted.tolist() == [case.accept] * case.batch, case
        functions: dict[str, Callable[[], Any]] = {
            "nld": rotate([p.run_op for p in problems]),
            "torch": rotate([p.run_torch for p in problems]),
        }
        extra = {}
        if options.threads == 1:
            cpu = cpu_medians(functions, 5 if options.quick else 15)
            extra = {
                "cpu us": cpu["nld"],
                "torch cpu us": cpu["torch"],
                "x cpu": cpu["torch"] / cpu["nld"],
            }
        timings = interleave(functions, budget_s=0.3 if options.quick else 3.0)
        report.add(case.name(), timings, "nld", num_bytes=problems[0].num_bytes(), **extra)
    if options.quick:
        for row in report.rows:
            cpu_text = f"  cpu time {row['x cpu']:5.1f}x" if "x cpu" in row else ""
            print(f"{row['case']:55} {row['us']:7.0f} us  {row['x torch']:5.1f}x{cpu_text}")
    else:
        report.finish()


if __name__ == "__main__":
    main()
