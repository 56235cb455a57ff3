"""Arguments of other libraries' paged calls, made from our page table."""

from __future__ import annotations

import torch
from torch import Tensor

from nld_cuda import reference
from nld_cuda.bench import grid
from nld_cuda.ops import MaskMode


def uniform(cell: grid.Attention) -> bool:
    """Tell whether all requests have the same rows, length and mask."""
    return len(set(cell.requests)) == 1


def modes(cell: grid.Attention) -> set[MaskMode]:
    """Return the masks of a cell as other libraries see them: a lone last row sees everything."""
    return {
        MaskMode.FULL if r.mode == MaskMode.CAUSAL and r.rows == 1 else r.mode
        for r in cell.requests
    }


def one_flag(cell: grid.Attention) -> str | None:
    """Say why a library with one causal flag for the whole batch has no answer; None: it has.

    A request of one row sees all its keys under either value of the flag.
    """
    several = {r.mode for r in cell.requests if r.rows > 1}
    if not several <= {MaskMode.FULL, MaskMode.CAUSAL}:
        return "has causal and full masks only"
    return "has one causal flag for the whole batch" if len(several) > 1 else None


def is_causal(cell: grid.Attention) -> bool:
    """Return that flag."""
    return any(r.mode == MaskMode.CAUSAL for r in cell.requests if r.rows > 1)


def visible(request: grid.Request) -> Tensor:
    """Return bool `[rows, seq_len]` of a request."""
    return reference.visible_keys(
        int(request.mode), request.seq_len, request.rows, request.block_len
    )


def page_counts(cell: grid.Attention) -> list[int]:
    """Return the pages of every request."""
    return [-(-r.seq_len // cell.page_size) for r in cell.requests]


def kv_indptr(counts: list[int]) -> Tensor:
    """Return int32 `[batch + 1]`: where each request's entries start in a flat list."""
    return torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)


def page_indices(cell: grid.Attention, table: Tensor) -> Tensor:
    """Return int32 page indices of all requests, one after the other (FlashInfer's layout)."""
    return torch.cat([table[b, :n] for b, n in enumerate(page_counts(cell))])


def last_page_lens(cell: grid.Attention) -> Tensor:
    """Return int32 `[batch]`: tokens on each request's last page, 1 .. page_size."""
    lens = [(r.seq_len - 1) % cell.page_size + 1 for r in cell.requests]
    return torch.tensor(lens, dtype=torch.int32)


def slots(cell: grid.Attention, table: Tensor, lens: list[int]) -> Tensor:
    """Return cache slots of the first `lens[b]` tokens of all requests, flat (SGLang's layout)."""
    parts = []
    for b, length in enumerate(lens):
        position = torch.arange(length, device=table.device)
        page = table[b].long()[position // cell.page_size]
        parts.append(page * cell.page_size + position % cell.page_size)
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def repage(cell: grid.Attention, cache: Tensor, table: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Copy a cache to pages of another size; return it and its table (for fixed page sizes)."""
    counts = [-(-r.seq_len // size) for r in cell.requests]
    made = cache.new_zeros(sum(counts), size, *cache.shape[2:])
    made_table = torch.zeros(len(counts), max(counts), dtype=torch.int32, device=table.device)
    first = 0
    for b, (count, r) in enumerate(zip(counts, cell.requests, strict=True)):
        source = slots(cell, table[b : b + 1], [r.seq_len])
        flat = made[first : first + count].flatten(0, 1)
        flat[: r.seq_len] = cache.flatten(0, 1)[source]
        made_table[b, :count] = torch.arange(first, first + count, device=table.device)
        first += count
    return made, made_table
