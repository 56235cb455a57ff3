// The CPU twin of plan.cuh: the same plan, word for word. Plain loops over the rules of plan.h.
#pragma once

#include <algorithm>
#include <utility>
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
      longest = std::max(longest, plan_tile_keys(shape, tile));
      total_keys += plan_tile_keys(shape, tile);
    }
  }
  int32_t split_keys = 0;
  int64_t least = INT64_MAX;
  for (int32_t k = 1; k <= kPlanCandidates && shape.split_len == 0; ++k) {
    const int32_t keys = plan_split_keys(longest, k);
    int64_t items = 0;
    for (int32_t i = 0; i < header.num_tiles; ++i) {
      items += plan_num_splits(plan_tile_keys(shape, plan.tiles[i]), keys);
    }
    const int64_t cost = plan_cut_cost(shape, longest, keys, total_keys, header.num_tiles, items);
    if (cost < least) {
      least = cost;
      split_keys = keys;
    }
  }
  std::vector<std::pair<int32_t, PlanItem>> items;  // with their lengths
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
      const int32_t keys = plan_item_keys(shape, tile, split);
      items.push_back({keys, plan_item(shape, tile, i, split)});
      header.max_item_keys = std::max(header.max_item_keys, keys);
    }
  }
  header.num_items = static_cast<int32_t>(items.size());
  std::stable_sort(items.begin(), items.end(), [&](const auto& a, const auto& b) {
    return plan_bucket(a.first, header.max_item_keys) < plan_bucket(b.first, header.max_item_keys);
  });
  std::transform(items.begin(), items.end(), plan.items, [](const auto& item) { return item.second; });
  *plan.header = header;
}

}  // namespace nld
