// commit_ in two launches, for a vocabulary that several GPUs share: each scans its shard, all gather the parts, each
// commits.
//
// commit_scan_kernel: one CTA for each part of each row (grid: parts x rows), which reads a slice of 8192 ids once, as
// in commit_kernel, and leaves 32 bytes. No tickets: the commit waits for the other GPUs anyway. Always with the code
// of draws, which rows without a temperature pass by: half as many instantiations. commit_parts_kernel: one CTA a
// request, the last CTA of commit_kernel without what came before it. Traffic: judged rows * shard * sizeof(T); 32
// bytes a part and row, written once, read once for each GPU.
#pragma once

#include "sampler/kernel.cuh"

namespace nld {

template <class T>
__global__ void __launch_bounds__(kScanThreads, kShardScanCtas<T>)
    commit_scan_kernel(const __grid_constant__ CommitParams p) {
  NLD_DYNAMIC_SMEM(PartSmem, sm);
  const int32_t slice_idx = blockIdx.x, row = blockIdx.z * gridDim.y + blockIdx.y;
  if (row >= p.rows) return;
  SlicePart* const part = p.parts.parts + (row * gridDim.x + slice_idx);
  const int32_t request = find_request(p, row);
  if (request < 0 || !is_judged(p, request, row) || slice_idx >= num_shard_slices(p.vocab)) {
    if (threadIdx.x == 0) *part = no_part();
    return;
  }
  RowSlice<T> slice;
  slice.load(static_cast<const T*>(p.logits) + row * p.logits_row_stride, slice_idx, static_cast<int32_t>(p.vocab));
  const RowQuestion asked =
      p.temperature != nullptr ? question<true>(p, row, request) : question<false>(p, row, request);
  const auto first = static_cast<int32_t>(p.first_token_id);
  const auto put = [&](const SlicePart& found) { *part = found; };
  scan_part<T, true, true, true>(sm, slice, static_cast<int32_t>(p.vocab), first, asked,
                                 banned_elements(p, slice, first), put);
}

static __global__ void __launch_bounds__(kScanThreads, 4) commit_parts_kernel(const __grid_constant__ CommitParams p) {
  NLD_DYNAMIC_SMEM(CommitSmem, sm);
  const int32_t request = blockIdx.x;
  const RequestRows rows = request_rows(p, request);
  if (rows.begin >= rows.end) {
    finish_empty_requests(p, threadIdx.x == 0 ? request : p.batch);
    return;
  }
  const auto load = [&](int32_t row, int32_t i) { return load_shard_part(p.parts, row, i); };
  commit_request(p, sm, request, rows, load, static_cast<int32_t>(parts_of_row(p.parts)));
}

}  // namespace nld
