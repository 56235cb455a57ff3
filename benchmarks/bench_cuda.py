"""Every op on a GPU against eager torch, SDPA and compiled FlexAttention.

    python benchmarks/bench_cuda.py [--ops attention,commit] [--quick] [--out FILE]

Each case: results are compared, then all implementations are timed in turns with cold inputs
(cuda_timing.py). `us` is the kernel time of a call, `eager us` that of a loop on the host; a
baseline that reads results on the host has only the latter. `predicted us` is what traffic.py
expects of the device. SDPA gets K/V gathered beforehand, in its better form (`sdpa`), or has to
gather the pages itself as a paged cache makes it (`gather+sdpa`); FlexAttention gets them gathered
too, and is compiled for the very shape. --rehearse runs the script without a GPU, on tiny shapes
and with tensors that only pretend to be on one: its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import bench
import bench_append
import bench_commit
import bench_verify
import cuda_timing
import traffic
from cuda_timing import Contender, Measured
from nld_cuda import ops, reference
from nld_cuda.ops import CommitRule, MaskMode, VerifyMode

L2_TIMES = 5  # inputs rotate over so many times the L2 cache
FULL, CAUSAL = MaskMode.FULL, MaskMode.CAUSAL


@dataclass
class Bench:
    """Options, rates of the device, and the rows so far."""

    budget_s: float
    rotate_bytes: float
    gpu: traffic.Gpu
    copy_gbps: float
    quick: bool
    tiny: bool  # rehearsal
    out: Path | None
    environment: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def num_inputs(self, bytes_each: float) -> int:
        return 2 if self.tiny else int(min(max(self.rotate_bytes // max(bytes_each, 1), 4), 64))

    def add(
        self, op: str, case: str, work: traffic.Work, measured: dict[str, Measured], **extra: Any
    ) -> None:
        """Add a row: ours is "nld", everything else a baseline."""
        mine = measured["nld"]
        assert mine.kernel is not None
        us = mine.kernel.median_us
        row: dict[str, Any] = {
            "op": op, "case": case, **extra, "us": us, "p10_us": mine.kernel.p10_us,
            "p90_us": mine.kernel.p90_us,
            "predicted us": traffic.predicted_us(work, self.gpu),
            "GB/s": work.floor_bytes / us / 1e3,
            "% of copy": 100 * work.floor_bytes / us / 1e3 / self.copy_gbps,
            "eager us": mine.eager.median_us,
        }  # fmt: skip
        if work.flops:
            row["TFLOP/s"] = work.flops / us / 1e6
        for name, other in measured.items():
            if name == "nld":
                continue
            if other.kernel is not None:
                row[f"{name} us"] = other.kernel.median_us
                row[f"x {name}"] = other.kernel.median_us / us
            else:
                row[f"{name} eager us"] = other.eager.median_us
                row[f"x {name}"] = other.eager.median_us / mine.eager.median_us
        row["timings"] = {name: asdict(m) for name, m in measured.items()}
        self.rows.append(row)
        print(f"{op} {case}: {us:.1f} us, predicted {row['predicted us']:.1f}", flush=True)
        self.write()

    def attempt(self, name: str, run: Callable[[], None]) -> None:
        """Run a case; one that fails does not stop the others."""
        try:
            run()
        except Exception as error:
            self.failures.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
            traceback.print_exc()

    def tables(self) -> str:
        text = []
        for op in dict.fromkeys(row["op"] for row in self.rows):
            mine = [r for r in self.rows if r["op"] == op]
            columns = dict.fromkeys(k for r in mine for k in r if k not in ("op", "timings"))
            cells = [{c: r.get(c) for c in columns} for r in mine]
            text.append(f"### {op}\n\n" + bench.table(cells))
        if self.failures:
            text.append("Failed:\n\n" + "\n".join(f"- {f}" for f in self.failures))
        return "\n\n".join(text)

    def write(self) -> None:
        if self.out is None:
            return
        document = {
            "benchmark": "cuda", "command": bench.command(), "environment": self.environment,
            "copy_gbps": self.copy_gbps, "rows": self.rows, "failures": self.failures,
            "tables": self.tables(),
        }  # fmt: skip
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(document, indent=1) + "\n")


# ---- attention -------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionShape:
    batch: int
    rows: int
    context: int
    mode: MaskMode = FULL
    flex: bool = False
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    page_size: int = 16
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return f"{self.batch} x {self.rows} rows, {self.context} keys {self.mode.name.lower()}"


ATTENTION = [
    *(AttentionShape(1, 32, n, flex=n in (1024, 8192)) for n in (1024, 4096, 8192, 32768)),
    *(AttentionShape(8, 32, n) for n in (1024, 4096, 16384)),
    AttentionShape(1, 32, 4096, CAUSAL, flex=True),
    *(AttentionShape(1, 1, n, CAUSAL) for n in (1024, 8192, 32768)),
    AttentionShape(32, 1, 4096, CAUSAL),
    AttentionShape(1, 1024, 1024, CAUSAL, flex=True),
    AttentionShape(1, 4096, 4096, CAUSAL),
]
TINY_ATTENTION = [
    AttentionShape(2, 4, 40, heads=4, kv_heads=2, dim=64, dtype=torch.float32),
    AttentionShape(1, 24, 24, CAUSAL, heads=4, kv_heads=2, dim=64, dtype=torch.float32),
]


class AttentionProblem:
    """Paged inputs for ours, and the same K/V gathered for the baselines."""

    def __init__(self, shape: AttentionShape, seed: int) -> None:
        torch.manual_seed(seed)
        self.shape = s = shape
        pages_each = -(-s.context // s.page_size)
        pages = s.batch * pages_each
        kv = (pages, s.page_size, s.kv_heads, s.dim)
        self.k_cache = torch.randn(kv, dtype=s.dtype, device="cuda")
        self.v_cache = torch.randn(kv, dtype=s.dtype, device="cuda")
        self.table = torch.randperm(pages).int().view(s.batch, pages_each).to("cuda")
        self.q = torch.randn(s.batch * s.rows, s.heads, s.dim, dtype=s.dtype, device="cuda")
        self.seq_lens = self.ints([s.context] * s.batch)
        self.starts = self.ints([s.rows * b for b in range(s.batch + 1)])
        self.mode = self.ints([int(s.mode)] * s.batch)
        self.out = torch.empty_like(self.q)
        self.lse = torch.empty(s.heads, len(self.q), device="cuda")
        self.plan = ops.attention_plan(
            self.seq_lens, self.starts, self.mode, total_q=len(self.q), num_heads=s.heads,
            num_kv_heads=s.kv_heads, max_seq_len=pages_each * s.page_size,
        )  # fmt: skip
        self.rows4 = self.q.view(s.batch, s.rows, s.heads, s.dim).transpose(1, 2).contiguous()

    @staticmethod
    def ints(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32).to("cuda")

    def nld(self, plan: bool = True) -> None:
        ops.block_attention(
            self.q, self.k_cache, self.v_cache, self.table, self.seq_lens, self.starts, self.mode,
            plan=self.plan if plan else None, out=self.out, lse=self.lse,
        )  # fmt: skip

    def gather(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V as `[batch, kv_heads, context, dim]`, dense."""
        s = self.shape
        index = self.table.long()
        k, v = (
            c[index].flatten(1, 2)[:, : s.context].transpose(1, 2).contiguous()
            for c in (self.k_cache, self.v_cache)
        )
        return k, v

    def gathered(self, *, expand: bool) -> tuple[torch.Tensor, torch.Tensor]:
        times = self.shape.heads // self.shape.kv_heads if expand else 1
        k, v = (x.repeat_interleave(times, dim=1) for x in self.gather())
        return k, v

    def mask(self) -> tuple[torch.Tensor | None, bool]:
        """Return attn_mask and is_causal for SDPA, which lines rows and keys up at the start."""
        s = self.shape
        if s.mode == FULL or s.rows == 1:
            return None, False
        if s.rows == s.context:
            return None, True
        return reference.visible_keys(int(s.mode), s.context, s.rows).to("cuda"), False

    def sdpa(self, k: torch.Tensor, v: torch.Tensor, mask: Any) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            self.rows4, k, v, attn_mask=mask[0], is_causal=mask[1],
            enable_gqa=k.shape[1] != self.shape.heads,
        )  # fmt: skip

    def result(self) -> torch.Tensor:
        s = self.shape
        return self.out.view(s.batch, s.rows, s.heads, s.dim).transpose(1, 2)


