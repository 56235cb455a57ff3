// Launches the mma.sync kernels of one dtype, head_dim and type of cache. Each is instantiated in a file of its own
// (launch_sm80_<dtype>_<head_dim>.cu, launch_sm80_fp8_<head_dim>.cu): they compile slowly.
#pragma once

#include <atomic>

#include "attention/kernel_sm80.cuh"

namespace nld {

template <class T, int kHeadDim, class Kv, int kTileRows>
LaunchError launch_mma_rows(const MmaParams& p, void* stream) {
  typedef TileShape<kHeadDim, kTileRows, Kv> Shape;
  constexpr int kSmemBytes = static_cast<int>(sizeof(typename Shape::Smem));
  const auto kernel = attention_mma_kernel<T, kHeadDim, kTileRows, Kv>;
  if (const LaunchError error = allow_smem(kernel, kSmemBytes)) return error;
  // Persistent CTAs, as many as the GPU holds at once: a second wave would find its share of the items waiting.
  static std::atomic<int> ctas_per_sm{0};  // the same on all GPUs of a machine, or nearly
  int ctas = ctas_per_sm;
  if (ctas == 0) ctas_per_sm = ctas = resident_ctas(kernel, Shape::kThreads, kSmemBytes);
  const int64_t work = static_cast<int64_t>(p.op.plan_shape.max_items) * p.op.num_kv_heads;
  const int64_t resident = static_cast<int64_t>(p.op.num_sms) * ctas;
  NLD_LAUNCH(kernel, static_cast<unsigned>(work < resident ? work : resident), Shape::kThreads, kSmemBytes, stream, p);
  return launch_result();
}

template <class T, int kHeadDim, class Kv>
LaunchError launch_mma(const MmaParams& p, void* stream) {
  switch (p.op.plan_shape.tile_rows) {
    case 16:
      return launch_mma_rows<T, kHeadDim, Kv, 16>(p, stream);
    case 64:
      return launch_mma_rows<T, kHeadDim, Kv, 64>(p, stream);
    case 128:
      return launch_mma_rows<T, kHeadDim, Kv, 128>(p, stream);
  }
  return "a plan has tiles of 16, 64 or 128 rows";
}

}  // namespace nld
