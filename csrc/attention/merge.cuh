// Merges the partial results of a row's splits into `out` and `lse`. The only code that does: where the partials lie
// (workspace, or the shared memory of a cluster) changes no bit.
#pragma once

#include "attention/rows.cuh"

namespace nld {

constexpr int kMergeAhead = 8;  // partial rows on their way at once

// Row `row` of a tile, by one warp. `splits` has max(s), sum(s) and out(s), the row's head_dim floats, of each split s,
// aligned to kVec floats. There are few rows, so latency is what counts: a lane per split reads the maxima and sums,
// then all weights are known and the rows follow, eight at a time. Order of the splits is that of the keys, whoever
// finished first. The `out` of splits in which the row saw nothing is not read.
template <class T, int kVec, class Splits>
__device__ __forceinline__ void merge_row(const AttentionCudaParams& p, const PlanTile& tile, int32_t kv_head,
                                          int32_t row, const Splits& splits, int32_t num_splits, int32_t head_dim) {
  const int lane = threadIdx.x % kWarpSize;
  float m = -INFINITY;
  for (int32_t split = lane; split < num_splits; split += kWarpSize) m = fmaxf(m, splits.max(split));
#pragma unroll
  for (int x = kWarpSize / 2; x > 0; x /= 2) m = fmaxf(m, __shfl_xor_sync(kFullMask, m, x));
  const float m_safe = m == -INFINITY ? 0.0f : m;
  const RowPlace place = row_place(p, tile.request, tile.row_begin + row, kv_head);
  T* out = static_cast<T*>(p.out) + place.token * p.out_token_stride + place.head * p.out_head_stride;
  // Once per pass of 32 * kVec dims: one at head_dim 128, so l is simply summed again in the others.
  for (int32_t dim0 = 0; dim0 < head_dim; dim0 += kWarpSize * kVec) {
    const int32_t dim = dim0 + lane * kVec;
    float l = 0.0f;
    Vec<float, kVec> o = {};
    for (int32_t split0 = 0; split0 < num_splits; split0 += kWarpSize) {
      const int32_t count = min(kWarpSize, num_splits - split0);
      float my_l = 0.0f, my_weight = 0.0f;
      if (lane < count) {
        my_l = splits.sum(split0 + lane);
        my_weight = NLD_BUG(combine_wrong_weight) ? 1.0f : partial_weight(splits.max(split0 + lane), m_safe);
      }
      const unsigned seen = __ballot_sync(kFullMask, my_l != 0.0f);  // a NaN is
      for (int32_t s0 = 0; s0 < count; s0 += kMergeAhead) {
        Vec<float, kVec> part[kMergeAhead];
#pragma unroll
        for (int i = 0; i < kMergeAhead; ++i) {
          part[i] = {};
          if ((seen >> (s0 + i) & 1) != 0 && dim < head_dim) {
            part[i] = *reinterpret_cast<const Vec<float, kVec>*>(splits.out(split0 + s0 + i) + dim);
          }
        }
#pragma unroll
        for (int i = 0; i < kMergeAhead; ++i) {
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

}  // namespace nld
