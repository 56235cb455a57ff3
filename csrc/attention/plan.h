// The work list of CUDA attention: what one step's batch is cut into. Built on the device once per step (plan.cuh) or
// by its CPU twin (plan_host.h), equal bit for bit, and read by every layer's kernels. Knows no torch.
//
//   tile   up to tile_rows packed rows of one request; packed row = query row * heads_per_kv + head within the kv head
//   item   (tile, split): the keys [key_begin, key_end) that one CTA works through, for each kv head, but those of the
//          tile's hole. Keys are numbered in reading order (mask.h).
//   slot   where an item of a split tile leaves its partial result; a tile with one split writes `out` itself
//
// All sizes follow from integers the host knows, so that nothing is read back. The plan is an int32 tensor
//   header | tiles [max_tiles] | split_tiles [max_tiles] | items [max_items]
// and max_items is what fits, so a plan tensor alone tells a kernel's grid and workspace. Words that the counts of the
// header do not reach are never written nor read.
#pragma once

#include <cstdint>

#include "attention/heuristic.h"
#include "attention/mask.h"

namespace nld {

constexpr int32_t kPlanVersion = 0x4e4c4402;
constexpr int32_t kPlanBuckets = 256;  // lengths that sorting tells apart

struct PlanHeader {
  int32_t version, batch, total_q, heads_per_kv, tile_rows, split_len;  // what it was made for
  int32_t num_tiles, num_items, num_split_tiles, num_slots;
  int32_t max_item_keys;
  int32_t unused;
};
struct PlanTile {
  int32_t request, row_begin, num_rows;  // packed rows [row_begin, row_begin + num_rows) of the request
  int32_t key_end;                       // one past the last key that any row of the tile sees
  int32_t num_splits, split_keys;        // split s starts at key s * split_keys (plan_cut: not counting the hole)
  int32_t first_slot;                    // of split 0, the others follow; -1 where num_splits is 1
  int32_t first_item;                    // items of the tiles before this one: where its own stood before sorting
  int32_t hole_begin, hole_end;          // keys no row of the tile sees; equal where there are none
  int32_t heads_begin;                   // of the request's KeyOrder: token_of_key is asked from here on
  int32_t unused;
};
struct PlanItem {
  int32_t tile, split, key_begin, key_end;  // key_begin == key_end: rows that see nothing
};
constexpr int32_t kPlanHeaderWords = sizeof(PlanHeader) / 4, kPlanTileWords = sizeof(PlanTile) / 4,
                  kPlanItemWords = sizeof(PlanItem) / 4;
static_assert(kPlanHeaderWords % 4 == 0 && kPlanTileWords % 4 == 0 && kPlanItemWords == 4, "16-byte loads");

// ---- sizes, from host integers alone ----

NLD_HD int64_t attention_max_tiles(int64_t total_q, int64_t batch, int64_t heads_per_kv, int32_t tile_rows) {
  if (batch == 0) return 0;
  const int64_t partial = batch < total_q ? batch : total_q;  // every request may have one tile that is not full
  return total_q * heads_per_kv / tile_rows + partial;
}

// Where the plan chooses, it makes at most two waves of items more than there are tiles: slots, and so the workspace,
// grow with the number of SMs, not with the context.
NLD_HD int64_t attention_max_items(int64_t max_tiles, int64_t wave, int64_t max_seq_len, int64_t split_len) {
  if (max_tiles == 0) return 0;
  if (split_len == 0) return max_tiles + 2 * wave;
  return max_tiles * (max_seq_len > 0 ? (max_seq_len - 1) / split_len + 1 : 1);
}

// A tile of n >= 2 splits takes n slots and is cut n - 1 >= n / 2 times.
NLD_HD int64_t attention_max_slots(int64_t max_tiles, int64_t max_items) {
  const int64_t twice = 2 * (max_items - max_tiles);
  return twice < max_items ? twice : max_items;
}

NLD_HD int64_t plan_items_offset(int64_t max_tiles) {
  return (kPlanHeaderWords + (kPlanTileWords + 1) * max_tiles + 3) / 4 * 4;  // items are read as 16-byte vectors
}
NLD_HD int64_t attention_plan_len(int64_t max_tiles, int64_t max_items) {
  return plan_items_offset(max_tiles) + kPlanItemWords * max_items;
}

// The max_items of a plan tensor of `len` words, or -1 where it cannot be a plan of max_tiles tiles.
NLD_HD int64_t plan_items_of_len(int64_t len, int64_t max_tiles) {
  const int64_t words = len - plan_items_offset(max_tiles), items = words / kPlanItemWords;
  return words < 0 || words % kPlanItemWords != 0 || items < max_tiles ? -1 : items;
}

struct PlanShape {
  int32_t total_q, batch, heads_per_kv, split_len, tile_rows, max_tiles, max_items;
};

// ---- the arrays inside a plan ----

struct PlanArrays {
  PlanHeader* header;
  PlanTile* tiles;
  int32_t* split_tiles;  // tiles with more than one split, ascending
  PlanItem* items;       // longest first
};
NLD_HD PlanArrays plan_arrays(int32_t* plan, int64_t max_tiles) {
  int32_t* const tiles = plan + kPlanHeaderWords;
  return {reinterpret_cast<PlanHeader*>(plan), reinterpret_cast<PlanTile*>(tiles), tiles + kPlanTileWords * max_tiles,
          reinterpret_cast<PlanItem*>(plan + plan_items_offset(max_tiles))};
}

struct Plan {
  const PlanHeader* header;
  const PlanTile* tiles;
  const int32_t* split_tiles;
  const PlanItem* items;
};
NLD_HD Plan plan_view(const int32_t* plan, int64_t max_tiles) {
  const PlanArrays arrays = plan_arrays(const_cast<int32_t*>(plan), max_tiles);
  return {arrays.header, arrays.tiles, arrays.split_tiles, arrays.items};
}

NLD_HD bool plan_fits(const PlanHeader& header, const PlanShape& shape) {
  return header.version == kPlanVersion && header.batch == shape.batch && header.total_q == shape.total_q &&
         header.heads_per_kv == shape.heads_per_kv && header.tile_rows == shape.tile_rows &&
         header.split_len == shape.split_len && header.num_tiles <= shape.max_tiles &&
         header.num_items <= shape.max_items;
}

// ---- the rules, one function each, shared by the kernel and its twin ----

struct AttentionPlanParams {
  PlanShape shape;
  const int32_t* seq_lens;      // [batch]
  const int32_t* cu_seqlens_q;  // [batch + 1]
  const int32_t* mask_mode;     // [batch]
  const int32_t* block_len;     // [batch] or null
  const int32_t* block_phase;   // [batch] or null
  int32_t* plan;
};

NLD_HD int32_t plan_request_tiles(const AttentionPlanParams& p, int32_t request) {
  const int64_t rows = static_cast<int64_t>(p.cu_seqlens_q[request + 1]) - p.cu_seqlens_q[request];
  return rows <= 0 ? 0
                   : static_cast<int32_t>((rows * p.shape.heads_per_kv + p.shape.tile_rows - 1) / p.shape.tile_rows);
}

// The index'th tile of a request; its splits are not known yet.
NLD_HD PlanTile plan_tile(const AttentionPlanParams& p, int32_t request, int32_t index) {
  const RequestMask mask = request_mask(p, request);
  const int32_t begin = index * p.shape.tile_rows, left = mask.num_rows * p.shape.heads_per_kv - begin;
  const int32_t rows = left < p.shape.tile_rows ? left : p.shape.tile_rows;
  const TileKeys keys = tile_keys(mask, begin / p.shape.heads_per_kv, (begin + rows - 1) / p.shape.heads_per_kv);
  return {request, begin, rows, keys.key_end, 1, 0, -1, 0, keys.hole_begin, keys.hole_end, key_order(mask).heads_begin,
          0};
}

// The part of a tile's hole that items do not stretch over: whole splits of a fixed split_len, which leaves the others
// at its absolute multiples, and else whole steps of the kernels. Splits are of the keys without it.
NLD_HD KeyRange plan_cut(const PlanShape& shape, const PlanTile& tile) {
  return whole_steps(tile.hole_begin, tile.hole_end, 0, shape.split_len > 0 ? shape.split_len : kPlanKeys);
}
NLD_HD int32_t plan_tile_keys(const PlanShape& shape, const PlanTile& tile) {
  const KeyRange cut = plan_cut(shape, tile);
  return tile.key_end - (cut.end - cut.begin);
}

// What the split_keys way to cut is expected to take (heuristic.h); with more cuts than the plan has room for: forever.
NLD_HD int64_t plan_cut_cost(const PlanShape& shape, int32_t longest, int32_t split_keys, int64_t total_keys,
                             int64_t num_tiles, int64_t num_items) {
  const int64_t most = shape.max_items - shape.max_tiles;  // two waves
  if (num_items - num_tiles > most) return INT64_MAX;
  return plan_cost(shape.tile_rows, most > 2 ? most / 2 : 1,
                   {split_keys < longest ? split_keys : longest, num_tiles, num_items, total_keys});
}

// Splits of one tile: of equal length, or at absolute multiples of split_len. At most what the plan has room for (the
// last split takes the rest), so that a sequence longer than the promised max_seq_len is slow, not wrong.
NLD_HD void plan_split_tile(const PlanShape& shape, int32_t split_keys, PlanTile& tile) {
  const int64_t all_keys = plan_tile_keys(shape, tile);
  int64_t keys = shape.split_len;
  if (shape.split_len == 0) {
    const int64_t splits = plan_num_splits(static_cast<int32_t>(all_keys), split_keys);
    keys = splits > 1 ? plan_round_up((all_keys + splits - 1) / splits) : split_keys;
  }
  int64_t splits = (all_keys + keys - 1) / keys;
  if (shape.split_len > 0 && splits > shape.max_items / shape.max_tiles) splits = shape.max_items / shape.max_tiles;
  tile.num_splits = splits > 1 ? static_cast<int32_t>(splits) : 1;
  tile.split_keys = static_cast<int32_t>(keys);
}

NLD_HD PlanItem plan_item(const PlanShape& shape, const PlanTile& tile, int32_t tile_index, int32_t split) {
  const KeyRange cut = plan_cut(shape, tile);
  const int32_t begin = split * tile.split_keys, left_out = cut.end - cut.begin;
  int32_t end = tile.key_end;
  if (split < tile.num_splits - 1) {
    end = begin + tile.split_keys;
    if (end > cut.begin) end += left_out;
  }
  return {tile_index, split, begin >= cut.begin ? begin + left_out : begin, end};
}

// Length of that item, without the cut.
NLD_HD int32_t plan_item_keys(const PlanShape& shape, const PlanTile& tile, int32_t split) {
  return split < tile.num_splits - 1 ? tile.split_keys : plan_tile_keys(shape, tile) - split * tile.split_keys;
}

// Longest first, to 1/256 of the longest: place of an item of `keys` keys in the order.
NLD_HD int32_t plan_bucket(int32_t keys, int32_t max_item_keys) {
  return kPlanBuckets - 1 - keys / (max_item_keys / kPlanBuckets + 1);
}

}  // namespace nld
