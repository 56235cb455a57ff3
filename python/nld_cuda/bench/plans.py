"""The plan of a cell, and other plans for the same cell that the heuristic did not choose.

The op has no option for them, and needs none: a plan is data. `recut` writes one with other splits
into a tensor that block_attention takes as it takes its own. The rows of a tile follow from the
average rows of a request, so `with_tile_rows` adds empty requests, or rows that belong to nobody.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from nld_cuda import ops
from nld_cuda.bench import grid

HEADER_WORDS, TILE_WORDS, ITEM_WORDS = 12, 12, 4  # csrc/attention/plan.h
SPLIT_LEN = 5  # of the header, as these:
NUM_TILES, NUM_ITEMS, NUM_SPLIT_TILES, NUM_SLOTS, MAX_ITEM_KEYS = range(6, 11)  # of the header
TILE_ROWS = (16, 64, 128)
BUCKETS = 256
KEY_STEP = 64  # freely chosen splits start at multiples of it


@dataclass(frozen=True)
class Plan:
    """What of a plan the model and the tuner look at."""

    words: torch.Tensor
    tile_rows: int
    max_tiles: int
    # request, row_begin, num_rows, key_end, num_splits, split_keys, first_slot, first_item,
    # hole_begin, hole_end, heads_begin, unused
    tiles: list[list[int]]
    items: list[list[int]]  # tile, split, key_begin, key_end; longest first
    num_slots: int

    @property
    def splits(self) -> int:
        """Of the tile with most."""
        return max((t[4] for t in self.tiles), default=1)

    @property
    def longest(self) -> int:
        """Keys of the longest item."""
        return max((self.keys_of(item) for item in self.items), default=0)

    def cut(self, tile: list[int]) -> tuple[int, int]:
        """Return what items leave out of the tile's hole: whole splits, or whole steps."""
        step = int(self.words[SPLIT_LEN]) or KEY_STEP
        begin, end = -(-tile[8] // step) * step, tile[9] // step * step
        return (begin, end) if end > begin else (0, 0)

    def keys_of(self, item: list[int]) -> int:
        """Return how many keys an item works through."""
        tile, _, begin, end = item
        cut_begin, cut_end = self.cut(self.tiles[tile])
        return end - begin - max(min(end, cut_end) - max(begin, cut_begin), 0)


def plan_arguments(cell: grid.Attention) -> tuple[list[torch.Tensor], dict[str, object]]:
    """Arguments of attention_plan, CPU tensors."""
    requests = cell.requests
    columns = [
        [r.seq_len for r in requests],
        [0, *torch.tensor([r.rows for r in requests]).cumsum(0).tolist()],
        [int(r.mode) for r in requests],
        [r.block_len for r in requests],
    ]
    *tensors, block_len = (torch.tensor(c, dtype=torch.int32) for c in columns)
    options = {
        "total_q": cell.total_q, "num_heads": cell.heads, "num_kv_heads": cell.kv_heads,
        "max_seq_len": cell.max_seq_len, "block_len": block_len,
    }  # fmt: skip
    return tensors, options


def plan_of(cell: grid.Attention, num_sms: int, split_len: int = 0) -> Plan:
    """Make the cell's plan on the CPU, as a GPU of so many SMs would."""
    tensors, options = plan_arguments(cell)
    words = ops.attention_plan(*tensors, **options, split_len=split_len, num_sms=num_sms)  # type: ignore[arg-type]
    return parse(words, cell)


def _items_offset(max_tiles: int) -> int:
    return (HEADER_WORDS + (TILE_WORDS + 1) * max_tiles + 3) // 4 * 4


def parse(words: torch.Tensor, cell: grid.Attention) -> Plan:
    """Read the words of a plan."""
    header = words[:HEADER_WORDS].tolist()
    tile_rows, num_tiles, num_items = header[4], header[NUM_TILES], header[NUM_ITEMS]
    packed = cell.total_q * cell.heads // cell.kv_heads
    max_tiles = packed // tile_rows + min(len(cell.requests), cell.total_q)
    at = _items_offset(max_tiles)
    tiles = words[HEADER_WORDS : HEADER_WORDS + TILE_WORDS * num_tiles].view(-1, TILE_WORDS)
    items = words[at : at + ITEM_WORDS * num_items].view(-1, ITEM_WORDS)
    return Plan(words, tile_rows, max_tiles, tiles.tolist(), items.tolist(), header[NUM_SLOTS])


def recut(plan: Plan, split_keys: int) -> Plan:
    """Cut the tiles of a plan evenly into splits of at most so many keys, as the plan does."""
    tiles: list[list[int]] = []
    items: list[list[int]] = []  # with their lengths
    split_tiles: list[int] = []
    num_slots = 0
    for t, tile in enumerate(plan.tiles):
        cut_begin, cut_end = plan.cut(tile)
        left_out = cut_end - cut_begin
        end = tile[3] - left_out
        splits = max(-(-end // split_keys), 1)
        keys = -(-end // (splits * KEY_STEP)) * KEY_STEP if splits > 1 else split_keys
        splits = max(-(-end // keys), 1)
        slot = num_slots if splits > 1 else -1
        if splits > 1:
            split_tiles.append(t)
            num_slots += splits
        tiles.append([*tile[:4], splits, keys, slot, len(items), *tile[8:]])
        for s in range(splits):
            first, last = s * keys, end if s == splits - 1 else (s + 1) * keys
            key_begin = first + left_out if first >= cut_begin else first
            key_end = last + left_out if last > cut_begin else last
            items.append([t, s, key_begin, key_end, last - first])
    longest = max((item[4] for item in items), default=0)
    items.sort(key=lambda item: -(item[4] // (longest // BUCKETS + 1)))
    items = [item[:4] for item in items]
    header = plan.words[:HEADER_WORDS].tolist()
    for at, value in (
        (NUM_ITEMS, len(items)), (NUM_SPLIT_TILES, len(split_tiles)),
        (NUM_SLOTS, num_slots), (MAX_ITEM_KEYS, longest),
    ):  # fmt: skip
        header[at] = value
    at = _items_offset(plan.max_tiles)
    # As many items more than tiles that twice the difference holds all slots.
    words = torch.zeros(at + ITEM_WORDS * (plan.max_tiles + len(items)), dtype=torch.int32)
    flat = [*header, *(word for tile in tiles for word in tile)]
    words[: len(flat)] = torch.tensor(flat, dtype=torch.int32)
    first = HEADER_WORDS + TILE_WORDS * plan.max_tiles
    words[first : first + len(split_tiles)] = torch.tensor(split_tiles, dtype=torch.int32)
    words[at : at + ITEM_WORDS * len(items)] = torch.tensor(items, dtype=torch.int32).flatten()
    return Plan(words, plan.tile_rows, plan.max_tiles, tiles, items, num_slots)


def with_tile_rows(cell: grid.Attention, tile_rows: int) -> grid.Attention:
    """Pad a batch so that its average request calls for tiles of so many rows."""
    assert tile_rows in TILE_ROWS
    per_kv = cell.heads // cell.kv_heads
    rows, batch = cell.total_q * per_kv, len(cell.requests)
    least, most = {16: (1, 16), 64: (17, 64), 128: (65, None)}[tile_rows]
    if most is not None and -(-rows // batch) > most:
        batch = -(-rows // most)
    empty = (grid.Request(0, 0),) * (batch - len(cell.requests))
    missing = max((least - 1) * batch + 1 - rows, 0)
    return replace(
        cell, requests=cell.requests + empty, extra_rows=cell.extra_rows + -(-missing // per_kv)
    )


def candidates(plan: Plan) -> list[int]:
    """Split lengths worth comparing: the longest tile in 1, 2, ... parts of 64 keys or more."""
    longest = max((tile[3] for tile in plan.tiles), default=0)
    parts = range(1, min(longest // KEY_STEP, 256) + 1)
    return sorted({-(-longest // (k * KEY_STEP)) * KEY_STEP for k in parts} or {KEY_STEP})
