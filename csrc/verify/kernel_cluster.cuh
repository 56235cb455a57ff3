// verify_ on GPUs with clusters, for few rows: one launch, also where drafts come with probabilities.
//
// A cluster is a row, its CTAs are the row's slices (grid: rows x cluster size). Each CTA reads its slice once and
// leaves 16 bytes in the shared memory of rank 0, which finds the verdict of the row. The only row of a request (a
// plain step, COMMIT) ends there: no ticket, nothing in global memory. Otherwise rank 0 leaves its verdict (16 bytes)
// and takes a ticket; the last row of a request walks over the verdicts and emits. A residual is drawn by all CTAs of
// that last cluster, a slice each, as the second launch of the portable way would. Traffic: that of verify_kernel, with
// 32 bytes a row instead of 32 a slice. Why not for more rows: ranks wait for the ticket of rank 0, keeping their
// places on the SM from rows that come later. Numbers, and what does not pay: docs/verify.md.
#pragma once

#include "common/ptx_sm90.cuh"
#include "common/ticket.cuh"
#include "verify/row.cuh"

namespace nld {

constexpr int kMaxClusterRounds = 2;  // slices of a row that one CTA reads, one after the other
constexpr int kMaxClusterParts = 16 * kMaxClusterRounds;

struct alignas(16) ClusterSmem : VerifySmem {   // behind it kScanSliceLen floats where drafts come with probabilities
  VerifyPart parts[kMaxClusterParts];           // of rank 0: the row's, from all ranks ...
  VerifyPart residual_parts[kMaxClusterParts];  // ... and the residual's
  ResidualTask task;                            // from rank 0
  uint64_t parts_bar, residual_bar, task_bar;
  int64_t draft;
  int32_t slices;
};

template <class Message>
__device__ __forceinline__ void send(Message* to, const Message& message, uint64_t* bar, int rank) {
  static_assert(sizeof(Message) == sizeof(uint4));
  uint4 words;
  memcpy(&words, &message, sizeof words);
  ptx::store_async_to_rank(to, words, bar, rank);
}

// Where the walk of a request ended, the same in every thread. By whole warps.
struct Walk {
  int32_t accepted;
  RowVerdict end;
};
__device__ __forceinline__ Walk walk(const RowVerdict* verdicts, int32_t count) {
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  for (int32_t first = 0;; first += kWarpSize) {
    RowVerdict mine = {kAccepted, 0.0f, 0.0f};
    if (first + lane < count) {
      const uint4 v = __ldcg(reinterpret_cast<const uint4*>(verdicts + first + lane));  // not from the L1 cache
      mine = {static_cast<int64_t>(v.x | static_cast<uint64_t>(v.y) << 32), __uint_as_float(v.z), __uint_as_float(v.w)};
    }
    const int end = WarpLanes::first(first + lane == count - 1 || mine.value != kAccepted);
    if (end == kWarpSize) continue;
    const int64_t value = __shfl_sync(kFullMask, mine.value, end);
    return {first + end, {value, __shfl_sync(kFullMask, mine.max, end), __shfl_sync(kFullMask, mine.sum, end)}};
  }
}

// The row judged. Where no other row of the request is to come also how the request ends, else accepted is -1. By the
// whole CTA of rank 0; in every lane of its first warp.
template <class T, bool kDraws>
__device__ __forceinline__ Walk finish_row(const VerifyParams& p, ClusterSmem* sm) {
  const RowView& view = sm->view;
  const auto load = [&](int i) { return sm->parts[i]; };
  const bool first_group = threadIdx.x < kVerdictLanes;  // the others have nothing to do
  const Verdict verdict = find_verdict<T, kDraws>(p, view, first_group, sm->draft, sm->slices, load, sm);
  Walk end = {view.index, {__shfl_sync(kFullMask, verdict.value, 0), verdict.sums.max, verdict.sums.sum}};
  if (view.num_judged() > 1) {
    if (threadIdx.x == 0) p.verdicts[view.row] = end.end;
    if (arrive_last(p.tickets + view.request, 1, view.num_judged(), &sm->is_last)) {
      end = walk(p.verdicts + view.begin, view.count);
    } else {
      end.accepted = -1;
    }
  }
  return end;
}

// By whole warps: the first one emits how the walk of the request ended, if it did.
__device__ __forceinline__ void emit_walk(const VerifyParams& p, const Walk& walk, const ClusterSmem* sm) {
  if (threadIdx.x >= kWarpSize || walk.accepted < 0) return;
  emit<WarpLanes>(p, sm->view.request, {sm->view.begin, sm->view.count}, walk.accepted, walk.end.value);
}

template <class T, bool kDraws>
constexpr int kClusterCtas = kVerifyCtas<T, kDraws> - (kDraws ? 0 : kCtasLess);

template <class T, bool kDraws>
__global__ void __launch_bounds__(kScanThreads, kClusterCtas<T, kDraws>)
    verify_cluster_kernel(const __grid_constant__ VerifyParams p) {
  NLD_DYNAMIC_SMEM(ClusterSmem, sm);
  if (blockIdx.x == 0) leave_empty_requests(p);
  {
    RowView view;
    const int32_t row = static_cast<int32_t>(blockIdx.x) / ptx::cluster_size();
    if (!find_row(p, row, ptx::cluster_rank() == 0, &view)) return;  // the whole cluster leaves
    if (threadIdx.x == 0) {
      sm->view = view;
      sm->slices = static_cast<int32_t>(num_scan_slices(p.vocab));
      sm->draft = view.is_last ? -1 : p.block_tokens[row + 1];
      ptx::mbar_init(&sm->parts_bar, 1);
      ptx::mbar_init(&sm->residual_bar, 1);
      ptx::mbar_init(&sm->task_bar, 1);
      ptx::mbar_init_fence();
    }
    __syncthreads();
  }
  ptx::cluster_arrive_relaxed();  // CTAs may send to each other once all have started
  const bool forced = is_forced(p, sm->view.request, sm->view.begin, sm->view.index);
  if (threadIdx.x == 0) {  // what will come
    ptx::mbar_arrive_expect_tx(&sm->task_bar, sizeof(ResidualTask));
    ptx::mbar_arrive_expect_tx(&sm->parts_bar, (sm->slices - (NLD_BUG(verify_cluster_lost_part) ? 1 : 0)) *
                                                   static_cast<int>(sizeof(VerifyPart)));
  }
  if (forced) {  // parts that say nothing, but that this CTA has read what rank 0 is going to change
    ptx::cluster_wait();
    __syncthreads();
    NLD_ROLLED for (int32_t slice = ptx::cluster_rank(); slice < sm->slices; slice += ptx::cluster_size()) {
      if (threadIdx.x == 0) send(sm->parts + slice, VerifyPart{-kScanInf, -1, -kScanInf, 0.0f}, &sm->parts_bar, 0);
    }
  } else {
    NLD_ROLLED for (int32_t slice = ptx::cluster_rank(); slice < sm->slices; slice += ptx::cluster_size()) {
      RowSlice<T> words;
      words.load(logits_row<T>(p, sm->view.row), slice, static_cast<int32_t>(p.vocab));
      if (slice == ptx::cluster_rank()) {
        if (!NLD_BUG(verify_cluster_sends_early)) ptx::cluster_wait();
      } else {
        __syncthreads();  // shared memory of the last round has been read
      }
      const auto put = [&](const VerifyPart& part) { send(sm->parts + slice, part, &sm->parts_bar, 0); };
      scan_slice<T, kDraws>(p, sm->view, words, put, sm);
    }
  }
  const bool draws_residual = kDraws && p.draft_probs != nullptr && sm->view.mode == VerifyMode::kRejection;
  if (ptx::cluster_rank() == 0) {
    if (!NLD_BUG(verify_cluster_no_wait)) ptx::mbar_wait<ptx::Scope::kCluster>(&sm->parts_bar, 0);
    const Walk walk = finish_row<T, kDraws>(p, sm);
    if (!kDraws || !draws_residual) {
      emit_walk(p, walk, sm);
    } else if (threadIdx.x < kWarpSize) {  // mostly: leave
      const int32_t residual = walk.end.value == kResidual ? walk.accepted : -1;
      if (threadIdx.x == 0) ptx::mbar_arrive_expect_tx(&sm->residual_bar, sm->slices * sizeof(VerifyPart));
      if (static_cast<int32_t>(threadIdx.x) < ptx::cluster_size())
        send(&sm->task, {residual, walk.end.max, walk.end.sum, 0}, &sm->task_bar, threadIdx.x);
      if (residual < 0) emit_walk(p, walk, sm);
    }
  }
  if (!kDraws || !draws_residual) return;

  if (!NLD_BUG(verify_cluster_task_early)) ptx::mbar_wait<ptx::Scope::kCluster>(&sm->task_bar, 0);
  if (sm->task.accepted < 0) return;
  NLD_ROLLED for (int32_t slice = ptx::cluster_rank(); slice < sm->slices; slice += ptx::cluster_size()) {
    __syncthreads();  // shared memory of the scan, or of the last round, has been read
    const auto put = [&](const VerifyPart& part) { send(sm->residual_parts + slice, part, &sm->residual_bar, 0); };
    scan_residual<T>(p, sm->view.request, sm->view.begin + sm->task.accepted, sm->task.max, sm->task.sum, slice, put,
                     reinterpret_cast<float*>(sm + 1), sm);
  }
  if (ptx::cluster_rank() != 0) return;
  ptx::mbar_wait<ptx::Scope::kCluster>(&sm->residual_bar, 0);
  const auto load = [&](int i) { return sm->residual_parts[i]; };
  const int32_t bonus = pick_residual<T>(p, sm->view.request, sm->view.begin + sm->task.accepted, sm->slices, load, sm);
  emit_walk(p, {sm->task.accepted, {bonus, 0.0f, 0.0f}}, sm);
}

}  // namespace nld
