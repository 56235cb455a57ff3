// Launches the mma.sync kernels of one dtype, head_dim and type of cache. Each is instantiated in a file of its own
// (launch_sm80_<dtype>_<head_dim>.cu, launch_sm80_fp8_<head_dim>.cu): they compile slowly.
#pragma once

#include <algorithm>
#include <atomic>

#include "attention/kernel_sm80.cuh"

namespace nld {

// Clusters of that many CTAs that the GPU holds at once; 0: it has none.
template <class T, int kHeadDim, class Kv, int kTileRows>
int mma_resident_clusters_rows(int size) {
  typedef TileShape<kHeadDim, kTileRows, Kv> Shape;
  constexpr int kSmemBytes = static_cast<int>(sizeof(typename Shape::Smem));
  static ResidentClusters resident;
  return resident(attention_mma_kernel<T, kHeadDim, kTileRows, Kv>, Shape::kThreads, kSmemBytes, size);
}

template <class T, int kHeadDim, class Kv, int kTileRows>
LaunchError launch_mma_rows(const MmaParams& p, void* stream) {
  typedef TileShape<kHeadDim, kTileRows, Kv> Shape;
  constexpr int kSmemBytes = static_cast<int>(sizeof(typename Shape::Smem));
  const auto kernel = attention_mma_kernel<T, kHeadDim, kTileRows, Kv>;
  if (const LaunchError error = allow_smem(kernel, kSmemBytes)) return error;
  // Persistent CTAs, as many as the GPU holds at once: a second wave would find its share of the items waiting.
  const int cluster = p.op.cluster_size;
  int64_t work = p.op.plan_shape.max_items, resident;
  if (cluster > 1) {
    work = p.op.plan_shape.max_tiles;
    resident = mma_resident_clusters_rows<T, kHeadDim, Kv, kTileRows>(cluster);
    if (const LaunchError error = allow_cluster(kernel, cluster)) return error;
  } else {
    static std::atomic<int> ctas_per_sm{0};  // the same on all GPUs of a machine, or nearly
    int ctas = ctas_per_sm;
    if (ctas == 0) ctas_per_sm = ctas = resident_ctas(kernel, Shape::kThreads, kSmemBytes);
    resident = static_cast<int64_t>(p.op.num_sms) * ctas;
  }
  work = std::min(work * p.op.num_kv_heads, resident) * cluster;
  const LaunchShape shape = {.grid = static_cast<unsigned>(work),
                             .block = Shape::kThreads,
                             .smem_bytes = kSmemBytes,
                             .cluster = static_cast<unsigned>(cluster),
                             .overlaps_previous = can_overlap(kernel)};
  NLD_LAUNCH_SHAPED(kernel, shape, stream, p);
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

template <class T, int kHeadDim, class Kv>
int mma_resident_clusters(int tile_rows, int size) {
  switch (tile_rows) {
    case 16:
      return mma_resident_clusters_rows<T, kHeadDim, Kv, 16>(size);
    case 64:
      return mma_resident_clusters_rows<T, kHeadDim, Kv, 64>(size);
    case 128:
      return mma_resident_clusters_rows<T, kHeadDim, Kv, 128>(size);
  }
  return 0;
}

}  // namespace nld
