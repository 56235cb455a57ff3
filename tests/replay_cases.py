"""Calls of every op whose inputs change while shapes and addresses stay, as a CUDA graph needs it.

A `ReplayCase` makes the arguments of an op, as CPU tensors, for any number of variants: equal
shapes, other lengths, masks, modes, slots and values. `Call` holds them in fixed buffers on a
device, fills in a variant in place, runs the op on them, and knows what must have come out: what
`nld_cuda.reference` makes of the same variant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compare import assert_equal
from nld_cuda import ops, reference
from nld_cuda.ops import CommitRule, MaskMode, VerifyMode
from sharded import sharded_commit, sharded_verify

Args = dict[str, Any]
NUM_VARIANTS = 4


@dataclass(frozen=True)
class ReplayCase:
    """An op and how its arguments are made.

    Attributes:
        make: variant -> arguments by name; tensors on the CPU.
        written: arguments that the op writes.
        tolerance: absolute, of floating-point results.
        call: what runs it, if that is not the op of this name: several that come to the same.
    """

    op: str
    make: Callable[[int], Args]
    written: tuple[str, ...]
    tolerance: float = 0.0
    name: str = ""
    call: Callable | None = None

    def __str__(self) -> str:
        return self.name or self.op


class Call:
    """An op over fixed buffers on a device."""

    def __init__(self, case: ReplayCase, device: str) -> None:
        self.case = case
        self.buffers = {
            name: x.to(device, copy=True) if isinstance(x, Tensor) else x
            for name, x in case.make(0).items()
        }

    def fill(self, variant: int, *, non_blocking: bool = False) -> None:
        """Put another variant's values into the same buffers."""
        for name, x in self.case.make(variant).items():
            if isinstance(x, Tensor) and name != "tickets":  # those, the op itself must restore
                self.buffers[name].copy_(x, non_blocking=non_blocking)

    def __call__(self) -> None:
        (self.case.call or getattr(ops, self.case.op))(**self.buffers)

    def check(self, variant: int) -> None:
        """Compare what the op has written with the reference's result of the variant."""
        expected = self.expected(variant)
        for name in self.case.written:
            actual, want = self.buffers[name].cpu(), expected[name]
            if want.is_floating_point() and self.case.tolerance:
                assert_equal(actual.isnan(), want.isnan(), f"{name} NaN of variant {variant}")
                actual, want = actual.float().nan_to_num(), want.float().nan_to_num()
                error = torch.where(actual == want, 0.0, (actual - want).abs()).max().item()
                limit = self.case.tolerance
                assert error <= limit, f"{name} of variant {variant}: error {error:.3g} > {limit}"
            else:
                assert_equal(actual, want, f"{name} of variant {variant}")

    def expected(self, variant: int) -> Args:
        arguments = self.case.make(variant)
        function = getattr(reference, self.case.op)
        if self.case.op == "block_attention":
            outputs = ("out", "lse")
            inputs = {k: v for k, v in arguments.items() if k not in (*outputs, "plan")}
            for name, x in zip(outputs, function(**inputs), strict=True):
                arguments[name].copy_(x)
        else:
            function(**arguments)
        return arguments


