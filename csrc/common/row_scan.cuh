// Device scans over a row of logits: argmax, Gumbel argmax, softmax sums. Shared by the sampler and verification.
//
// A row is cut into slices of kScanSliceLen ids, one CTA each; a warp owns 1024 neighbouring ids of a slice, a thread
// holds 32 of them in registers, all loaded up front. Which thread looks at an id, and the order in which parts are
// put together, depend on nothing but the id: results are the same for any batch, row, alignment and schedule.
// Values may be anything: NaN counts as -inf, +inf as the largest finite float. Ties go to the lowest id.
//
// How a kernel uses it (`value(i)`, i = 0 .. 31, is the value of the thread's element i; loops over i are unrolled):
//   RowSlice<T> slice;  slice.load(row, slice_idx, vocab);            // missing ids at the end are -inf
//   banned = slice.banned_mask(ids, num_ids);                         // bit i: element i may not be chosen
//   top = warp_max(thread_max(value));  sums = warp_exp_sum(value, top);     // the warp's softmax sums
//   best = warp_max(thread_max(value, banned)) or warp_gumbel(...);          // the warp's best; its id comes later:
//   -> shared memory, barrier -> best_warp(...) knows whose best it is; that warp calls warp_find() and merges the sums
#pragma once

#include <type_traits>

#include "common/element.cuh"
#include "common/philox.h"
#include "common/ptx.cuh"

namespace nld {

constexpr int kScanThreads = 256, kScanWarps = kScanThreads / kWarpSize;
constexpr int kScanIds = 32;                                      // ids a thread holds
constexpr int kScanWarpIds = kScanIds * kWarpSize;                // neighbouring ids a warp holds
constexpr int kScanSliceLen = kScanWarpIds * kScanWarps;          // ids of a CTA
constexpr int64_t kScanMaxVocab = INT32_MAX - 2 * kScanSliceLen;  // so that ids past the end fit 32 bits
constexpr float kScanInf = __builtin_huge_valf();
constexpr float kScanMaxFloat = 3.402823466e+38f;
constexpr float kScanLog2e = 1.44269504f;

NLD_HD int64_t num_scan_slices(int64_t vocab) { return (vocab + kScanSliceLen - 1) / kScanSliceLen; }

// NaN -> -inf, +inf -> the largest finite float.
__device__ __forceinline__ float clean_logit(float x) { return fminf(fmaxf(x, -kScanInf), kScanMaxFloat); }

// ---- what a thread holds of a row ----

template <class T>
struct PackedBits;
template <>
struct PackedBits<float> {
  using Load = uint32_t;
  static constexpr uint32_t kNothing = 0xff800000u;  // -inf
};
template <>
struct PackedBits<bf16> {  // two elements in a word
  using Load = uint16_t;
  static constexpr uint32_t kNothing = 0xff80ff80u;
};
template <>
struct PackedBits<f16> {
  using Load = uint16_t;
  static constexpr uint32_t kNothing = 0xfc00fc00u;
};

// 32 ids of a row, as they lie in memory: kNumVecs vectors of 16 bytes, a warp's vectors side by side.
template <class T>
struct RowSlice {
  static constexpr int kPerWord = 4 / sizeof(T);
  static constexpr uint32_t kNothing = PackedBits<T>::kNothing;
  static constexpr int kVec = 4 * kPerWord;  // ids of a 16-byte vector
  static constexpr int kNumVecs = kScanIds / kVec;
  static constexpr int kVecStride = kVec * kWarpSize;  // from one vector of a thread to its next

  uint32_t first;  // id of element 0; past the vocabulary where the row has ended
  uint32_t words[kNumVecs * 4];

  __device__ __forceinline__ uint32_t id(int i) const { return first + i / kVec * kVecStride + i % kVec; }
  __device__ __forceinline__ uint32_t warp_first() const { return first - threadIdx.x % kWarpSize * kVec; }

  // The logit of element i as it is.
  __device__ __forceinline__ float raw(int i) const {
    const uint32_t word = words[i / kPerWord];
    if constexpr (std::is_same_v<T, float>) {
      return __uint_as_float(word);
    } else if constexpr (std::is_same_v<T, bf16>) {
      return __uint_as_float(i % 2 == 0 ? word << 16 : word & 0xffff0000u);
    } else {
      return to_float(f16{static_cast<uint16_t>(i % 2 == 0 ? word : word >> 16)});
    }
  }

