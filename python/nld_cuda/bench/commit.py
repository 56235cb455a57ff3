"""Problems of commit_, and the eager pipeline it replaces: softmax, max, gather, where, topk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nld_cuda import ops
from nld_cuda.bench import grid
from nld_cuda.bench.base import Baseline, Prepared, compiled, dtype_of
from nld_cuda.ops import CommitRule

MASK, THRESHOLD = 100, 0.9


class CommitProblem:
    """Blocks of a cell on a device; the last rows of each are masked."""

    def __init__(self, cell: grid.Commit, device: torch.device) -> None:
        torch.manual_seed(0)
        self.cell = cell
        rows, batch = cell.batch * cell.rows, cell.batch
        # Normal logits with one raised id a row: most rows confident, as in a real block.
        logits = torch.randn(rows, cell.vocab, device=device) * 2
        raised = torch.randint(0, cell.vocab, (rows,), device=device)
        logits[torch.arange(rows, device=device), raised] += 14
        self.logits = logits.to(dtype_of(cell.dtype))
        masked = torch.arange(cell.rows) >= cell.rows - round(cell.rows * cell.masked)
        self.fresh_mask = masked.repeat(batch).to(device)
        self.is_masked = self.fresh_mask.clone()
        self.tokens = torch.full((rows,), MASK, device=device)
        ints: dict[str, Any] = {"dtype": torch.int32, "device": device}
        self.starts = torch.arange(0, rows + 1, cell.rows, **ints)
        self.rule = torch.full((batch,), int(cell.rule), **ints)
        self.threshold = torch.full((batch,), THRESHOLD, device=device)
        self.outputs: dict[str, Any] = {
            "candidates": torch.zeros(rows, dtype=torch.int64, device=device),
            "confidence": torch.zeros(rows, device=device),
            "num_committed": torch.zeros(batch, **ints),
            "num_remaining": torch.zeros(batch, **ints),
            "done": torch.zeros(batch, dtype=torch.bool, device=device),
            "tickets": torch.zeros(batch, **ints),
        }
        self.draw: dict[str, Any] = {}
        if cell.temperature > 0:
            self.draw = {
                "temperature": torch.full((batch,), cell.temperature, device=device),
                "seed": torch.arange(1, batch + 1, device=device),
                "positions": torch.arange(rows, **ints),
            }

    def run(self, draw: bool = True) -> Tensor:
        """Call our op; without `draw` at temperature 0."""
        ops.commit_(
            self.logits, self.tokens, self.is_masked, self.starts, self.rule, self.threshold,
            mask_token_id=MASK, **(self.draw if draw else {}), **self.outputs,
        )  # fmt: skip
        return self.tokens

    def reset(self) -> None:
        """Mask the block again."""
        self.is_masked.copy_(self.fresh_mask)
        self.tokens.fill_(MASK)


def eager(
    logits: Tensor, is_masked: Tensor, rule: CommitRule, batch: int, temperature: float
) -> Tensor:
    """Judge every row, as eager pipelines do: gathering the masked ones needs a host read."""
    logits = logits.float()
    noisy = logits
    if temperature > 0:
        noisy = logits / temperature - torch.empty_like(logits).exponential_().log_()
    candidates = noisy.max(-1).indices
    probs = logits.softmax(-1)
    masked = is_masked.view(batch, -1)
    if rule == CommitRule.ALL:
        return torch.where(is_masked, candidates, MASK)
    if rule == CommitRule.ENTROPY:
        entropy = -(probs * probs.clamp_min(1e-10).log()).sum(-1)
        ordered, order = torch.where(masked, entropy.view(batch, -1), torch.inf).sort(-1)
        fits = (ordered.cumsum(-1) - ordered <= THRESHOLD) & (ordered < torch.inf)
        commits = torch.zeros_like(masked).scatter(1, order, fits)
    else:
        confidence = probs.gather(-1, candidates[:, None])[:, 0]
        score = torch.where(masked, confidence.view(batch, -1), -torch.inf)
        best = score.topk(1).indices
        commits = masked & (score >= THRESHOLD) & (rule != CommitRule.QUOTA)
        commits = commits.scatter(1, best, True)
    return torch.where(commits.view(-1), candidates, MASK)


def _make(problem: CommitProblem, function: Callable[..., Tensor] = eager) -> Prepared:
    cell = problem.cell
    arguments = (problem.logits, problem.fresh_mask, cell.rule, cell.batch)
    return Prepared(
        lambda: function(*arguments, cell.temperature), lambda _: function(*arguments, 0.0)
    )


def _make_compiled(problem: CommitProblem) -> Prepared:
    return _make(problem, torch.compile(eager, dynamic=False))


def _differs(problem: CommitProblem, result: Tensor) -> str | None:
    """Compare at temperature 0: with noise each draws its own."""
    problem.reset()
    same = torch.equal(problem.run(draw=False), result)
    problem.reset()
    return None if same else "reveals other tokens than ours"


def _refuses(cell: grid.Commit, device: str) -> str | None:
    if cell.rule == CommitRule.REVISE and cell.masked < 1:
        return "the eager pipeline has no revision"
    return None


def _read_bytes(cell: grid.Commit) -> float:
    """Float32 logits, probabilities, noise."""
    return 4.0 * cell.batch * cell.rows * cell.vocab * (4 if cell.temperature else 3)


TORCH = Baseline(
    "torch", _make, _differs, refuses=_refuses, layout="torch commit", layout_bytes=_read_bytes
)
COMPILED = compiled(TORCH, _make_compiled)
# The time that reading the logits takes at least, by a torch sum.
READ = Baseline(
    "read (sum)", lambda p: Prepared(p.logits.sum), lambda problem, result: None,
    refuses=lambda cell, _: None if cell.masked == 1 else "would read rows that are not judged",
    note="does nothing but read the logits: a roof, no rival",
)  # fmt: skip
BASELINES = (TORCH, COMPILED, READ)


def problem_bytes(cell: grid.Commit) -> float:
    """Memory that one problem takes, with the float32 values that become its logits."""
    return float(cell.batch * cell.rows * cell.vocab * (grid.ELEMENT_BYTES[cell.dtype] + 8))
