// rope_append_ and compact_ on CUDA.
#pragma once

#include "common/element.cuh"
#include "kv_cache/kv_cache.h"

namespace nld {

constexpr int kRopeThreads = 128;

template <class T>
__device__ __forceinline__ T* cache_row(const PagedCache& cache, int64_t slot, int64_t page_size, int64_t head) {
  return static_cast<T*>(cache.data) + slot / page_size * cache.page_stride + slot % page_size * cache.token_stride +
         head * cache.head_stride;
}

struct RopeSmem {
  float cos[256], sin[256];
};

// One CTA per token: cos and sin once for all heads, then kSize elements of both halves of a head at a time.
// Traffic: q read and written, k and v read once and written once.
template <class T, int kSize>
__global__ void __launch_bounds__(kRopeThreads) rope_append_kernel(const __grid_constant__ RopeAppendParams p) {
  using V = Vec<T, kSize>;
  NLD_DYNAMIC_SMEM(RopeSmem, sm);
  const int64_t token = blockIdx.x;
  const int num_freqs = static_cast<int>(p.num_freqs), head_dim = static_cast<int>(p.head_dim);
  const int32_t position = p.positions[token];
  for (int i = threadIdx.x; i < num_freqs; i += kRopeThreads) {
    // The angle is one float32 product, as the published model computes it; its sine needs more digits.
    const double angle = static_cast<double>(p.inv_freq[i] * static_cast<float>(position));
    sm->cos[i] = static_cast<float>(cos(angle)) * p.attention_scaling;
    sm->sin[i] = static_cast<float>(sin(angle)) * p.attention_scaling;
  }
  __syncthreads();
  float q_scale = 1.0f;
  if (p.query_scale_len > 0) {
    q_scale += p.query_scale_beta * logf(1.0f + static_cast<float>(position / p.query_scale_len));
  }
  const int64_t slot = p.slots[token];
  const bool writes = slot >= 0 && slot < p.num_slots;
  const int pairs = num_freqs / kSize, rest = (head_dim - 2 * num_freqs) / kSize, work = pairs + rest;
  const int num_rotated = static_cast<int>(p.num_heads + (writes ? p.num_kv_heads : 0));
  for (int i = threadIdx.x; i < num_rotated * work; i += kRopeThreads) {
    const int head = i / work, part = i % work;
    const bool is_q = head < p.num_heads;
    const int64_t kv_head = head - p.num_heads;
    T* q = static_cast<T*>(p.q) + token * p.q_token_stride + head * p.q_head_stride;
    const T* x = is_q ? q : static_cast<const T*>(p.k) + token * p.k_token_stride + kv_head * p.k_head_stride;
    T* y = is_q ? q : cache_row<T>(p.k_cache, slot, p.page_size, kv_head);
    const float scale = is_q ? q_scale : 1.0f;
    if (part < pairs) {
      const int at = part * kSize;
      V first = *reinterpret_cast<const V*>(x + at), second = *reinterpret_cast<const V*>(x + num_freqs + at);
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        const float a = to_float(first.at[e]), b = to_float(second.at[e]), c = sm->cos[at + e], s = sm->sin[at + e];
        first.at[e] = from_float<T>((a * c - b * s) * scale);
        second.at[e] = from_float<T>((b * c + a * s) * scale);
      }
      *reinterpret_cast<V*>(y + at) = first;
      *reinterpret_cast<V*>(y + num_freqs + at) = second;
    } else {
      const int at = 2 * num_freqs + (part - pairs) * kSize;
      V v = *reinterpret_cast<const V*>(x + at);
#pragma unroll
      for (int e = 0; e < kSize; ++e) v.at[e] = from_float<T>(to_float(v.at[e]) * scale);
      *reinterpret_cast<V*>(y + at) = v;
    }
  }
  if (!writes) return;
  const int chunks = head_dim / kSize;
  for (int i = threadIdx.x; i < p.num_kv_heads * chunks; i += kRopeThreads) {
    const int64_t head = i / chunks, at = i % chunks * kSize;
    const T* x = static_cast<const T*>(p.v) + token * p.v_token_stride + head * p.v_head_stride + at;
    *reinterpret_cast<V*>(cache_row<T>(p.v_cache, slot, p.page_size, head) + at) = *reinterpret_cast<const V*>(x);
  }
}

constexpr int kCompactThreads = 128;

// One CTA per (request, layer, k or v). A thread owns some columns (bytes of an entry) and moves all entries of them in
// ascending order: a source never lies before its destination, so no thread reads what another one has written.
// Traffic: every entry that moves is read once and written once.
template <class T>
__global__ void __launch_bounds__(kCompactThreads) compact_kernel(const __grid_constant__ CompactParams p) {
  const int64_t request = blockIdx.x, layer = blockIdx.y;
  const bool is_v = blockIdx.z == 1;
  const PagedCache& cache = is_v ? p.v_cache : p.k_cache;
  const int64_t scale = p.element_size;  // strides count elements, T may hold several
  char* data = static_cast<char*>(cache.data) + layer * (is_v ? p.v_layer_stride : p.k_layer_stride) * scale;
  const int32_t* pages = p.page_table + request * p.page_table_stride;
  const auto entry = [&](int64_t index) -> char* {  // null where the table has no page for it
    const int64_t page = index / p.page_size;
    if (index < 0 || page >= p.max_pages || pages[page] < 0 || pages[page] >= p.num_pages) return nullptr;
    return data + (pages[page] * cache.page_stride + index % p.page_size * cache.token_stride) * scale;
  };
  const int64_t base = p.base_lens[request];
  const int64_t num_kept = p.num_kept[request] < p.max_kept ? p.num_kept[request] : p.max_kept;
  const int64_t per_head = p.head_dim * scale / static_cast<int64_t>(sizeof(T)), columns = p.num_kv_heads * per_head;
  for (int64_t column = threadIdx.x; column < columns; column += kCompactThreads) {
    const int64_t offset = column / per_head * cache.head_stride * scale + column % per_head * sizeof(T);
    for (int64_t i = 0; i < num_kept; ++i) {
      const int64_t src = base + p.src_offsets[request * p.max_kept + i], dst = base + i;
      if (src == dst) continue;
      const char* from = entry(src);
      char* to = entry(dst);
      if (from != nullptr && to != nullptr) {
        *reinterpret_cast<T*>(to + offset) = *reinterpret_cast<const T*>(from + offset);
      }
    }
  }
}

}  // namespace nld
