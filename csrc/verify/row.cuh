// What the kernels of verify_ share: the scan of a slice of a row, the verdict of a row, the race for a residual.
#pragma once

#include "common/row_scan.cuh"
#include "verify/accept.h"

namespace nld {

constexpr int kVerdictLanes = 8;                            // lanes that put the parts of a row together ...
constexpr int kVerdictRows = kScanThreads / kVerdictLanes;  // ... and rows whose verdicts a CTA finds at once
static_assert(kVerdictRows == kWarpSize, "the walk looks at them with one ballot");

// CTAs that share an SM: as many as the registers allow without spilling, since each holds its loads in registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kCtasLess = 1;  // its code takes a few registers more
#else
constexpr int kCtasLess = 0;
#endif
template <class T, bool kDraws>
constexpr int kVerifyCtas = (kDraws ? 3 : 4) - (sizeof(T) == 4 ? 1 : kCtasLess);

// The lanes of a warp, for emit().
struct WarpLanes {
  static constexpr int kCount = kWarpSize;
  static __device__ __forceinline__ int index() { return static_cast<int>(threadIdx.x % kWarpSize); }
  static __device__ __forceinline__ int first(bool holds) {
    const unsigned lanes = __ballot_sync(kFullMask, holds);
    return lanes != 0 ? __ffs(static_cast<int>(lanes)) - 1 : kCount;
  }
  static __device__ __forceinline__ void sync() { __syncwarp(); }  // a ballot alone orders no memory
};

// Past the L1 cache, which does not see what other SMs wrote during the launch.
__device__ __forceinline__ VerifyPart load_part(const VerifyPart* part) {
  const uint4 v = __ldcg(reinterpret_cast<const uint4*>(part));
  return {__uint_as_float(v.x), static_cast<int32_t>(v.y), __uint_as_float(v.z), __uint_as_float(v.w)};
}

__device__ __forceinline__ NoiseKey noise_key(const VerifyParams& p, int32_t request, int32_t row, Purpose purpose) {
  return {static_cast<uint64_t>(p.seed[request]), static_cast<uint32_t>(p.positions[row]) + 1u,
          static_cast<uint32_t>(purpose)};
}

// A request as one of its rows sees it.
struct RowView {
  int32_t request, row, begin, index, count;
  VerifyMode mode;
  float scale;  // of the logits of its draws; 0: argmax
  bool is_last;

