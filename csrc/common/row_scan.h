// Scans over a row of logits: argmax, Gumbel argmax, softmax sums. Shared by the sampler and verification.
//
// A row is read in slices of kSliceLen ids, which threads may share; the parts are merged in order of their ids, so the
// result depends on neither the number of threads nor the batch. NaN counts as -inf, +inf as the largest finite float.
#pragma once

#include "common/philox_vec.h"

namespace nld::NLD_ISA {

constexpr int64_t kSliceLen = 16384;    // ids per work item
constexpr int64_t kChunkLen = 2048;     // ids per pass over the L1 cache; divides kSliceLen
constexpr int64_t kPrefetchLen = 2048;  // ids ahead; a page ends the processor's own read-ahead
constexpr float kInf = __builtin_inff();
constexpr float kMaxFloat = __FLT_MAX__;

// 2 * kLanes values in any order.
template <class T>
NLD_INLINE void load_pair(const T* p, VecF& a, VecF& b) {
  a = load(p);
  b = load(p + kLanes);
}
NLD_INLINE void load_pair(const bf16* p, VecF& a, VecF& b) {  // even and odd ids: cheaper than widening each half
  VecU both;
  __builtin_memcpy(&both, p, sizeof(both));
  a = (VecF)(both << 16);
  b = (VecF)(both & 0xffff0000u);
}

// The values being scanned: a row of logits times `scale` (1 = as they are, or inverse_temperature()). Other sources of
// values (residuals, say) offer vec() and partial() too, and for softmax sums pair() and cleaned().
template <class T>
struct Logits {
  const T* data;
  float scale;
  int64_t first = 0;  // the id of data[0]: what other functions call i is an id

  NLD_INLINE VecF clean(VecF x, float scale) { return min(max(x, set1(-kInf)) * scale, set1(kMaxFloat)); }
  inline __attribute__((always_inline)) VecF vec(int64_t i) const { return clean(load(data + (i - first)), scale); }
  inline __attribute__((always_inline)) VecF partial(int64_t i, int n) const {  // lanes from n on: -inf
    return clean(load_partial(data + (i - first), n, -kInf), scale);
  }
  inline __attribute__((always_inline)) void pair(int64_t i, VecF& a, VecF& b) const {
    a = vec(i);
    b = vec(i + kLanes);
  }
  inline __attribute__((always_inline)) float at(int64_t i) const { return partial(i, 1)[0]; }
  inline __attribute__((always_inline)) Logits cleaned() const { return *this; }
};

// A row of logits as it lies in memory, NaN and +inf included, with an eye on the next chunk.
template <class T>
struct RawLogits {
  const T* data;
  int64_t first = 0;

  inline __attribute__((always_inline)) VecF vec(int64_t i) const { return load(data + (i - first)); }
  inline __attribute__((always_inline)) VecF partial(int64_t i, int n) const {
    return load_partial(data + (i - first), n, -kInf);
  }
  inline __attribute__((always_inline)) void pair(int64_t i, VecF& a, VecF& b) const {
    const T* at = data + (i - first);
    __builtin_prefetch(at + kPrefetchLen);
    if (2 * kLanes * sizeof(T) > 64) __builtin_prefetch(at + kPrefetchLen + kLanes);
    load_pair(at, a, b);
  }
  inline __attribute__((always_inline)) Logits<T> cleaned() const { return {data, 1.0f, first}; }
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

// The largest of values begin .. end as they lie: NaN is passed over, +inf stays.
template <class Values>
static float top_value(const Values& values, int64_t begin, int64_t end) {
  VecF top = set1(-kInf);
  for_each_vec(values, begin, end, [&](int64_t, VecF v) __attribute__((always_inline)) { top = max(v, top); });
  return reduce_max(top);
}

// Keeps track of the largest allowed value chunk by chunk. Where in its chunk it lies is looked up at the end, for the
// last chunk that improved only; a chunk with a banned id in it is gone through at once.
struct ArgmaxTracker {
  Best best;
  int64_t chunk_begin = -1, chunk_end = -1;  // where to look `best` up; -1: its id is known

