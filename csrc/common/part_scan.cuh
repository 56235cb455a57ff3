// Device scan of a slice of a row for a SlicePart: the same for a whole vocabulary and for a shard of it.
#pragma once

#include "common/row_scan.cuh"
#include "common/slice_part.h"

namespace nld {

// CTAs of a scan of a shard, with draws, that share an SM: as many as the registers allow without spilling.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
template <class T>
constexpr int kShardScanCtas = 2;
#else
template <class T>
constexpr int kShardScanCtas = sizeof(T) == 4 ? 2 : 3;
#endif

// Slices of a shard; parts beyond say nothing.
__device__ __forceinline__ int64_t num_shard_slices(int64_t shard_len) {
  return num_scan_slices(shard_len) - (NLD_BUG(shard_lost_slice) ? 1 : 0);
}

struct PartSmem {
  float best[kScanWarps];
  ExpSum sums[kScanWarps];
};

// Random words of a shard, whose ids are counted from `first`: four neighbours may lie in two Philox blocks.
struct ShardNoise {
  NoiseKey key;
  uint32_t first;
};
__device__ __forceinline__ Philox4 noise_words(const ShardNoise& noise, uint32_t id) {
  const uint32_t token = noise.first + id, offset = NLD_BUG(shard_noise_not_shifted) ? 0 : token % 4;
  Philox4 drawn = philox_words(noise.key, token / 4);
  if (offset == 0) return drawn;  // the same in all lanes
  const Philox4 next = philox_words(noise.key, token / 4 + 1);
#pragma unroll
  for (uint32_t by = 1; by < 4; ++by) {
    if (offset != by) continue;
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) drawn.word[i] = i + by < 4 ? drawn.word[(i + by) % 4] : next.word[(i + by) % 4];
  }
  return drawn;
}

// The part of the slice that the CTA has loaded, handed to put() by one thread. Of a shard (kShard): `first` is the id
// of its first column, else 0. Not kDraws: nothing is drawn. Not kSums: no softmax sums. All threads of the CTA call;
// the caller's barrier comes next.
template <class T, bool kDraws, bool kSums, bool kShard, class Put>
__device__ __forceinline__ void scan_part(PartSmem* sm, RowSlice<T>& slice, int32_t row_len, int32_t first,
                                          const RowQuestion& asked, uint32_t banned, const Put& put) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const auto raw = [&](int i) { return slice.raw(i); };
  const float top = thread_max(raw);
  const bool any_banned = __any_sync(kFullMask, banned != 0);
  const float allowed_top = warp_max(any_banned ? thread_max(raw, banned) : top);
  ExpSum sums = {-kScanInf, 0.0f, 0.0f};
  if (kSums) sums = warp_exp_sum(raw, warp_max(top));

  Choice choice = {allowed_top, -1};  // which id it is is looked up by the best warp only
  const bool draws = kDraws && !asked.is_held && asked.scale > 0.0f;
  if (asked.is_held) {                      // nothing to choose: the token's own logit is asked for
    const int32_t id = asked.held - first;  // negative where it lies before the shard, or nowhere
    const bool here = slice.warp_holds(id) && id < row_len;
    choice = here ? Choice{0.0f, id} : Choice{-kScanInf, -1};
  } else if (draws) {
    const float floor = add_rn(fminf(mul_rn(allowed_top, asked.scale), kScanMaxFloat), kMinGumbel);
    const auto next8 = [&](float (&values)[8]) { slice.take8(values); };
    if constexpr (kShard) {
      const ShardNoise noise = {asked.key, static_cast<uint32_t>(first)};
      choice = warp_gumbel(slice, next8, asked.scale, noise, banned, floor);
    } else {
      choice = warp_gumbel(slice, next8, asked.scale, asked.key, banned, floor);
    }
  }
  if (lane == 0) {
    sm->best[warp] = choice.value;
    sm->sums[warp] = sums;
  }
  if (!NLD_BUG(commit_no_barrier)) __syncthreads();
  if (warp != best_warp(sm->best)) return;  // whole warps
  float logit = choice.value;
  if (asked.is_held || draws) {
    if (choice.id >= 0) logit = slice.logit_of(choice.id);
  } else {
    choice.id = warp_find(slice, raw, choice.value, banned);
  }
  const ExpSum total = merge_lanes<kScanWarps>(sm->sums[lane % kScanWarps]);
  if (lane != 0) return;
  if (choice.id < 0) {
    choice = {-kScanInf, -1};
    logit = 0.0f;
  } else if (kShard && !NLD_BUG(shard_id_not_global)) {
    choice.id += first;
  }
  put(SlicePart{total.max, total.sum, total.dot, choice.value, choice.id, logit, {0, 0}});
}

// Past the L1 cache, which does not see what other SMs wrote during the launch.
__device__ __forceinline__ SlicePart load_slice_part(const SlicePart* part) {
  union {
    uint4 halves[2];
    SlicePart part;
  } u;
  u.halves[0] = __ldcg(reinterpret_cast<const uint4*>(part));
  u.halves[1] = __ldcg(reinterpret_cast<const uint4*>(part) + 1);
  return u.part;
}

// Part i of a row, from those of all shards.
__device__ __forceinline__ SlicePart load_shard_part(const RowParts& p, int32_t row, int32_t i) {
  const int32_t per_shard = static_cast<int32_t>(p.num_parts), shard = i / per_shard;
  const int64_t shard_rows = NLD_BUG(shard_wrong_stride) ? 0 : shard * p.rows;
  return load_slice_part(p.parts + (shard_rows + row) * per_shard + i % per_shard);
}

}  // namespace nld
