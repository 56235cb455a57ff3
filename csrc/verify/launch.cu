// Launcher of verify_: the way for any GPU, and which way is taken.
#include "verify/kernel.cuh"

namespace nld {
namespace {

template <class T>
LaunchError verify(const VerifyParams& p, int capability, void* stream) {
  const auto slices = static_cast<unsigned>(verify_slices(p.vocab));
  const dim3 grid(static_cast<unsigned>(p.rows > 0 ? p.rows : 1), slices);
  if (p.temperature == nullptr) {
    NLD_LAUNCH((verify_kernel<T, false>), grid, kScanThreads, sizeof(VerifySmem), stream, p);
  } else {
    NLD_LAUNCH((verify_kernel<T, true>), grid, kScanThreads, sizeof(VerifySmem), stream, p);
  }
  if (p.residual != nullptr) {
    LaunchShape shape;
    shape.grid = dim3(static_cast<unsigned>(p.batch), slices);
    shape.block = dim3(kScanThreads);
    shape.smem_bytes = sizeof(ResidualSmem);
    shape.overlaps_previous = capability >= 90;
    NLD_LAUNCH_SHAPED((verify_residual_kernel<T>), shape, stream, p);
  }
  return launch_result();
}

}  // namespace

int64_t verify_slices(int64_t vocab) { return num_scan_slices(vocab); }

LaunchError launch_verify(const VerifyParams& p, void* stream) {
  if (p.batch == 0) return nullptr;
  const int capability = compute_capability(), cluster = verify_cluster_size(p, capability);
  if (cluster > 0) return launch_verify_cluster(p, cluster, stream);
  switch (p.dtype) {
    case DType::kF32:
      return verify<float>(p, capability, stream);
    case DType::kBF16:
      return verify<bf16>(p, capability, stream);
    case DType::kF16:
      return verify<f16>(p, capability, stream);
  }
  return "unknown dtype";
}

}  // namespace nld
