// commit_ in one launch, and gumbel_noise_.
//
// One CTA judges one slice (8192 ids) of one row; the last CTA of a request to finish commits: grid = rows * slices,
// and a few CTAs more for requests without rows. 256 threads hold 32 ids each in registers (4 loads of 16 bytes in
// bfloat16, 8 in float32, all issued before the first is used), take the maximum of their warp, then one exponential
// per id. Traffic: the logits of judged rows once (32 x 131072 bfloat16: 8.4 MB, 2.8 us at the 3.0 TB/s an H100 copies
// with; its 16 exponentials per clock and SM take 1.1 us of that time), 32 bytes written and read per slice, 30 bytes a
// row. Latency after the logits: two shared-memory steps, fence + ticket, and the commit (one warp step per 2 rows,
// then the rule, then two block-wide steps): 2-3 us estimated, not measured yet. Why slices of 8192: one request of 32
// rows makes 512 CTAs, four for each SM of an H100, all resident at once with 64 KiB (bfloat16) in flight per SM, three
// times what bandwidth * latency asks for; with half of its rows judged there still are two for each. Slices of 16384
// leave SMs idle there, slices of 4096 double the tickets and parts. Considered, not built: the maximum of the whole
// slice before the exponentials (a barrier while loads are under way; warps are independent now), online rescaling (an
// exponential more per step), a ticket per row (a second wait).
#pragma once

#include "common/row_scan.cuh"
#include "common/ticket.cuh"
#include "sampler/rules.h"
#include "sampler/sampler.h"

namespace nld {

// What a slice of a judged row says.
struct alignas(32) SlicePart {
  ExpSum sums;
  Choice choice;  // of a held token: itself, in the slice that has it
  float logit;    // of the choice
};

constexpr int kSharedRows = 256;  // longer requests keep their per-row figures in global memory
constexpr int kMergeLanes = 16;   // lanes that put the slices of a row together

struct CommitWorkspace {
  SlicePart* parts;  // [rows, num_slices]
  float* entropy;    // [rows]
  bool* commits;     // [rows]
};
NLD_HD int64_t commit_num_slices(int64_t vocab) { return (vocab + kScanSliceLen - 1) / kScanSliceLen; }
NLD_HD CommitWorkspace commit_workspace(const CommitParams& p) {
  auto* const parts = static_cast<SlicePart*>(p.workspace);
  auto* const entropy = reinterpret_cast<float*>(parts + p.rows * commit_num_slices(p.vocab));
  return {parts, entropy, reinterpret_cast<bool*>(entropy + p.rows)};
}

struct CommitSmem {
  float best[kScanWarps];  // of each warp of the scan
  ExpSum sums[kScanWarps];
  int32_t is_last;
  int32_t num_committed[kScanWarps], num_remaining[kScanWarps], first_masked[kScanWarps], first_eos[kScanWarps];
  float confidence[kSharedRows], entropy[kSharedRows];
  bool is_masked[kSharedRows], commits[kSharedRows];
};

// ---- one slice of one row ----

__device__ __forceinline__ bool row_is_fixed(const CommitParams& p, int64_t row) {
  return p.is_fixed != nullptr && p.is_fixed[row];
}
__device__ __forceinline__ CommitRule rule_of(const CommitParams& p, int64_t request) {
  return static_cast<CommitRule>(p.rule[request]);
}

// Writes the part of a judged row's slice. All threads of the CTA call.
template <class T, bool kDraws>
__device__ __forceinline__ void scan_slice(const CommitParams& p, CommitSmem* sm, RowSlice<T>& slice, int32_t row,
                                           int32_t request, SlicePart* part) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const auto raw = [&](int i) { return slice.raw(i); };
  float scale = 0.0f;  // these come while the logits are on their way
  NoiseKey key = {};
  if (kDraws && p.is_masked[row]) {
    scale = inverse_temperature(p.temperature[request]);
    key = {static_cast<uint64_t>(p.seed[request]), static_cast<uint32_t>(p.positions[row]), p.purpose};
  }
  const uint32_t banned =
      p.bans_mask_id ? slice.banned_mask(&p.mask_token_id, 1) : slice.banned_mask(p.banned, p.num_banned);
  const float top = thread_max(raw);
  const bool any_banned = __any_sync(kFullMask, banned != 0);
  const float allowed_top = warp_max(any_banned ? thread_max(raw, banned) : top);
  const ExpSum sums = warp_exp_sum(raw, warp_max(top));

