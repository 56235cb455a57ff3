// verify_ on CUDA, any GPU: one launch, or two where drafts come with probabilities. kernel_cluster.cuh is the way for
// GPUs with clusters and few rows.
#pragma once

#include "common/ticket.cuh"
#include "verify/row.cuh"

namespace nld {

// One request, all of whose parts are there: verdicts of 32 rows at a time, eight lanes a row, up to the first that is
// not kAccepted; then a warp emits. By the whole CTA.
// `load(row, i)` is part i of num_parts.
template <class T, bool kDraws, class Load>
__device__ __forceinline__ void judge_request(const VerifyParams& p, const RowView& any_row, const Load& load,
                                              int num_parts, VerifySmem* sm) {
  const int lane = static_cast<int>(threadIdx.x % kWarpSize), group = static_cast<int>(threadIdx.x) / kVerdictLanes;
  const int in_group = static_cast<int>(threadIdx.x) % kVerdictLanes;
  const int32_t request = any_row.request, begin = any_row.begin, count = any_row.count;
  int first = any_row.mode == VerifyMode::kCommit ? count - 1 : 0, accepted;
  for (;; first += kVerdictRows) {
    RowView view = any_row;
    view.index = first + group;
    view.row = begin + view.index;
    view.is_last = view.index == count - 1;
    const bool exists = view.index < count;
    const auto part_of_row = [&](int i) { return load(view.row, i); };
    const int64_t draft = exists && !view.is_last ? p.block_tokens[view.row + 1] : -1;
    const Verdict verdict = find_verdict<T, kDraws>(p, view, exists, draft, num_parts, part_of_row, sm);
    if (in_group == 0) {
      sm->verdicts[group] = verdict.value;
      sm->row_sums[group] = verdict.sums;
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
  const int32_t slice = static_cast<int32_t>(blockIdx.y), slices = static_cast<int32_t>(gridDim.y);
  if (blockIdx.x == 0 && slice == 0) leave_empty_requests(p);
  RowView view;
  if (!find_row(p, row, slice == 0, &view)) return;
  if (threadIdx.x == 0) sm->view = view;
  if (!is_forced(p, view.request, view.begin, view.index)) {
    RowSlice<T> words;
    words.load(logits_row<T>(p, row), slice, static_cast<int32_t>(p.vocab));
    const auto put = [&](const VerifyPart& part) { p.parts[static_cast<int64_t>(row) * slices + slice] = part; };
    scan_slice<T, kDraws>(p, view, words, put, sm);
  }
  if (!arrive_last(p.tickets + view.request, 1, slices * view.num_judged(), &sm->is_last)) return;
  const auto load = [&](int32_t of_row, int i) {
    return load_part(p.parts + (static_cast<int64_t>(of_row) * slices + i));
  };
  judge_request<T, kDraws>(p, sm->view, load, slices, sm);
}

struct ResidualSmem : VerifySmem {
  alignas(16) float probs[kScanSliceLen];
};

// Where a request's bonus is still to be drawn from max(p - q, 0): one CTA per slice of its row (grid: requests x
// slices) races with Gumbel noise, the last one emits. Other requests cost the load of one word.
// Traffic: vocab * (sizeof(T) + 4) per request that refused a draft.
// A launch of its own, since p needs the sums of the whole row; one CTA would take about ten times as long.
template <class T>
__global__ void __launch_bounds__(kScanThreads, sizeof(T) == 4 ? 2 : 3)
    verify_residual_kernel(const __grid_constant__ VerifyParams p) {
  NLD_DYNAMIC_SMEM(ResidualSmem, sm);
  ptx::wait_for_previous_kernel();
  const int32_t request = static_cast<int32_t>(blockIdx.x);
  const int32_t slice = static_cast<int32_t>(blockIdx.y), slices = static_cast<int32_t>(gridDim.y);
  const ResidualTask task = p.residual[request];
  if (task.accepted < 0) return;
  const int32_t begin = p.cu_seqlens[request], row = begin + task.accepted;
  VerifyPart* const parts = p.parts + static_cast<int64_t>(row) * slices;
  const auto put = [&](const VerifyPart& part) { parts[slice] = part; };
  scan_residual<T>(p, request, row, task.max, task.sum, slice, put, sm->probs, sm);
  if (!arrive_last(p.tickets + request, 1, slices, &sm->is_last)) return;
  const auto load = [&](int i) { return load_part(parts + i); };
  const int32_t bonus = pick_residual<T>(p, request, row, slices, load, sm);
  if (threadIdx.x < kWarpSize)
    emit<WarpLanes>(p, request, {begin, p.cu_seqlens[request + 1] - begin}, task.accepted, bonus);
}

}  // namespace nld