def _ints(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _generator(variant: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 + variant)


def rope_append(variant: int) -> Args:
    """13 tokens; a variant leaves another number of them unwritten (slot -1)."""
    g = _generator(variant)
    tokens, heads, kv_heads, dim, pages, page_size = 13, 4, 2, 64, 5, 4
    slots = torch.randperm(pages * page_size, generator=g)[:tokens].int()
    slots[: 3 * variant] = -1
    qkv = torch.randn(tokens, heads + 2 * kv_heads, dim, generator=g).bfloat16()
    q, k, v = (x.contiguous() for x in qkv.split((heads, kv_heads, kv_heads), dim=1))
    cache = torch.full((pages, page_size, kv_heads, dim), torch.nan).bfloat16()
    return {
        "q": q, "k": k, "v": v, "k_cache": cache, "v_cache": cache.clone(),
        "positions": torch.randint(0, 9000, (tokens,), generator=g).int(), "slot_mapping": slots,
        "inv_freq": 1e4 ** -(torch.arange(dim // 2) / (dim // 2)),
    }  # fmt: skip


def compact(variant: int) -> Args:
    g = _generator(variant)
    layers, pages, page_size, batch, kept = 2, 12, 4, 2, 5
    caches = torch.randn(2, layers, pages, page_size, 2, 16, generator=g).bfloat16()
    table = torch.randperm(pages, generator=g).int().view(batch, pages // batch)
    steps = torch.randint(1, 4, (batch, kept), generator=g)
    return {
        "k_cache": caches[0].clone(), "v_cache": caches[1].clone(), "page_table": table,
        "base_lens": _ints([variant, 5]), "num_kept": _ints([kept - variant, variant]),
        "src_offsets": (steps.cumsum(1) - 1).int(),
    }  # fmt: skip


# Rows and cached tokens of three requests, and their masks. 40 rows are there in every variant;
# those past the last request belong to nobody.
_BATCHES = [
    ([(1, 70), (32, 100), (7, 9)], [MaskMode.CAUSAL, MaskMode.FULL, MaskMode.CAUSAL]),
    ([(8, 128), (0, 33), (32, 40)], [MaskMode.FULL, MaskMode.CAUSAL, MaskMode.BLOCK_CAUSAL]),
    ([(20, 31), (5, 0), (4, 77)], [MaskMode.QUADRATIC, MaskMode.FULL, MaskMode.CAUSAL]),
    ([(1, 1), (1, 128), (1, 65)], [MaskMode.CAUSAL, MaskMode.CAUSAL, MaskMode.FULL]),
]


def attention(variant: int, dtype: torch.dtype = torch.bfloat16, split_len: int = 0) -> Args:
    g = _generator(variant)
    requests, modes = _BATCHES[variant % len(_BATCHES)]
    total, heads, kv_heads, dim, page_size, max_pages = 40, 8, 2, 64, 16, 8
    rows, lens = zip(*requests, strict=True)
    pages = len(requests) * max_pages
    table = torch.randperm(pages, generator=g).int().view(len(requests), max_pages)
    caches = torch.randn(2, pages, page_size, kv_heads, dim, generator=g)
    for b, n in enumerate(lens):  # poison what no request may read
        flat = caches[:, table[b].long()].flatten(1, 2)
        flat[:, n:] = torch.nan
        caches[:, table[b].long()] = flat.view(2, max_pages, page_size, kv_heads, dim)
        table[b, -(-n // page_size) :] = 2**31 - 1
    return {
        "q": torch.randn(total, heads, dim, generator=g).to(dtype),
        "k_cache": caches[0].to(dtype), "v_cache": caches[1].to(dtype), "page_table": table,
        "seq_lens": _ints(lens), "cu_seqlens_q": _ints([0, *rows]).cumsum(0).int(),
        "mask_mode": _ints([int(m) for m in modes]), "block_len": _ints([4, 8, 8]),
        "block_phase": _ints([variant, 1, 2]), "split_len": split_len,
        "out": torch.full((total, heads, dim), torch.nan).to(dtype),
        "lse": torch.full((heads, total), torch.nan),
    }  # fmt: skip


def _logits(rows: int, vocab: int, g: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Return logits with one raised id a row: nothing hangs on rounding."""
    logits = torch.randn(rows, vocab, generator=g) * 2
    best = torch.randint(20, vocab, (rows,), generator=g)
    logits[torch.arange(rows), best] += torch.linspace(6, 14, rows)
    return logits.to(dtype)


def commit(variant: int, tickets: bool = False) -> Args:
    g = _generator(variant)
    rows, vocab, batch, mask = 24, 5003, 3, 7
    masked = torch.rand(rows, generator=g) < 0.3 * variant
    tokens = torch.randint(20, vocab, (rows,), generator=g).masked_fill(masked, mask)
    starts = [[0, 8, 16, 24], [0, 1, 20, 20], [0, 0, 0, 23], [0, 24, 24, 24]][variant % 4]
    rules = [CommitRule.THRESHOLD, CommitRule.QUOTA, CommitRule.ENTROPY, CommitRule.ALL]
    return {
        "logits": _logits(rows, vocab, g, torch.bfloat16), "block_tokens": tokens,
        "is_masked": masked, "cu_seqlens": _ints(starts),
        "rule": _ints([int(rules[(variant + b) % 4]) for b in range(batch)]),
        "threshold": torch.tensor([0.9, 0.5, 0.3]), "quota": _ints([1, 3, 2]),
        "mask_token_id": mask, "eos_token_ids": torch.tensor([[2, -1], [3, 4], [-1, -1]]),
        "temperature": torch.tensor([0.0, 0.7, 0.0]), "seed": torch.tensor([1, 2, 3]) + variant,
        "positions": (torch.arange(rows) + 100 * variant).int(),
        "candidates": torch.zeros(rows, dtype=torch.int64), "confidence": torch.zeros(rows),
        "num_committed": _ints([9] * batch), "num_remaining": _ints([9] * batch),
        "done": torch.zeros(batch, dtype=torch.bool),
        "tickets": _ints([0] * batch) if tickets else None,
    }  # fmt: skip


def verify(variant: int) -> Args:
    g = _generator(variant)
    rows, vocab, batch = 24, 5003, 3
    logits = _logits(rows, vocab, g, torch.float32)
    # Drafts that a greedy verifier accepts, up to one wrong one per variant.
    tokens = logits.argmax(-1).roll(1)
    tokens[3 + 4 * variant] = 11
    modes = [VerifyMode.GREEDY, VerifyMode.SAMPLED, VerifyMode.REJECTION, VerifyMode.COMMIT]
    starts = [[0, 8, 16, 24], [0, 1, 20, 20], [0, 0, 0, 23], [0, 24, 24, 24]][variant % 4]
    return {
        "logits": logits, "block_tokens": tokens, "cu_seqlens": _ints(starts),
        "verify_mode": _ints([int(modes[(variant + b) % 4]) for b in range(batch)]),
        "out_tokens": torch.full((batch, 40), -5), "out_lens": _ints([0, 3, variant]),
        "max_out_lens": _ints([40, 9, 30]), "next_tokens": torch.tensor([5, 6, 7]),
        "seq_lens": _ints([60, 70, 80]),
        "done": torch.tensor([False, variant == 3, False]),
        "positions": (torch.arange(rows) + 50).int(), "temperature": torch.tensor([0.0, 0.6, 0.8]),
        "seed": torch.tensor([4, 5, 6]) + variant, "eos_token_ids": torch.tensor([[2], [3], [-1]]),
        "num_emitted": _ints([9] * batch), "num_accepted": _ints([9] * batch),
    }  # fmt: skip


def verify_drawn_drafts(variant: int) -> Args:
    """Two launches: drafts with probabilities, some refused; forced tokens; tickets."""
    arguments = verify(variant)
    rows, vocab = arguments["logits"].shape
    g = _generator(variant)
    modes = [VerifyMode.REJECTION, VerifyMode.SAMPLED, VerifyMode.COMMIT]
    return arguments | {
        "verify_mode": _ints([int(modes[(variant + b) // 2 % 3]) for b in range(3)]),
        "temperature": torch.tensor([0.9, 0.6, 0.8]),
        "draft_probs": torch.softmax(_logits(rows, vocab, g, torch.float32) * (variant % 2), -1),
        "force_positions": _ints([-1, 52 + variant, -1]), "force_tokens": torch.tensor([7, 8, 9]),
        "tickets": _ints([0] * 3),
    }  # fmt: skip


def verify_shards(variant: int) -> Args:
    """Modes that shards of the vocabulary can judge."""
    arguments = verify(variant)
    modes = arguments["verify_mode"]
    modes[modes == VerifyMode.REJECTION] = int(VerifyMode.SAMPLED)
    return arguments


def gumbel_noise(variant: int) -> Args:
    return {
        "noise": torch.full((3, 1001), torch.nan), "seed": torch.tensor([1, 2**40, -3]) + variant,
        "positions": _ints([variant, 77, 4096]), "purpose": 0,
    }  # fmt: skip


_COMMITTED = (
    "block_tokens", "is_masked", "candidates", "confidence", "num_committed", "num_remaining",
    "done",
)  # fmt: skip
_VERIFIED = (
    "out_tokens", "out_lens", "next_tokens", "seq_lens", "done", "num_emitted", "num_accepted",
)  # fmt: skip

REPLAY_CASES = [
    ReplayCase("rope_append_", rope_append, ("q", "k_cache", "v_cache"), 0.06),
    ReplayCase("compact_", compact, ("k_cache", "v_cache")),
    ReplayCase("block_attention", attention, ("out", "lse"), 0.02),
    ReplayCase(
        "block_attention", lambda v: attention(v, torch.float16, 32), ("out", "lse"), 0.004,
        name="block_attention-split",
    ),
    ReplayCase("commit_", commit, _COMMITTED, 1e-5),
    ReplayCase(
        "commit_", lambda v: commit(v, tickets=True), (*_COMMITTED, "tickets"), 1e-5,
        name="commit_-tickets",
    ),
    ReplayCase("verify_", verify, _VERIFIED),
    ReplayCase(
        "verify_", verify_drawn_drafts, (*_VERIFIED, "force_positions", "tickets"),
        name="verify_-drawn-drafts",
    ),
    ReplayCase(
        "commit_", commit, _COMMITTED, 1e-5, "commit_-shards", sharded_commit([1001, 4000]),
    ),
    ReplayCase("verify_", verify_shards, _VERIFIED, 0.0, "verify_-shards", sharded_verify([2503])),
    ReplayCase("gumbel_noise_", gumbel_noise, ("noise",)),
]  # fmt: skip
