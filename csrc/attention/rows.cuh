// What every CUDA attention kernel does alike: where a packed row and a key lie, and how a row's sums become `out` and
// `lse`. The combine kernel and the kernels that write unsplit tiles must round alike: with a fixed split_len a row
// that needs one split has the same bits whether the other rows of its tile need more or not.
#pragma once

#include "attention/attention.h"
#include "common/element.cuh"

namespace nld {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Token and head of a packed row of a request.
struct RowPlace {
  int64_t token;
  int64_t head;
};
__device__ __forceinline__ RowPlace row_place(const AttentionCudaParams& p, int32_t request, int32_t row,
                                              int32_t kv_head) {
  const int32_t heads_per_kv = p.plan_shape.heads_per_kv;
  return {static_cast<int64_t>(p.cu_seqlens_q[request]) + row / heads_per_kv,
          static_cast<int64_t>(kv_head) * heads_per_kv + row % heads_per_kv};
}

// The token of a key of a request whose tile says heads_begin (mask.h). Groups are few keys of many: what their order
// follows from is read again for each key rather than held.
__device__ __forceinline__ int32_t key_token(const AttentionCudaParams& p, int32_t request, int32_t heads_begin,
                                             int32_t key) {
  if (key < heads_begin) return key;
  RequestMask mask = request_mask(p, request);
  mask.mode = MaskMode::kQuadratic;  // spares the other modes' code
  KeyOrder order = key_order(mask);
  if (NLD_BUG(attention_head_stride)) --order.block_len;
  return token_of_key(order, key);
}

// Index into partial_m and partial_l; times head_dim, into partial_o.
__device__ __forceinline__ int64_t partial_row(const AttentionCudaParams& p, int32_t slot, int32_t kv_head,
                                               int32_t tile_row) {
  return (slot * p.num_kv_heads + kv_head) * p.plan_shape.tile_rows + tile_row;
}

// Where the partial result of a row lies: in the workspace, or in shared memory.
struct PartialRow {
  float *out, *max, *sum;
};

// Factor that turns a row's sum of products with V into its output. l is 0 only where nothing was seen (else the
// largest term is 1), and NaN where a NaN was. Partials do not have the scale of V: it is applied here, once.
__device__ __forceinline__ float row_scale(const AttentionCudaParams& p, int32_t kv_head, float l) {
  const float v_scale = scale_of_head(p.v_scale, NLD_BUG(attention_wrong_scale) ? 0 : kv_head);
  NLD_DEVICE_CHECK(v_scale > 0.0f && v_scale < INFINITY, "scales are positive and finite");
  return l == 0.0f ? 0.0f : v_scale / l;
}

// The scale of K of a head: a factor on softmax_scale.
__device__ __forceinline__ float key_scale(const AttentionCudaParams& p, int32_t kv_head) {
  const float k_scale = scale_of_head(p.k_scale, kv_head);
  NLD_DEVICE_CHECK(k_scale > 0.0f && k_scale < INFINITY, "scales are positive and finite");
  return k_scale;
}

// m in log2 units, as in the partials.
__device__ __forceinline__ float row_lse(float m, float l) {
  return l == 0.0f ? -INFINITY : __fmaf_rn(m, kLn2, logf(l));
}

// Weight of a partial with maximum m in a row whose maximum over all partials is m_all.
__device__ __forceinline__ float partial_weight(float m, float m_all) { return exp2f(m - m_all); }

// Rows that belong to requests; those from there on belong to nobody.
__device__ __forceinline__ int32_t owned_rows(const AttentionCudaParams& p) {
  return p.batch > 0 ? p.cu_seqlens_q[p.batch] : 0;
}

// 0 and -inf to the rows that belong to nobody, by the grid: this is warp `warp` of `warps` of its CTA.
template <class T>
__device__ __forceinline__ void clear_rows(const AttentionCudaParams& p, int32_t owned, int warp, int64_t warps) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t cta = blockIdx.x + static_cast<int64_t>(gridDim.x) * (blockIdx.y + gridDim.y * blockIdx.z);
  const int64_t num_warps = warps * gridDim.x * gridDim.y * gridDim.z;
  for (int64_t i = owned * p.num_heads + cta * warps + warp; i < p.total_q * p.num_heads; i += num_warps) {
    const int64_t token = i / p.num_heads, head = i % p.num_heads;
    T* out = static_cast<T*>(p.out) + token * p.out_token_stride + head * p.out_head_stride;
    for (int64_t dim = lane; dim < p.head_dim; dim += kWarpSize) out[dim] = from_float<T>(0.0f);
    if (lane == 0) p.lse[head * p.lse_head_stride + token * p.lse_token_stride] = -INFINITY;
  }
}

}  // namespace nld