def flex_call(problems: list[AttentionProblem]) -> list[Callable[[], object]]:
    """FlexAttention on gathered K/V, compiled for the shape."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    s = problems[0].shape
    compiled = torch.compile(flex_attention, dynamic=False)
    block_mask = None
    if s.mode == CAUSAL and s.rows > 1:
        offset = s.context - s.rows

        def visible(b: Any, h: Any, row: Any, key: Any) -> Any:
            return key <= row + offset

        block_mask = create_block_mask(visible, None, None, s.rows, s.context, device="cuda")

    def make(p: AttentionProblem) -> Callable[[], object]:
        k, v = p.gather()
        return lambda: compiled(p.rows4, k, v, block_mask=block_mask, enable_gqa=True)

    return [make(p) for p in problems]


def attention(b: Bench) -> None:
    shapes = TINY_ATTENTION if b.tiny else ATTENTION[:3] if b.quick else ATTENTION
    for shape in shapes:
        b.attempt(f"attention {shape}", lambda shape=shape: attention_case(b, shape))
        if not b.tiny:
            torch.cuda.empty_cache()


def attention_case(b: Bench, shape: AttentionShape) -> None:
    element = shape.dtype.itemsize
    kv_bytes = 2 * shape.batch * shape.context * shape.kv_heads * shape.dim * element
    problems = [AttentionProblem(shape, seed) for seed in range(b.num_inputs(kv_bytes))]
    first = problems[0]
    first.nld()
    contenders = {"nld": Contender([p.nld for p in problems])}
    contenders["nld without plan"] = Contender([lambda p=p: p.nld(plan=False) for p in problems])
    mask = first.mask()
    forms = {"sdpa gqa": False, "sdpa expanded": True}
    for name, expand in forms.items():
        inputs = [(p, *p.gathered(expand=expand)) for p in problems[: 8 if expand else None]]
        calls = [lambda p=p, k=k, v=v: p.sdpa(k, v, mask) for p, k, v in inputs]
        error = (calls[0]().float() - first.result().float()).abs().max().item()
        assert error < 0.03, f"differs from {name} by {error}"
        contenders[name] = Contender(calls)
    contenders["gather+sdpa"] = Contender([lambda p=p: p.sdpa(*p.gather(), mask) for p in problems])
    notes = ""
    if shape.flex and not b.quick:
        try:
            calls = flex_call(problems[:8])
            error = (calls[0]().float() - first.result().float()).abs().max().item()  # type: ignore
            assert error < 0.03, f"differs from flex by {error}"
            contenders["flex"] = Contender(calls)
        except Exception as failure:  # a baseline that does not run is no failure of ours
            notes = f"flex: {type(failure).__name__}: {str(failure)[:200]}"
            print(notes)
    measured = cuda_timing.measure(contenders, budget_s=b.budget_s)
    best = min(forms, key=lambda name: measured[name].kernel.median_us)  # type: ignore[union-attr]
    measured["sdpa"] = measured[best]
    for name in forms:
        del measured[name]
    pairs = shape.batch * int(
        reference.visible_keys(int(shape.mode), shape.context, shape.rows).sum()
    )
    work = traffic.attention(
        [(shape.rows, shape.context)] * shape.batch, shape.heads, shape.kv_heads, shape.dim,
        element, pairs,
    )  # fmt: skip
    extra = {"sdpa form": best.split()[1]} | ({"notes": notes} if notes else {})
    b.add("attention", str(shape), work, measured, inputs=len(problems), **extra)


# ---- commit and verify -----------------------------------------------------------------------


def commit(b: Bench) -> None:
    cases = bench_commit.GOALS if b.quick else bench_commit.CASES
    if b.tiny:
        cases = [bench_commit.Case(4, 300, torch.float32), bench_commit.Case(
            3, 200, torch.bfloat16, CommitRule.ENTROPY, masked=0.5)]  # fmt: skip
    for case in cases:
        b.attempt(f"commit {case}", lambda case=case: commit_case(b, case))


def commit_case(b: Bench, case: bench_commit.Case) -> None:
    judged = round(case.rows * case.masked)
    work = traffic.commit(judged, case.vocab, case.dtype.itemsize)
    with on_gpu(b):
        torch.manual_seed(0)
        first = bench_commit.Problem(case)
        bench_commit.check(first)
        problems = [first] + [first.copy() for _ in range(b.num_inputs(work.floor_bytes) - 1)]
        for p in problems:  # masks and tickets of their own: the op takes them off
            p.is_masked, p.tokens = first.fresh_mask.clone(), first.tokens.clone()
            p.outputs["tickets"] = torch.zeros(1, dtype=torch.int32)

        def call(p: bench_commit.Problem) -> Callable[[], object]:
            return lambda: ops.commit_(
                p.logits, p.tokens, p.is_masked, p.cu_seqlens, p.rule, p.threshold,
                mask_token_id=bench_commit.MASK, **p.draw, **p.outputs,
            )  # fmt: skip

        def prepare() -> None:
            for p in problems:
                p.is_masked.copy_(p.fresh_mask)

        contenders = {
            "nld": Contender([call(p) for p in problems], prepare),
            "torch": Contender([p.torch for p in problems[: 16 if judged < 256 else 4]]),
            "read": Contender([p.logits.sum for p in problems]),
        }
        measured = cuda_timing.measure(contenders, budget_s=b.budget_s)
    b.add("commit", str(case), work, measured, inputs=len(problems))


def verify(b: Bench) -> None:
    cases = bench_verify.CASES[:3] if b.quick else bench_verify.CASES
    if b.tiny:
        cases = [
            bench_verify.Case(mode, 2, 4, 2, vocab=300)
            for mode in (VerifyMode.GREEDY, VerifyMode.SAMPLED, VerifyMode.REJECTION)
        ]
    for case in cases:
        b.attempt(f"verify {case.name()}", lambda case=case: verify_case(b, case))


def verify_case(b: Bench, case: bench_verify.Case) -> None:
    rejection = case.mode == VerifyMode.REJECTION
    work = traffic.verify(
        case.batch * (case.accept + 1), case.vocab, case.dtype.itemsize,
        case.batch if rejection and case.accept < case.rows - 1 else 0, 2 if rejection else 1,
    )  # fmt: skip
    with on_gpu(b):
        size = case.batch * case.rows * case.vocab * (8 if rejection else 4)
        problems = [bench_verify.Problem(case, seed) for seed in range(b.num_inputs(size))]
        tickets = [torch.zeros(case.batch, dtype=torch.int32) for _ in problems]
        for p in problems:
            p.run_op()
            assert p.num_accepted.tolist() == [case.accept] * case.batch, p.num_accepted
            p.out_tokens = torch.zeros(case.batch, 1 << 14, dtype=torch.int64)
            p.max_out_lens.fill_(1 << 14)

        def call(p: bench_verify.Problem, tickets: torch.Tensor) -> Callable[[], object]:
            return lambda: ops.verify_(
                p.logits, p.block.view(-1), p.cu_seqlens, p.mode, p.out_tokens, p.out_lens,
                p.max_out_lens, p.next_tokens, p.seq_lens, p.done, positions=p.positions,
                temperature=p.temperature, seed=p.seeds, draft_probs=p.draft_probs,
                eos_token_ids=p.eos, num_emitted=p.num_emitted, num_accepted=p.num_accepted,
                tickets=tickets,
            )  # fmt: skip

        def prepare() -> None:
            for p in problems:
                p.reset()

        contenders = {
            "nld": Contender([call(*x) for x in zip(problems, tickets, strict=True)], prepare),
            "torch": Contender([p.run_torch for p in problems[:4]], in_graph=False),
        }
        measured = cuda_timing.measure(contenders, budget_s=b.budget_s)
    b.add("verify", case.name(), work, measured, inputs=len(problems))


# ---- cache writes ----------------------------------------------------------------------------


def append(b: Bench) -> None:
    cases = bench_append.APPENDS[:2] if b.quick else bench_append.APPENDS
    if b.tiny:
        cases = [bench_append.Append(5, 4, 2, 16, torch.float32)]
    for case in cases:
        b.attempt(case.name(), lambda case=case: append_case(b, case))
    b.attempt("compact", lambda: compact_case(b))


def append_case(b: Bench, case: bench_append.Append) -> None:
    work = traffic.rope_append(
        case.tokens, case.heads, case.kv_heads, case.dim, case.dtype.itemsize
    )
    with on_gpu(b):
        mine, other = bench_append.AppendProblem(case, 0), bench_append.AppendProblem(case, 0)
        mine.run_op()
        other.run_torch()
        error = (mine.k_cache.float() - other.k_cache.float()).abs().max().item()
        assert error < (1e-4 if case.dtype == torch.float32 else 0.06), error
        num = b.num_inputs(work.floor_bytes)
        problems = [bench_append.AppendProblem(case, seed) for seed in range(num)]
        contenders = {
            "nld": Contender([p.run_op for p in problems]),
            "torch": Contender([p.run_torch for p in problems]),
        }
        measured = cuda_timing.measure(contenders, budget_s=b.budget_s)
    b.add("append", case.name(), work, measured, inputs=num)


def compact_case(b: Bench) -> None:
    with on_gpu(b):
        one, two = bench_append.CompactProblem(0), bench_append.CompactProblem(0)
        one.run_op()
        two.run_torch()
        assert all(torch.equal(x, y) for x, y in zip(one.caches, two.caches, strict=True))
        p = bench_append.CompactProblem
        work = traffic.compact(p.kept - 1, p.layers, p.heads, p.dim, 2)
        problems = [p(seed) for seed in range(2 if b.tiny else 8)]
        contenders = {
            "nld": Contender([p.run_op for p in problems]),
            "torch": Contender([p.run_torch for p in problems], in_graph=False),
        }
        measured = cuda_timing.measure(contenders, budget_s=b.budget_s)
    b.add("append", "compact 16 of 272, 26 layers", work, measured, inputs=len(problems))


BENCHES = {"attention": attention, "commit": commit, "verify": verify, "append": append}


@contextlib.contextmanager
def on_gpu(b: Bench) -> Iterator[None]:
    """Make new tensors on the GPU: the problems of the CPU benchmarks then live there."""
    with torch.device("cuda"):
        yield


@contextlib.contextmanager
def rehearsal() -> Iterator[None]:
    """No GPU: pretended tensors, the clock of the host, and no graphs."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    from unittest import mock

    import pretend_cuda

    def direct(calls: cuda_timing.Calls) -> Callable[[], None]:
        return lambda: [call() for call in calls] and None

    replay = mock.patch.object(
        cuda_timing, "_replay_us", lambda replay: cuda_timing._eager_us([replay])
    )
    with pretend_cuda.rehearsal(), mock.patch.object(cuda_timing, "_capture", direct), replay:
        yield


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ops", default=",".join(BENCHES), help=f"of {','.join(BENCHES)}")
    parser.add_argument("--quick", action="store_true", help="few cases")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds a case")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, tiny shapes")
    options = parser.parse_args()
    with rehearsal() if options.rehearse else contextlib.nullcontext():
        if options.rehearse:
            device, copy, l2 = "cpu", 10.0, 1 << 20
        elif not torch.cuda.is_available():
            sys.exit("bench_cuda: a CUDA device must be there, torch finds none")
        else:
            device, copy = "cuda", bench.copy_gbps("cuda", 1 << 30)
            l2 = torch.cuda.get_device_properties(0).L2_cache_size
        environment = bench.environment(device)
        b = Bench(
            budget_s=0.0 if options.rehearse else options.budget,
            rotate_bytes=L2_TIMES * l2,
            gpu=traffic.gpu_named(environment.get("gpu", ""), copy),
            copy_gbps=copy,
            quick=options.quick,
            tiny=options.rehearse,
            out=options.out,
            environment=environment,
        )
        for name in options.ops.split(","):
            BENCHES[name](b)
    b.write()
    print(b.tables())
    print(f"measured copy bandwidth: {copy:.0f} GB/s (read + written)")
    print(f"bench: {len(b.rows)} cases measured, {len(b.failures)} failed")
    sys.exit(bool(b.failures))


if __name__ == "__main__":
    main()
