// Scans over a row of logits: argmax, Gumbel argmax, softmax sums. Shared by the sampler and verification.
//
// A row is read in slices of kSliceLen ids, which threads may share; the parts are merged in order of their ids, so the
// result depends on neither the number of threads nor the batch. NaN counts as -inf, +inf as the largest finite float.
#pragma once

#include "common/philox_vec.h"

namespace nld::NLD_ISA {

constexpr int64_t kSliceLen = 16384;  // ids per work item
constexpr int64_t kChunkLen = 2048;   // ids per pass over the L1 cache; divides kSliceLen
constexpr float kInf = __builtin_inff();
constexpr float kMaxFloat = __FLT_MAX__;

// The values being scanned: a row of logits times `scale` (1 = as they are, or inverse_temperature()). Other sources of
// values (residuals, say) offer the same three functions.
template <class T>
struct Logits {
  const T* data;
  float scale;

  NLD_INLINE VecF clean(VecF x, float scale) { return min(max(x, set1(-kInf)) * scale, set1(kMaxFloat)); }
  inline __attribute__((always_inline)) VecF vec(int64_t i) const { return clean(load(data + i), scale); }
  inline __attribute__((always_inline)) VecF partial(int64_t i, int n) const {  // lanes from n on: -inf
    return clean(load_partial(data + i, n, -kInf), scale);
  }
  inline __attribute__((always_inline)) float at(int64_t i) const { return partial(i, 1)[0]; }
};

// Ids that may not be chosen, in any order; entries outside the vocabulary are ignored.
struct Banned {
  const int64_t* ids;
  int64_t num_ids;
};
NLD_INLINE bool is_banned(const Banned& banned, int64_t id) {
  for (int64_t i = 0; i < banned.num_ids; ++i) {
    if (banned.ids[i] == id) return true;
  }
  return false;
}
// For rows without a finite allowed value. 0 when every id is banned.
static inline int64_t lowest_allowed(const Banned& banned, int64_t vocab) {
  for (int64_t id = 0; id < vocab; ++id) {
    if (!is_banned(banned, id)) return id;
  }
  return 0;
}

// The largest value so far and the lowest id that has it; id -1: nothing above -inf yet.
struct Best {
  float value = -kInf;
  int64_t id = -1;
};
NLD_INLINE void merge(Best& best, const Best& later_ids) {
  if (later_ids.value > best.value) best = later_ids;
}

// Softmax sums: sum of exp(x - max), and dot = sum of exp(x - max) * (x - max), from which the entropy is
// log(sum) - dot / sum. max -inf and sum 0: no value above -inf.
struct ExpSum {
  float max = -kInf;
  float sum = 0.0f;
  float dot = 0.0f;
};
NLD_INLINE float exp(float x) { return exp(set1(x))[0]; }
NLD_INLINE void merge(ExpSum& total, const ExpSum& part) {
  if (part.sum == 0.0f) return;
  if (total.sum == 0.0f) {
    total = part;
    return;
  }
  const float top = total.max > part.max ? total.max : part.max;
  const float total_shift = total.max - top, part_shift = part.max - top;
  const float total_factor = exp(total_shift), part_factor = exp(part_shift);
  float dot = 0.0f;
  if (total_factor > 0.0f) dot += (total.dot + total.sum * total_shift) * total_factor;
  if (part_factor > 0.0f) dot += (part.dot + part.sum * part_shift) * part_factor;
  total = {top, total.sum * total_factor + part.sum * part_factor, dot};
}

// Calls visit(i, values) for kLanes values at a time; missing lanes at the end are -inf.
template <class Values, class Visit>
NLD_INLINE void for_each_vec(const Values& values, int64_t begin, int64_t end, const Visit& visit) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) visit(i, values.vec(i));
  if (i < end) visit(i, values.partial(i, static_cast<int>(end - i)));
}

// Takes over the lanes of `v` (ids from `first` on) that beat `best`.
NLD_INLINE void take_better(Best& best, VecF v, int64_t first, const Banned& banned) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (v[lane] > best.value && !is_banned(banned, first + lane)) best = {v[lane], first + lane};
  }
}

// Largest allowed value of ids begin .. end; ties go to the lowest id.
template <class Values>
static void scan_argmax(const Values& values, int64_t begin, int64_t end, const Banned& banned, Best& best) {
  for (int64_t chunk = begin; chunk < end; chunk += kChunkLen) {
    const int64_t chunk_end = chunk + kChunkLen < end ? chunk + kChunkLen : end;
    VecF top = set1(-kInf);
    for_each_vec(values, chunk, chunk_end, [&](int64_t, VecF v) __attribute__((always_inline)) { top = max(v, top); });
    if (!(reduce_max(top) > best.value)) continue;
    for_each_vec(values, chunk, chunk_end, [&](int64_t i, VecF v) __attribute__((always_inline)) {
      if (any(v > best.value)) take_better(best, v, i, banned);
    });
  }
}

// Largest value + Gumbel noise of the allowed ids begin .. end; `begin` is a multiple of 4. The noise itself is worked
// out only where a cheap upper bound could beat the best so far; after the first few hundred ids that is almost
// nowhere.
template <class Values>
static void scan_gumbel(const Values& values, int64_t begin, int64_t end, const NoiseKey& key, const Banned& banned,
                        Best& best) {
  VecU low, high = {};
  int64_t next = begin;
  bool second = false;
  for_each_vec(values, begin, end, [&](int64_t i, VecF v) __attribute__((always_inline)) {
    if (!second) {
      philox_words(key, next, low, high);
      next += kNoiseStep;
    }
    const VecU words = second ? high : low;
    second = !second;
    if (any(v + gumbel_bound(words) > best.value)) {
      const VecF noisy = v + gumbel(words);
      if (any(noisy > best.value)) take_better(best, noisy, i, banned);
    }
  });
}

// Softmax sums of ids begin .. end, banned or not. kDot: also the sum the entropy needs.
template <bool kDot, class Values>
static void scan_exp_sum(const Values& values, int64_t begin, int64_t end, ExpSum& total) {
  for (int64_t chunk = begin; chunk < end; chunk += kChunkLen) {
    const int64_t chunk_end = chunk + kChunkLen < end ? chunk + kChunkLen : end;
    VecF top = set1(-kInf);
    for_each_vec(values, chunk, chunk_end, [&](int64_t, VecF v) __attribute__((always_inline)) { top = max(v, top); });
    const float chunk_max = reduce_max(top);
    if (chunk_max == -kInf) continue;
    VecF sum = {}, dot = {};
    for_each_vec(values, chunk, chunk_end, [&](int64_t, VecF v) __attribute__((always_inline)) {
      const VecF shifted = max(v - chunk_max, set1(-100.0f));  // exp() is 0 there, and 0 * shifted stays 0
      const VecF e = exp(shifted);
      sum += e;
      if (kDot) dot += e * shifted;
    });
    merge(total, {chunk_max, reduce_add(sum), reduce_add(dot)});
  }
}

}  // namespace nld::NLD_ISA