  // Reads the thread's share of slice `slice_idx`: 16 bytes at a time whatever the alignment of the row, all issued
  // before the first is used. Elements that the row does not have are -inf. Warps past its end read nothing.
  // vocab <= kScanMaxVocab.
  __device__ __forceinline__ void load(const T* row, int32_t slice_idx, int32_t vocab) {
    const int32_t begin = slice_idx * kScanSliceLen + static_cast<int32_t>(threadIdx.x) / kWarpSize * kScanWarpIds;
    first = static_cast<uint32_t>(begin) + threadIdx.x % kWarpSize * kVec;
    const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
    const int32_t at = static_cast<int32_t>(first) - shift;  // where the vector lies that has element 0
    if (shift == 0 && begin + kScanWarpIds <= vocab) {
#pragma unroll
      for (int k = 0; k < kNumVecs; ++k) load_vec(row + at + k * kVecStride, words + 4 * k);
      return;
    }
    load_clipped(row, at, vocab, shift);
  }

  // Bit i: element i is one of `ids` (any values, those outside the vocabulary are ignored). Warp-uniform cost: a warp
  // without a banned id only looks through the list, 32 ids at a time. `first_token_id`: of a shard's first column.
  __device__ __forceinline__ uint32_t banned_mask(const int64_t* ids, int64_t num_ids,
                                                  int32_t first_token_id = 0) const {
    const uint64_t begin = static_cast<uint64_t>(first_token_id) + warp_first();
    uint32_t mask = 0;
    for (int64_t base = 0; base < num_ids; base += kWarpSize) {
      const int64_t i = base + threadIdx.x % kWarpSize;
      // Unsigned, so that ids before `begin`, and any nonsense, lie beyond the end.
      const uint64_t offset = i < num_ids ? static_cast<uint64_t>(ids[i]) - begin : UINT64_MAX;
      unsigned hits = __ballot_sync(kFullMask, offset < kScanWarpIds);
      while (hits != 0) {
        const int lane = __ffs(hits) - 1;
        hits &= hits - 1;
        mask |= element_bit(__shfl_sync(kFullMask, static_cast<int>(offset), lane));
      }
    }
    return mask;
  }

  // The bit of the id at `offset` from the warp's first, 0 where another lane holds it.
  __device__ __forceinline__ uint32_t element_bit(int offset) const {
    const int in_lane = offset % kVecStride - static_cast<int>(threadIdx.x % kWarpSize) * kVec;
    if (offset < 0 || offset >= kScanWarpIds || in_lane < 0 || in_lane >= kVec) return 0;
    return 1u << (offset / kVecStride * kVec + in_lane);
  }

  // The first 8 elements as floats; then the elements move up by 8, so that after 4 calls all are in place again.
  // (Registers cannot be indexed by the counter of a rolled loop.)
  __device__ __forceinline__ void take8(float (&values)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = raw(i);
    constexpr int kMoved = 8 / kPerWord, kWords = kNumVecs * 4;
    uint32_t taken[kMoved];
#pragma unroll
    for (int i = 0; i < kMoved; ++i) taken[i] = words[i];
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = i + kMoved < kWords ? words[(i + kMoved) % kWords] : taken[i % kMoved];
  }

  // The logit of an id that the warp holds, in every lane.
  __device__ __forceinline__ float logit_of(int64_t id) const {
    const uint32_t mine = element_bit(static_cast<int>(id - warp_first()));
    float logit = 0.0f;
#pragma unroll
    for (int i = 0; i < kScanIds; ++i) logit = (mine >> i & 1) != 0 ? raw(i) : logit;
    const int owner = __ffs(static_cast<int>(__ballot_sync(kFullMask, mine != 0))) - 1;
    return clean_logit(__shfl_sync(kFullMask, logit, owner));
  }
  __device__ __forceinline__ bool warp_holds(int64_t id) const {
    return id >= warp_first() && id < static_cast<int64_t>(warp_first()) + kScanWarpIds;
  }