  template <class Values>
  inline __attribute__((always_inline)) void see(const Values& values, int64_t begin, int64_t end, float top,
                                                 const Banned& banned) {
    if (!(top > best.value)) return;
    bool has_banned = false;
    for (int64_t i = 0; i < banned.num_ids; ++i) has_banned |= banned.ids[i] >= begin && banned.ids[i] < end;
    if (!has_banned) {
      best.value = top;
      chunk_begin = begin;
      chunk_end = end;
      return;
    }
    Best found = {best.value, -1};
    for_each_vec(values, begin, end, [&](int64_t i, VecF v) __attribute__((always_inline)) {
      if (any(v > found.value)) take_better(found, v, i, banned);
    });
    if (found.id < 0) return;
    best = found;
    chunk_begin = -1;
  }

  template <class Values>
  inline __attribute__((always_inline)) void finish(const Values& values, Best& total) {
    if (chunk_begin >= 0) {
      int64_t i = chunk_begin;
      for (; i + 4 * kLanes <= chunk_end; i += 4 * kLanes) {
        if (any((values.vec(i) == best.value) | (values.vec(i + kLanes) == best.value) |
                (values.vec(i + 2 * kLanes) == best.value) | (values.vec(i + 3 * kLanes) == best.value))) {
          break;
        }
      }
      for (; i < chunk_end; i += kLanes) {
        const VecF v = i + kLanes <= chunk_end ? values.vec(i) : values.partial(i, static_cast<int>(chunk_end - i));
        if (!any(v == best.value)) continue;
        for (int lane = kLanes - 1; lane >= 0; --lane) best.id = v[lane] == best.value ? i + lane : best.id;
        break;
      }
    }
    merge(total, best);
  }
};

// Largest allowed value of ids begin .. end; ties go to the lowest id.
template <class Values>
static void scan_argmax(const Values& values, int64_t begin, int64_t end, const Banned& banned, Best& best) {
  ArgmaxTracker tracker;
  tracker.best.value = best.value;
  for (int64_t chunk = begin; chunk < end; chunk += kChunkLen) {
    const int64_t chunk_end = chunk + kChunkLen < end ? chunk + kChunkLen : end;
    tracker.see(values, chunk, chunk_end, top_value(values, chunk, chunk_end), banned);
  }
  tracker.finish(values, best);
}

// Largest value + Gumbel noise of the allowed ids begin .. end; `begin` is a multiple of 4. The noise itself is worked
// out only where a cheap upper bound could beat the best so far; after the first few hundred ids that is almost
// nowhere.
template <class Values>
static void scan_gumbel(const Values& values, int64_t begin, int64_t end, const NoiseKey& key, const Banned& banned,
                        Best& best) {
  constexpr int kVecs = 4;
  for (int64_t i = begin; i < end; i += kVecs * kLanes) {
    VecF v[kVecs];
    if (i + kVecs * kLanes <= end) {
#pragma GCC unroll 4
      for (int k = 0; k < kVecs; ++k) v[k] = values.vec(i + k * kLanes);
    } else {
      for (int k = 0; k < kVecs; ++k) {
        const int64_t left = end - (i + k * kLanes);
        v[k] = left > 0 ? values.partial(i + k * kLanes, left < kLanes ? static_cast<int>(left) : kLanes) : set1(-kInf);
      }
    }
    VecU words[kVecs];
    philox_words<kVecs / 2>(key, i, words);
    VecF bound = set1(-kInf);
#pragma GCC unroll 4
    for (int k = 0; k < kVecs; ++k) bound = max(v[k] + gumbel_bound(words[k]), bound);
    if (!any(bound > best.value)) continue;
    for (int k = 0; k < kVecs; ++k) {
      const VecF noisy = v[k] + gumbel(words[k]);
      if (any(noisy > best.value)) take_better(best, noisy, i + k * kLanes, banned);
    }
  }
}

// ---- softmax sums ----

// Two passes over each chunk, with exact differences to its maximum: right for any values, but slower.
template <bool kDot, class Values>
static void careful_exp_sum(const Values& values, int64_t begin, int64_t end, ExpSum& total) {
  for (int64_t chunk = begin; chunk < end; chunk += kChunkLen) {
    const int64_t chunk_end = chunk + kChunkLen < end ? chunk + kChunkLen : end;
    const float top = top_value(values, chunk, chunk_end);
    if (top == -kInf) continue;
    VecF sum = {}, dot = {};
    for_each_vec(values, chunk, chunk_end, [&](int64_t, VecF v) __attribute__((always_inline)) {
      const VecF shifted = max(v - top, set1(-100.0f));  // exp() is 0 there, and 0 * shifted stays 0
      const VecF e = exp(shifted);
      sum += e;
      if (kDot) dot += e * shifted;
    });
    merge(total, {top, reduce_add(sum), reduce_add(dot)});
  }
}

// Weights 2^(x * log2(e) - exponent) relative to a whole power of two, so that a softmax sum needs no maximum
// beforehand: any reference near it does, and to change the reference is an exact scaling. With `bias` = kRoundBias -
// exponent one fused multiply-add both scales x and leaves the power of two of its weight in the low bits: in steps of
// 1/16 with AVX-512, which has a register for the table of 2^(j / 16), else in whole steps.
struct Reference {
  float exponent, bias;
  float value;  // exponent * log(2)
  float floor;  // values below it weigh as much as it: less than 2^-115
  float limit;  // values above it ask for another reference, to keep digits
};
#if defined(__AVX512F__)
constexpr int kFractionBits = 4;
#else
constexpr int kFractionBits = 0;
#endif
constexpr float kRoundToWhole = 12582912.0f;  // 1.5 * 2^23
constexpr float kRoundBias = kRoundToWhole / (1 << kFractionBits);
constexpr float kLog2e = 1.44269504f;
constexpr float kMaxReference = 1e5f;  // beyond it the product with log2(e) has too few digits after the point

// How far values may rise above the reference. Fused, weights keep their digits however large they are; the entropy sum
// and the unfused product lose some.
template <bool kDot>
NLD_INLINE Reference reference_at(float value) {
#if defined(__AVX2__)
  constexpr float kHeadroom = kDot ? 5.0f : 60.0f;
#else
  constexpr float kHeadroom = 5.0f;
#endif
  const float exponent = (value * kLog2e + kRoundToWhole) - kRoundToWhole;
  return {exponent, kRoundBias - exponent, exponent * kLn2, value - 80.0f, value + kHeadroom};
}

// 2^r = 1 + r * Q(r), Q fitted for the smallest largest relative error: 1.1e-7, with the table 4.3e-7.
// The result is added to `sum`.
NLD_INLINE VecF add_weight(VecF sum, VecF clamped, const Reference& reference) {
#if defined(__AVX2__)
  const VecF t = fma(clamped, set1(kLog2e), set1(reference.bias)), n = t - reference.bias;
  const VecF r = fma(clamped, set1(kLog2e), -n);
#else  // without a fused operation the product of a large x would lose the digits after the point
  const VecF scaled = (clamped - reference.value) * kLog2e, t = scaled + kRoundBias;
  const VecF r = scaled - (t - kRoundBias);
#endif
#if defined(__AVX512F__)
  // Bits of 2^(j / 16) less those that the shift below brings along.
  const VecI powers = {0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532, 0x3f75fed7, 0x3f75583f,
                       0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c, 0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d};
  const VecI power = (VecI)_mm512_maskz_permutexvar_epi32(0xffff, (__m512i)as_int(t), (__m512i)powers);
  const VecF scale = as_float(power + (as_int(t) << 19));
  return fma(scale, fma(fma(r, set1(0x1.ebfbd6p-3f), set1(0x1.62e982p-1f)), r, set1(1.0f)), sum);
#else
  VecF p = set1(0x1.5bb9e4p-10f);
  p = fma(p, r, set1(0x1.3ceab4p-7f));
  p = fma(p, r, set1(0x1.c6b754p-5f));
  p = fma(p, r, set1(0x1.ebf9bcp-3f));
  p = fma(p, r, set1(0x1.62e42ap-1f));
  p = fma(p, r, set1(1.0f));
  return sum + as_float(as_int(p) + (as_int(t) << 23));
#endif
}

template <bool kDot>
struct WeightSums {
  VecF sum[2] = {}, dot[2] = {};  // dot: weight * (x - reference.value)