  __device__ __forceinline__ bool weighs_draft() const { return mode == VerifyMode::kRejection && !is_last; }
  // Rows of the request that are judged; the others' CTAs leave early.
  __device__ __forceinline__ int32_t num_judged() const { return mode == VerifyMode::kCommit ? 1 : count; }
};

// Requests that are left alone: counts 0, nothing to draw.
__device__ __forceinline__ void leave_alone(const VerifyParams& p, int64_t request) {
  p.num_emitted[request] = p.num_accepted[request] = 0;
  if (p.residual != nullptr) p.residual[request] = {-1, 0.0f, 0.0f, 0};
}

// Requests without rows have no CTA of their own: the threads of one CTA share them.
__device__ __forceinline__ void leave_empty_requests(const VerifyParams& p) {
  for (int64_t b = threadIdx.x; b < p.batch; b += kScanThreads) {
    const int64_t begin = p.cu_seqlens[b], end = p.cu_seqlens[b + 1];
    NLD_DEVICE_CHECK(0 <= begin && begin <= end && end <= p.rows, "cu_seqlens rise from 0 to at most the rows");
    if (begin < 0 || end > p.rows || end <= begin) leave_alone(p, b);
  }
}

// What the CTAs of a row do: false, leave; these must not look at anything that the last CTA of the request writes, so
// under COMMIT, where only the bonus row is judged, drafts leave after a look at the mode. `speaks` is true in one CTA
// of the row. By the whole CTA.
__device__ __forceinline__ bool find_row(const VerifyParams& p, int32_t row, bool speaks, RowView* view) {
  const int32_t request = count_not_above(p.cu_seqlens, static_cast<int32_t>(p.batch) + 1, row) - 1;
  if (request < 0 || request >= p.batch) return false;
  const int32_t begin = p.cu_seqlens[request], count = p.cu_seqlens[request + 1] - begin, index = row - begin;
  if (begin + count > p.rows) return false;
  const bool commit = static_cast<VerifyMode>(p.mode[request]) == VerifyMode::kCommit, is_last = index == count - 1;
  if (commit && !is_last) return false;
  if (p.done[request]) {
    if (speaks && (commit || index == 0) && threadIdx.x == 0) leave_alone(p, request);
    return false;
  }
  *view = {request, row, begin, index, count, verify_mode(p, request), draw_scale(p, request), is_last};
  return true;
}

struct VerifySmem {
  RowView view;  // kept here while registers hold the slice
  ExpSum sums[kScanWarps];
  Choice best[kScanWarps];
  float top[kScanWarps];
  int32_t is_last;
  int32_t lowest_allowed;
  int64_t verdicts[kVerdictRows];
  ExpSum row_sums[kVerdictRows];
};

template <class T>
__device__ __forceinline__ const T* logits_row(const VerifyParams& p, int64_t row) {
  return static_cast<const T*>(p.logits) + row * p.logits_stride;
}
// A logit as draws see it.
template <class T>
__device__ __forceinline__ float scaled_logit(const VerifyParams& p, const RowView& view, int64_t id) {
  return fminf(mul_rn(clean_logit(to_float(logits_row<T>(p, view.row)[id])), view.scale), kScanMaxFloat);
}

// The race of a slice: its largest scaled logit plus noise, left out what has its bit set. Of the warp's share.
template <class T>
__device__ __forceinline__ Choice race(RowSlice<T>& slice, float scale, const NoiseKey& key, uint32_t left_out) {
  const auto value = [&](int i) { return mul_rn(clean_logit(slice.raw(i)), scale); };
  const float top = warp_max(thread_max(value, left_out));
  if (top == -kScanInf) return {-kScanInf, -1};  // a warp past the end of the row
  return warp_gumbel(slice, [&](float (&next)[8]) { slice.take8(next); }, scale, key, left_out, top + kMinGumbel);
}

// What a slice of a row says, handed to put() by one thread. By the whole CTA; the caller's barrier comes next.
template <class T, bool kDraws, class Put>
__device__ __forceinline__ void scan_slice(const VerifyParams& p, const RowView& view, RowSlice<T>& slice,
                                           const Put& put, VerifySmem* sm) {
  const int warp = static_cast<int>(threadIdx.x / kWarpSize), lane = static_cast<int>(threadIdx.x % kWarpSize);
  uint32_t left_out = slice.banned_mask(p.banned_token_ids, p.num_banned);
  if (!kDraws || view.scale == 0.0f || view.mode == VerifyMode::kGreedy) {
    const auto value = [&](int i) { return slice.raw(i); };
    const float top = warp_max(thread_max(value, left_out));
    if (lane == 0) sm->top[warp] = top;
    if (!NLD_BUG(verify_no_barrier)) __syncthreads();
    if (best_warp(sm->top) != warp) return;
    const int32_t id = warp_find(slice, value, top, left_out);
    if (lane == 0) put(VerifyPart{top, id, -kScanInf, 0.0f});
    return;
  }
  const bool weighs = view.weighs_draft();
  if (weighs) {
    const auto value = [&](int i) {
      return (left_out >> i & 1) != 0 ? -kScanInf : mul_rn(clean_logit(slice.raw(i)), view.scale);
    };
    const ExpSum sums = warp_exp_sum(value, warp_max(thread_max(value)));
    if (lane == 0) sm->sums[warp] = sums;
    if (p.draft_probs == nullptr && !NLD_BUG(verify_residual_keeps_draft)) {  // the residual: all but the draft
      const int64_t draft = p.block_tokens[view.row + 1];
      if (slice.warp_holds(draft)) left_out |= slice.element_bit(static_cast<int>(draft - slice.warp_first()));
    }
  } else if (lane == 0) {
    sm->sums[warp] = {-kScanInf, 0.0f, 0.0f};
  }
  Choice best = {-kScanInf, -1};
  if (!weighs || p.draft_probs == nullptr) {
    best = race(slice, view.scale, noise_key(p, view.request, view.row, weighs ? Purpose::kResidual : Purpose::kSample),
                left_out);
  }
  if (lane == 0) sm->best[warp] = best;
  if (!NLD_BUG(verify_no_barrier)) __syncthreads();
  if (warp != 0) return;
  best = best_lane<kScanWarps>(sm->best[lane % kScanWarps]);
  const ExpSum sums = merge_lanes<kScanWarps>(sm->sums[lane % kScanWarps]);
  if (lane == 0) put(VerifyPart{best.value, best.id, sums.max, sums.sum});
}

// For rows without a finite allowed logit; 0 when every id is banned. By the whole CTA.
__device__ __forceinline__ int32_t lowest_allowed(const VerifyParams& p, VerifySmem* sm) {
  if (threadIdx.x == 0) sm->lowest_allowed = INT32_MAX;
  __syncthreads();
  NLD_ROLLED for (int64_t first = 0; first < p.vocab; first += kScanThreads) {
    const int64_t id = first + threadIdx.x;
    bool allowed = id < p.vocab;
    NLD_ROLLED for (int64_t i = 0; i < p.num_banned; ++i) allowed &= p.banned_token_ids[i] != id;
    if (allowed) atomicMin(&sm->lowest_allowed, static_cast<int>(id));
    if (__syncthreads_or(allowed)) return sm->lowest_allowed;
  }
  return 0;
}

// Is the draft kept: u * q(d) < p(d), strictly, so never where p(d) is 0.
template <class T>
__device__ __forceinline__ bool keeps_draft(const VerifyParams& p, const RowView& view, int64_t draft,
                                            const ExpSum& sums) {
  if (draft < 0 || draft >= p.vocab) return false;
  const float shifted = scaled_logit<T>(p, view, draft) - sums.max;
  const float target_prob = shifted > -100.0f ? expf(shifted) / sums.sum : 0.0f;
  float draft_prob = 1.0f;
  if (p.draft_probs != nullptr) {
    draft_prob = p.draft_probs[(view.row + int64_t{1}) * p.draft_probs_stride + draft];
    if (!(draft_prob > 0.0f)) draft_prob = 0.0f;
  }
  const float u = uniform(philox_word(noise_key(p, view.request, view.row, Purpose::kAccept), 0));
  return mul_rn(u, draft_prob) < target_prob;
}

// The parts of one row put together, in an order that depends on nothing, by a group of kVerdictLanes lanes; `load(i)`
// is part i. Groups without a row pass no parts.
struct RowSums {
  Choice best;
  ExpSum sums;
};
template <bool kSums, class Load>
__device__ __forceinline__ RowSums merge_parts(const Load& load, int num_parts) {
  RowSums row = {{-kScanInf, -1}, {-kScanInf, 0.0f, 0.0f}};
  for (int i = static_cast<int>(threadIdx.x) % kVerdictLanes; i < num_parts; i += kVerdictLanes) {
    const VerifyPart part = load(i);
    const Choice choice = {part.best_value, part.best_id};
    if (is_better(choice, row.best)) row.best = choice;
    if (kSums) row.sums = merge(row.sums, ExpSum{part.max, part.sum, 0.0f});
  }
  row.best = best_lane<kVerdictLanes>(row.best);
  if (kSums) row.sums = merge_lanes<kVerdictLanes>(row.sums);
  return row;
}

// The verdict of the row that a group of kVerdictLanes lanes looks after, in the first lane of the group. `draft` is
// the token after it, -1 where there is none. By the whole CTA; groups whose row does not exist judge nothing.
struct Verdict {
  int64_t value;
  ExpSum sums;  // of the row
};
template <class T, bool kDraws, class Load>
__device__ __forceinline__ Verdict find_verdict(const VerifyParams& p, const RowView& view, bool exists, int64_t draft,
                                                int slices, const Load& load, VerifySmem* sm) {
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  const int in_group = static_cast<int>(threadIdx.x) % kVerdictLanes;
  const bool forced = exists && is_forced(p, view.request, view.begin, view.index);
  const RowSums row = merge_parts<kDraws>(load, exists && !forced ? slices : 0);
  bool banned = false;
  if (kDraws) {
    NLD_ROLLED for (int64_t i = in_group; i < p.num_banned; i += kVerdictLanes) banned |=
        p.banned_token_ids[i] == draft;
    const unsigned votes = __ballot_sync(kFullMask, banned) >> (lane - in_group);
    banned = (votes & ((1u << kVerdictLanes) - 1)) != 0;
  }
  const bool weighs = kDraws && view.weighs_draft() && row.sums.sum > 0.0f;
  int64_t target = row.best.id;
  if (__syncthreads_or(exists && !forced && target < 0 && !(weighs && p.draft_probs != nullptr))) {
    const int32_t lowest = lowest_allowed(p, sm);
    if (target < 0) target = lowest;
  }
  if (forced) target = p.force_tokens[view.request];
  int64_t verdict = !view.is_last && draft == target ? kAccepted : target;
  if (weighs && !forced && in_group == 0) {
    if (!banned && keeps_draft<T>(p, view, draft, row.sums)) {
      verdict = kAccepted;
    } else {
      verdict = p.draft_probs != nullptr ? kResidual : target;
    }
  }
  return {exists ? verdict : kAccepted, row.sums};
}

// ---- the bonus of a refused draft that came with probabilities ----

// The draft probabilities of the ids a thread holds, in shared memory: there they can be on their way together with the
// logits, without a register each. A thread reads its own only.
template <class T>
struct StagedProbs {
  const float4* next;  // of the thread's vectors, which lie kScanThreads apart

