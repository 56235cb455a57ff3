// Launcher of verify_ on GPUs with clusters.
#include "verify/kernel_cluster.cuh"

namespace nld {
namespace {

template <class T>
LaunchError verify(const VerifyParams& p, int cluster, void* stream) {
  const auto launch = [&](auto* kernel, size_t smem_bytes) -> LaunchError {
    if (cluster > 8) {
      if (const LaunchError error = allow_wide_cluster(kernel)) return error;
    }
    LaunchShape shape;
    shape.grid = dim3(static_cast<unsigned>(p.rows * cluster));
    shape.block = dim3(kScanThreads);
    shape.smem_bytes = static_cast<int>(smem_bytes);
    shape.cluster = static_cast<unsigned>(cluster);
    NLD_LAUNCH_SHAPED(kernel, shape, stream, p);
    return launch_result();
  };
  const size_t smem_bytes = sizeof(ClusterSmem) + (p.residual != nullptr ? kScanSliceLen * sizeof(float) : 0);
  return p.temperature == nullptr ? launch(&verify_cluster_kernel<T, false>, smem_bytes)
                                  : launch(&verify_cluster_kernel<T, true>, smem_bytes);
}

}  // namespace

int verify_cluster_size(const VerifyParams& p, int capability) {
  // 16 CTAs are more than every GPU with clusters promises, but what those of data centers can do.
  const int64_t slices = verify_slices(p.vocab), most = capability < 120 ? 16 : 8;
  const int64_t rounds = (slices + most - 1) / most, cluster = (slices + rounds - 1) / rounds;
  // About what 132 SMs hold at once: clusters keep their places longer than CTAs that nobody waits for.
  constexpr int64_t kMaxCtas = 4 * 132;
  if (capability < 90 || p.rows == 0 || rounds > kMaxClusterRounds || p.rows * cluster > kMaxCtas) return 0;
  // Worth it where it saves the ticket (mostly one row a request) or the second launch.
  return p.rows <= p.batch || p.residual != nullptr ? static_cast<int>(cluster) : 0;
}

LaunchError launch_verify_cluster(const VerifyParams& p, int cluster, void* stream) {
  switch (p.dtype) {
    case DType::kF32:
      return verify<float>(p, cluster, stream);
    case DType::kBF16:
      return verify<bf16>(p, cluster, stream);
    case DType::kF16:
      return verify<f16>(p, cluster, stream);
  }
  return "unknown dtype";
}

}  // namespace nld
