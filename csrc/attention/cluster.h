// Whether a batch is attended by clusters that merge their splits themselves (cluster_merge.cuh) or by the plan's
// splits and a second launch that merges (combine.cuh): integers the host knows, no lengths.
#pragma once

#include "attention/plan.h"

namespace nld {

constexpr int64_t kMaxClusterSize = 16;  // 8 on every GPU with clusters, 16 where it says so

// In a cluster every tile gets the same number of CTAs, however long it is. Where one request is long and the others
// are short, the plan would have given the long one more: max_seq_len / wave keys to a CTA rather than
// max_seq_len / size. So many nanoseconds more (heuristic.h) are put up with in that worst case, to save every batch
// some 3000 of a launch and a merge through memory: a guess, nobody has timed either.
constexpr int64_t kClusterRegretNs = 16000;

// Tiles of a batch whose requests have about equally many rows. There may be more (plan.h: attention_max_tiles): then
// clusters take a second turn.
NLD_HD int64_t attention_usual_tiles(const PlanShape& shape) {
  const int64_t requests = shape.batch < shape.total_q ? shape.batch : shape.total_q;
  if (requests == 0) return 0;
  const int64_t rows = (shape.total_q + requests - 1) / requests * shape.heads_per_kv;
  return requests * ((rows + shape.tile_rows - 1) / shape.tile_rows);
}

// CTAs of a cluster, a power of two; 1: no clusters. `resident(size)`: clusters of that size that the GPU holds at
// once. The largest with which all tiles and kv heads run side by side.
template <class Resident>
int32_t attention_cluster_size(const PlanShape& shape, int64_t num_kv_heads, int64_t max_seq_len, int64_t num_sms,
                               const Resident& resident) {
  if (shape.split_len > 0) return 1;  // the caller says where splits lie
  const int64_t wanted = attention_usual_tiles(shape) * num_kv_heads;
  const int64_t wave = attention_wave(shape.tile_rows, num_kv_heads, num_sms);
  // A plan with other room than attention_plan leaves was cut by somebody who wants just these splits (tune.py).
  if (shape.max_items != attention_max_items(shape.max_tiles, wave, max_seq_len, 0)) return 1;
  for (int64_t size = kMaxClusterSize; size > 1 && wanted > 0; size /= 2) {
    const int64_t more_keys = max_seq_len / size - max_seq_len / wave;
    if (more_keys * attention_key_ns(shape.tile_rows) > kClusterRegretNs) break;  // smaller clusters: more still
    if (max_seq_len <= (size - 1) * kPlanKeys) continue;                          // somebody would never have a key
    if (resident(static_cast<int32_t>(size)) >= wanted) return static_cast<int32_t>(size);
  }
  return 1;
}

// What the CTA of that rank works through.
NLD_HD PlanItem attention_cluster_item(const PlanShape& shape, PlanTile tile, int32_t tile_index, int32_t rank,
                                       int32_t size) {
  tile.num_splits = size;
  tile.split_keys = plan_round_up((static_cast<int64_t>(plan_tile_keys(shape, tile)) + size - 1) / size);
  PlanItem item = plan_item(shape, tile, tile_index, rank);
  if (item.key_end > tile.key_end) item.key_end = tile.key_end;
  if (item.key_begin > item.key_end) item.key_begin = item.key_end;
  return item;
}

}  // namespace nld
