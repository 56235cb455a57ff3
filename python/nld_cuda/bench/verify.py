"""Problems of verify_, and the eager pipeline with its host-side slicing that it replaces."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nld_cuda import ops
from nld_cuda.bench import grid
from nld_cuda.bench.base import Baseline, Prepared, dtype_of
from nld_cuda.ops import VerifyMode

EOS, TEMPERATURE, SEQ_LEN, CAPACITY = 11, 0.8, 600, 128


class VerifyProblem:
    """Drafts of a cell on a device, made so that exactly `accept` of them are accepted."""

    def __init__(self, cell: grid.Verify, device: torch.device) -> None:
        torch.manual_seed(0)
        batch, n, vocab = cell.batch, cell.rows, cell.vocab
        rows = batch * n
        self.cell = cell
        self.logits = (torch.randn(rows, vocab, device=device) * 2).to(dtype_of(cell.dtype))
        ints: dict[str, Any] = {"dtype": torch.int32, "device": device}
        self.temperature = torch.full((batch,), TEMPERATURE, device=device)
        self.seeds = torch.arange(batch, device=device) + 1000
        self.positions = torch.arange(rows, **ints) % n + 500
        self.starts = torch.arange(0, rows + 1, n, **ints)
        self.mode = torch.full((batch,), int(cell.mode), **ints)
        self.eos = torch.full((batch, 1), EOS, device=device)
        self.draft_probs: Tensor | None = None
        self.out_tokens = torch.zeros(batch, CAPACITY, dtype=torch.int64, device=device)
        self.next_tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        self.out_lens, self.seq_lens, self.num_emitted, self.num_accepted, self.tickets = (
            torch.zeros(batch, **ints) for _ in range(5)
        )
        self.max_out_lens = torch.full((batch,), CAPACITY, **ints)
        self.done = torch.zeros(batch, dtype=torch.bool, device=device)
        self.block = self._drafts().view(-1)
        self.reset()

    def _drafts(self) -> Tensor:
        """Draft what the mode accepts, up to the wanted number."""
        cell, (rows, vocab), device = self.cell, self.logits.shape, self.logits.device
        n = cell.rows
        self.logits[:, EOS] = -torch.inf
        if cell.mode == VerifyMode.REJECTION and cell.draft_probs:
            # Draft and target distribution are equal, so every draft is accepted.
            self.draft_probs = torch.softmax(self.logits.float() / TEMPERATURE, -1).roll(1, 0)
            judge = torch.multinomial(self.draft_probs, 1)[:, 0]
        elif cell.mode == VerifyMode.REJECTION:
            judge = self.logits.float().argmax(-1).roll(1)
            before = torch.arange(rows, device=device).roll(1)
            self.logits[before, judge] = 200.0  # probability 1
        else:  # one-row steps tell the targets
            mode = VerifyMode.GREEDY if cell.mode == VerifyMode.COMMIT else cell.mode
            judge = self._targets(mode).roll(1)
        block = judge.view(cell.batch, n).clone()
        if cell.accept < n - 1:
            refused = cell.accept + 1
            block[:, refused] = (block[:, refused] + vocab // 3 + 1) % vocab
            row = torch.arange(cell.batch, device=device) * n + refused
            self.logits[row - 1, block[:, refused]] = -torch.inf
            if self.draft_probs is not None:
                random = torch.randn(cell.batch, vocab, device=device)
                self.draft_probs[row] = torch.softmax(random, -1)
                self.draft_probs[row, block[:, refused]] = 0.5
        return block

    def _targets(self, mode: VerifyMode) -> Tensor:
        """Return the token that a one-row step emits at every row."""
        rows, device, n = len(self.logits), self.logits.device, self.cell.rows
        ints: dict[str, Any] = {"dtype": torch.int32, "device": device}
        out = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        block, next_tokens = (torch.zeros(rows, dtype=torch.int64, device=device) for _ in "ab")
        ops.verify_(
            self.logits, block, torch.arange(rows + 1, **ints),
            torch.full((rows,), int(mode), **ints), out, torch.zeros(rows, **ints),
            torch.ones(rows, **ints), next_tokens, torch.ones(rows, **ints),
            torch.zeros(rows, dtype=torch.bool, device=device), positions=self.positions,
            temperature=self.temperature.repeat_interleave(n),
            seed=self.seeds.repeat_interleave(n),
        )  # fmt: skip
        return next_tokens

    def run(self) -> Tensor:
        """Call our op."""
        ops.verify_(
            self.logits, self.block, self.starts, self.mode, self.out_tokens, self.out_lens,
            self.max_out_lens, self.next_tokens, self.seq_lens, self.done,
            positions=self.positions, temperature=self.temperature, seed=self.seeds,
            draft_probs=self.draft_probs, eos_token_ids=self.eos, num_emitted=self.num_emitted,
            num_accepted=self.num_accepted, tickets=self.tickets,
        )  # fmt: skip
        return self.num_accepted

    def reset(self) -> None:
        """Start with nothing emitted."""
        self.out_lens.zero_()
        self.seq_lens.fill_(SEQ_LEN)
        self.done.zero_()


class Eager:
    """The same with torch ops and lists, as a decode loop without the op does it."""

    def __init__(self, problem: VerifyProblem) -> None:
        self.problem = problem
        self.block = problem.block.view(problem.cell.batch, -1)
        self.seq_lens = problem.seq_lens.clone()
        self.next_tokens = problem.next_tokens.clone()
        self.done = problem.done.clone()
        self.accepted: list[int] = []
        self.reset()

    def reset(self) -> None:
        """Start with nothing emitted."""
        self.seq_lens.fill_(SEQ_LEN)
        self.lists: list[list[int]] = [[] for _ in range(len(self.block))]

    def run(self) -> None:
        """Judge, then emit."""
        cell, (batch, n) = self.problem.cell, self.block.shape
        logits = self.problem.logits.view(batch, n, -1)
        drafts = self.block[:, 1:]
        if cell.mode == VerifyMode.REJECTION:
            accepted, bonus = self._rejection(logits, drafts)
        elif cell.mode == VerifyMode.COMMIT:
            p = torch.softmax(logits[:, -1].float() / TEMPERATURE, -1)
            accepted = torch.full((batch,), n - 1, device=p.device)
            bonus = torch.multinomial(p, 1)[:, 0]
        else:
            if cell.mode == VerifyMode.GREEDY:
                target = logits.argmax(-1)
            else:
                p = torch.softmax(logits.float() / TEMPERATURE, -1)
                target = torch.multinomial(p.view(batch * n, -1), 1).view(batch, n)
            accepted = (target[:, :-1] == drafts).long().cumprod(1).sum(1)
            bonus = target.gather(1, accepted[:, None])[:, 0]
        self.accepted = accepted.tolist()
        self.emit(self.accepted, bonus.tolist())

    def _rejection(self, logits: Tensor, drafts: Tensor) -> tuple[Tensor, Tensor]:
        batch, n = self.block.shape
        p = torch.softmax(logits.float() / TEMPERATURE, -1)
        p_draft = p[:, :-1].gather(2, drafts[..., None])[..., 0]
        given = self.problem.draft_probs
        q = None if given is None else given.view(batch, n, -1)[:, 1:]
        q_draft = 1.0 if q is None else q.gather(2, drafts[..., None])[..., 0]
        keep = torch.rand_like(p_draft) * q_draft < p_draft
        accepted = keep.long().cumprod(1).sum(1)
        left = p[torch.arange(batch, device=p.device), accepted]
        for b, count in enumerate(accepted.tolist()):
            if count < n - 1 and q is not None:
                left[b] = (left[b] - q[b, count]).clamp_min(0)
            elif count < n - 1:
                left[b, drafts[b, count]] = 0
        return accepted, torch.multinomial(left, 1)[:, 0]

    def emit(self, accepted: list[int], bonus: list[int]) -> None:
        """Append to the lists, cut at EOS and budget, move the lengths back."""
        rows = self.block.shape[1]
        for b, (count, token) in enumerate(zip(accepted, bonus, strict=True)):
            tokens = [*self.block[b, 1 : count + 1].tolist(), token]
            if EOS in tokens:
                tokens = tokens[: tokens.index(EOS) + 1]
                self.done[b] = True
            self.lists[b] += tokens
            if len(self.lists[b]) >= CAPACITY:
                self.done[b] = True
            self.next_tokens[b] = tokens[-1]
            self.seq_lens[b] -= rows - len(tokens)


def _make(problem: VerifyProblem) -> Prepared:
    made = Eager(problem)
    return Prepared(made.run, lambda _: made, made.reset)


def _differs(problem: VerifyProblem, result: Eager) -> str | None:
    """Compare tokens and lengths; of what is drawn only the number that is certain."""
    cell = problem.cell
    problem.reset()
    problem.run()
    ours, lens = problem.num_accepted.tolist(), problem.seq_lens.tolist()
    out = zip(problem.out_tokens.tolist(), problem.out_lens.tolist(), strict=True)
    emitted = [tokens[:length] for tokens, length in out]
    problem.reset()
    if ours != [cell.accept] * cell.batch:
        return f"ours accepts {ours}, made for {cell.accept}"
    if cell.mode == VerifyMode.SAMPLED:
        return None  # other random numbers: nothing but the shape could be compared
    if result.accepted != ours or result.seq_lens.tolist() != lens:
        return f"accepts {result.accepted}, ours {ours}"
    if cell.mode == VerifyMode.GREEDY and result.lists != emitted:
        return "emits other tokens than ours"
    return None


def _eager_bytes(cell: grid.Verify) -> float:
    return 12.0 * cell.batch * cell.rows * cell.vocab


TORCH = Baseline(
    "torch", _make, _differs, in_graph=False, layout="torch verify", layout_bytes=_eager_bytes
)
BASELINES = (TORCH,)


def problem_bytes(cell: grid.Verify) -> float:
    """Memory that one problem takes."""
    element = grid.ELEMENT_BYTES[cell.dtype] + (4 if cell.draft_probs else 0)
    return float(cell.batch * cell.rows * cell.vocab * (element + 4))