  // `staging`: kScanSliceLen floats.
  __device__ __forceinline__ void load(float* staging, const float* row, const RowSlice<T>& slice, uint32_t vocab) {
    float4* const vecs = reinterpret_cast<float4*>(staging) + threadIdx.x;
    next = vecs;
    const bool aligned = reinterpret_cast<uintptr_t>(row) % 16 == 0;
#pragma unroll
    for (int k = 0; k < kScanIds / 4; ++k) {
      const uint32_t id = slice.id(4 * k);
      const int count = id < vocab ? static_cast<int>(min(vocab - id, 4u)) : 0;
      float4* const to = vecs + k * kScanThreads;
      if (aligned) {
        ptx::cp_async<16>(to, count > 0 ? row + id : row, 4 * count);
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e)
          ptx::cp_async<4>(reinterpret_cast<float*>(to) + e, e < count ? row + id + e : row, e < count ? 4 : 0);
      }
    }
    ptx::cp_async_commit();
  }
  __device__ __forceinline__ void wait() const {
    if (!NLD_BUG(verify_probs_no_wait)) ptx::cp_async_wait<0>();
  }
  // The next 8 of the thread's ids.
  __device__ __forceinline__ void take8(float (&values)[8]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float4 v = *next;
      next += kScanThreads;
      values[4 * half] = v.x;
      values[4 * half + 1] = v.y;
      values[4 * half + 2] = v.z;
      values[4 * half + 3] = v.w;
    }
  }
};

