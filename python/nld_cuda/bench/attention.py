"""Problems of block_attention: a paged cache with its pages in random order, queries, masks."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from nld_cuda import ops
from nld_cuda.bench import grid
from nld_cuda.bench.base import NotRun, dtype_of

FP8 = "float8_e4m3fn"


class AttentionProblem:
    """Inputs of a cell on a device. `run` calls our op with a plan made beforehand (CUDA)."""

    def __init__(self, cell: grid.Attention, device: torch.device) -> None:
        if (
            cell.kv_dtype == FP8
            and "k_scale" not in inspect.signature(ops.block_attention).parameters
        ):
            raise NotRun("this build has no fp8 cache")
        torch.manual_seed(0)
        self.cell = cell
        self.device = device
        dtype = dtype_of(cell.dtype)
        pages_of = [-(-r.seq_len // cell.page_size) for r in cell.requests]
        num_pages = sum(pages_of)
        shape = (num_pages, cell.page_size, cell.kv_heads, cell.head_dim)
        self.k_cache, self.v_cache = (
            torch.randn(shape, dtype=dtype, device=device) for _ in range(2)
        )
        self.scales: dict[str, Any] = {}
        if cell.kv_dtype == FP8:
            self.quantise()
        elif cell.kv_dtype != cell.dtype:
            raise NotRun(f"a {cell.kv_dtype} cache under {cell.dtype} queries is no case of the op")
        table = torch.zeros(len(pages_of), max(pages_of), dtype=torch.int32)
        for b, pages in enumerate(torch.randperm(num_pages).int().split(pages_of)):
            table[b, : len(pages)] = pages
        self.table = table.to(device)
        self.q = torch.randn(cell.total_q, cell.heads, cell.head_dim, dtype=dtype, device=device)
        self.seq_lens = self.ints([r.seq_len for r in cell.requests])
        self.starts = self.ints([0, *_sums(r.rows for r in cell.requests)])
        self.mode = self.ints([int(r.mode) for r in cell.requests])
        self.block_len = self.ints([r.block_len for r in cell.requests])
        self.out = torch.empty_like(self.q)
        self.laid_out: dict[Any, tuple[Tensor, Tensor]] = {}  # K/V of baselines, shared by them
        self.lse = torch.empty(cell.heads, cell.total_q, device=device)
        self.plan: Tensor | None = None
        if device.type == "cuda":
            self.plan = ops.attention_plan(
                self.seq_lens, self.starts, self.mode, total_q=cell.total_q, num_heads=cell.heads,
                num_kv_heads=cell.kv_heads, max_seq_len=cell.max_seq_len, block_len=self.block_len,
            )  # fmt: skip

    def ints(self, values: list[int]) -> Tensor:
        """Return an int32 tensor on the device."""
        return torch.tensor(values, dtype=torch.int32).to(self.device)

    def quantise(self) -> None:
        """Make the caches e4m3, with scales that use the whole range.

        They are equal for all heads, so that libraries with one scale a cache can be compared.
        """
        for name in ("k", "v"):
            cache: Tensor = getattr(self, f"{name}_cache").float()
            scale = float(cache.abs().max()) / 448
            setattr(self, f"{name}_cache", (cache / scale).to(torch.float8_e4m3fn))
            self.scales[f"{name}_scale"] = torch.full(
                (self.cell.kv_heads,), scale, device=self.device
            )

    def run(self) -> Tensor:
        """Call our op into `out` and `lse`."""
        return self._run(self.plan)

    def run_without_plan(self) -> Tensor:
        """Call our op as it is called for a single layer: it makes its own plan."""
        return self._run(None)

    def _run(self, plan: Tensor | None) -> Tensor:
        ops.block_attention(
            self.q, self.k_cache, self.v_cache, self.table, self.seq_lens, self.starts, self.mode,
            block_len=self.block_len, plan=plan, out=self.out, lse=self.lse, **self.scales,
        )  # fmt: skip
        return self.out

    def reset(self) -> None:
        """Nothing is changed by a call."""

    def gather(self, b: int) -> tuple[Tensor, Tensor]:
        """Return K and V of a request, `[kv_heads, seq_len, dim]`, dense."""
        r = self.cell.requests[b]
        pages = self.table[b, : -(-r.seq_len // self.cell.page_size)].long()
        k, v = (
            self.dequantised(cache[pages], name).flatten(0, 1)[: r.seq_len].transpose(0, 1)
            for name, cache in (("k", self.k_cache), ("v", self.v_cache))
        )
        return k.contiguous(), v.contiguous()

    def gather_all(self) -> tuple[Tensor, Tensor]:
        """Return K and V of equally long requests, `[batch, kv_heads, seq_len, dim]`, dense."""
        index, length = self.table.long(), self.cell.requests[0].seq_len
        k, v = (
            self.dequantised(cache[index], name).flatten(1, 2)[:, :length].transpose(1, 2)
            for name, cache in (("k", self.k_cache), ("v", self.v_cache))
        )
        return k.contiguous(), v.contiguous()

    def dequantised(self, values: Tensor, name: str) -> Tensor:
        """Return cache values `[..., kv_heads, dim]` in the dtype of q."""
        if not self.scales:
            return values
        return (values.float() * self.scales[f"{name}_scale"][:, None]).to(self.q.dtype)


def _sums(values: Any) -> list[int]:
    total, sums = 0, []
    for value in values:
        total += value
        sums.append(total)
    return sums


def differs(problem: AttentionProblem, result: Tensor) -> str | None:
    """Compare a baseline's rows with ours: other orders of summation, no more."""
    tolerance = 1e-4 if problem.cell.dtype == "float32" else 0.03
    error = (result.float() - problem.out.float()).abs().max().item()
    return None if error < tolerance else f"differs from ours by {error:.3g}"


def problem_bytes(cell: grid.Attention) -> float:
    """Memory that one problem takes: caches, q, out, lse."""
    rows = cell.total_q * cell.heads
    return cell.cache_bytes + 2 * rows * cell.head_dim * grid.ELEMENT_BYTES[cell.dtype] + 4 * rows
