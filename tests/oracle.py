"""The four decode loops for one request, dense and slow: no cache, no batch, everything recomputed.

Written from the description of the published algorithms (greedy, batch of one), independent of
`nld_cuda.decode`. A loop sees the model only through

    logits(tokens, positions, mask, draft_from) -> float32 [n, vocab]

with `mask[i, j]` true where row i sees row j, and the draft adapter on for the rows from
`draft_from` on (None: off). Each loop returns `(new tokens, nfe)`; nfe counts forwards as the
published loop of that mode does. Where the published loop has a defect, the right behaviour is
implemented here and the place says "defect".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Logits = Callable[[list[int], list[int], Tensor, "int | None"], Tensor]


@dataclass(frozen=True)
class Options:
    """What every loop needs to know besides the prompt."""

    max_new: int
    mask_id: int
    eos: tuple[int, ...] = ()
    budget: int | None = None  # thinking tokens after which `end_think` is forced
    end_think: int | None = None

    def forced(self, place: int, emitted: Sequence[int]) -> int | None:
        """The token forced as new token number `place` after `emitted`, if any."""
        if self.budget is None or place != self.budget or self.end_think in emitted:
            return None
        return self.end_think

    def cut(self, tokens: Sequence[int]) -> tuple[list[int], bool]:
        """Tokens up to the first EOS (kept) and the length limit, and whether the request ended."""
        for i, token in enumerate(tokens[: self.max_new]):
            if token in self.eos:
                return list(tokens[: i + 1]), True
        return list(tokens[: self.max_new]), len(tokens) >= self.max_new


def causal_mask(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


def block_mask(context: int, block: int) -> Tensor:
    """`context` causal rows, then `block` rows that see everything."""
    mask = causal_mask(context + block)
    mask[context:] = True
    return mask


def quadratic_mask(context: int, k: int) -> Tensor:
    """`context` causal rows, then k groups of one head and k masks."""
    n = context + k * (k + 1)
    mask = causal_mask(n)
    for i in range(context, n):
        group_i, slot_i = divmod(i - context, k + 1)
        for j in range(context, n):
            group_j, slot_j = divmod(j - context, k + 1)
            head_before = slot_j == 0 and j <= i
            same_group = slot_i > 0 and group_i == group_j
            mask[i, j] = head_before or same_group
    return mask


def _ar_rows(logits: Logits, tokens: list[int]) -> list[int]:
    rows = logits(tokens, list(range(len(tokens))), causal_mask(len(tokens)), None)
    return rows.argmax(-1).tolist()


def _judge(rows: Tensor, mask_id: int) -> tuple[Tensor, Tensor]:
    """Best token of each row, never the mask (allowed as published: defect), and its confidence."""
    probs = torch.softmax(rows.float(), -1)
    allowed = rows.clone()
    allowed[:, mask_id] = -torch.inf
    token = allowed.argmax(-1)
    return token, probs.gather(-1, token[:, None])[:, 0]


def ar(logits: Logits, prompt: list[int], opt: Options) -> tuple[list[int], int]:
    """One token per forward. nfe = tokens emitted."""
    out: list[int] = []
    while len(out) < opt.max_new:
        token = _ar_rows(logits, prompt + out)[-1]
        forced = opt.forced(len(out), out)
        out.append(token if forced is None else forced)
        if out[-1] in opt.eos:
            break
    return out, len(out)


def diffusion(
    logits: Logits, prompt: list[int], opt: Options, block_len: int, threshold: float | None = None
) -> tuple[list[int], int]:
    """Denoise blocks of [seed, masks], a causal pass after each. nfe = denoise passes + blocks."""
    out: list[int] = []
    nfe = 0
    token = _ar_rows(logits, prompt)[-1]
    while len(out) < opt.max_new:
        forced = opt.forced(len(out), out)
        block = [token if forced is None else forced] + [opt.mask_id] * (block_len - 1)
        # rows past the budget stay mask tokens: context only
        masked = [0 < i < opt.max_new - len(out) for i in range(block_len)]
        pinned = None
        if opt.budget is not None and opt.end_think not in [*out, block[0]]:
            offset = opt.budget - len(out)
            if 0 < offset < block_len and masked[offset]:
                block[offset], masked[offset], pinned = opt.end_think, False, offset
        if len(out) + 1 == opt.max_new:
            # all that is left is known: the published loop runs the block all the same (defect)
            out.append(block[0])
            break
        context = prompt + out
        while any(masked):
            nfe += 1
            tokens = context + block
            mask = block_mask(len(context), block_len)
            rows = logits(tokens, list(range(len(tokens))), mask, None)[len(context) :]
            best, confidence = _judge(rows, opt.mask_id)
            candidates = [i for i in range(block_len) if masked[i]]
            top = max(candidates, key=lambda i: (float(confidence[i]), -i))
            for i in candidates:
                if i == top or (threshold is not None and float(confidence[i]) >= threshold):
                    block[i], masked[i] = int(best[i]), False
            first_eos = next(
                (i for i, t in enumerate(block) if t in opt.eos and not masked[i]), None
            )
            if first_eos is not None and not any(masked[:first_eos]):
                break
            if pinned is not None and opt.end_think in [
                t for i, t in enumerate(block[:pinned]) if not masked[i]
            ]:
                # thinking already ended further left: the published loop keeps both (defect)
                block[pinned], masked[pinned], pinned = opt.mask_id, True, None
        nfe += 1
        token = _ar_rows(logits, context + block)[-1]
        out += block
        out, ended = opt.cut(out)
        if ended:
            break
    return out, nfe


def linear_spec(
    logits: Logits, prompt: list[int], opt: Options, block_len: int, threshold: float = 0.0
) -> tuple[list[int], int]:
    """Draft a block, verify it, keep the agreeing prefix and one token. nfe = 1 + all passes."""
    out: list[int] = []
    if not opt.max_new:
        return out, 0

    def emit(token: int) -> None:
        forced = opt.forced(len(out), out)
        out.append(token if forced is None else forced)

    nfe = 1
    emit(_ar_rows(logits, prompt)[-1])
    ended = opt.cut(out)[1]
    while not ended:
        context = prompt + out[:-1]
        block = [out[-1]] + [opt.mask_id] * (block_len - 1)
        masked = [False] + [True] * (block_len - 1)
        if opt.budget is not None and opt.end_think not in out:
            offset = opt.budget - (len(out) - 1)
            if 0 < offset < block_len:
                block[offset], masked[offset] = opt.end_think, False
        while any(masked):
            nfe += 1
            tokens = context + block
            mask = block_mask(len(context), block_len)
            rows = logits(tokens, list(range(len(tokens))), mask, len(context))
            best, confidence = _judge(rows[len(context) :], opt.mask_id)
            candidates = [i for i in range(block_len) if masked[i]]
            passing = [i for i in candidates if float(confidence[i]) >= threshold]
            top = max(candidates, key=lambda i: (float(confidence[i]), -i))
            for i in set(passing) | {top}:
                block[i], masked[i] = int(best[i]), False
        nfe += 1
        targets = _ar_rows(logits, context + block)[len(context) :]
        for i in range(block_len):
            emit(targets[i])
            if i + 1 == block_len or block[i + 1] != out[-1]:
                break
        out, ended = opt.cut(out)
    return out, nfe


def quadratic_spec(
    logits: Logits, prompt: list[int], opt: Options, k: int, *, late_bonus: bool = False
) -> tuple[list[int], int]:
    """Verify k drafts and predraft after each of them in one forward. nfe = 1 + steps.

    The published loop holds back the verifier's own token until the next step has shown it again
    (late_bonus=True), though nothing can reject it; ours emits it at once.
    """
    n = len(prompt)
    if not opt.max_new:
        return [], 0
    mask = causal_mask(n + k)
    mask[n:] = True
    rows = logits(prompt + [opt.mask_id] * k, list(range(n + k)), mask, None)
    nfe = 1
    out: list[int] = []

    def target(token: int) -> int:
        forced = opt.forced(len(out), out)
        return token if forced is None else forced

    def pin(drafts: list[int]) -> list[int]:
        """A token that will be forced need not be guessed."""
        if opt.budget is not None and opt.end_think not in out:
            offset = opt.budget - len(out)
            if 0 <= offset < len(drafts):
                drafts[offset] = opt.end_think
        return drafts

    out.append(target(int(rows[n - 1].argmax())))
    drafts = pin(_judge(rows[n + 1 :], opt.mask_id)[0].tolist())
    done = opt.cut(out)[1] and not late_bonus
    while not done:
        context = prompt + out[:-1]
        heads = [out[-1], *drafts]
        if late_bonus and (out[-1] in opt.eos or len(out) > opt.max_new):
            nfe += 1
            break
        tokens, positions = list(context), list(range(len(context)))
        for j, head in enumerate(heads):
            tokens += [head] + [opt.mask_id] * k
            positions += [len(context) + j + i for i in range(k + 1)]
        rows = logits(tokens, positions, quadratic_mask(len(context), k), None)
        rows = rows[len(context) :].view(k, k + 1, -1)
        nfe += 1
        for j in range(k):
            out.append(target(int(rows[j, 0].argmax())))
            if j + 1 == k or heads[j + 1] != out[-1]:
                break
        drafts = pin(_judge(rows[j, 2:], opt.mask_id)[0].tolist())
        done = opt.cut(out[:-1] if late_bonus else out)[1]
    return opt.cut(out)[0], nfe
