// The splits of one tile in one cluster: each CTA works through its share of the keys, parks what it has in its own
// shared memory, and then merges its share of the rows from the shared memory of all. Nothing goes through global
// memory, nothing is left for another launch, and all CTAs merge: the last CTA of a tile alone would read
// 128 rows * 16 splits * 512 bytes = 1 MB of a block of 32 tokens, of which one SM gets about 0.1 MB in a microsecond.
//
//      rank 0: keys [0, s)   rank 1: [s, 2 s)   rank 2: [2 s, 3 s) ...      s = a multiple of 64
//        parts                 parts              parts
//   ------------------------------ barrier of the cluster ------------------------------
//      rows 0, C, 2 C ...    rows 1, C + 1 ...  ...        from all parts, in the order of the ranks
//   ------------------------------ barrier of the cluster ------------------------------    parts are free
//
// A kernel that does so takes its work from for_each_item, leaves results in a ClusterParts and calls
// ItemView::finish_item.
#pragma once

#include "attention/cluster.h"
#include "attention/merge.cuh"
#include "common/ptx_sm90.cuh"

namespace nld {

__device__ __forceinline__ bool in_cluster(const AttentionCudaParams& p) { return ptx::kHasSm90 && p.cluster_size > 1; }

// What a CTA of a persistent grid does: pairs (item, kv head) of the plan, forth and back (heuristic.h); in clusters,
// pairs (tile, kv head), and of each its share of the keys. Body: void(item, kv head).
template <class Body>
__device__ __forceinline__ void for_each_item(const AttentionCudaParams& p, const Body& body) {
  const Plan plan = plan_view(p.plan, p.plan_shape.max_tiles);
  NLD_DEVICE_CHECK(plan_fits(*plan.header, p.plan_shape), "the plan was made for these sizes");
  const int num_kv_heads = static_cast<int>(p.num_kv_heads), size = in_cluster(p) ? p.cluster_size : 1;
  const int num_ctas = static_cast<int>(gridDim.x) / size;  // or clusters
  int step = attention_first_step(static_cast<int>(blockIdx.x) / size, num_ctas);
  for (int work = static_cast<int>(blockIdx.x) / size;;) {
    const int index = work / num_kv_heads, kv_head = work % num_kv_heads;
    PlanItem item;
    // Read before it is known to exist, so that the two reads overlap.
    if (size > 1) {
      const PlanTile tile = plan.tiles[min(index, p.plan_shape.max_tiles - 1)];
      item = attention_cluster_item(p.plan_shape, tile, index, ptx::cluster_rank(), size);
      if (index >= plan.header->num_tiles) break;
    } else {
      item = plan.items[min(index, p.plan_shape.max_items - 1)];
      if (index >= plan.header->num_items) break;
    }
    body(item, kv_head);
    work = index * num_kv_heads + kv_head + step;
    step = attention_next_step(step, num_ctas);
  }
}

// Partial results of a tile; 8 more floats a row avoid bank conflicts of accumulators whose threads hold pairs of
// columns of 8 rows.
template <int kHeadDim_, int kRows>
struct ClusterParts {
  static constexpr int kHeadDim = kHeadDim_;
  alignas(16) float out[kRows][kHeadDim + 8];
  float max[kRows], sum[kRows];

  __device__ __forceinline__ PartialRow row(int row) { return {out[row], &max[row], &sum[row]}; }
};

// One row in the parts of every CTA of the cluster.
template <class Parts>
struct ClusterSplits {
  Parts* parts;
  int32_t row, num_splits;
  __device__ __forceinline__ int32_t rank(int32_t split) const {
    return NLD_BUG(cluster_wrong_order) ? num_splits - 1 - split : split;
  }
  __device__ __forceinline__ float max(int32_t split) const { return *ptx::map_to_rank(&parts->max[row], rank(split)); }
  __device__ __forceinline__ float sum(int32_t split) const { return *ptx::map_to_rank(&parts->sum[row], rank(split)); }
  __device__ __forceinline__ const float* out(int32_t split) const {
    return ptx::map_to_rank(parts->out[row], rank(split));
  }
};

// The barriers of the cluster, for every thread of every CTA. On GPUs that have none nobody comes here.
__device__ __forceinline__ void meet_before_merge() {
  if (!NLD_BUG(cluster_merges_early)) ptx::cluster_sync();
}
__device__ __forceinline__ void meet_after_merge() {
  if (!NLD_BUG(cluster_parts_in_use)) ptx::cluster_sync();
}
// Of warps that merge nothing.
__device__ __forceinline__ void meet_cluster_twice() {
  meet_before_merge();
  meet_after_merge();
}

// This CTA's share of the rows, by warp `warp` of num_warps, between the two barriers.
template <class T, class Parts>
__device__ __forceinline__ void merge_in_cluster(const AttentionCudaParams& p, const PlanTile& tile, int32_t kv_head,
                                                 Parts* parts, int warp, int num_warps) {
  const int size = p.cluster_size;
  constexpr int kVec = Parts::kHeadDim % (4 * kWarpSize) == 0 || Parts::kHeadDim % (2 * kWarpSize) != 0 ? 4 : 2;
  const int stride = num_warps * size + NLD_BUG(cluster_lost_rows);
  for (int row = warp * size + ptx::cluster_rank(); row < tile.num_rows; row += stride) {
    const ClusterSplits<Parts> splits = {parts, row, size};
    merge_row<T, kVec>(p, tile, kv_head, row, splits, size, Parts::kHeadDim);
  }
}

}  // namespace nld
