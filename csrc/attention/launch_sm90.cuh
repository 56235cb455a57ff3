// Launches the Hopper kernels of one dtype and head_dim; instances: launch_sm90_<dtype>_<head_dim>.cu.
#pragma once

#include <algorithm>

#include "attention/kernel_sm90.cuh"

namespace nld {

template <class T, int kHeadDim, class Kv, int kTileRows>
int wgmma_resident_clusters_rows(int size) {
  typedef HopperShape<kHeadDim, kTileRows, Kv> Shape;
  constexpr int kSmemBytes = static_cast<int>(sizeof(typename Shape::Smem));
  static ResidentClusters resident;
  return resident(attention_wgmma_kernel<T, kHeadDim, kTileRows, Kv>, Shape::kThreads, kSmemBytes, size);
}

template <class T, int kHeadDim, class Kv, int kTileRows>
LaunchError launch_wgmma_rows(const HopperParams& p, void* stream) {
  typedef HopperShape<kHeadDim, kTileRows, Kv> Shape;
  constexpr int kSmemBytes = static_cast<int>(sizeof(typename Shape::Smem));
  const auto kernel = attention_wgmma_kernel<T, kHeadDim, kTileRows, Kv>;
  if (const LaunchError error = allow_smem(kernel, kSmemBytes)) return error;
  const AttentionCudaParams& op = p.mma.op;
  const int cluster = op.cluster_size;
  const bool merges = cluster > 1;
  const int64_t work = static_cast<int64_t>(merges ? op.plan_shape.max_tiles : op.plan_shape.max_items);
  const int64_t resident = merges ? wgmma_resident_clusters_rows<T, kHeadDim, Kv, kTileRows>(cluster)
                                  : static_cast<int64_t>(op.num_sms) * Shape::kMinCtas;
  if (const LaunchError error = allow_cluster(kernel, cluster)) return error;
  const LaunchShape shape = {.grid = static_cast<unsigned>(std::min(work * op.num_kv_heads, resident) * cluster),
                             .block = Shape::kThreads,
                             .smem_bytes = kSmemBytes,
                             .cluster = static_cast<unsigned>(cluster),
                             .overlaps_previous = can_overlap(kernel)};
  NLD_LAUNCH_SHAPED(kernel, shape, stream, p);
  return launch_result();
}

template <class T, int kHeadDim, class Kv>
LaunchError launch_wgmma(const HopperParams& p, void* stream) {
  return p.mma.op.plan_shape.tile_rows == 128 ? launch_wgmma_rows<T, kHeadDim, Kv, 128>(p, stream)
                                              : launch_wgmma_rows<T, kHeadDim, Kv, 64>(p, stream);
}

template <class T, int kHeadDim, class Kv>
int wgmma_resident_clusters(int tile_rows, int size) {
  return tile_rows == 128 ? wgmma_resident_clusters_rows<T, kHeadDim, Kv, 128>(size)
                          : wgmma_resident_clusters_rows<T, kHeadDim, Kv, 64>(size);
}

}  // namespace nld
