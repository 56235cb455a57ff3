"""What block_attention and its plan mean."""

from __future__ import annotations

import torch
from torch import Tensor


def visible_keys(
    mode: int, seq_len: int, num_rows: int, block_len: int = 1, block_phase: int = 0
) -> Tensor:
    """Return bool `[num_rows, seq_len]`: may row i of a request see key j?"""
    row = torch.arange(num_rows)[:, None]
    key = torch.arange(seq_len)[None]
    first = seq_len - num_rows  # key index of row 0
    p = first + row
    if mode == 0:  # FULL
        return (key >= 0) & (row >= 0)
    if mode == 1:  # CAUSAL
        return key <= p
    if mode == 2:  # BLOCK_CAUSAL

        def block(index: Tensor) -> Tensor:
            return torch.div(index + block_phase, block_len, rounding_mode="floor")

        return block(key) <= block(p)
    if mode == 3:  # QUADRATIC
        group_len = block_len + 1
        current = key - first  # flat index among the current rows
        in_cache = current < 0
        head = (current >= 0) & (current % group_len == 0) & (current <= row)
        same_group = (current >= 0) & (
            torch.div(current, group_len, rounding_mode="floor")
            == torch.div(row, group_len, rounding_mode="floor")
        )
        return in_cache | head | ((row % group_len != 0) & same_group)
    raise ValueError(f"block_attention: mask_mode must lie in [0, 4), got {mode}")


def reading_order(mode: int, seq_len: int, num_rows: int, block_len: int = 1) -> Tensor:
    """Return int64 `[seq_len]`: the token that kernels read as key 0, 1, ...

    Under QUADRATIC the cache, the heads of all groups, then their other rows; else as they stand.
    """
    token = torch.arange(seq_len)
    if mode != 3:
        return token
    current = token - (seq_len - num_rows)
    head = (current >= 0) & (current % (block_len + 1) == 0)
    return torch.cat([token[current < 0], token[head], token[(current >= 0) & ~head]])


