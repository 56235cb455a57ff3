"""Frozen test cases: CORRECT (odd sizes), CORNER (edges), PERF (reused by the benchmarks)."""

from __future__ import annotations

from dataclasses import dataclass, replace

FULL, CAUSAL, BLOCK_CAUSAL, QUADRATIC = range(4)


@dataclass(frozen=True)
class Request:
    """One request of an attention batch: rows of q, tokens in the cache, its mask."""

    rows: int
    seq_len: int
    mode: int = CAUSAL
    block_len: int = 0
    phase: int = 0


@dataclass(frozen=True)
class AttentionCase:
    name: str
    requests: tuple[Request, ...]
    heads: int = 4
    kv_heads: int = 2
    dim: int = 64
    page_size: int = 16
    hnd: bool = False  # pages stored [num_pages, heads, page_size, dim]
    softcap: float = 0.0
    scale: float | None = None
    split_len: int = 0
    extra_rows: int = 0  # rows of q that belong to nobody

    def __str__(self) -> str:
        return self.name

    @property
    def rows(self) -> int:
        return sum(r.rows for r in self.requests)


MIXED = (
    Request(7, 70, CAUSAL),
    Request(33, 113, FULL),
    Request(40, 203, BLOCK_CAUSAL, block_len=8, phase=3),
    Request(30, 150, QUADRATIC, block_len=4),
    Request(1, 300, CAUSAL),
)

ATTENTION_CORRECT = [
    AttentionCase("mixed", MIXED, page_size=5),
    AttentionCase("mixed-splits", MIXED, split_len=64, extra_rows=3),
    AttentionCase("mixed-odd-split", MIXED, split_len=37),
    AttentionCase("mixed-hnd", MIXED, hnd=True, page_size=32),
    AttentionCase("mixed-page-1", MIXED, page_size=1),
    AttentionCase("mha", MIXED, heads=3, kv_heads=3, dim=96),
    AttentionCase("mqa-5", MIXED, heads=5, kv_heads=1, dim=40),
    AttentionCase("gqa-9-of-3", MIXED, heads=9, kv_heads=3, dim=72),
    AttentionCase("wide-gqa", (Request(3, 40), Request(2, 9, FULL)), heads=150, kv_heads=1, dim=16),
    AttentionCase("dim-1", MIXED, dim=1),
    AttentionCase("dim-7", MIXED, dim=7),
    AttentionCase("dim-33", MIXED, dim=33),
    AttentionCase("dim-320", (Request(5, 133, FULL), Request(9, 21)), dim=320),
    AttentionCase("softcap", MIXED, softcap=3.0, dim=128),
    AttentionCase("scale", MIXED, scale=0.7),
    AttentionCase("negative-scale", MIXED, scale=-0.2),
    AttentionCase("prompt", (Request(203, 203),), dim=32, split_len=128),
    AttentionCase("long", (Request(32, 2500, FULL), Request(3, 1025)), heads=8, dim=16),
    AttentionCase(
        "block-causal-phases",
        tuple(
            Request(20, 61, BLOCK_CAUSAL, block_len=6, phase=phase)
            for phase in (0, 1, 5, 6, -1, -7)
        ),
    ),
    AttentionCase("block-16-groups", (Request(16 * 17, 16 * 17 + 30, QUADRATIC, block_len=16),)),
]

ATTENTION_CORNER = [
    AttentionCase("empty-batch", ()),
    AttentionCase("empty-batch-with-rows", (), extra_rows=5),
    AttentionCase("no-rows", (Request(0, 20), Request(0, 0))),
    AttentionCase(
        "seq-len-0",
        (Request(5, 0, FULL), Request(3, 9), Request(2, 0), Request(4, 0, QUADRATIC, 1)),
    ),
    AttentionCase(
        "more-rows-than-keys",
        (Request(9, 4), Request(9, 4, BLOCK_CAUSAL, 3, 1), Request(9, 4, FULL)),
    ),
    AttentionCase("more-rows-than-keys-groups", (Request(9, 4, QUADRATIC, block_len=2),)),
    AttentionCase("one-key", (Request(1, 1), Request(1, 1, FULL))),
    AttentionCase("pages-exactly-full", (Request(16, 32), Request(16, 16, FULL))),
    AttentionCase("block-len-1", (Request(12, 30, BLOCK_CAUSAL, 1), Request(12, 30, QUADRATIC, 1))),
    AttentionCase("partial-last-group", (Request(11, 23, QUADRATIC, block_len=3),)),
    AttentionCase("block-longer-than-all", (Request(12, 30, BLOCK_CAUSAL, 1000),)),
    AttentionCase("split-1", (Request(3, 11),), split_len=1),
]

# The shape of the 3B to 14B models: 32 query tokens against a context.
ATTENTION_PERF = [
    AttentionCase(
        f"{rows}x{context}",
        (Request(rows, context, FULL),),
        heads=32,
        kv_heads=8,
        dim=128,
        page_size=16,
    )
    for rows in (32, 1)
    for context in (1024, 2048, 4096, 8192)
]
ATTENTION_PERF += [
    replace(ATTENTION_PERF[0], name="prompt 1024", requests=(Request(1024, 1024, CAUSAL),)),
    replace(
        ATTENTION_PERF[0],
        name="batch 4 mixed",
        requests=(
            Request(32, 512, FULL),
            Request(32, 3000, CAUSAL),
            Request(1, 2000, CAUSAL),
            Request(272, 1272, QUADRATIC, 16),
        ),
    ),
]
