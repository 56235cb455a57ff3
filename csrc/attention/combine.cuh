// Merges the partial results of split tiles.
#pragma once

#include "attention/rows.cuh"

namespace nld {

constexpr int kCombineThreads = 128, kCombineWarps = kCombineThreads / kWarpSize;

constexpr int kCombineAhead = 8;  // partial rows on their way at once

// A warp per row, over a persistent grid: rows of split tiles, then the rows that belong to no request (0 and -inf).
// Traffic: (head_dim + 2) * 4 bytes per row and split, mostly from L2, where the attention kernel left them moments
// ago; partials of splits in which a row saw nothing are not read. There are few rows, so latency is what counts: a
// lane per split reads the maxima and sums, then all weights are known and the rows follow, eight at a time. Order of
// the splits is that of the keys, whoever finished first. One more launch rather than "the last CTA merges": no tickets
// to reset, and the merge has all SMs to itself.
template <class T, int kVec>
__global__ void __launch_bounds__(kCombineThreads, 4)
    attention_combine_kernel(const __grid_constant__ AttentionCudaParams p) {
  const int lane = threadIdx.x % kWarpSize;
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
    const int64_t first = partial_row(p, tile.first_slot, kv_head, r);
    const int64_t stride = p.num_kv_heads * tile_rows;  // from split to split
    float m = -INFINITY;
    for (int32_t split = lane; split < tile.num_splits; split += kWarpSize) {
      m = fmaxf(m, p.partial_m[first + split * stride]);
    }
#pragma unroll
    for (int x = kWarpSize / 2; x > 0; x /= 2) m = fmaxf(m, __shfl_xor_sync(kFullMask, m, x));
    const float m_safe = m == -INFINITY ? 0.0f : m;
    const RowPlace place = row_place(p, tile.request, tile.row_begin + r, kv_head);
    T* out = static_cast<T*>(p.out) + place.token * p.out_token_stride + place.head * p.out_head_stride;
    // Once per pass of 32 * kVec dims: one at head_dim 128, so l is simply summed again in the others.
    for (int32_t dim0 = 0; dim0 < head_dim; dim0 += kWarpSize * kVec) {
      const int32_t dim = dim0 + lane * kVec;
      float l = 0.0f;
      Vec<float, kVec> o = {};
      for (int32_t split0 = 0; split0 < tile.num_splits; split0 += kWarpSize) {
        const int32_t count = min(kWarpSize, tile.num_splits - split0);
        float my_l = 0.0f, my_weight = 0.0f;
        if (lane < count) {
          const int64_t at = first + (split0 + lane) * stride;
          my_l = p.partial_l[at];
          my_weight = NLD_BUG(combine_wrong_weight) ? 1.0f : partial_weight(p.partial_m[at], m_safe);
        }
        const unsigned seen = __ballot_sync(kFullMask, my_l != 0.0f);  // a NaN is
        for (int32_t s0 = 0; s0 < count; s0 += kCombineAhead) {
          Vec<float, kVec> part[kCombineAhead];
#pragma unroll
          for (int i = 0; i < kCombineAhead; ++i) {
            part[i] = {};
            if ((seen >> (s0 + i) & 1) != 0 && dim < head_dim) {
              const float* from = p.partial_o + (first + (split0 + s0 + i) * stride) * head_dim + dim;
              part[i] = *reinterpret_cast<const Vec<float, kVec>*>(from);
            }
          }
#pragma unroll
          for (int i = 0; i < kCombineAhead; ++i) {
            const float weight = __shfl_sync(kFullMask, my_weight, s0 + i);
            const float l_split = __shfl_sync(kFullMask, my_l, s0 + i);
            if ((seen >> (s0 + i) & 1) == 0) continue;
            l = __fmaf_rn(l_split, weight, l);
#pragma unroll
            for (int e = 0; e < kVec; ++e) o.at[e] = __fmaf_rn(part[i].at[e], weight, o.at[e]);
          }
        }
      }
      if (dim < head_dim) {
        const float scale = row_scale(p, kv_head, l);
        Vec<T, kVec> result;
#pragma unroll
        for (int e = 0; e < kVec; ++e) result.at[e] = from_float<T>(o.at[e] * scale);
        if (reinterpret_cast<uintptr_t>(out) % sizeof(result) == 0) {
          *reinterpret_cast<Vec<T, kVec>*>(out + dim) = result;
        } else {
#pragma unroll
          for (int e = 0; e < kVec; ++e) out[dim + e] = result.at[e];
        }
      }
      if (dim0 == 0 && lane == 0) {
        p.lse[place.head * p.lse_head_stride + place.token * p.lse_token_stride] = row_lse(m, l);
      }
    }
  }

  const int64_t owned = p.batch > 0 ? p.cu_seqlens_q[p.batch] : 0;
  for (int64_t i = owned * p.num_heads + warp; i < p.total_q * p.num_heads; i += num_warps) {
    const int64_t token = i / p.num_heads, head = i % p.num_heads;
    T* out = static_cast<T*>(p.out) + token * p.out_token_stride + head * p.out_head_stride;
    for (int32_t dim = lane; dim < head_dim; dim += kWarpSize) out[dim] = from_float<T>(0.0f);
    if (lane == 0) p.lse[head * p.lse_head_stride + token * p.lse_token_stride] = -INFINITY;
  }
}

}  // namespace nld
