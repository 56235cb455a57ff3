// Launcher of attention without tensor cores.
#include "attention/kernel_simt.cuh"

namespace nld {
namespace {

template <class T, int kDims>
LaunchError launch(const AttentionCudaParams& p, void* stream) {
  const int smem_bytes = simt_smem_floats(p.head_dim) * static_cast<int>(sizeof(float));
  constexpr auto kernel = attention_simt_kernel<T, kDims>;
  if (const LaunchError error = allow_smem(kernel, smem_bytes)) return error;
  const dim3 grid(static_cast<unsigned>(p.plan_shape.max_items), static_cast<unsigned>(p.num_kv_heads),
                  static_cast<unsigned>(p.plan_shape.tile_rows / kSimtRows));
  const LaunchShape shape = {
      .grid = grid, .block = kSimtThreads, .smem_bytes = smem_bytes, .overlaps_previous = can_overlap(kernel)};
  NLD_LAUNCH_SHAPED(kernel, shape, stream, p);
  return launch_result();
}

template <class T>
LaunchError launch_dtype(const AttentionCudaParams& p, void* stream) {
  if (p.head_dim <= 2 * kWarpSize) return launch<T, 2>(p, stream);
  if (p.head_dim <= 4 * kWarpSize) return launch<T, 4>(p, stream);
  static_assert(kMaxSimtDim == 16 * kWarpSize);
  return launch<T, 16>(p, stream);
}

}  // namespace

LaunchError launch_attention_simt(const AttentionCudaParams& p, void* stream) {
  switch (p.dtype) {
    case DType::kF32:
      return launch_dtype<float>(p, stream);
    case DType::kBF16:
      return launch_dtype<bf16>(p, stream);
    case DType::kF16:
      return launch_dtype<f16>(p, stream);
  }
  return "unknown dtype";
}

}  // namespace nld