  const bool is_held = !p.is_masked[row];
  Choice choice = {allowed_top, -1};  // which id it is is looked up by the best warp only
  if (is_held) {                      // nothing to choose: the token's own logit is asked for
    const int64_t token = p.block_tokens[row];
    const bool here = slice.warp_holds(token) && token < p.vocab;
    choice = here ? Choice{0.0f, static_cast<int32_t>(token)} : Choice{-kScanInf, -1};
  } else if (kDraws && scale > 0.0f) {
    const float floor = add_rn(fminf(mul_rn(allowed_top, scale), kScanMaxFloat), kMinGumbel);
    choice = warp_gumbel(slice, [&](float (&values)[8]) { slice.take8(values); }, scale, key, banned, floor);
  }
  if (lane == 0) {
    sm->best[warp] = choice.value;
    sm->sums[warp] = sums;
  }
  if (!NLD_BUG(commit_no_barrier)) __syncthreads();
  if (warp != best_warp(sm->best)) return;  // whole warps; the caller's barrier comes next
  float logit = choice.value;
  if (is_held || (kDraws && scale > 0.0f)) {
    if (choice.id >= 0) logit = slice.logit_of(choice.id);
  } else {
    choice.id = warp_find(slice, raw, choice.value, banned);
  }
  const ExpSum total = merge_lanes<kScanWarps>(sm->sums[lane % kScanWarps]);
  if (lane == 0) *part = {total, choice, logit};
}

// ---- one request, by the last of its CTAs ----

struct RequestRows {
  int32_t begin, end;
};
// Kept inside the tensor whatever cu_seqlens says.
__device__ __forceinline__ RequestRows request_rows(const CommitParams& p, int64_t request) {
  const int32_t begin = max(p.cu_seqlens[request], 0);
  return {begin, max(begin, min(p.cu_seqlens[request + 1], static_cast<int32_t>(p.rows)))};
}

// For rows without a finite allowed value. 0 when every id is banned.
__device__ __forceinline__ int64_t lowest_allowed(const CommitParams& p) {
  if (p.bans_mask_id) return p.mask_token_id == 0 && p.vocab > 1 ? 1 : 0;
  for (int64_t id = 0; id < p.vocab; ++id) {
    bool is_banned = false;
    for (int64_t i = 0; i < p.num_banned && !is_banned; ++i) is_banned = p.banned[i] == id;
    if (!is_banned) return id;
  }
  return 0;
}

__device__ __forceinline__ SlicePart load_part(const SlicePart* part) {  // other SMs wrote it: not from the L1 cache
  union {
    uint4 halves[2];
    SlicePart part;
  } u;
  u.halves[0] = __ldcg(reinterpret_cast<const uint4*>(part));
  u.halves[1] = __ldcg(reinterpret_cast<const uint4*>(part) + 1);
  return u.part;
}

