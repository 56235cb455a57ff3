// verify_ in two launches, for a vocabulary that several GPUs share: each scans its shard, all gather the parts, each
// judges and emits. REJECTION is not for shards (docs/verify.md) and counts as SAMPLED.
//
// verify_scan_kernel: one CTA for each part of each row (grid: parts x rows), which reads a slice of 8192 ids once and
// leaves 32 bytes. No tickets: the verdict waits for the other GPUs anyway. Always with the code of draws.
// verify_parts_kernel: one CTA a request, the last CTA of verify_kernel without what came before it.
// Traffic: judged rows * shard * sizeof(T); 32 bytes a part and row, written once, read once for each GPU.
#pragma once

#include "common/part_scan.cuh"
#include "verify/kernel.cuh"

namespace nld {

template <class T>
__global__ void __launch_bounds__(kScanThreads, kShardScanCtas<T>)
    verify_scan_kernel(const __grid_constant__ VerifyParams p) {
  NLD_DYNAMIC_SMEM(PartSmem, sm);
  const int32_t slice_idx = blockIdx.x, row = blockIdx.z * gridDim.y + blockIdx.y;
  if (row >= p.rows) return;
  SlicePart* const part = p.shards.parts + (row * gridDim.x + slice_idx);
  RowView view;
  if (!find_row(p, row, false, &view) || slice_idx >= num_shard_slices(p.vocab)) {
    if (threadIdx.x == 0) *part = no_part();
    return;
  }
  NLD_DEVICE_CHECK(view.mode != VerifyMode::kRejection,
                   "verify_mode must not be REJECTION where the vocabulary is sharded");
  RowSlice<T> slice;
  slice.load(logits_row<T>(p, row), slice_idx, static_cast<int32_t>(p.vocab));
  RowQuestion asked;
  if (view.mode != VerifyMode::kGreedy && view.scale > 0.0f) {
    asked.scale = view.scale;
    asked.key = noise_key(p, view.request, row, Purpose::kSample);
  }
  const auto first = static_cast<int32_t>(p.first_token_id);
  const auto put = [&](const SlicePart& found) { *part = found; };
  scan_part<T, true, false, true>(sm, slice, static_cast<int32_t>(p.vocab), first, asked,
                                  slice.banned_mask(p.banned_token_ids, p.num_banned, first), put);
}

static __global__ void __launch_bounds__(kScanThreads, 4) verify_parts_kernel(const __grid_constant__ VerifyParams p) {
  NLD_DYNAMIC_SMEM(VerifySmem, sm);
  const int32_t request = blockIdx.x;
  const VerifyRows rows = verify_rows(p, request);
  if (rows.count == 0) {
    if (threadIdx.x == 0) leave_alone(p, request);
    return;
  }
  const auto begin = static_cast<int32_t>(rows.begin), count = static_cast<int32_t>(rows.count);
  const RowView view = {request, begin, begin, 0, count, verify_mode(p, request), 0.0f, count == 1};
  const auto load = [&](int32_t row, int i) -> VerifyPart {
    const SlicePart part = load_shard_part(p.shards, row, i);
    return {part.value, part.id, part.max, part.sum};
  };
  judge_request<float, false>(p, view, load, static_cast<int>(parts_of_row(p.shards)), sm);
}

}  // namespace nld
