// verify_ on CUDA: one launch, or two where drafts come with probabilities.
#pragma once

#include "common/row_scan.cuh"
#include "common/ticket.cuh"
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
};

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

// What slice `slice_idx` of a row says, written to its place among the parts. By the whole CTA.
template <class T, bool kDraws>
__device__ __forceinline__ void scan_slice(const VerifyParams& p, const RowView& view, uint32_t slice_idx,
                                           VerifyPart* part, VerifySmem* sm) {
  const int warp = static_cast<int>(threadIdx.x / kWarpSize), lane = static_cast<int>(threadIdx.x % kWarpSize);
  RowSlice<T> slice;
  slice.load(logits_row<T>(p, view.row), slice_idx, static_cast<uint32_t>(p.vocab));
  uint32_t left_out = slice.banned_mask(p.banned_token_ids, p.num_banned);
  if (!kDraws || view.scale == 0.0f || view.mode == VerifyMode::kGreedy) {
    const auto value = [&](int i) { return slice.raw(i); };
    const float top = warp_max(thread_max(value, left_out));
    if (lane == 0) sm->top[warp] = top;
    if (!NLD_BUG(verify_no_barrier)) __syncthreads();
    if (best_warp(sm->top) != warp) return;
    const int32_t id = warp_find(slice, value, top, left_out);
    if (lane == 0) *part = {top, id, -kScanInf, 0.0f};
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
  if (lane == 0) *part = {best.value, best.id, sums.max, sums.sum};
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

// The parts of one row put together, in an order that depends on nothing, by a group of kVerdictLanes lanes; groups
// without a row pass null.
struct RowSums {
  Choice best;
  ExpSum sums;
};
template <bool kSums>
__device__ __forceinline__ RowSums merge_parts(const VerifyPart* parts, int slices) {
  RowSums row = {{-kScanInf, -1}, {-kScanInf, 0.0f, 0.0f}};
  for (int i = static_cast<int>(threadIdx.x) % kVerdictLanes; parts != nullptr && i < slices; i += kVerdictLanes) {
    const VerifyPart part = load_part(parts + i);
    const Choice choice = {part.best_value, part.best_id};
    if (is_better(choice, row.best)) row.best = choice;
    if (kSums) row.sums = merge(row.sums, ExpSum{part.max, part.sum, 0.0f});
  }
  row.best = best_lane<kVerdictLanes>(row.best);
  if (kSums) row.sums = merge_lanes<kVerdictLanes>(row.sums);
  return row;
}

// One request, all of whose parts are there: verdicts of 32 rows at a time, eight lanes a row, up to the first that is
// not kAccepted; then a warp emits. By the whole CTA.
template <class T, bool kDraws>
__device__ __forceinline__ void judge_request(const VerifyParams& p, const RowView& any_row, int slices,
                                              VerifySmem* sm) {
  const int lane = static_cast<int>(threadIdx.x % kWarpSize), group = static_cast<int>(threadIdx.x) / kVerdictLanes;
  const int in_group = static_cast<int>(threadIdx.x) % kVerdictLanes;
  const int32_t request = any_row.request, begin = any_row.begin, count = any_row.count;
  int first = any_row.mode == VerifyMode::kCommit ? count - 1 : 0, accepted;
  for (;; first += kVerdictRows) {
    RowView view = any_row;
    view.index = first + group;
    view.row = begin + view.index;
    view.is_last = view.index == count - 1;
    const bool exists = view.index < count, forced = exists && is_forced(p, request, begin, view.index);
    const VerifyPart* parts = exists && !forced ? p.parts + static_cast<int64_t>(view.row) * slices : nullptr;
    const int64_t draft = exists && !view.is_last ? p.block_tokens[view.row + 1] : -1;
    const RowSums row = merge_parts<kDraws>(parts, slices);
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
    if (forced) target = p.force_tokens[request];
    int64_t verdict = !view.is_last && draft == target ? kAccepted : target;
    if (weighs && !forced && in_group == 0) {
      if (!banned && keeps_draft<T>(p, view, draft, row.sums)) {
        verdict = kAccepted;
      } else {
        verdict = p.draft_probs != nullptr ? kResidual : target;
      }
    }
    if (in_group == 0) {
      sm->verdicts[group] = exists ? verdict : kAccepted;
      sm->row_sums[group] = row.sums;
    }
    if (!NLD_BUG(verify_walk_no_barrier)) __syncthreads();
    const int end = WarpLanes::first(first + lane == count - 1 || sm->verdicts[lane] != kAccepted);
    accepted = first + end;
    if (end < kVerdictRows) break;
    __syncthreads();  // before the verdicts are overwritten
  }
  const int64_t bonus = sm->verdicts[accepted - first];
  if (threadIdx.x >= kWarpSize) return;
  if (bonus == kResidual) {  // the second launch draws it
    const ExpSum sums = sm->row_sums[accepted - first];
    if (lane == 0) p.residual[request] = {accepted, sums.max, sums.sum, 0};
    return;
  }
  if (p.residual != nullptr && lane == 0) p.residual[request] = {-1, 0.0f, 0.0f, 0};
  if (NLD_BUG(verify_accepts_too_few) && accepted > 0) --accepted;
  emit<WarpLanes>(p, request, {begin, count - (NLD_BUG(verify_rolls_back_too_few) ? 1 : 0)}, accepted, bonus);
}

// Requests that are left alone: counts 0, nothing to draw.
__device__ __forceinline__ void leave_alone(const VerifyParams& p, int64_t request) {
  p.num_emitted[request] = p.num_accepted[request] = 0;
  if (p.residual != nullptr) p.residual[request] = {-1, 0.0f, 0.0f, 0};
}

// One CTA per slice of 8192 ids and row (grid: rows x slices): reads it once and leaves 16 bytes. The last CTA of a
// request to arrive judges all its rows and emits. Rows that cannot be asked for (a request that is done, drafts under
// COMMIT, forced places) read no logits.
// Traffic: vocab * sizeof(T) a live row; 32 bytes a slice for its part, written and read.
// Why: a step has few rows (1 to 32 a request), so a row must be shared by many SMs; the end of the work is known only
// on the device, and a second launch costs more than a ticket.
template <class T, bool kDraws>
__global__ void __launch_bounds__(kScanThreads, kVerifyCtas<T, kDraws>)
    verify_kernel(const __grid_constant__ VerifyParams p) {
  NLD_DYNAMIC_SMEM(VerifySmem, sm);
  const int32_t row = static_cast<int32_t>(blockIdx.x);
  const uint32_t slice = blockIdx.y, slices = gridDim.y;
  if (blockIdx.x == 0 && slice == 0) {  // requests without rows have no CTA of their own
    for (int64_t b = threadIdx.x; b < p.batch; b += kScanThreads) {
      const int64_t begin = p.cu_seqlens[b], end = p.cu_seqlens[b + 1];
      NLD_DEVICE_CHECK(0 <= begin && begin <= end && end <= p.rows, "cu_seqlens rise from 0 to at most the rows");
      if (begin < 0 || end > p.rows || end <= begin) leave_alone(p, b);
    }
  }
  const int32_t request = count_not_above(p.cu_seqlens, static_cast<int32_t>(p.batch) + 1, row) - 1;
  if (request < 0 || request >= p.batch) return;
  const int32_t begin = p.cu_seqlens[request], count = p.cu_seqlens[request + 1] - begin, index = row - begin;
  if (begin + count > p.rows) return;
  const bool commit = static_cast<VerifyMode>(p.mode[request]) == VerifyMode::kCommit, is_last = index == count - 1;
  // Each request has one CTA that is there in any case. A CTA that will not arrive must not look at what the last one
  // writes: under COMMIT only the bonus row arrives, and the CTA that is always there.
  const bool is_first = index == 0 && slice == 0;
  if (commit && !is_last && !is_first) return;
  if (p.done[request]) {
    if (is_first && threadIdx.x == 0) leave_alone(p, request);
    return;
  }
  const RowView view = {request, row, begin, index, count, verify_mode(p, request), draw_scale(p, request), is_last};
  if (threadIdx.x == 0) sm->view = view;
  if ((!commit || is_last) && !is_forced(p, request, begin, index)) {
    scan_slice<T, kDraws>(p, view, slice, p.parts + static_cast<int64_t>(row) * slices + slice, sm);
  }
  const int32_t arrivals = static_cast<int32_t>(slices) * (commit ? 1 : count) + (commit && count > 1 ? 1 : 0);
  if (!arrive_last(p.tickets + request, 1, arrivals, &sm->is_last)) return;
  judge_request<T, kDraws>(p, sm->view, static_cast<int>(slices), sm);
}

// The draft probabilities of the ids a thread holds, in their order.
template <class T>
struct ProbSlice {
  float values[kScanIds];

  __device__ __forceinline__ void load(const float* row, const RowSlice<T>& slice, uint32_t vocab) {
    const bool aligned = reinterpret_cast<uintptr_t>(row) % 16 == 0;
#pragma unroll
    for (int i = 0; i < kScanIds; i += 4) {
      const uint32_t id = slice.id(i);
      if (aligned && id + 4 <= vocab) {
        const float4 v = __ldg(reinterpret_cast<const float4*>(row + id));
        values[i] = v.x;
        values[i + 1] = v.y;
        values[i + 2] = v.z;
        values[i + 3] = v.w;
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e) values[i + e] = id + e < vocab ? __ldg(row + id + e) : 0.0f;
      }
    }
  }
  __device__ __forceinline__ void move_up8() {  // as RowSlice::take8()
#pragma unroll
    for (int i = 0; i + 8 < kScanIds; ++i) values[i] = values[i + 8];
  }
};

// log(max(p - q, 0)) with p = exp(logit - top) / sum. NaN and negative draft probabilities count as 0.
__device__ __forceinline__ float log_residual(float logit, float q, float top, float inverse_sum) {
  const float mass = mul_rn(expf(fmaxf(logit - top, -100.0f)), inverse_sum) - fmaxf(q, 0.0f);
  const bool some = mass >= 1.17549435e-38f;  // exact_log() takes normal numbers only
  return some ? exact_log(some ? mass : 1.0f) : -kScanInf;
}

// Where a request's bonus is still to be drawn from max(p - q, 0): one CTA per slice of its row (grid: requests x
// slices) races with Gumbel noise, the last one emits. Other requests cost the load of one word.
// Traffic: vocab * (sizeof(T) + 4) per request that refused a draft.
// A launch of its own, since p needs the sums of the whole row; one CTA would take about ten times as long.
template <class T>
__global__ void __launch_bounds__(kScanThreads, 2) verify_residual_kernel(const __grid_constant__ VerifyParams p) {
  NLD_DYNAMIC_SMEM(VerifySmem, sm);
  const int32_t request = static_cast<int32_t>(blockIdx.x);
  const uint32_t slice_idx = blockIdx.y, slices = gridDim.y, vocab = static_cast<uint32_t>(p.vocab);
  const ResidualTask task = p.residual[request];
  if (task.accepted < 0) return;
  const int warp = static_cast<int>(threadIdx.x / kWarpSize), lane = static_cast<int>(threadIdx.x % kWarpSize);
  const int32_t begin = p.cu_seqlens[request], row = begin + task.accepted;
  const float scale = draw_scale(p, request), inverse_sum = 1.0f / task.sum;
  const float* const draft_probs = p.draft_probs + (row + int64_t{1}) * p.draft_probs_stride;
  const NoiseKey key = noise_key(p, request, row, Purpose::kResidual);
  VerifyPart* const parts = p.parts + static_cast<int64_t>(row) * slices;

  RowSlice<T> slice;
  slice.load(logits_row<T>(p, row), slice_idx, vocab);
  const uint32_t left_out = slice.banned_mask(p.banned_token_ids, p.num_banned);
  ProbSlice<T> probs;
  probs.load(draft_probs, slice, vocab);
  const auto next8 = [&](float (&next)[8]) {
    slice.take8(next);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float logit = fminf(mul_rn(clean_logit(next[i]), scale), kScanMaxFloat);
      next[i] = log_residual(logit, probs.values[i], task.max, inverse_sum);
    }
    probs.move_up8();
  };
  Choice best = warp_gumbel(slice, next8, 1.0f, key, left_out, -kScanInf);
  if (lane == 0) sm->best[warp] = best;
  __syncthreads();
  if (warp == 0) {
    best = best_lane<kScanWarps>(sm->best[lane % kScanWarps]);
    if (lane == 0) parts[slice_idx] = {best.value, best.id, -kScanInf, 0.0f};
  }
  if (!arrive_last(p.tickets + request, 1, static_cast<int32_t>(slices), &sm->is_last)) return;

  best = merge_parts<false>(parts, static_cast<int>(slices)).best;  // every group of lanes for itself
  if (best.id < 0) {  // nothing left (rounding): from p itself. About never, so one CTA may do it all
    for (uint32_t i = 0; i < slices; ++i) {
      slice.load(logits_row<T>(p, row), i, vocab);
      const Choice found = race(slice, scale, key, slice.banned_mask(p.banned_token_ids, p.num_banned));
      if (is_better(found, best)) best = found;
    }
    __syncthreads();
    if (lane == 0) sm->best[warp] = best;
    __syncthreads();
    best = best_lane<kScanWarps>(sm->best[lane % kScanWarps]);
    if (best.id < 0) best.id = lowest_allowed(p, sm);
  }
  if (warp == 0) emit<WarpLanes>(p, request, {begin, p.cu_seqlens[request + 1] - begin}, task.accepted, best.id);
}

}  // namespace nld