// Puts the slices of every row together: candidate, confidence, entropy. A group of lanes per row.
__device__ __forceinline__ void finish_rows(const CommitParams& p, const CommitWorkspace& ws, RequestRows rows,
                                            bool revises, float* confidence, float* entropy, bool* is_masked) {
  constexpr int kGroups = kScanThreads / kMergeLanes;
  const int32_t num_slices = static_cast<int32_t>(commit_num_slices(p.vocab));
  const int lane = threadIdx.x % kMergeLanes;
#pragma unroll 1
  for (int32_t base = rows.begin; base < rows.end; base += kGroups) {  // whole warps, for the shuffles
    const int32_t row = base + static_cast<int32_t>(threadIdx.x) / kMergeLanes;
    const bool in_request = row < rows.end;
    const bool masked = in_request && p.is_masked[row];
    const bool is_judged = masked || (in_request && revises && !row_is_fixed(p, row));
    ExpSum sums = {-kScanInf, 0.0f, 0.0f};
    Choice choice = {-kScanInf, -1};
    float logit = 0.0f;
    if (is_judged) {
      const SlicePart* parts = ws.parts + static_cast<int64_t>(row) * num_slices;
#pragma unroll 1
      for (int32_t i = lane; i < num_slices; i += kMergeLanes) {
        const SlicePart part = load_part(parts + i);
        sums = merge(sums, part.sums);
        if (is_better(part.choice, choice)) {
          choice = part.choice;
          logit = part.logit;
        }
      }
    }
    const int32_t own_id = choice.id;
    sums = merge_lanes<kMergeLanes>(sums);
    choice = best_lane<kMergeLanes>(choice);
    // The lane whose id it is has the logit, too (where there is none, the logit does not matter).
    const unsigned holders = __ballot_sync(kFullMask, own_id == choice.id);
    const int group = threadIdx.x % kWarpSize / kMergeLanes * kMergeLanes;
    logit = __shfl_sync(kFullMask, logit, group + __ffs(holders >> group & ((1u << kMergeLanes) - 1)) - 1);
    if (!in_request || lane != 0) continue;
    const int64_t token = p.block_tokens[row];
    float belief = is_judged ? 0.0f : 1.0f, own_entropy = kScanInf;
    if (is_judged && choice.id >= 0 && sums.sum > 0.0f) {
      belief = exp_shift(clamp_shift(logit - sums.max)) / sums.sum;
      own_entropy = fmaxf(exact_log(sums.sum) - sums.dot / sums.sum, 0.0f);
    }
    p.candidates[row] = !masked ? token : choice.id >= 0 ? choice.id : lowest_allowed(p);
    p.confidence[row] = belief;
    const int32_t i = row - rows.begin;
    if (confidence != p.confidence + rows.begin) confidence[i] = belief;
    if (is_masked != p.is_masked + rows.begin) is_masked[i] = masked;
    entropy[i] = own_entropy;
  }
}

template <class Rule>
__device__ __forceinline__ void judge_rows(const RuleInput& in, bool* commits) {
  for (int32_t i = threadIdx.x; i < in.num_rows; i += kScanThreads)
    commits[i] = in.is_masked[i] && Rule::commits(in, i);
}

__device__ __forceinline__ void judge_request(CommitRule rule, const RuleInput& in, bool* commits) {
  switch (rule) {
    case CommitRule::kThreshold:
      return judge_rows<ThresholdRule>(in, commits);
    case CommitRule::kQuota:
      return judge_rows<QuotaRule>(in, commits);
    case CommitRule::kAll:
      return judge_rows<AllRule>(in, commits);
    case CommitRule::kEntropy:
      return judge_rows<EntropyRule>(in, commits);
    case CommitRule::kRevise:
      return judge_rows<ReviseRule>(in, commits);
  }
  for (int32_t i = threadIdx.x; i < in.num_rows; i += kScanThreads) commits[i] = false;  // no such rule
}

__device__ __forceinline__ bool is_eos(const CommitParams& p, int32_t request, int64_t token) {
  bool found = false;
  for (int64_t i = 0; i < p.num_eos; ++i) found |= p.eos[static_cast<int64_t>(request) * p.num_eos + i] == token;
  return found && token >= 0;
}

