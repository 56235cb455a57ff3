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
        return max((self.item_keys(item) for item in self.items), default=0)

    def cut(self, tile: list[int]) -> tuple[int, int]:
        """Where items skip a part of a tile's hole, whole splits or steps, and how long it is."""
        step = int(self.words[SPLIT_LEN]) or KEY_STEP
        begin = -(-tile[8] // step) * step
        return begin, max(tile[9] // step * step - begin, 0)

    def item_keys(self, item: list[int]) -> int:
        """Keys that an item works through, without those of its tile's hole."""
        begin, left_out = self.cut(self.tiles[item[0]])
        return item[3] - item[2] - (left_out if item[2] < begin < item[3] else 0)

    def tile_keys(self, tile: int) -> int:
        """Keys of all splits of a tile."""
        return self.tiles[tile][3] - self.cut(self.tiles[tile])[1]


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
    items: list[list[int]] = []
    split_tiles: list[int] = []
    num_slots = 0
    for t, tile in enumerate(plan.tiles):
        (cut, left_out), all_keys = plan.cut(tile), plan.tile_keys(t)
        splits = max(-(-all_keys // split_keys), 1)
        keys = -(-all_keys // (splits * KEY_STEP)) * KEY_STEP if splits > 1 else split_keys
        splits = max(-(-all_keys // keys), 1)
        slot = num_slots if splits > 1 else -1
        if splits > 1:
            split_tiles.append(t)
            num_slots += splits
        tiles.append([*tile[:4], splits, keys, slot, len(items), *tile[8:]])
        for s in range(splits):
            begin, end = s * keys, min((s + 1) * keys, all_keys)
            begin += left_out if begin >= cut else 0
            items.append([t, s, begin, end + left_out if end > cut else end])
    made = Plan(plan.words, plan.tile_rows, plan.max_tiles, tiles, items, num_slots)
    longest = made.longest
    items.sort(key=lambda item: -(made.item_keys(item) // (longest // BUCKETS + 1)))
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
    return replace(made, words=words)


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
    longest = max((plan.tile_keys(t) for t in range(len(plan.tiles))), default=0)
    parts = range(1, min(longest // KEY_STEP, 256) + 1)
    return sorted({-(-longest // (k * KEY_STEP)) * KEY_STEP for k in parts} or {KEY_STEP})