def block_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    mask_mode: Tensor,
    *,
    block_len: Tensor | None = None,
    block_phase: Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    split_len: int = 0,
    plan: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gather each request's keys and values, score, mask, softmax.

    `split_len` and `plan` say how to compute, not what.
    """
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    total_q, num_heads, head_dim = q.shape
    page_size, num_kv_heads = k_cache.shape[1:3]
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full((num_heads, total_q), -torch.inf, dtype=compute, device=q.device)
    for b, seq_len in enumerate(seq_lens.tolist()):
        begin, end = int(cu_seqlens_q[b]), int(cu_seqlens_q[b + 1])
        if begin == end or seq_len == 0:
            continue
        index = torch.arange(seq_len, device=q.device)
        pages, offsets = page_table[b, index // page_size].long(), index % page_size
        heads_per_kv = num_heads // num_kv_heads
        k, v = k_cache[pages, offsets].to(compute), v_cache[pages, offsets].to(compute)
        if k_scale is not None:
            k = k * k_scale[:, None]
        if v_scale is not None:
            v = v * v_scale[:, None]
        k, v = (x.repeat_interleave(heads_per_kv, dim=1) for x in (k, v))
        scores = scale * torch.einsum("qhd,khd->hqk", q[begin:end].to(compute), k)
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        visible = visible_keys(
            int(mask_mode[b]),
            seq_len,
            end - begin,
            1 if block_len is None else int(block_len[b]),
            0 if block_phase is None else int(block_phase[b]),
        ).to(q.device)
        scores = scores.masked_fill(~visible, -torch.inf)
        lse[:, begin:end] = torch.logsumexp(scores, dim=-1)
        weights = torch.softmax(scores, dim=-1).masked_fill(~visible, 0)  # a row seeing nothing: 0
        out[begin:end] = torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)
    return out, lse


def attention_plan(
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    mask_mode: Tensor,
    *,
    total_q: int,
    num_heads: int,
    num_kv_heads: int,
    max_seq_len: int,
    block_len: Tensor | None = None,
    block_phase: Tensor | None = None,
    split_len: int = 0,
    num_sms: int = 0,
) -> Tensor:
    """List the tiles of every request, cut their keys into splits, sort the items by length."""
    batch, heads_per_kv = seq_lens.shape[0], num_heads // num_kv_heads
    num_sms = num_sms or 4
    average = -(-total_q * heads_per_kv // batch) if batch else 0
    tile_rows = 128 if average > 64 else 64 if average > 16 or split_len > 0 else 16
    max_tiles = total_q * heads_per_kv // tile_rows + min(batch, total_q) if batch else 0
    wave = max(num_sms * (1 if tile_rows == 128 else 2) // num_kv_heads, 1)  # items side by side
    max_splits = max(-(-max_seq_len // split_len), 1) if split_len > 0 else 0
    max_items = max_tiles * max_splits if split_len > 0 else max_tiles + 2 * wave * (max_tiles > 0)

    # Per tile: request, first packed row, packed rows, one past the last key that a row sees; the
    # keys before it that none sees; the request's first key that is not the token of its number.
    tiles = []
    for b, seq_len in enumerate(seq_lens.tolist()):
        num_rows, mode = int(cu_seqlens_q[b + 1]) - int(cu_seqlens_q[b]), int(mask_mode[b])
        length = 1 if block_len is None else int(block_len[b])
        phase = 0 if block_phase is None else int(block_phase[b])
        visible = visible_keys(mode, seq_len, num_rows, length, phase)
        visible = visible[:, reading_order(mode, seq_len, num_rows, length)]
        heads_begin = max(seq_len - num_rows, 0) if mode == 3 else 2**31 - 1
        for begin in range(0, num_rows * heads_per_kv, tile_rows):
            rows = min(tile_rows, num_rows * heads_per_kv - begin)
            seen = visible[begin // heads_per_kv : (begin + rows - 1) // heads_per_kv + 1].any(0)
            end = int(seen.nonzero().max()) + 1 if seen.any() else 0
            unseen = (~seen[:end]).nonzero()
            hole = [int(unseen.min()), int(unseen.max()) + 1] if len(unseen) else [end, end]
            tiles.append((b, begin, rows, end, *hole, heads_begin))

    # No item stretches over the whole steps of a hole: splits are of the other keys.
    step = split_len or 64
    cuts = []
    for *_, hole_begin, hole_end, _ in tiles:
        cut = [-(-hole_begin // step) * step, hole_end // step * step]
        cuts.append(cut if cut[1] > cut[0] else [0, 0])
    lengths = [t[3] - (c[1] - c[0]) for t, c in zip(tiles, cuts, strict=True)]

    # Where the plan chooses: the longest tile in 1, 2, ... splits, the others likewise; the way
    # that takes least by the model of time of csrc/attention/heuristic.h, in nanoseconds.
    longest_tile, total_keys = max(lengths, default=0), sum(lengths)
    ctas, key_ns = (1, 20) if tile_rows == 128 else (2, 16)

    def cost(keys: int) -> float:
        num_items = sum(max(-(-length // keys), 1) for length in lengths)
        cuts = num_items - len(tiles)
        if cuts > 2 * wave:
            return float("inf")
        longest_item, waves = min(keys, longest_tile), -(-num_items // wave)
        packed = total_keys // wave + total_keys // max(num_items, 1)
        arithmetic = key_ns * max(min(waves * longest_item, packed), longest_item)
        memory = total_keys * ctas * 20 // wave
        busy = max(arithmetic, memory) + min(arithmetic, memory) // 4
        partials = 1000 + cuts * tile_rows * ctas * 25 // wave if cuts > 0 else 0
        return busy + waves * 2000 + partials

    ways = [max(-(-longest_tile // k), 64) for k in range(1, 257)]
    share = min((-(-keys // 64) * 64 for keys in ways), key=cost)  # the first of equal cost
    tile_words: list[list[int]] = []
    split_tiles: list[int] = []
    items: list[list[int]] = []  # with their lengths
    num_slots = 0
    for t, (b, begin, rows, end, *hole, heads_begin) in enumerate(tiles):
        length, (cut_begin, cut_end) = lengths[t], cuts[t]
        split_keys, splits = split_len, -(-length // split_len) if split_len > 0 else 0
        splits = min(splits, max_splits)
        if split_len == 0:
            wanted = -(-length // share)  # then equal lengths, at multiples of 64 keys
            split_keys = -(-length // (wanted * 64)) * 64 if wanted > 1 else share
            splits = -(-length // split_keys)
        splits = max(splits, 1)
        slot = num_slots if splits > 1 else -1
        words = [b, begin, rows, end, splits, split_keys, slot, len(items), *hole, heads_begin, 0]
        tile_words.append(words)
        if splits > 1:
            split_tiles.append(t)
            num_slots += splits
        for s in range(splits):
            first, last = s * split_keys, length if s == splits - 1 else (s + 1) * split_keys
            left_out = cut_end - cut_begin
            key_begin = first + left_out if first >= cut_begin else first
            key_end = last + left_out if last > cut_begin else last
            items.append([t, s, key_begin, key_end, last - first])
    longest = max((item[4] for item in items), default=0)
    items.sort(key=lambda item: -(item[4] // (longest // 256 + 1)))  # stable

    header = [0x4E4C4402, batch, total_q, heads_per_kv, tile_rows, split_len]
    header += [len(tiles), len(items), len(split_tiles), num_slots, longest, 0]
    offset = -(-(12 + 13 * max_tiles) // 4) * 4
    plan = torch.zeros(offset + 4 * max_items, dtype=torch.int32)
    for at, words in (
        (0, header),
        (12, [w for tile in tile_words for w in tile]),
        (12 + 12 * max_tiles, split_tiles),
        (offset, [w for item in items for w in item[:4]]),
    ):
        plan[at : at + len(words)] = torch.tensor(words, dtype=torch.int32)
    return plan