 private:
  static __device__ __forceinline__ void load_vec(const T* from, uint32_t* to) {
    const uint4 vec = ptx::load_once(reinterpret_cast<const uint4*>(from));
    to[0] = vec.x;
    to[1] = vec.y;
    to[2] = vec.z;
    to[3] = vec.w;
  }
  // The general case: vectors that the row has only a part of, and rows that do not begin at a multiple of 16 bytes.
  __device__ __forceinline__ void load_clipped(const T* row, int32_t at, int32_t vocab, int shift) {
    const bool is_last_lane = threadIdx.x % kWarpSize == kWarpSize - 1;
    uint32_t beyond[4];    // the vector after the last one of the last lane
    uint32_t partial = 0;  // bit k: of vector k the row has a part
#pragma unroll
    for (int k = 0; k <= kNumVecs; ++k) {
      uint32_t* const to = k < kNumVecs ? words + 4 * k : beyond;
      const int32_t begin = vec_at(at, k);
#pragma unroll
      for (int w = 0; w < 4; ++w) to[w] = kNothing;
      if (k == kNumVecs && (shift == 0 || !is_last_lane)) continue;
      if (begin >= 0 && begin + kVec <= vocab) {
        load_vec(row + begin, to);
      } else if (begin + kVec > 0 && begin < vocab) {
        partial |= 1u << k;
      }
    }
    const auto* const bits = reinterpret_cast<const typename PackedBits<T>::Load*>(row);
    while (partial != 0) {  // rarely more than one in the whole row
      const int k = __ffs(static_cast<int>(partial)) - 1;
      partial &= partial - 1;
      uint32_t vec[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        vec[w] = kNothing;
#pragma unroll
        for (int e = 0; e < kPerWord; ++e) {
          const int32_t i = vec_at(at, k) + w * kPerWord + e;
          if (i < 0 || i >= vocab || NLD_BUG(scan_lost_tail)) continue;
          const uint32_t bit = __ldg(bits + i);
          vec[w] = kPerWord == 1 ? bit : e == 0 ? (vec[w] & 0xffff0000u) | bit : (vec[w] & 0xffffu) | bit << 16;
        }
      }
#pragma unroll
      for (int i = 0; i <= kNumVecs; ++i) {
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          uint32_t& to = i < kNumVecs ? words[4 * (i % kNumVecs) + w] : beyond[w];
          to = i == k ? vec[w] : to;
        }
      }
    }
    if (shift != 0) realign(beyond, shift);
  }
  static __device__ __forceinline__ int32_t vec_at(int32_t at, int k) {
    return at + (k < kNumVecs ? k * kVecStride : (kNumVecs - 1) * kVecStride + kVec);
  }

  // The vectors were read `shift` elements too early; what is missing at their ends lies in the next lane.
  __device__ __forceinline__ void realign(const uint32_t (&beyond)[4], int shift) {
    const int lane = threadIdx.x % kWarpSize;
    const int words_off = shift / kPerWord;
    const bool halves = kPerWord == 2 && shift % 2 != 0;
#pragma unroll
    for (int k = 0; k < kNumVecs; ++k) {
      uint32_t both[8];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        both[w] = words[4 * k + w];
        // Lane 31 is followed by lane 0 of the next vector.
        const bool wraps = k + 1 < kNumVecs && lane == 0 && !NLD_BUG(scan_wrong_neighbour);
        both[4 + w] = __shfl_sync(kFullMask, wraps ? words[4 * ((k + 1) % kNumVecs) + w] : both[w], lane + 1);
        if (k + 1 == kNumVecs && lane == kWarpSize - 1) both[4 + w] = beyond[w];
      }
#pragma unroll
      for (int by = 2; by > 0; by /= 2) {
#pragma unroll
        for (int w = 0; w + by < 8; ++w) both[w] = (words_off & by) != 0 ? both[w + by] : both[w];
      }
#pragma unroll
      for (int w = 0; w < 4; ++w) words[4 * k + w] = halves ? both[w] >> 16 | both[w + 1] << 16 : both[w];
    }
  }
};

// ---- over a warp: every lane gets the result ----

// Integers in the order of floats (NaN aside); its own inverse.
__device__ __forceinline__ int32_t float_order(float x) {
  const int32_t bits = float_bits(x);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
__device__ __forceinline__ float warp_max(float x) {
  const int32_t order = __reduce_max_sync(kFullMask, float_order(x));
  return bits_float(order ^ ((order >> 31) & 0x7fffffff));
}
// Sums over groups of kWidth lanes, in a fixed order.
template <int kWidth = kWarpSize>
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = kWidth / 2; step > 0; step /= 2) x += __shfl_xor_sync(kFullMask, x, step);
  return x;
}

// Largest value of a thread, cleaned; elements whose bit is set are left out.
template <class Value>
__device__ __forceinline__ float thread_max(const Value& value) {
  float top[2] = {-kScanInf, -kScanInf};
#pragma unroll
  for (int i = 0; i < kScanIds; ++i) top[i % 2] = fmaxf(top[i % 2], value(i));  // passes over NaN
  return fminf(fmaxf(top[0], top[1]), kScanMaxFloat);
}
template <class Value>
__device__ __forceinline__ float thread_max(const Value& value, uint32_t left_out) {
  return thread_max([&](int i) { return (left_out >> i & 1) != 0 ? -kScanInf : value(i); });
}

