// commit_ in one launch.
//
// One CTA judges one slice (8192 ids) of one row; the last CTA of a request to finish commits. Grid: slices x rows, and
// a few CTAs more for requests without rows. A thread holds 32 ids in registers (4 loads of 16 bytes in bfloat16, 8 in
// float32, all issued before the first is used); a warp takes its maximum, then one exponential per id.
//
// Traffic: the logits of judged rows once, 32 bytes written and read per slice, 30 bytes a row. 32 x 131072 bfloat16:
// 8.4 MB, 2.8 us at the 3.0 TB/s an H100 copies with; its 16 exponentials per clock and SM take 1.1 us of that time.
// Latency after the last logits, 2-3 us by estimate (not measured yet): two steps through shared memory, release and
// ticket, parts, rule, two block-wide steps.
//
// Why slices of 8192: one block of 32 rows makes 512 CTAs, four for each SM of an H100, all resident at once with
// 64 KiB (bfloat16) in flight per SM, three times what bandwidth * latency asks for; with half of its rows judged there
// still are two for each. Slices of 16384 leave SMs idle there, slices of 4096 double the tickets and parts.
//
// Considered, not built: the maximum of the whole slice before the exponentials (a barrier while loads are under way;
// warps are independent now), online rescaling (an exponential more per step), a ticket per row (a second wait).
#pragma once

#include "common/part_scan.cuh"
#include "common/ticket.cuh"
#include "sampler/rules.h"
#include "sampler/sampler.h"