// Decides and writes what the request becomes. All threads of the CTA call.
__device__ __forceinline__ void commit_request(const CommitParams& p, CommitSmem* sm, int32_t request) {
  const CommitWorkspace ws = commit_workspace(p);
  const RequestRows rows = request_rows(p, request);
  const int32_t num_rows = rows.end - rows.begin;
  const CommitRule rule = rule_of(p, request);
  const bool revises = rule == CommitRule::kRevise, in_smem = num_rows <= kSharedRows;
  float* const confidence = in_smem ? sm->confidence : p.confidence + rows.begin;
  float* const entropy = in_smem ? sm->entropy : ws.entropy + rows.begin;
  bool* const is_masked = in_smem ? sm->is_masked : p.is_masked + rows.begin;
  bool* const commits = in_smem ? sm->commits : ws.commits + rows.begin;
  finish_rows(p, ws, rows, revises, confidence, entropy, is_masked);
  if (!NLD_BUG(commit_judges_early)) __syncthreads();
  const RuleInput in = {.num_rows = num_rows,
                        .is_masked = is_masked,
                        .confidence = confidence,
                        .entropy = entropy,
                        .threshold = p.threshold[request],
                        .quota = p.quota != nullptr ? p.quota[request] : 1};
  judge_request(rule, in, commits);
  if (!NLD_BUG(commit_changes_early)) __syncthreads();  // every row is judged before the first one changes

  const float revise_threshold = p.revise_threshold != nullptr ? p.revise_threshold[request] : 0.0f;
  int32_t num_committed = 0, num_remaining = 0, first_masked = INT32_MAX, first_eos = INT32_MAX;
  for (int32_t i = threadIdx.x; i < num_rows; i += kScanThreads) {
    const int32_t row = rows.begin + i;
    const bool is_fixed = row_is_fixed(p, row);
    bool masked = is_masked[i];
    int64_t token = p.block_tokens[row];
    if (commits[i]) {
      p.block_tokens[row] = token = p.candidates[row];
      p.is_masked[row] = masked = false;
      ++num_committed;
    } else if (revises && !masked && !is_fixed && ReviseRule::masks_again(confidence[i], revise_threshold)) {
      p.block_tokens[row] = token = p.mask_token_id;
      p.is_masked[row] = masked = true;
    }
    num_remaining += masked;
    if (masked && i < first_masked) first_masked = i;
    if (!masked && !is_fixed && i < first_eos && is_eos(p, request, token)) first_eos = i;
  }
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  num_committed = __reduce_add_sync(kFullMask, num_committed);
  num_remaining = __reduce_add_sync(kFullMask, num_remaining);
  first_masked = __reduce_min_sync(kFullMask, first_masked);
  first_eos = __reduce_min_sync(kFullMask, first_eos);
  if (lane == 0) {
    sm->num_committed[warp] = num_committed;
    sm->num_remaining[warp] = num_remaining;
    sm->first_masked[warp] = first_masked;
    sm->first_eos[warp] = first_eos;
  }
  __syncthreads();
  num_committed = num_remaining = 0;
  for (int i = 0; i < kScanWarps; ++i) {
    num_committed += sm->num_committed[i];
    num_remaining += sm->num_remaining[i];
    first_masked = min(first_masked, sm->first_masked[i]);
    first_eos = min(first_eos, sm->first_eos[i]);
  }
  // Everything right of the first EOS that no later step can move becomes that EOS.
  if (first_eos < first_masked) {
    const int64_t eos = p.block_tokens[rows.begin + first_eos];
    for (int32_t i = first_eos + 1 + static_cast<int32_t>(threadIdx.x); i < num_rows; i += kScanThreads) {
      p.block_tokens[rows.begin + i] = eos;
      if (p.is_masked[rows.begin + i]) p.is_masked[rows.begin + i] = false;
    }
    num_remaining = 0;
  }
  if (threadIdx.x == 0) {
    p.num_committed[request] = num_committed;
    p.num_remaining[request] = num_remaining;
    p.done[request] = num_remaining == 0;
  }
}

__device__ __forceinline__ void finish_empty_requests(const CommitParams& p, int64_t request) {
  if (request >= p.batch) return;
  const RequestRows rows = request_rows(p, request);
  if (rows.begin < rows.end) return;
  p.num_committed[request] = p.num_remaining[request] = 0;
  p.done[request] = true;
}