// Softmax sums: sum of exp(x - max), and dot = sum of exp(x - max) * (x - max), from which the entropy is
// log(sum) - dot / sum. max -inf and sum 0: no value above -inf.
struct ExpSum {
  float max, sum, dot;
};

// exp(x - max) of a difference that may be anything <= 0, also -inf and NaN (-inf - -inf): those weigh nothing.
__device__ __forceinline__ float clamp_shift(float shift) { return fmaxf(shift, -200.0f); }
__device__ __forceinline__ float exp_shift(float clamped) { return ptx::exp2_approx(clamped * kScanLog2e); }

// The sums of a warp's values, of which `max` is the largest, cleaned. One exponential per value.
template <class Value>
__device__ __forceinline__ ExpSum warp_exp_sum(const Value& value, float max) {
  float sum = 0.0f, dot = 0.0f;
  // One fused multiply-add does for x * log2(e) - reference: exact but for the rounding of the result, whatever the
  // rounding of the reference, as long as the maximum is given a weight by the same formula and divided out.
  const float reference = max * kScanLog2e;
  bool fits = fabsf(max) < 1e5f;  // beyond, that weight could overflow
  if (fits) {
#pragma unroll
    for (int i = 0; i < kScanIds; ++i) {
      const float t = fmaf(value(i), kScanLog2e, -reference), weight = ptx::exp2_approx(t);
      sum += weight;
      dot = fmaf(weight, t, dot);
    }
    fits = !__any_sync(kFullMask, dot != dot);  // 0 * -inf: there is a NaN or -inf among the values
  }
  if (fits) {
    const float t = fmaf(max, kScanLog2e, -reference), weight = ptx::exp2_approx(t);
    sum = warp_sum(sum);
    dot = warp_sum(dot);
    return {max, sum / weight, (dot - t * sum) * kLn2 / weight};
  }
  sum = dot = 0.0f;
#pragma unroll
  for (int i = 0; i < kScanIds; ++i) {
    const float shift = clamp_shift(clean_logit(value(i)) - max), weight = exp_shift(shift);
    sum += weight;
    dot = fmaf(weight, shift, dot);
  }
  return {max, warp_sum(sum), warp_sum(dot)};
}

// The sums of kWidth neighbouring lanes put together, in a fixed order; lanes without any pass {-inf, 0, 0}.
template <int kWidth>
__device__ __forceinline__ ExpSum merge_lanes(ExpSum part) {
  float max = part.max;
#pragma unroll
  for (int step = kWidth / 2; step > 0; step /= 2) max = fmaxf(max, __shfl_xor_sync(kFullMask, max, step));
  const float shift = clamp_shift(part.max - max), factor = NLD_BUG(scan_merge_weight) ? 1.0f : exp_shift(shift);
  return {max, warp_sum<kWidth>(part.sum * factor), warp_sum<kWidth>((part.dot + part.sum * shift) * factor)};
}
__device__ __forceinline__ ExpSum merge(const ExpSum& a, const ExpSum& b) {
  const float max = fmaxf(a.max, b.max), shift_a = clamp_shift(a.max - max), shift_b = clamp_shift(b.max - max);
  const float factor_a = exp_shift(shift_a), factor_b = exp_shift(shift_b);
  return {max, a.sum * factor_a + b.sum * factor_b,
          (a.dot + a.sum * shift_a) * factor_a + (b.dot + b.sum * shift_b) * factor_b};
}

// ---- argmax ----

// A chosen id and what it was compared by. id -1: nothing above -inf to choose from.
struct Choice {
  float value;
  int32_t id;
};
__device__ __forceinline__ bool is_better(const Choice& a, const Choice& b) {
  const bool lower = NLD_BUG(scan_tie_to_higher_id) ? a.id > b.id : a.id < b.id;
  return a.value > b.value || (a.value == b.value && a.id >= 0 && (b.id < 0 || lower));
}
// The best of kWidth neighbouring lanes.
template <int kWidth>
__device__ __forceinline__ Choice best_lane(Choice mine) {
#pragma unroll
  for (int step = kWidth / 2; step > 0; step /= 2) {
    const Choice other = {__shfl_xor_sync(kFullMask, mine.value, step), __shfl_xor_sync(kFullMask, mine.id, step)};
    if (is_better(other, mine)) mine = other;
  }
  return mine;
}