  inline __attribute__((always_inline)) void add(int i, VecF v, const Reference& reference) {
    const VecF clamped = max(v, set1(reference.floor));  // also where NaN and -inf end up
    if (kDot) {
      const VecF weight = add_weight(VecF{}, clamped, reference);
      sum[i] += weight;
      dot[i] = fma(weight, clamped - reference.value, dot[i]);
    } else {
      sum[i] = add_weight(sum[i], clamped, reference);
    }
  }
  inline __attribute__((always_inline)) void add(const WeightSums& chunk) {
    for (int i = 0; i < 2; ++i) {
      sum[i] += chunk.sum[i];
      if (kDot) dot[i] += chunk.dot[i];
    }
  }
  inline __attribute__((always_inline)) void change_reference(const Reference& from, const Reference& to) {
    const int shift = static_cast<int>(from.exponent - to.exponent);  // negative
    const float factor = shift > -126 ? bits_float((127 + shift) << 23) : 0.0f;
    for (int i = 0; i < 2; ++i) {
      if (kDot) dot[i] = (dot[i] + sum[i] * (from.value - to.value)) * factor;
      sum[i] *= factor;
    }
  }
};

// The sums of one chunk; the result is its largest value (NaN passed over).
template <bool kDot, class Values>
static float sum_chunk(const Values& values, int64_t begin, int64_t end, const Reference& reference,
                       WeightSums<kDot>& sums) {
  WeightSums<kDot> local;
  VecF top[2] = {set1(-kInf), set1(-kInf)};
  int64_t i = begin;
  for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
    VecF v[2];
    values.pair(i, v[0], v[1]);
    for (int half = 0; half < 2; ++half) {
      top[half] = max(v[half], top[half]);
      local.add(half, v[half], reference);
    }
  }
  for_each_vec(values, i, end, [&](int64_t, VecF v) __attribute__((always_inline)) {
    top[0] = max(v, top[0]);
    local.add(0, v, reference);
  });
  sums = local;
  return reduce_max(max(top[0], top[1]));
}

// Softmax sums of ids begin .. end, banned or not, and with kBest also their argmax: one read of memory. kDot: also the
// sum the entropy needs. `values` may still hold NaN and +inf; values.cleaned() must not.
template <bool kDot, bool kBest, class Values>
static void scan_softmax(const Values& values, int64_t begin, int64_t end, const Banned& banned, Best& best,
                         ExpSum& total) {
  WeightSums<kDot> sums;
  ArgmaxTracker tracker;
  Reference reference = {};
  bool has_reference = false, fits = true;
  float top = -kInf;
  for (int64_t chunk = begin; chunk < end && fits; chunk += kChunkLen) {
    const int64_t chunk_end = chunk + kChunkLen < end ? chunk + kChunkLen : end;
    if (!has_reference) {  // usually a few values are enough to see where the row lies
      float first = top_value(values, chunk, chunk + 256 < chunk_end ? chunk + 256 : chunk_end);
      if (first == -kInf) first = top_value(values, chunk, chunk_end);
      if (first == -kInf) continue;
      fits = first > -kMaxReference && first < kMaxReference;
      if (!fits) break;
      reference = reference_at<kDot>(first);
      has_reference = true;
    }
    WeightSums<kDot> chunk_sums;  // apart first: shorter chains of additions round less
    const float chunk_top = sum_chunk(values, chunk, chunk_end, reference, chunk_sums);
    if (chunk_top > reference.limit) {
      fits = chunk_top < kMaxReference;
      if (!fits) break;
      const Reference next = reference_at<kDot>(chunk_top);
      sums.change_reference(reference, next);
      reference = next;
      sum_chunk(values, chunk, chunk_end, reference, chunk_sums);
    }
    sums.add(chunk_sums);
    top = chunk_top > top ? chunk_top : top;
    if (kBest) tracker.see(values, chunk, chunk_end, chunk_top, banned);
  }
  if (!fits) {  // infinite or huge values
    careful_exp_sum<kDot>(values.cleaned(), begin, end, total);
    if (kBest) scan_argmax(values.cleaned(), begin, end, banned, best);
    return;
  }
  if (kBest) tracker.finish(values, best);
  if (!has_reference) return;
  // The weight of the maximum itself has the same systematic errors as the others: dividing by it removes them.
  const float top_weight = add_weight(VecF{}, set1(top), reference)[0], sum = reduce_add(sums.sum[0] + sums.sum[1]);
  const float dot = kDot ? reduce_add(sums.dot[0] + sums.dot[1]) + sum * (reference.value - top) : 0.0f;
  merge(total, {top, sum / top_weight, dot / top_weight});
}

template <bool kDot, class Values>
static void scan_exp_sum(const Values& values, int64_t begin, int64_t end, ExpSum& total) {
  Best none;
  scan_softmax<kDot, false>(values, begin, end, {nullptr, 0}, none, total);
}

}  // namespace nld::NLD_ISA
