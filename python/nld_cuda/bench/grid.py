"""The cells that are predicted, tuned and measured: shapes of the models, batches, contexts.

One frozen dataclass an op. `time_model.py` predicts every cell, `tune.py` looks for better choices
than the heuristic's, the benchmarks measure. Names are paths, made of the shape alone, so that
results of different machines and days can be laid side by side: `attention/q32/b8/c4096`.

The published 3B, 8B and 14B models have the same 32 query heads, 8 kv heads of 128 and vocabulary,
so a layer's ops cost the same in all three; they differ where layers are counted (`compact_`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from nld_cuda.ops import CommitRule, MaskMode, VerifyMode


@dataclass(frozen=True)
class Model:
    """What of a model the ops see."""

    layers: int
    hidden: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    vocab: int = 131072


# Layers of the 14B model are those of its base model; the other values are in the published files.
MODELS = {"3B": Model(26, 3072), "8B": Model(34, 4096), "14B": Model(40, 5120)}
MODEL = MODELS["8B"]

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}

BATCHES = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
ROWS = (1, 8, 16, 32, 64)
PREFILLS = (1024, 2048, 4096, 8192, 16384)


# ---- block_attention -------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """One request: rows of q, keys in the cache including theirs, and its mask."""

    rows: int
    seq_len: int
    mode: MaskMode = MaskMode.FULL
    block_len: int = 1


@dataclass(frozen=True)
class Attention:
    """One call of block_attention.

    Attributes:
        group: cells of one table: decode, mixed, quadratic, prefill, fp8, page.
        headline: one of the few that a short run measures.
        dtype: of q and out.
        kv_dtype: of the caches.
        extra_rows: rows of q behind the last request's, that belong to nobody.
    """

    name: str
    requests: tuple[Request, ...]
    group: str
    headline: bool = False
    heads: int = MODEL.heads
    kv_heads: int = MODEL.kv_heads
    head_dim: int = MODEL.head_dim
    page_size: int = 16
    dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"
    extra_rows: int = 0

    @property
    def total_q(self) -> int:
        return sum(r.rows for r in self.requests) + self.extra_rows

    @property
    def max_seq_len(self) -> int:
        """The bound that the page table gives: whole pages."""
        longest = max((r.seq_len for r in self.requests), default=0)
        return -(-longest // self.page_size) * self.page_size

    @property
    def cache_bytes(self) -> int:
        """Of K and V, in whole pages."""
        pages = sum(-(-r.seq_len // self.page_size) for r in self.requests)
        token = 2 * self.kv_heads * self.head_dim * ELEMENT_BYTES[self.kv_dtype]
        return pages * self.page_size * token

    @property
    def visible_pairs(self) -> int:
        """(row, key) pairs under the masks: what the products are counted by."""
        return sum(_visible(r) for r in self.requests)


def _visible(r: Request) -> int:
    """Visible (row, key) pairs of a request whose rows are its last keys (block phase 0)."""
    first = r.seq_len - r.rows
    if r.mode == MaskMode.FULL:
        return r.rows * r.seq_len
    rows = range(first, r.seq_len)
    if r.mode == MaskMode.CAUSAL:
        return sum(p + 1 for p in rows)
    if r.mode == MaskMode.BLOCK_CAUSAL:
        return sum(min((p // r.block_len + 1) * r.block_len, r.seq_len) for p in rows)
    # groups of a head and block_len masks: the cache, the heads so far, and a mask's own group
    pairs = 0
    for i in range(r.rows):
        at, group = i % (r.block_len + 1), i // (r.block_len + 1)
        own = min(r.block_len + 1, r.rows - group * (r.block_len + 1)) - 1
        pairs += first + group + 1 + (own if at else 0)
    return pairs


def _decode() -> list[Attention]:
    """A block (or one token) of every request against equally long contexts."""
    shown = {
        (1, 1, 1024), (1, 1, 32768), (1, 32, 4096), (8, 1, 1024), (16, 1, 4096), (32, 1, 1024),
        (32, 1, 4096), (32, 1, 32768), (32, 8, 4096), (32, 8, 16384), (32, 64, 4096), (64, 4, 8192),
    }  # fmt: skip
    return [
        Attention(
            f"attention/q{rows}/b{batch}/c{context}",
            (Request(rows, context, MaskMode.CAUSAL if rows == 1 else MaskMode.FULL),) * batch,
            "decode",
            (rows, batch, context) in shown,
        )
        for rows in ROWS
        for batch in BATCHES
        for context in CONTEXTS
    ]


def spread(batch: int, least: int = 512, most: int = 32768) -> list[int]:
    """Lengths from least to most in equal ratios."""
    ratio = (most / least) ** (1 / max(batch - 1, 1))
    return [round(least * ratio**i) for i in range(batch)]


def _mixed() -> list[Attention]:
    cells = []
    for batch in (4, 8, 32):
        lens = spread(batch)
        for rows in (1, 32):
            mode = MaskMode.CAUSAL if rows == 1 else MaskMode.FULL
            cells.append(
                Attention(
                    f"attention/lengths/q{rows}/b{batch}/c512-32768",
                    tuple(Request(rows, n, mode) for n in lens),
                    "mixed",
                    batch == 8,
                )
            )
            skewed = (Request(rows, 32768, mode), *[Request(rows, 512, mode)] * (batch - 1))
            cells.append(
                Attention(f"attention/skewed/q{rows}/b{batch}/c32768,512", skewed, "mixed")
            )
    for batch in (2, 8, 32):
        for context in (1024, 4096, 16384):
            # denoising and refreshing in one forward, as diffusion decoding does
            modes = (MaskMode.FULL, MaskMode.CAUSAL)
            cells.append(
                Attention(
                    f"attention/modes/q32/b{batch}/c{context}",
                    tuple(Request(32, context, modes[b % 2]) for b in range(batch)),
                    "mixed",
                    (batch, context) == (8, 4096),
                )
            )
    # everything at once: blocks, single tokens, groups, and a prompt that joins
    every = (
        Request(32, 4096), Request(32, 3000, MaskMode.CAUSAL), Request(1, 2000, MaskMode.CAUSAL),
        Request(272, 1272, MaskMode.QUADRATIC, 16), Request(1024, 1024, MaskMode.CAUSAL),
        Request(64, 9000, MaskMode.BLOCK_CAUSAL, 32), Request(8, 512), Request(32, 20000),
    )  # fmt: skip
    cells.append(Attention("attention/everything/b8", every, "mixed", True))
    return cells


def _quadratic() -> list[Attention]:
    return [
        Attention(
            f"attention/quadratic/k{k}/b{batch}/c{context}",
            (Request(k * (k + 1), context + k * (k + 1), MaskMode.QUADRATIC, k),) * batch,
            "quadratic",
            (k, batch, context) == (16, 1, 4096),
        )
        for k in (8, 16, 32)
        for batch in (1, 8)
        for context in (1024, 4096, 16384)
    ]


def _prefill() -> list[Attention]:
    cells = [
        Attention(
            f"attention/prefill/{mode.name.lower()}/b{batch}/c{n}",
            (Request(n, n, mode, 32),) * batch,
            "prefill",
            (mode, batch, n) in ((MaskMode.CAUSAL, 1, 1024), (MaskMode.CAUSAL, 1, 8192)),
        )
        for mode in (MaskMode.CAUSAL, MaskMode.BLOCK_CAUSAL)
        for n in PREFILLS
        for batch in (1, 4)
    ]
    lens = spread(8, 256, 8192)
    ragged = tuple(Request(n, n, MaskMode.CAUSAL) for n in lens)
    cells.append(Attention("attention/prefill/ragged/b8/c256-8192", ragged, "prefill"))
    # a prompt that goes on behind a prefix in the cache
    behind = (Request(2048, 16384, MaskMode.CAUSAL),)
    cells.append(Attention("attention/prefill/chunk2048/b1/c16384", behind, "prefill"))
    return cells


def _variants(cells: Sequence[Attention]) -> list[Attention]:
    """The decode cells worth asking about with an fp8 cache, and with other page sizes."""
    chosen = [
        c
        for c in cells
        if len({r.rows for r in c.requests}) == 1
        and c.requests[0].rows in (1, 32)
        and len(c.requests) in (1, 8, 32)
        and c.requests[0].seq_len in (1024, 4096, 32768)
    ]
    fp8 = [
        replace(
            c, name=c.name + "/fp8", group="fp8", kv_dtype="float8_e4m3fn",
            headline=c.name == "attention/q32/b8/c4096",
        )
        for c in chosen
    ]  # fmt: skip
    pages = [
        replace(c, name=f"{c.name}/page{size}", group="page", page_size=size, headline=False)
        for c in chosen
        if len(c.requests) == 8
        for size in (1, 64, 256)
    ]
    return fp8 + pages


def _float32() -> list[Attention]:
    """What a CPU user also runs."""
    single = [
        Attention(
            f"attention/q{rows}/b1/c{context}",
            (Request(rows, context, MaskMode.CAUSAL if rows == 1 else MaskMode.FULL),),
            "float32",
        )
        for rows in (32, 1)
        for context in (1024, 2048, 4096, 8192)
    ]
    prompt = Request(1024, 1024, MaskMode.CAUSAL)
    single.append(Attention("attention/prefill/causal/b1/c1024", (prompt,), "float32"))
    single.append(Attention("attention/four/b4", _FOUR, "float32"))
    return [
        replace(c, name=c.name + "/float32", dtype="float32", kv_dtype="float32") for c in single
    ]


# every mask, in a batch that a CPU can run too
_FOUR = (
    Request(32, 512), Request(32, 3000, MaskMode.CAUSAL), Request(1, 2000, MaskMode.CAUSAL),
    Request(272, 1272, MaskMode.QUADRATIC, 16),
)  # fmt: skip
_DECODE = _decode()
ATTENTION = [
    *_DECODE, *_mixed(), Attention("attention/four/b4", _FOUR, "mixed"), *_quadratic(),
    *_prefill(), *_variants(_DECODE), *_float32(),
]  # fmt: skip


# ---- commit_, verify_ ------------------------------------------------------------------------


@dataclass(frozen=True)
class Commit:
    """One call of commit_: batch requests of `rows` rows, of which a share is judged."""

    batch: int
    rows: int
    dtype: str = "bfloat16"
    rule: CommitRule = CommitRule.THRESHOLD
    temperature: float = 0.0
    masked: float = 1.0
    vocab: int = MODEL.vocab
    headline: bool = False

    @property
    def judged_rows(self) -> int:
        """Of every request the last round(masked * rows)."""
        return self.batch * round(self.rows * self.masked)

    @property
    def name(self) -> str:
        options = "" if self.rule == CommitRule.THRESHOLD else f"/{self.rule.name.lower()}"
        options += f"/T{self.temperature:g}" if self.temperature else ""
        options += f"/masked{self.masked:.0%}".rstrip("%") if self.masked < 1 else ""
        return f"commit/b{self.batch}/q{self.rows}/v{self.vocab}/{self.dtype}{options}"


COMMIT = [
    *(Commit(b, 32, headline=b in (1, 8)) for b in BATCHES),
    *(Commit(1, rows) for rows in (8, 16, 64)),
    *(Commit(b, 32, "float32", headline=b == 1) for b in (1, 8, 32)),
    Commit(1, 32, "float16"),
    *(Commit(1, 32, rule=rule) for rule in CommitRule if rule != CommitRule.THRESHOLD),
    *(Commit(b, 32, temperature=1.0, headline=b == 1) for b in (1, 8)),
    *(Commit(1, 32, masked=share) for share in (0.5, 0.25, 0.03125)),
    Commit(8, 32, masked=0.5),
    Commit(1, 32, vocab=2048),
    # what a CPU user also runs
    Commit(1, 1),
    Commit(1, 256),
    Commit(1, 32, "float32", CommitRule.ENTROPY),
    Commit(1, 32, "float32", temperature=1.0),
    Commit(1, 32, "float32", vocab=2048),
]


@dataclass(frozen=True)
class Verify:
    """One call of verify_.

    Attributes:
        rows: of each request, the seed's included.
        accept: drafts that are accepted in each request.
        draft_probs: REJECTION only: probabilities are given (two launches); else one-hot drafts.
    """

    mode: VerifyMode
    batch: int
    rows: int
    accept: int
    dtype: str = "bfloat16"
    draft_probs: bool = False
    vocab: int = MODEL.vocab
    headline: bool = False

    @property
    def rows_read(self) -> int:
        """Of the logits: under COMMIT that of the bonus alone."""
        return self.batch * (1 if self.mode == VerifyMode.COMMIT else self.rows)

    @property
    def residual_rows(self) -> int:
        """Rows that are read again, with their draft's probabilities."""
        return self.batch if self.draft_probs and self.accept < self.rows - 1 else 0

    @property
    def name(self) -> str:
        probs = "/probs" if self.draft_probs else ""
        shape = f"b{self.batch}/q{self.rows}/accept{self.accept}/v{self.vocab}"
        return f"verify/{self.mode.name.lower()}/{shape}/{self.dtype}{probs}"


