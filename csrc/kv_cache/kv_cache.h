// Paged KV cache writes: RoPE + append, and in-place compaction. Shared by CPU and CUDA; knows no torch.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace nld {

// A cache of pages, any stride order; strides in elements, the head_dim stride is 1.
struct PagedCache {
  void* data;  // [num_pages, page_size, num_kv_heads, head_dim]
  int64_t page_stride, token_stride, head_stride;
};

struct RopeAppendParams {
  DType dtype;
  int64_t total_tokens, num_heads, num_kv_heads, head_dim, page_size, num_slots;
  void* q;  // [total_tokens, num_heads, head_dim], rotated in place
  int64_t q_token_stride, q_head_stride;
  const void* k;  // [total_tokens, num_kv_heads, head_dim]
  int64_t k_token_stride, k_head_stride;
  const void* v;  // [total_tokens, num_kv_heads, head_dim]
  int64_t v_token_stride, v_head_stride;
  PagedCache k_cache, v_cache;
  const int32_t* positions;  // [total_tokens]
  const int32_t* slots;      // [total_tokens], -1 = do not write
  const float* inv_freq;     // [num_freqs]; 2 * num_freqs <= head_dim, the rest of a head is not rotated
  int64_t num_freqs;
  float attention_scaling;  // multiplies cos and sin (YaRN)
  float query_scale_beta;   // llama-4: q *= 1 + beta * ln(1 + floor(position / query_scale_len))
  int64_t query_scale_len;  // 0 = no query scale
  bool is_fp8;              // the caches hold e4m3 of x / scale, else the dtype of q
  const float* k_scale;     // [num_kv_heads] or null: 1
  const float* v_scale;     // [num_kv_heads] or null: 1
};

struct CompactParams {
  int64_t element_size, batch, max_kept, max_pages, num_layers, num_pages, num_kv_heads, head_dim, page_size;
  PagedCache k_cache, v_cache;  // [num_layers, num_pages, page_size, num_kv_heads, head_dim]
  int64_t k_layer_stride, v_layer_stride;
  const int32_t* page_table;  // [batch, max_pages]
  int64_t page_table_stride;
  const int32_t* base_lens;    // [batch]
  const int32_t* src_offsets;  // [batch, max_kept], strictly increasing along a row
  const int32_t* num_kept;     // [batch]
};

struct KvCacheCpu {
  void (*rope_append)(const RopeAppendParams&, int64_t token_begin, int64_t token_end);
  void (*compact)(const CompactParams&, int64_t item_begin, int64_t item_end);  // item = layer * batch + request
};
// CUDA: on the given cudaStream_t; null, or why the launch failed.
const char* launch_rope_append(const RopeAppendParams&, void* stream);
const char* launch_compact(const CompactParams&, void* stream);

namespace baseline {
extern const KvCacheCpu kv_cache_cpu;
}
namespace avx2 {
extern const KvCacheCpu kv_cache_cpu;
}
namespace avx512 {
extern const KvCacheCpu kv_cache_cpu;
}

}  // namespace nld