// The request that owns a row, -1 if there is none. All threads of the CTA call.
__device__ __forceinline__ int32_t find_request(const CommitParams& p, int32_t row) {
  const int32_t request = count_not_above(p.cu_seqlens, static_cast<int32_t>(p.batch) + 1, row) - 1;
  return request < p.batch ? request : -1;
}

// Are all slices of all rows of the request done, with these `weight` ones?
__device__ __forceinline__ bool arrive(const CommitParams& p, CommitSmem* sm, int32_t request, int32_t weight,
                                       int32_t num_slices) {
  const RequestRows rows = request_rows(p, request);
  return arrive_last(p.tickets + request, weight, (rows.end - rows.begin) * num_slices, &sm->is_last);
}

// A row that is not judged stays so: nothing of it that its CTAs read is ever written. So only one of them arrives, for
// all; the others leave at once.
template <class T, bool kDraws>
__global__ void __launch_bounds__(kScanThreads, kDraws ? (sizeof(T) == 4 ? 2 : 3) : 4)
    commit_kernel(const __grid_constant__ CommitParams p) {
  NLD_DYNAMIC_SMEM(CommitSmem, sm);
  const int32_t num_slices = gridDim.x, slice_idx = blockIdx.x;
  const int32_t row = blockIdx.z * gridDim.y + blockIdx.y;  // rows * num_slices is below 2^31
  if (row >= p.rows) {                                      // the CTAs after those of the rows: requests that have none
    finish_empty_requests(p, ((row - p.rows) * num_slices + slice_idx) * kScanThreads + threadIdx.x);
    return;
  }
  // Masked rows are judged by any rule: their loads need not wait for the search of their request. One round of loads.
  const int32_t rows_begin = p.cu_seqlens[0], rows_end = p.cu_seqlens[p.batch];
  const bool is_masked = p.is_masked[row] & (row >= rows_begin) & (row < rows_end);
  int32_t request = -1;
  bool is_last;
  if (!is_masked) {
    request = find_request(p, row);
    if (request < 0) return;  // a row of nobody
  }
  if (is_masked || (rule_of(p, request) == CommitRule::kRevise && !row_is_fixed(p, row))) {
    RowSlice<T> slice;
    slice.load(static_cast<const T*>(p.logits) + row * p.logits_row_stride, slice_idx, static_cast<uint32_t>(p.vocab));
    if (is_masked) request = find_request(p, row);
    if (request < 0) return;  // cu_seqlens does not ascend
    scan_slice<T, kDraws>(p, sm, slice, row, request, commit_workspace(p).parts + (row * num_slices + slice_idx));
    is_last = arrive(p, sm, request, 1, num_slices);
  } else {
    if (slice_idx != 0) return;
    is_last = arrive(p, sm, request, num_slices, num_slices);
  }
  if (is_last) commit_request(p, sm, request);
}

// ---- noise ----

constexpr int kNoiseThreads = 256;

// One thread per row and group of 4 ids, which share a Philox block. Traffic: the noise is written once.
static __global__ void __launch_bounds__(kNoiseThreads)
    gumbel_noise_kernel(const __grid_constant__ GumbelNoiseParams p) {
  const int64_t groups = (p.vocab + 3) / 4, item = static_cast<int64_t>(blockIdx.x) * kNoiseThreads + threadIdx.x;
  if (item >= p.rows * groups) return;
  const int64_t row = item / groups, group = item % groups;
  const NoiseKey key = {static_cast<uint64_t>(p.seed[row]), static_cast<uint32_t>(p.positions[row]), p.purpose};
  const Philox4 words = philox_words(key, static_cast<uint32_t>(group));
  float* noise = p.noise + row * p.noise_row_stride + 4 * group;
  const int64_t left = p.vocab - 4 * group;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < left) noise[i] = gumbel(words.word[i]);
  }
}

}  // namespace nld