// log(max(p - q, 0)) with p = exp(logit - top) / sum. NaN and negative draft probabilities count as 0.
__device__ __forceinline__ float log_residual(float logit, float q, float top, float inverse_sum) {
  const float mass = mul_rn(expf(fmaxf(logit - top, -100.0f)), inverse_sum) - fmaxf(q, 0.0f);
  const bool some = mass >= 1.17549435e-38f;  // exact_log() takes normal numbers only
  return some ? exact_log(some ? mass : 1.0f) : -kScanInf;
}

// A slice's race over max(p - q, 0) of row `row`, where the walk of its request ended, handed to put(). By the whole
// CTA; the caller's barrier comes next. `staging`: kScanSliceLen floats of shared memory.
template <class T, class Put>
__device__ __forceinline__ void scan_residual(const VerifyParams& p, int32_t request, int32_t row, float max, float sum,
                                              int32_t slice_idx, const Put& put, float* staging, VerifySmem* sm) {
  const int warp = static_cast<int>(threadIdx.x / kWarpSize), lane = static_cast<int>(threadIdx.x % kWarpSize);
  RowSlice<T> slice;
  slice.load(logits_row<T>(p, row), slice_idx, static_cast<int32_t>(p.vocab));
  StagedProbs<T> probs;
  probs.load(staging, p.draft_probs + (row + int64_t{1}) * p.draft_probs_stride, slice, static_cast<uint32_t>(p.vocab));
  const float scale = draw_scale(p, request), inverse_sum = 1.0f / sum;
  const NoiseKey key = noise_key(p, request, row, Purpose::kResidual);
  const uint32_t left_out = slice.banned_mask(p.banned_token_ids, p.num_banned);
  probs.wait();
  const auto next8 = [&](float (&next)[8]) {
    float q[8];
    slice.take8(next);
    probs.take8(q);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float logit = fminf(mul_rn(clean_logit(next[i]), scale), kScanMaxFloat);
      next[i] = log_residual(logit, q[i], max, inverse_sum);
    }
  };
  Choice best = warp_gumbel(slice, next8, 1.0f, key, left_out, -kScanInf);
  if (lane == 0) sm->best[warp] = best;
  __syncthreads();
  if (warp != 0) return;
  best = best_lane<kScanWarps>(sm->best[lane % kScanWarps]);
  if (lane == 0) put(VerifyPart{best.value, best.id, -kScanInf, 0.0f});
}

// The bonus from the parts of its race: in every thread. By the whole CTA.
template <class T, class Load>
__device__ __forceinline__ int32_t pick_residual(const VerifyParams& p, int32_t request, int32_t row, int slices,
                                                 const Load& load, VerifySmem* sm) {
  Choice best = merge_parts<false>(load, slices).best;  // every group of lanes for itself
  if (best.id < 0) {  // nothing left (rounding): from p itself. About never, so one CTA may do it all
    const int warp = static_cast<int>(threadIdx.x / kWarpSize), lane = static_cast<int>(threadIdx.x % kWarpSize);
    const float scale = draw_scale(p, request);
    const NoiseKey key = noise_key(p, request, row, Purpose::kResidual);
    NLD_ROLLED for (int i = 0; i < slices; ++i) {
      RowSlice<T> slice;
      slice.load(logits_row<T>(p, row), i, static_cast<int32_t>(p.vocab));
      const Choice found = race(slice, scale, key, slice.banned_mask(p.banned_token_ids, p.num_banned));
      if (is_better(found, best)) best = found;
    }
    __syncthreads();
    if (lane == 0) sm->best[warp] = best;
    __syncthreads();
    best = best_lane<kScanWarps>(sm->best[lane % kScanWarps]);
    if (best.id < 0) best.id = lowest_allowed(p, sm);
  }
  return best.id;
}

}  // namespace nld
