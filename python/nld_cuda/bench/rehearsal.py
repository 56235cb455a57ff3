"""Small cells that take every path of the suite: of rehearsals and tests."""

from __future__ import annotations

from typing import Any

from nld_cuda.bench.grid import Append, Attention, Cell, Commit, Compact, Request, Verify
from nld_cuda.ops import CommitRule, MaskMode, VerifyMode


def cells() -> list[Cell]:
    """Return them; no figure of theirs means anything."""
    sizes: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_dim": 64}
    f32 = {"dtype": "float32", "kv_dtype": "float32"}
    causal, block, quadratic = MaskMode.CAUSAL, MaskMode.BLOCK_CAUSAL, MaskMode.QUADRATIC
    every = (
        Request(4, 20), Request(6, 19, causal), Request(1, 50, causal),
        Request(6, 23, quadratic, 2), Request(8, 8, block, 4),
    )  # fmt: skip
    batches: list[tuple[str, tuple[Request, ...], str, dict[str, str]]] = [
        ("q4/b2/c40", (Request(4, 40),) * 2, "decode", f32),
        ("q1/b2/c33", (Request(1, 33, causal),) * 2, "decode", {}),
        ("q5/b1/c37", (Request(5, 37, causal),), "decode", {}),
        ("quadratic/k2/b1/c20", (Request(6, 26, quadratic, 2),), "quadratic", {}),
        ("prefill/causal/b1/c24", (Request(24, 24, causal),), "prefill", {}),
        ("prefill/block_causal/b1/c24", (Request(24, 24, block, 8),), "prefill", f32),
        ("everything/b5", every, "mixed", f32),
        ("lengths/q4/b2", (Request(4, 20), Request(4, 33)), "mixed", {}),
        ("q4/b2/c40/fp8", (Request(4, 40),) * 2, "fp8", {"kv_dtype": "float8_e4m3fn"}),
    ]
    made: list[Cell] = [
        Attention(f"attention/{name}", requests, group, True, **sizes, **dtypes)  # type: ignore
        for name, requests, group, dtypes in batches
    ]
    made += [
        Commit(1, 4, "float32", vocab=300),
        Commit(2, 3, rule=CommitRule.ENTROPY, masked=0.5, vocab=301),
        Commit(2, 4, "float32", CommitRule.QUOTA, vocab=300),
        Commit(1, 4, "float32", temperature=1.0, vocab=300),
        *(
            Verify(mode, 2, 4, 2, "float32", vocab=300)
            for mode in (VerifyMode.GREEDY, VerifyMode.SAMPLED, VerifyMode.REJECTION)
        ),
        Verify(VerifyMode.REJECTION, 2, 4, 2, draft_probs=True, vocab=301),
        Verify(VerifyMode.COMMIT, 2, 4, 3, vocab=301),
        Append(5, "float32", "float32", **sizes),
        Append(3, kv_dtype="float8_e4m3fn", **sizes),
        Compact("tiny", 2, 3, 12),
    ]
    return made
