// Launches the Hopper kernels of one dtype and head_dim; instances: launch_sm90_<dtype>_<head_dim>.cu.
#pragma once

#include <atomic>

#include "attention/kernel_sm90.cuh"

namespace nld {

template <class T, int kHeadDim, class Kv, int kTileRows>
LaunchError launch_wgmma_rows(const HopperParams& p, void* stream) {
  typedef HopperShape<kHeadDim, kTileRows, Kv> Shape;
  constexpr int kSmemBytes = static_cast<int>(sizeof(typename Shape::Smem));
  const auto kernel = attention_wgmma_kernel<T, kHeadDim, kTileRows, Kv>;
  if (const LaunchError error = allow_smem(kernel, kSmemBytes)) return error;
  const AttentionCudaParams& op = p.mma.op;
  const int64_t work = static_cast<int64_t>(op.plan_shape.max_items) * op.num_kv_heads;
  const int64_t resident = static_cast<int64_t>(op.num_sms) * Shape::kMinCtas;
  NLD_LAUNCH(kernel, static_cast<unsigned>(work < resident ? work : resident), Shape::kThreads, kSmemBytes, stream, p);
  return launch_result();
}

template <class T, int kHeadDim, class Kv>
LaunchError launch_wgmma(const HopperParams& p, void* stream) {
  return p.mma.op.plan_shape.tile_rows == 128 ? launch_wgmma_rows<T, kHeadDim, Kv, 128>(p, stream)
                                              : launch_wgmma_rows<T, kHeadDim, Kv, 64>(p, stream);
}

}  // namespace nld
