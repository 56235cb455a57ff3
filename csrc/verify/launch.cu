// Launcher of verify_.
#include "verify/kernel.cuh"

namespace nld {
namespace {

template <class T>
LaunchError verify(const VerifyParams& p, void* stream) {
  const auto slices = static_cast<unsigned>(verify_slices(p.vocab));
  const dim3 grid(static_cast<unsigned>(p.rows > 0 ? p.rows : 1), slices);
  if (p.temperature == nullptr) {
    NLD_LAUNCH((verify_kernel<T, false>), grid, kScanThreads, sizeof(VerifySmem), stream, p);
  } else {
    NLD_LAUNCH((verify_kernel<T, true>), grid, kScanThreads, sizeof(VerifySmem), stream, p);
  }
  if (p.residual != nullptr) {
    const dim3 residual_grid(static_cast<unsigned>(p.batch), slices);
    NLD_LAUNCH((verify_residual_kernel<T>), residual_grid, kScanThreads, sizeof(VerifySmem), stream, p);
  }
  return launch_result();
}

}  // namespace

int64_t verify_slices(int64_t vocab) { return num_scan_slices(vocab); }

LaunchError launch_verify(const VerifyParams& p, void* stream) {
  if (p.batch == 0) return nullptr;
  switch (p.dtype) {
    case DType::kF32:
      return verify<float>(p, stream);
    case DType::kBF16:
      return verify<bf16>(p, stream);
    case DType::kF16:
      return verify<f16>(p, stream);
  }
  return "unknown dtype";
}

}  // namespace nld
