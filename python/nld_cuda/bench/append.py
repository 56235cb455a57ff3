"""Problems of rope_append_ and compact_, and the eager torch ops they replace."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nld_cuda import ops, reference
from nld_cuda.bench import grid
from nld_cuda.bench.base import Baseline, NotRun, Prepared, compiled, dtype_of


class AppendProblem:
    """Rows of q, k and v, as views of one buffer as the model makes them, and a cache."""

    def __init__(self, cell: grid.Append, device: torch.device) -> None:
        self.scales: dict[str, Any] = {}
        dtype, kv_dtype = dtype_of(cell.dtype), dtype_of(cell.kv_dtype)
        if kv_dtype != dtype:
            if "k_scale" not in inspect.signature(ops.rope_append_).parameters:
                raise NotRun("this build has no fp8 cache")
            ones = torch.full((cell.kv_heads,), 0.02, device=device)
            self.scales = {"k_scale": ones, "v_scale": ones.clone()}
        torch.manual_seed(0)
        self.cell = cell
        heads = cell.heads + 2 * cell.kv_heads
        self.qkv = torch.randn(cell.tokens, heads, cell.head_dim, device=device).to(dtype)
        pages = cell.tokens // cell.page_size + 2
        shape = (pages, cell.page_size, cell.kv_heads, cell.head_dim)
        self.k_cache, self.v_cache = (
            torch.zeros(shape, device=device).to(kv_dtype) for _ in range(2)
        )
        self.positions = (torch.arange(cell.tokens, device=device) + 5000).int()
        slots = torch.randperm(pages * cell.page_size)[: cell.tokens].int()
        self.slots = slots.to(device)
        exponents = torch.arange(cell.head_dim // 2, device=device) * 2 / cell.head_dim
        self.inv_freq = (1e6**-exponents).float()

    def parts(self) -> tuple[Tensor, ...]:
        """Return q, k and v."""
        cell = self.cell
        return self.qkv.split([cell.heads, cell.kv_heads, cell.kv_heads], dim=1)

    def run(self) -> Tensor:
        """Call our op. It rotates q again and again: its values do not matter."""
        q, k, v = self.parts()
        ops.rope_append_(
            q, k, v, self.k_cache, self.v_cache, self.positions, self.slots, self.inv_freq,
            **self.scales,
        )  # fmt: skip
        return self.qkv

    def reset(self) -> None:
        """Nothing that time depends on is changed."""

    def arguments(self) -> tuple[Tensor, ...]:
        """Return what the eager pipeline takes."""
        tensors = (self.k_cache, self.v_cache, self.positions, self.slots, self.inv_freq)
        return (*self.parts(), *tensors, *self.scales.values())


def eager(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor,
    slots: Tensor, inv_freq: Tensor, k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """Do the same as a plain model does in every layer."""
    angles = positions.float()[:, None] * inv_freq
    cos = torch.cat((angles.cos(),) * 2, dim=-1)[:, None].to(q.dtype)
    sin = torch.cat((angles.sin(),) * 2, dim=-1)[:, None].to(q.dtype)
    q.copy_(q * cos + reference.rotate_half(q) * sin)
    k = k * cos + reference.rotate_half(k) * sin
    for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        if scale is not None:
            x = (x.float() / scale[:, None]).clamp(-448, 448).to(cache.dtype)
            x, cache = x.view(torch.uint8), cache.view(torch.uint8)
        cache.flatten(0, 1).index_copy_(0, slots.long(), x)


def _make(problem: AppendProblem, function: Callable[..., None] = eager) -> Prepared:
    arguments = problem.arguments()

    def fresh(_: None) -> AppendProblem:
        """Return what it makes of inputs that nobody has rotated yet."""
        other = AppendProblem(problem.cell, problem.qkv.device)
        function(*other.arguments())
        return other

    return Prepared(lambda: function(*arguments), fresh)


def _make_compiled(problem: AppendProblem) -> Prepared:
    return _make(problem, torch.compile(eager, dynamic=False))


def _differs_append(problem: AppendProblem, result: AppendProblem) -> str | None:
    tolerance = 1e-4 if problem.cell.dtype == "float32" else 0.06
    ours = AppendProblem(problem.cell, problem.qkv.device)
    ours.run()
    scale = float(ours.scales["k_scale"][0]) if ours.scales else 1.0
    relative = 0.126 if ours.scales else 0.0  # rotated k may round to the next e4m3 number
    error = 0.0
    for a, b, unit in (
        (ours.parts()[0], result.parts()[0], 1.0),
        (ours.k_cache, result.k_cache, scale),
        (ours.v_cache, result.v_cache, scale),
    ):
        a, b = a.float() * unit, b.float() * unit
        excess = (a - b).abs() - relative * a.abs()
        error = max(error, excess.max().item())
    return None if error < tolerance else f"differs from ours by {error:.3g}"


class CompactProblem:
    """Quadratic mode: head entries, one of every group, are moved together in all layers."""

    def __init__(self, cell: grid.Compact, device: torch.device) -> None:
        torch.manual_seed(0)
        self.cell = cell
        model = grid.MODELS.get(cell.model, grid.MODEL)
        page_size, behind = 16, 333
        stride = cell.total // cell.kept
        pages_each = -(-(behind + cell.total) // page_size) + 1
        pages = cell.batch * pages_each
        shape = (cell.num_layers, pages, page_size, model.kv_heads, model.head_dim)
        dtype = dtype_of(cell.dtype)
        self.caches = [torch.randn(shape, device=device).to(dtype) for _ in range(2)]
        self.table = torch.randperm(pages).int().view(cell.batch, pages_each).to(device)
        ints: dict[str, Any] = {"dtype": torch.int32, "device": device}
        self.base = torch.full((cell.batch,), behind, **ints)
        self.offsets = (torch.arange(cell.kept, **ints) * stride).repeat(cell.batch, 1)
        self.num_kept = torch.full((cell.batch,), cell.kept, **ints)

    def run(self) -> list[Tensor]:
        """Call our op."""
        k_cache, v_cache = self.caches
        ops.compact_(k_cache, v_cache, self.table, self.base, self.offsets, self.num_kept)
        return self.caches

    def reset(self) -> None:
        """Entries may be moved again: the same bytes."""

    def eager(self) -> None:
        """Gather the entries of each request and copy them: the count is read on the host."""
        page_size = self.caches[0].shape[2]
        for b, kept in enumerate(self.num_kept.tolist()):
            keep = self.offsets[b, :kept].long() + self.base[b]
            move = torch.arange(kept, device=keep.device) + self.base[b]
            table = self.table[b].long()
            source, target = (
                table[i // page_size] * page_size + i % page_size for i in (keep, move)
            )
            for cache in self.caches:
                entries = cache.flatten(1, 2)
                entries.index_copy_(1, target, entries.index_select(1, source))


def _differs_compact(problem: CompactProblem, result: None) -> str | None:
    ours, other = (CompactProblem(problem.cell, problem.table.device) for _ in range(2))
    ours.run()
    other.eager()
    same = all(torch.equal(a, b) for a, b in zip(ours.caches, other.caches, strict=True))
    return None if same else "leaves other entries than ours"


TORCH = Baseline("torch", _make, _differs_append)
COMPILED = compiled(TORCH, _make_compiled)
BASELINES = (TORCH, COMPILED)
COMPACT_BASELINES = (
    Baseline("torch", lambda p: Prepared(p.eager), _differs_compact, in_graph=False),
)  # fmt: skip


def append_bytes(cell: grid.Append) -> float:
    """Memory that one problem takes."""
    heads = cell.heads + 4 * cell.kv_heads
    return float(cell.tokens * heads * cell.head_dim * (grid.ELEMENT_BYTES[cell.dtype] + 4))


def compact_bytes(cell: grid.Compact) -> float:
    """Memory that one problem takes: whole caches of all layers, float32 while they are made."""
    model = grid.MODELS.get(cell.model, grid.MODEL)
    tokens = cell.batch * (cell.total + 365)
    return float(6 * 2 * cell.num_layers * tokens * model.kv_heads * model.head_dim)
