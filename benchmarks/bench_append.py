"""rope_append_ and compact_ against the eager torch ops they replace, on CPU.

    python benchmarks/bench_append.py [--quick] [--threads N]

Baselines: cos / sin, rotate-half on q and k, index_put_ of k and v into the pages (what a plain
model does per layer); index_select and index_copy_ over the gathered entries for compact_.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

from bench import Report, interleave, rotate
from nld_cuda import ops, reference


@dataclass(frozen=True)
class Append:
    tokens: int
    heads: int
    kv_heads: int
    dim: int
    dtype: torch.dtype
    page_size: int = 16

    def name(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"append {self.tokens} x {self.heads}/{self.kv_heads} x {self.dim} {kind}"

    def num_bytes(self) -> int:  # q read and written, k and v read and written
        elements = self.tokens * (self.heads + 2 * self.kv_heads) * self.dim
        return 2 * elements * self.dtype.itemsize


APPENDS = [
    Append(32, 32, 8, 128, torch.float32),
    Append(32, 32, 8, 128, torch.bfloat16),
    Append(1024, 32, 8, 128, torch.bfloat16),
    Append(1, 32, 8, 128, torch.bfloat16),
    Append(64, 8, 2, 32, torch.float32),  # a tiny model, four blocks of 16
]


class AppendProblem:
    def __init__(self, case: Append, seed: int) -> None:
        torch.manual_seed(seed)
        self.case = case
        heads = case.heads + 2 * case.kv_heads
        qkv = torch.randn(case.tokens, heads, case.dim).to(case.dtype)
        self.q, self.k, self.v = qkv.split([case.heads, case.kv_heads, case.kv_heads], dim=1)
        pages = case.tokens // case.page_size + 2
        shape = (pages, case.page_size, case.kv_heads, case.dim)
        self.k_cache = torch.zeros(shape, dtype=case.dtype)
        self.v_cache = torch.zeros(shape, dtype=case.dtype)
        self.positions = (torch.arange(case.tokens) + 5000).int()
        self.slots = torch.randperm(pages * case.page_size)[: case.tokens].int()
        self.inv_freq = (1e6 ** -(torch.arange(case.dim // 2) * 2 / case.dim)).float()

    def run_op(self) -> None:
        ops.rope_append_(
            self.q, self.k, self.v, self.k_cache, self.v_cache, self.positions, self.slots,
            self.inv_freq,
        )  # fmt: skip

    def run_torch(self) -> None:
        angles = self.positions.float()[:, None] * self.inv_freq
        cos = torch.cat((angles.cos(),) * 2, dim=-1)[:, None].to(self.q.dtype)
        sin = torch.cat((angles.sin(),) * 2, dim=-1)[:, None].to(self.q.dtype)
        self.q.copy_(self.q * cos + reference.rotate_half(self.q) * sin)
        k = self.k * cos + reference.rotate_half(self.k) * sin
        slots = self.slots.long()
        self.k_cache.flatten(0, 1).index_copy_(0, slots, k)
        self.v_cache.flatten(0, 1).index_copy_(0, slots, self.v)


class CompactProblem:
    """Quadratic mode: 16 head entries, one of every 17, in 26 layers of 8 x 128 bfloat16."""

    layers, heads, dim, page_size, kept, stride = 26, 8, 128, 16, 16, 17

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        pages = 48
        shape = (self.layers, pages, self.page_size, self.heads, self.dim)
        self.caches = [torch.randn(shape).bfloat16() for _ in range(2)]
        self.table = torch.randperm(pages).int()[None]
        self.base = torch.tensor([333], dtype=torch.int32)
        self.offsets = (torch.arange(self.kept, dtype=torch.int32) * self.stride)[None]
        self.num_kept = torch.tensor([self.kept], dtype=torch.int32)

    def run_op(self) -> None:
        ops.compact_(*self.caches, self.table, self.base, self.offsets, self.num_kept)

    def run_torch(self) -> None:
        keep = self.offsets[0, : int(self.num_kept[0])].long() + self.base
        move = torch.arange(int(self.num_kept[0])) + self.base
        table = self.table[0].long()
        source, target = (
            table[i // self.page_size] * self.page_size + i % self.page_size for i in (keep, move)
        )
        for cache in self.caches:
            entries = cache.flatten(1, 2)
            entries.index_copy_(1, target, entries.index_select(1, source))

    def num_bytes(self) -> int:
        return 2 * 2 * (self.kept - 1) * self.layers * self.heads * self.dim * 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few runs, nothing written")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report = Report("append")
    budget = 0.3 if options.quick else 2.0
    for case in APPENDS:
        mine, other = AppendProblem(case, 0), AppendProblem(case, 0)
        mine.run_op()
        other.run_torch()
        tolerance = 1e-4 if case.dtype == torch.float32 else 0.06
        for a, b in ((mine.q, other.q), (mine.k_cache, other.k_cache)):
            assert (a.float() - b.float()).abs().max() < tolerance, case
        problems = [AppendProblem(case, seed) for seed in range(8)]
        timings = interleave(
            {
                "nld": rotate([p.run_op for p in problems]),
                "torch": rotate([p.run_torch for p in problems]),
            },
            budget_s=budget,
        )
        report.add(case.name(), timings, "nld", num_bytes=case.num_bytes())
    one, two = CompactProblem(0), CompactProblem(0)
    one.run_op()
    two.run_torch()
    assert all(torch.equal(a, b) for a, b in zip(one.caches, two.caches, strict=True))
    timings = interleave({"nld": one.run_op, "torch": two.run_torch}, budget_s=budget)
    report.add("compact 16 of 272, 26 layers", timings, "nld", num_bytes=one.num_bytes())
    if options.quick:
        for row in report.rows:
            print(f"{row['case']:40} {row['us']:7.0f} us  {row['x torch']:5.1f}x")
    else:
        report.finish()


if __name__ == "__main__":
    main()