namespace nld {

constexpr int kSharedRows = 256;  // longer requests keep their per-row figures in global memory
constexpr int kMergeLanes = 16;   // lanes that put the slices of a row together

struct CommitSmem : PartSmem {
  int32_t is_last;
  int32_t num_committed[kScanWarps], num_remaining[kScanWarps], first_masked[kScanWarps], first_eos[kScanWarps];
  int64_t candidates[kSharedRows];
  float confidence[kSharedRows], entropy[kSharedRows];
  bool is_masked[kSharedRows], commits[kSharedRows];
};

// Per-row figures of one request, by row within it: in shared memory, or in the outputs and the workspace.
struct RequestFigures {
  int64_t* candidates;
  float *confidence, *entropy;
  bool *is_masked, *commits;
  bool in_smem;
};

// ---- one slice of one row ----

__device__ __forceinline__ bool row_is_fixed(const CommitParams& p, int64_t row) {
  return p.is_fixed != nullptr && p.is_fixed[row];
}
__device__ __forceinline__ CommitRule rule_of(const CommitParams& p, int64_t request) {
  return static_cast<CommitRule>(p.rule[request]);
}

__device__ __forceinline__ bool is_judged(const CommitParams& p, int32_t request, int32_t row) {
  return p.is_masked[row] || (rule_of(p, request) == CommitRule::kRevise && !row_is_fixed(p, row));
}

// Asked once the logits are on their way.
template <bool kDraws>
__device__ __forceinline__ RowQuestion question(const CommitParams& p, int32_t row, int32_t request) {
  RowQuestion asked = {.is_held = !p.is_masked[row]};
  if (asked.is_held) {
    asked.held = held_token(p.block_tokens[row]);
  } else if (kDraws) {
    asked.scale = inverse_temperature(p.temperature[request]);
    asked.key = {static_cast<uint64_t>(p.seed[request]), static_cast<uint32_t>(p.positions[row]), p.purpose};
  }
  return asked;
}

template <class T>
__device__ __forceinline__ uint32_t banned_elements(const CommitParams& p, const RowSlice<T>& slice, int32_t first) {
  return p.bans_mask_id ? slice.banned_mask(&p.mask_token_id, 1, first)
                        : slice.banned_mask(p.banned, p.num_banned, first);
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

// A row whose slices are being put together, by kMergeLanes lanes.
struct RowMerge {
  int32_t row;
  bool in_request, is_masked, is_judged;
  ExpSum sums;
  Choice choice;
  float logit;  // of the lane's own choice
};

// Puts the parts of every row together: candidate, confidence, entropy. load(row, i) is part i of num_parts.
template <class Load>
__device__ __forceinline__ void finish_rows(const CommitParams& p, const Load& load, int32_t num_parts,
                                            RequestRows rows, bool revises, const RequestFigures& figures) {
  constexpr int kGroups = kScanThreads / kMergeLanes, kAtOnce = 2;  // rows of a group whose loads overlap
  const int lane = threadIdx.x % kMergeLanes;
#pragma unroll 1
  for (int32_t base = rows.begin; base < rows.end; base += kGroups * kAtOnce) {  // whole warps, for the shuffles
    RowMerge merges[kAtOnce];
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
      RowMerge& m = merges[r];
      m.row = base + r * kGroups + static_cast<int32_t>(threadIdx.x) / kMergeLanes;
      m.in_request = m.row < rows.end;
      m.is_masked = m.in_request && p.is_masked[m.row];
    }
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
      RowMerge& m = merges[r];
      m.is_judged = m.is_masked || (m.in_request && revises && !row_is_fixed(p, m.row));
      const SlicePart part = m.is_judged && lane < num_parts ? load(m.row, lane) : no_part();
      m.sums = {part.max, part.sum, part.dot};
      m.choice = {part.value, part.id};
      m.logit = part.logit;
    }
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
      RowMerge& m = merges[r];
      if (m.is_judged) {
#pragma unroll 1
        for (int32_t i = lane + kMergeLanes; i < num_parts; i += kMergeLanes) {
          const SlicePart part = load(m.row, i);
          m.sums = merge(m.sums, ExpSum{part.max, part.sum, part.dot});
          if (is_better({part.value, part.id}, m.choice)) {
            m.choice = {part.value, part.id};
            m.logit = part.logit;
          }
        }
      }
      const ExpSum sums = merge_lanes<kMergeLanes>(m.sums);
      const Choice choice = best_lane<kMergeLanes>(m.choice);
      // The lane whose id it is has the logit, too (where there is none, the logit does not matter).
      const unsigned holders = __ballot_sync(kFullMask, m.choice.id == choice.id);
      const int group = threadIdx.x % kWarpSize / kMergeLanes * kMergeLanes;
      const int holder = group + __ffs(static_cast<int>(holders >> group & ((1u << kMergeLanes) - 1))) - 1;
      const float logit = __shfl_sync(kFullMask, m.logit, holder);
      if (!m.in_request || lane != 0) continue;
      float belief = m.is_judged ? 0.0f : 1.0f, entropy = kScanInf;
      if (m.is_judged && choice.id >= 0 && sums.sum > 0.0f) {
        belief = exp_shift(clamp_shift(logit - sums.max)) / sums.sum;
        entropy = fmaxf(exact_log(sums.sum) - sums.dot / sums.sum, 0.0f);
      }
      const int64_t candidate = !m.is_masked ? p.block_tokens[m.row] : choice.id >= 0 ? choice.id : lowest_allowed(p);
      p.candidates[m.row] = candidate;
      p.confidence[m.row] = belief;
      const int32_t i = m.row - rows.begin;
      if (figures.in_smem) {
        figures.candidates[i] = candidate;
        figures.confidence[i] = belief;
        figures.is_masked[i] = m.is_masked;
      }
      figures.entropy[i] = entropy;
    }
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
template <class Load>
__device__ __forceinline__ void commit_request(const CommitParams& p, CommitSmem* sm, int32_t request, RequestRows rows,
                                               const Load& load, int32_t num_parts) {
  const int32_t num_rows = rows.end - rows.begin;
  const CommitRule rule = rule_of(p, request);  // these four loads overlap with those of the parts
  const float threshold = p.threshold[request];
  const int64_t quota = p.quota != nullptr ? p.quota[request] : 1;
  const float revise_threshold = p.revise_threshold != nullptr ? p.revise_threshold[request] : 0.0f;
  const bool revises = rule == CommitRule::kRevise;
  const RequestFigures figures =
      num_rows <= kSharedRows
          ? RequestFigures{sm->candidates, sm->confidence, sm->entropy, sm->is_masked, sm->commits, true}
          : RequestFigures{p.candidates + rows.begin, p.confidence + rows.begin, p.entropy + rows.begin,
                           p.is_masked + rows.begin,  p.commits + rows.begin,    false};
  finish_rows(p, load, num_parts, rows, revises, figures);
  if (!NLD_BUG(commit_judges_early)) __syncthreads();
  judge_request(rule,
                {.num_rows = num_rows,
                 .is_masked = figures.is_masked,
                 .confidence = figures.confidence,
                 .entropy = figures.entropy,
                 .threshold = threshold,
                 .quota = quota},
                figures.commits);
  if (!NLD_BUG(commit_changes_early)) __syncthreads();  // every row is judged before the first one changes

  int32_t num_committed = 0, num_remaining = 0, first_masked = INT32_MAX, first_eos = INT32_MAX;
  for (int32_t i = threadIdx.x; i < num_rows; i += kScanThreads) {
    const int32_t row = rows.begin + i;
    const bool is_fixed = row_is_fixed(p, row);
    const int64_t token = figures.candidates[i];  // what the row holds once it is not masked
    bool masked = figures.is_masked[i];
    if (figures.commits[i]) {
      p.block_tokens[row] = token;
      p.is_masked[row] = masked = false;
      ++num_committed;
    } else if (revises && !masked && !is_fixed && ReviseRule::masks_again(figures.confidence[i], revise_threshold)) {
      p.block_tokens[row] = p.mask_token_id;
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
    const int64_t eos = figures.candidates[first_eos];
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
  if (is_masked || is_judged(p, request, row)) {
    RowSlice<T> slice;
    slice.load(static_cast<const T*>(p.logits) + row * p.logits_row_stride, slice_idx, static_cast<int32_t>(p.vocab));
    if (is_masked) request = find_request(p, row);
    if (request < 0) return;  // cu_seqlens does not ascend
    const RowQuestion asked = question<kDraws>(p, row, request);
    const auto put = [&](const SlicePart& part) { p.parts.parts[row * num_slices + slice_idx] = part; };
    scan_part<T, kDraws, true, false>(sm, slice, static_cast<int32_t>(p.vocab), 0, asked, banned_elements(p, slice, 0),
                                      put);
    is_last = arrive(p, sm, request, 1, num_slices);
  } else {
    if (slice_idx != 0) return;
    is_last = arrive(p, sm, request, num_slices, num_slices);
  }
  const auto load = [&](int32_t r, int32_t i) { return load_slice_part(p.parts.parts + r * num_slices + i); };
  if (is_last) commit_request(p, sm, request, request_rows(p, request), load, num_slices);
}

}  // namespace nld