_GREEDY, _SAMPLED = VerifyMode.GREEDY, VerifyMode.SAMPLED
_REJECTION, _COMMIT = VerifyMode.REJECTION, VerifyMode.COMMIT
VERIFY = [
    *(Verify(_GREEDY, b, 32, 6, headline=b in (1, 8)) for b in BATCHES),
    *(Verify(_GREEDY, b, 1, 0, headline=b == 1) for b in (1, 8, 64)),
    *(Verify(_GREEDY, 1, rows, rows // 2) for rows in (8, 16, 64)),
    Verify(_GREEDY, 1, 32, 31),
    Verify(_GREEDY, 1, 32, 6, "float32"),
    *(Verify(_SAMPLED, b, 32, 6, headline=b == 1) for b in (1, 8, 32)),
    Verify(_SAMPLED, 64, 1, 0),
    Verify(_SAMPLED, 1, 32, 6, "float32"),
    *(Verify(_REJECTION, b, 32, 6) for b in (1, 8)),
    *(Verify(_REJECTION, b, 32, 6, draft_probs=True, headline=b == 1) for b in (1, 8)),
    Verify(_REJECTION, 1, 32, 31, draft_probs=True),
    Verify(_REJECTION, 1, 32, 6, "float32", draft_probs=True),
    *(Verify(_COMMIT, b, 32, 31) for b in (1, 8, 32)),
    # what a CPU user also runs
    *(
        Verify(mode, batch, rows, accept, "float32", mode == _REJECTION)
        for mode in (_GREEDY, _SAMPLED, _REJECTION)
        for batch, rows, accept in ((1, 32, 31), (4, 8, 7), (1, 1, 0))
    ),
    Verify(_SAMPLED, 1, 32, 31),
    Verify(_SAMPLED, 4, 16, 10, "float32", vocab=2048),
]


# ---- rope_append_, compact_ ------------------------------------------------------------------


@dataclass(frozen=True)
class Append:
    """One call of rope_append_: `tokens` rows of q, k and v."""

    tokens: int
    dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"
    heads: int = MODEL.heads
    kv_heads: int = MODEL.kv_heads
    head_dim: int = MODEL.head_dim
    page_size: int = 16
    headline: bool = False

    @property
    def name(self) -> str:
        kind = self.dtype if self.dtype == self.kv_dtype else f"{self.dtype}/{self.kv_dtype}"
        heads = (self.heads, self.kv_heads, self.head_dim)
        usual = heads == (MODEL.heads, MODEL.kv_heads, MODEL.head_dim)
        return f"append/t{self.tokens}/{kind}" + ("" if usual else "/{}-{}-{}".format(*heads))


APPEND = [
    *(Append(n, headline=n in (32, 1024)) for n in (1, 8, 32, 64, 256, 1024, 2048, 4096, 16384)),
    *(Append(n, "float32", "float32") for n in (32, 1024)),
    *(Append(n, kv_dtype="float8_e4m3fn") for n in (32, 1024)),
    Append(64, "float32", "float32", heads=8, kv_heads=2, head_dim=32),  # of a tiny model
]


@dataclass(frozen=True)
class Compact:
    """One call of compact_: `batch` requests, each keeps `kept` of its entries in every layer."""

    model: str
    batch: int = 1
    kept: int = 16
    total: int = 272
    dtype: str = "bfloat16"
    headline: bool = False

    @property
    def num_layers(self) -> int:
        """Layers of the model; 2 of one that is none of the published."""
        return MODELS[self.model].layers if self.model in MODELS else 2

    @property
    def moved(self) -> int:
        """Entries that change their place: one of every total / kept, so all but the first."""
        return self.batch * (self.kept - 1)

    @property
    def name(self) -> str:
        return f"compact/{self.model}/b{self.batch}/k{self.kept}of{self.total}/{self.dtype}"


COMPACT = [Compact(name, b, headline=b == 1) for name in MODELS for b in (1, 8)]

Cell = Attention | Commit | Verify | Append | Compact
CELLS: list[Cell] = [*ATTENTION, *COMMIT, *VERIFY, *APPEND, *COMPACT]
BY_NAME = {cell.name: cell for cell in CELLS}
assert len(BY_NAME) == len(CELLS), "two cells have one name"


def op_of(cell: Cell) -> str:
    """attention, commit, verify, append or compact."""
    return type(cell).__name__.lower()


def models_of(cell: Cell) -> list[str]:
    """Names of the models that make such a call; none: a toy's."""
    if isinstance(cell, Compact):
        return [cell.model] if cell.model in MODELS else []
    if isinstance(cell, Commit | Verify):
        return [name for name, m in MODELS.items() if m.vocab == cell.vocab]
    heads = (cell.heads, cell.kv_heads, cell.head_dim)
    return [n for n, m in MODELS.items() if (m.heads, m.kv_heads, m.head_dim) == heads]