// Lowest id of a warp whose cleaned value is `best` (above -inf: warp_max(thread_max(value, left_out))); -1 if best is
// -inf. Only the warp that holds the best of its slice needs it.
template <class T, class Value>
__device__ __forceinline__ int32_t warp_find(const RowSlice<T>& slice, const Value& value, float best,
                                             uint32_t left_out) {
  uint32_t lowest = 0xffffffffu;
#pragma unroll
  for (int i = kScanIds - 1; i >= 0; --i) {
    const bool is_best = fminf(value(i), kScanMaxFloat) == best && (left_out >> i & 1) == 0 && best > -kScanInf;
    lowest = is_best ? slice.id(i) : lowest;
  }
  return static_cast<int32_t>(__reduce_min_sync(kFullMask, lowest));
}

// The warp (of kScanWarps) with the largest of `values`, the lowest on ties. Called by whole warps.
__device__ __forceinline__ int best_warp(const float* values) {
  const float value = values[threadIdx.x % kScanWarps];
  const float best = warp_max(value);
  const unsigned holders = __ballot_sync(kFullMask, value == best);
  return __ffs(holders) - 1;
}

// At least gumbel(word): g <= -log(u), and the bits of a float are nearly its logarithm.
__device__ __forceinline__ float gumbel_bound(uint32_t word) {
  const float u = int_to_float(static_cast<int32_t>(word >> 1));  // u * 2^31
  return fmaf(int_to_float(float_bits(u)), -kLn2 * 0x1p-23f, 158.0f * kLn2 + 1e-3f);
}
constexpr float kMinGumbel = -3.14f;

// The random words of four neighbouring ids; other kinds of noise offer this, too.
__device__ __forceinline__ Philox4 noise_words(const NoiseKey& key, uint32_t id) { return philox_words(key, id / 4); }

// The warp's largest value * scale + Gumbel noise among the elements whose bit in `left_out` is not set. `next8` hands
// out the thread's elements, 8 at a time (RowSlice::take8). `floor`: the best is at least this, for example
// largest value * scale + kMinGumbel; -inf if nothing is known. Noise is worked out only where it could win: first for
// 8 ids of every lane by its own limit, then by a bound made from the random bits.
template <class T, class Next8, class Noise>
__device__ __forceinline__ Choice warp_gumbel(const RowSlice<T>& slice, Next8 next8, float scale, const Noise& noise,
                                              uint32_t left_out, float floor) {
  Choice best = {-kScanInf, -1};
  floor = fmaxf(floor, -kScanMaxFloat);  // values at -inf never win
#pragma unroll 1
  for (int step = 0; step < kScanIds / 8; ++step) {
    float values[8];
    next8(values);
    float top = -kScanInf;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      values[i] = fminf(mul_rn(fmaxf(values[i], -kScanInf), scale), kScanMaxFloat);
      top = fmaxf(top, values[i]);
    }
    if (!__any_sync(kFullMask, add_rn(top, kMaxGumbel) >= floor)) continue;
    uint32_t words[8];
    bool can_win = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Philox4 drawn = noise_words(noise, slice.id(8 * step + 4 * half));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        words[4 * half + i] = drawn.word[i];
        const float bound = NLD_BUG(scan_bound_too_low) ? 0.0f : gumbel_bound(drawn.word[i]);
        can_win |= add_rn(values[4 * half + i], bound) >= floor;
      }
    }
    if (!__any_sync(kFullMask, can_win)) continue;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float noisy = add_rn(values[i], gumbel(words[i]));
      if (noisy > best.value && (left_out >> (8 * step + i) & 1) == 0) {
        best = {noisy, static_cast<int32_t>(slice.id(8 * step + i))};
      }
    }
    floor = fmaxf(floor, warp_max(best.value));
  }
  return best_lane<kWarpSize>(best);
}

// ---- which request a row belongs to ----

// Number of entries of the ascending `bounds` that are <= row, found by the kScanThreads threads of the CTA: one round
// of loads for up to that many entries, two for its square. cu_seqlens: the request is this less 1, if that is in
// 0 .. batch - 1.
__device__ __forceinline__ int32_t count_not_above(const int32_t* bounds, int32_t num_bounds, int32_t row) {
  uint32_t low = 0, count = num_bounds;  // bounds before `low` are <= row, those from low + count on are above
  while (count > 0) {
    const uint32_t step = (count + kScanThreads - 1) / kScanThreads, at = threadIdx.x * step;
    const uint32_t hits = __syncthreads_count(at < count && bounds[low + at] <= row);
    if (hits == 0) break;
    const uint32_t known = (hits - 1) * step + 1;
    low += known;
    count = min(step - 1, count - known);
  }
  return static_cast<int32_t>(low);
}

}  // namespace nld
