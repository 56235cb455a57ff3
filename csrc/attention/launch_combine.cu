// Launcher of the merge of split tiles.
#include "attention/combine.cuh"

namespace nld {
namespace {

template <class T>
LaunchError launch(const AttentionCudaParams& p, void* stream) {
  // A warp a row where the grid allows; 4 CTAs of 4 warps have 64 KB of an SM on their way.
  const PlanShape& shape = p.plan_shape;
  const int64_t split_tiles = attention_max_slots(shape.max_tiles, shape.max_items) / 2;
  const int64_t rows = split_tiles * p.num_kv_heads * shape.tile_rows + p.total_q * p.num_heads;
  const int64_t most = 4 * static_cast<int64_t>(p.num_sms), wanted = (rows + kCombineWarps - 1) / kCombineWarps;
  const unsigned grid = static_cast<unsigned>(wanted < most ? wanted : most);
  const auto kernel = p.head_dim % 4 == 0 ? attention_combine_kernel<T, 4> : attention_combine_kernel<T, 1>;
  const LaunchShape launch = {.grid = grid, .block = kCombineThreads, .overlaps_previous = can_overlap(kernel)};
  NLD_LAUNCH_SHAPED(kernel, launch, stream, p);
  return launch_result();
}

}  // namespace

LaunchError launch_attention_combine(const AttentionCudaParams& p, void* stream) {
  switch (p.dtype) {
    case DType::kF32:
      return launch<float>(p, stream);
    case DType::kBF16:
      return launch<bf16>(p, stream);
    case DType::kF16:
      return launch<f16>(p, stream);
  }
  return "unknown dtype";
}

}  // namespace nld
