// Launchers of rope_append_ and compact_.
#include <algorithm>

#include "kv_cache/kernel.cuh"

namespace nld {
namespace {

template <class T, int kSize, int kItems>
void rope_append_tiled(const RopeAppendParams& p, void* stream) {
  constexpr int64_t kRoom = kItems * kRopeThreads;  // items of a CTA
  RopeTiling t = {};
  t.heads = static_cast<int>(p.num_heads + 2 * p.num_kv_heads);
  t.pairs = static_cast<int>(p.num_freqs / kSize);
  t.parts = t.pairs + static_cast<int>((p.head_dim - 2 * p.num_freqs) / kSize);
  t.items = t.heads * t.parts;
  t.tokens = static_cast<int>(t.items < kRoom ? std::min(kRoom / t.items, p.total_tokens) : 1);
  t.ctas_per_token = static_cast<int>((t.items + kRoom - 1) / kRoom);
  t.table_len = static_cast<int>((t.tokens * p.num_freqs + 3) / 4 * 4);
  const dim3 grid(static_cast<unsigned>((p.total_tokens + t.tokens - 1) / t.tokens),
                  static_cast<unsigned>(t.ctas_per_token));
  NLD_LAUNCH((rope_append_kernel<T, kSize, kItems>), grid, kRopeThreads, t.smem_bytes(), stream, p, t);
}

// Few items: one a thread, so that they spread over the machine. Many: four a thread, so that enough loads are in
// flight to keep memory busy, and fewer CTAs work out the same cosines.
template <class T, int kSize>
void rope_append_sized(const RopeAppendParams& p, void* stream) {
  constexpr int64_t kMany = 4 * kRopeThreads * 512;
  if (p.total_tokens * (p.num_heads + 2 * p.num_kv_heads) * p.head_dim / (2 * kSize) < kMany) {
    rope_append_tiled<T, kSize, 1>(p, stream);
  } else {
    rope_append_tiled<T, kSize, 4>(p, stream);
  }
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
  if (p.total_tokens == 0 || p.num_heads + p.num_kv_heads == 0 || p.head_dim == 0) return nullptr;
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
  if (p.batch == 0 || p.num_layers == 0 || p.max_kept == 0 || p.num_kv_heads * p.head_dim == 0) return nullptr;
  const dim3 grid(static_cast<unsigned>(p.batch), static_cast<unsigned>(p.num_layers), 2);
  const auto& k = p.k_cache;
  const auto& v = p.v_cache;
  const int size = vec_size(p.element_size, p.head_dim,
                            {p.k_layer_stride, p.v_layer_stride, k.page_stride, k.token_stride, k.head_stride,
                             v.page_stride, v.token_stride, v.head_stride},
                            {k.data, v.data});
  switch (size * p.element_size) {
    case 16:
      NLD_LAUNCH((compact_kernel<uint4>), grid, kCompactThreads, sizeof(CompactSmem), stream, p);
      break;
    case 8:
      NLD_LAUNCH((compact_kernel<uint2>), grid, kCompactThreads, sizeof(CompactSmem), stream, p);
      break;
    case 4:
      NLD_LAUNCH((compact_kernel<uint32_t>), grid, kCompactThreads, sizeof(CompactSmem), stream, p);
      break;
    case 2:
      NLD_LAUNCH((compact_kernel<uint16_t>), grid, kCompactThreads, sizeof(CompactSmem), stream, p);
      break;
    default:
      NLD_LAUNCH((compact_kernel<uint8_t>), grid, kCompactThreads, sizeof(CompactSmem), stream, p);
  }
  return launch_result();
}

}  // namespace nld
