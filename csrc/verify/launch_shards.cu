// Launchers of verify_scan and verify_parts_.
#include <algorithm>

#include "verify/kernel_shards.cuh"

namespace nld {

LaunchError launch_verify_scan(const VerifyParams& p, void* stream) {
  if (p.rows == 0) return nullptr;
  if (p.vocab > kScanMaxVocab) return "logits must have at most 2^31 - 16385 columns";
  if (p.rows * p.shards.num_parts > INT32_MAX) return "rows * num_parts must be below 2^31";
  constexpr int64_t kMaxY = 65535;
  const dim3 grid(static_cast<unsigned>(p.shards.num_parts), static_cast<unsigned>(std::min(p.rows, kMaxY)),
                  static_cast<unsigned>((p.rows + kMaxY - 1) / kMaxY));
  switch (p.dtype) {
    case DType::kF32:
      NLD_LAUNCH((verify_scan_kernel<float>), grid, kScanThreads, sizeof(PartSmem), stream, p);
      return launch_result();
    case DType::kBF16:
      NLD_LAUNCH((verify_scan_kernel<bf16>), grid, kScanThreads, sizeof(PartSmem), stream, p);
      return launch_result();
    case DType::kF16:
      NLD_LAUNCH((verify_scan_kernel<f16>), grid, kScanThreads, sizeof(PartSmem), stream, p);
      return launch_result();
  }
  return "unknown dtype";
}

LaunchError launch_verify_parts(const VerifyParams& p, void* stream) {
  if (p.batch == 0) return nullptr;
  if (parts_of_row(p.shards) > INT32_MAX) return "num_shards * num_parts must be below 2^31";
  NLD_LAUNCH(verify_parts_kernel, static_cast<unsigned>(p.batch), kScanThreads, sizeof(VerifySmem), stream, p);
  return launch_result();
}

}  // namespace nld
