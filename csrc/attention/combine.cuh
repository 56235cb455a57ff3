// Merges the partial results of split tiles, in a launch of its own.
#pragma once

#include "attention/merge.cuh"
#include "common/ptx.cuh"

namespace nld {

constexpr int kCombineThreads = 128, kCombineWarps = kCombineThreads / kWarpSize;

// The partial results of one row in the workspace.
struct WorkspaceSplits {
  const AttentionCudaParams& p;
  int64_t first, stride;  // of split 0; from split to split
  int32_t head_dim;
  __device__ __forceinline__ float max(int32_t split) const { return p.partial_m[first + split * stride]; }
  __device__ __forceinline__ float sum(int32_t split) const { return p.partial_l[first + split * stride]; }
  __device__ __forceinline__ const float* out(int32_t split) const {
    return p.partial_o + (first + split * stride) * head_dim;
  }
};

// A warp per row, over a persistent grid: rows of split tiles, then the rows that belong to no request (0 and -inf).
// Traffic: (head_dim + 2) * 4 bytes per row and split, mostly from L2, where the attention kernel left them moments
// ago. One more launch rather than "the last CTA merges": no tickets to reset, and the merge has all SMs to itself.
// Where few tiles share the GPU there is no need for either: cluster_merge.cuh.
template <class T, int kVec>
__global__ void __launch_bounds__(kCombineThreads, 4)
    attention_combine_kernel(const __grid_constant__ AttentionCudaParams p) {
  if (!NLD_BUG(combine_no_wait)) ptx::wait_for_previous_kernel();
  ptx::allow_next_kernel();
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kCombineWarps + threadIdx.x / kWarpSize;
  const int64_t num_warps = static_cast<int64_t>(gridDim.x) * kCombineWarps;
  const int32_t head_dim = static_cast<int32_t>(p.head_dim), tile_rows = p.plan_shape.tile_rows;
  int64_t split_rows = 0;
  Plan plan = {};
  if (p.plan_shape.max_tiles > 0) {
    plan = plan_view(p.plan, p.plan_shape.max_tiles);
    split_rows = plan.header->num_split_tiles * p.num_kv_heads * tile_rows;
  }
  for (int64_t i = warp; i < split_rows; i += num_warps) {
    const int32_t r = static_cast<int32_t>(i % tile_rows);
    const int32_t kv_head = static_cast<int32_t>(i / tile_rows % p.num_kv_heads);
    const PlanTile tile = plan.tiles[plan.split_tiles[i / tile_rows / p.num_kv_heads]];
    if (r >= tile.num_rows) continue;  // warps never wait for each other
    const WorkspaceSplits splits = {p, partial_row(p, tile.first_slot, kv_head, r), p.num_kv_heads * tile_rows,
                                    head_dim};
    merge_row<T, kVec>(p, tile, kv_head, r, splits, tile.num_splits, head_dim);
  }
  // Where there are tiles, the attention kernel has.
  if (p.plan_shape.max_tiles == 0) clear_rows<T>(p, owned_rows(p), threadIdx.x / kWarpSize, kCombineWarps);
}

}  // namespace nld
