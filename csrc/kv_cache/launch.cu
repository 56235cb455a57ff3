// Launchers of rope_append_ and compact_.
#include "kv_cache/kernel.cuh"

namespace nld {
namespace {

template <class T, int kSize>
void rope_append_sized(const RopeAppendParams& p, void* stream) {
  NLD_LAUNCH((rope_append_kernel<T, kSize>), static_cast<unsigned>(p.total_tokens), kRopeThreads, sizeof(RopeSmem),
             stream, p);
}

template <class T>
LaunchError rope_append(const RopeAppendParams& p, void* stream) {
  const auto& k = p.k_cache;
  const auto& v = p.v_cache;
  const int size = vec_size(
      sizeof(T), p.num_freqs,
      {p.head_dim, p.q_token_stride, p.q_head_stride, p.k_token_stride, p.k_head_stride, p.v_token_stride,
       p.v_head_stride, k.page_stride, k.token_stride, k.head_stride, v.page_stride, v.token_stride, v.head_stride},
      {p.q, p.k, p.v, k.data, v.data});
  constexpr int kMax = 16 / sizeof(T);
  if (size == kMax) {
    rope_append_sized<T, kMax>(p, stream);
  } else {
    rope_append_sized<T, 1>(p, stream);
  }
  return launch_result();
}

}  // namespace

LaunchError launch_rope_append(const RopeAppendParams& p, void* stream) {
  if (p.total_tokens == 0) return nullptr;
  switch (p.dtype) {
    case DType::kF32:
      return rope_append<float>(p, stream);
    case DType::kBF16:
      return rope_append<bf16>(p, stream);
    case DType::kF16:
      return rope_append<f16>(p, stream);
  }
  return "unknown dtype";
}

LaunchError launch_compact(const CompactParams& p, void* stream) {
  if (p.batch == 0 || p.num_layers == 0 || p.max_kept == 0) return nullptr;
  const dim3 grid(static_cast<unsigned>(p.batch), static_cast<unsigned>(p.num_layers), 2);
  const auto& k = p.k_cache;
  const auto& v = p.v_cache;
  const int size = vec_size(p.element_size, p.head_dim,
                            {p.k_layer_stride, p.v_layer_stride, k.page_stride, k.token_stride, k.head_stride,
                             v.page_stride, v.token_stride, v.head_stride},
                            {k.data, v.data});
  switch (size * p.element_size) {
    case 16:
      NLD_LAUNCH((compact_kernel<uint4>), grid, kCompactThreads, 0, stream, p);
      break;
    case 4:
    case 8:
      NLD_LAUNCH((compact_kernel<uint32_t>), grid, kCompactThreads, 0, stream, p);
      break;
    default:
      NLD_LAUNCH((compact_kernel<uint16_t>), grid, kCompactThreads, 0, stream, p);
  }
  return launch_result();
}

}  // namespace nld
