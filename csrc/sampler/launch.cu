// Launchers of commit_ and gumbel_noise_.
#include <algorithm>

#include "sampler/kernel.cuh"
#include "sampler/kernel_noise.cuh"

namespace nld {
namespace {

template <class T>
LaunchError commit(const CommitParams& p, void* stream) {
  if (p.vocab > kScanMaxVocab) return "vocab must be at most 2^31 - 16385";
  const int64_t slices = num_scan_slices(p.vocab);
  // Rows, and after them as many more as requests without rows may need (a thread each).
  const int64_t rows = p.rows + (p.batch + slices * kScanThreads - 1) / (slices * kScanThreads);
  if (rows * slices > INT32_MAX) return "rows * ceil(vocab / 8192) must be below 2^31";
  constexpr int64_t kMaxY = 65535;
  const dim3 grid(static_cast<unsigned>(slices), static_cast<unsigned>(std::min(rows, kMaxY)),
                  static_cast<unsigned>((rows + kMaxY - 1) / kMaxY));
  if (p.temperature != nullptr) {
    NLD_LAUNCH((commit_kernel<T, true>), grid, kScanThreads, sizeof(CommitSmem), stream, p);
  } else {
    NLD_LAUNCH((commit_kernel<T, false>), grid, kScanThreads, sizeof(CommitSmem), stream, p);
  }
  return launch_result();
}

}  // namespace

int64_t commit_slices(int64_t vocab) { return num_scan_slices(vocab); }

LaunchError launch_commit(const CommitParams& p, void* stream) {
  if (p.batch == 0) return nullptr;
  switch (p.dtype) {
    case DType::kF32:
      return commit<float>(p, stream);
    case DType::kBF16:
      return commit<bf16>(p, stream);
    case DType::kF16:
      return commit<f16>(p, stream);
  }
  return "unknown dtype";
}

LaunchError launch_gumbel_noise(const GumbelNoiseParams& p, void* stream) {
  if (p.rows == 0 || p.vocab == 0) return nullptr;
  const int64_t grid = (p.rows * ((p.vocab + 3) / 4) + kNoiseThreads - 1) / kNoiseThreads;
  if (grid > INT32_MAX) return "rows * vocab must be below 2^41";
  NLD_LAUNCH(gumbel_noise_kernel, static_cast<unsigned>(grid), kNoiseThreads, 0, stream, p);
  return launch_result();
}

}  // namespace nld
