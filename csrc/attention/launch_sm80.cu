// The launcher of the mma.sync kernels: what they have instances for, and what they derive from the op's arguments.
#include "attention/cluster.h"
#include "attention/mma_params.h"
#include "common/element.cuh"

namespace nld {
namespace {

struct MmaInstance {
  LaunchError (*launch)(const MmaParams&, void* stream);  // null: there is no instance
  int (*resident_clusters)(int tile_rows, int size);
};
template <class T, int kHeadDim, class Kv = T>
constexpr MmaInstance kMmaInstance = {launch_mma<T, kHeadDim, Kv>, mma_resident_clusters<T, kHeadDim, Kv>};

MmaInstance mma_instance(DType dtype, int64_t head_dim, bool is_fp8) {
  const bool is_bf16 = dtype == DType::kBF16;
  if (dtype == DType::kF32) return {};
  if (is_fp8) {  // what models use: every instance costs seconds of building and a third of a megabyte
    if (!is_bf16) return {};
    return head_dim == 64    ? kMmaInstance<bf16, 64, e4m3>
           : head_dim == 128 ? kMmaInstance<bf16, 128, e4m3>
                             : MmaInstance{};
  }
  switch (head_dim) {
    case 64:
      return is_bf16 ? kMmaInstance<bf16, 64> : kMmaInstance<f16, 64>;
    case 96:
      return is_bf16 ? kMmaInstance<bf16, 96> : kMmaInstance<f16, 96>;
    case 128:
      return is_bf16 ? kMmaInstance<bf16, 128> : kMmaInstance<f16, 128>;
  }
  return {};
}

// Rows of elements of so many bytes that start at multiples of 16.
bool is_aligned(const void* data, std::initializer_list<int64_t> strides, int element_bytes = 2) {
  return vec_size(element_bytes, 16, strides, {data}) == 16 / element_bytes;
}

// Rows start at multiples of 16 bytes, and their places in chunks of 16 fit 32 bits.
bool has_chunks(const AttentionParams& p, const KvPages& pages) {
  const int64_t last = (p.num_pages - 1) * pages.page_stride + (p.page_size - 1) * pages.token_stride;
  const int bytes = p.is_fp8 ? 1 : 2;
  return is_aligned(pages.data, {pages.page_stride, pages.token_stride, pages.head_stride}, bytes) &&
         last * bytes / 16 <= UINT32_MAX - 16;
}

}  // namespace

bool attention_mma_takes(const AttentionParams& p) {
  return mma_instance(p.dtype, p.head_dim, p.is_fp8).launch != nullptr && has_chunks(p, p.k) && has_chunks(p, p.v) &&
         is_aligned(p.q, {p.q_token_stride, p.q_head_stride});
}

int32_t attention_mma_cluster_size(const AttentionCudaParams& p) {
  const auto resident = mma_instance(p.dtype, p.head_dim, p.is_fp8).resident_clusters;
  const int32_t tile_rows = p.plan_shape.tile_rows;
  return attention_cluster_size(p.plan_shape, p.num_kv_heads, p.max_pages * p.page_size, p.num_sms,
                                [&](int32_t size) { return resident(tile_rows, size); });
}

MmaParams mma_params(const AttentionCudaParams& op) {
  constexpr float kLog2E = 1.44269504088896341f;
  MmaParams p = {op, fast_div(op.page_size), fast_div(op.num_heads / op.num_kv_heads)};
  const int64_t chunk = op.is_fp8 ? 16 : 8;
  p.k_page_chunks = static_cast<uint32_t>(op.k.page_stride / chunk);
  p.k_token_chunks = static_cast<uint32_t>(op.k.token_stride / chunk);
  p.v_page_chunks = static_cast<uint32_t>(op.v.page_stride / chunk);
  p.v_token_chunks = static_cast<uint32_t>(op.v.token_stride / chunk);
  p.out_aligned = is_aligned(op.out, {op.out_token_stride, op.out_head_stride});
  // A positive scale lets the largest product be the largest score. Zero would make NaN of the -inf of hidden keys.
  p.q_signs = op.softmax_scale < 0.0f ? 0x80008000u : 0u;
  const float scale = std::fmax(std::fabs(op.softmax_scale), 1e-30f);
  p.scale_log2 = op.softcap > 0.0f ? 1.0f : scale * kLog2E;
  p.cap_log2 = op.softcap * kLog2E;
  p.cap_slope = op.softcap > 0.0f ? 2.0f * kLog2E * scale / op.softcap : 0.0f;
  return p;
}

LaunchError launch_attention_mma(const AttentionCudaParams& op, void* stream) {
  if (!attention_mma_takes(op)) return "the tensor-core kernel does not take this dtype, head_dim or alignment";
  return mma_instance(op.dtype, op.head_dim, op.is_fp8).launch(mma_params(op), stream);
}

}  // namespace nld
