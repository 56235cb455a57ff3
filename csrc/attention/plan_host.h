// The CPU twin of plan.cuh: the same plan, word for word. Plain loops over the rules of plan.h.
#pragma once

#include <algorithm>
#include <vector>

#include "attention/plan.h"

namespace nld {

inline void build_attention_plan(const AttentionPlanParams& p) {
  const PlanShape& shape = p.shape;
  const PlanArrays plan = plan_arrays(p.plan, shape.max_tiles);
  PlanHeader header = {
      kPlanVersion, shape.batch, shape.total_q, shape.heads_per_kv, shape.tile_rows, shape.split_len, 0, 0, 0, 0, 0, 0};
  int32_t longest = 0;
  int64_t total_keys = 0;
  for (int32_t request = 0; request < shape.batch; ++request) {
    const int32_t tiles = plan_request_tiles(p, request);
    for (int32_t i = 0; i < tiles && header.num_tiles < shape.max_tiles; ++i) {
      const PlanTile tile = plan_tile(p, request, i);
      plan.tiles[header.num_tiles++] = tile;
      longest = std::max(longest, tile.key_end);
      total_keys += tile.key_end;
    }
  }
  int32_t split_keys = 0;
  int64_t least = INT64_MAX;
  for (int32_t k = 1; k <= kPlanCandidates && shape.split_len == 0; ++k) {
    const int32_t keys = plan_split_keys(longest, k);
    int64_t items = 0;
    for (int32_t i = 0; i < header.num_tiles; ++i) items += plan_num_splits(plan.tiles[i].key_end, keys);
    const int64_t cost = plan_cut_cost(shape, longest, keys, total_keys, header.num_tiles, items);
    if (cost < least) {
      least = cost;
      split_keys = keys;
    }
  }
  std::vector<PlanItem> items;
  for (int32_t i = 0; i < header.num_tiles; ++i) {
    PlanTile& tile = plan.tiles[i];
    plan_split_tile(shape, split_keys, tile);
    tile.first_item = static_cast<int32_t>(items.size());
    if (tile.num_splits > 1) {
      tile.first_slot = header.num_slots;
      header.num_slots += tile.num_splits;
      plan.split_tiles[header.num_split_tiles++] = i;
    }
    for (int32_t split = 0; split < tile.num_splits; ++split) {
      const PlanItem item = plan_item(tile, i, split);
      items.push_back(item);
      header.max_item_keys = std::max(header.max_item_keys, item.key_end - item.key_begin);
    }
  }
  header.num_items = static_cast<int32_t>(items.size());
  const auto bucket = [&](const PlanItem& item) {
    return plan_bucket(item.key_end - item.key_begin, header.max_item_keys);
  };
  std::stable_sort(items.begin(), items.end(),
                   [&](const PlanItem& a, const PlanItem& b) { return bucket(a) < bucket(b); });
  std::copy(items.begin(), items.end(), plan.items);
  *plan.header = header;
}

}  // namespace nld
