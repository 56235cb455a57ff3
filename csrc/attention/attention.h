// Attention over a paged KV cache, a mask mode per request. Shared by CPU and CUDA; knows no torch.
#pragma once

#include <cstdint>

#include "attention/mask.h"
#include "common/dtype.h"

namespace nld {

// Keys or values in pages, any stride order; strides in elements, the head_dim stride is 1.
struct KvPages {
  const void* data;  // [num_pages, page_size, num_kv_heads, head_dim]
  int64_t page_stride, token_stride, head_stride;
};

struct AttentionParams {
  DType dtype;
  int64_t batch, total_q, num_heads, num_kv_heads, head_dim, num_pages, page_size, max_pages;
  const void* q;  // [total_q, num_heads, head_dim]
  int64_t q_token_stride, q_head_stride;
  KvPages k, v;
  const int32_t* page_table;  // [batch, max_pages]
  int64_t page_table_stride;
  const int32_t* seq_lens;      // [batch], including the current rows
  const int32_t* cu_seqlens_q;  // [batch + 1]
  const int32_t* mask_mode;     // [batch], MaskMode
  const int32_t* block_len;     // [batch] or null: needed by kBlockCausal and kQuadratic
  const int32_t* block_phase;   // [batch] or null: 0
  float softmax_scale;
  float softcap;      // 0 = none
  int64_t split_len;  // keys per split; splits lie at absolute multiples and are merged in order
  void* out;          // [total_q, num_heads, head_dim]
  int64_t out_token_stride, out_head_stride;
  float* lse;  // [num_heads, total_q], natural log
  int64_t lse_head_stride, lse_token_stride;
};

NLD_HD RequestMask request_mask(const AttentionParams& p, int64_t b) {
  return {static_cast<MaskMode>(p.mask_mode[b]), p.seq_lens[b], p.cu_seqlens_q[b + 1] - p.cu_seqlens_q[b],
          p.block_len != nullptr ? p.block_len[b] : 1, p.block_phase != nullptr ? p.block_phase[b] : 0};
}

// One unit of CPU work: rows [row_begin, row_begin + num_rows) of one kv head of one request, where packed row
// r = query row * heads_per_kv + head within the kv head. Tiles start at multiples of kAttentionTileRows of a request.
struct AttentionItem {
  int64_t request, kv_head, row_begin, num_rows;
  int64_t num_splits;  // splits that hold a key visible to one of the rows are all below this
};
constexpr int64_t kAttentionTileRows = 128;

// Scratch of one worker, in floats, for tiles of at most `max_rows` rows and sequences of at most `max_keys` keys.
struct AttentionCpu {
  int64_t (*scratch_floats)(const AttentionParams&, int64_t max_rows, int64_t max_keys);
  int64_t (*partial_floats)(const AttentionParams&, int64_t num_rows);
  // All splits of the item, merged in order; writes out and lse.
  void (*attend)(const AttentionParams&, const AttentionItem&, float* scratch);
  // One split of the item into its partial; `merge` then folds the item's num_splits partials, `partial_stride` floats
  // apart, in order and with the arithmetic of `attend`, and writes out and lse.
  void (*attend_split)(const AttentionParams&, const AttentionItem&, int64_t split, float* scratch, float* partial);
  void (*merge)(const AttentionParams&, const AttentionItem&, const float* partials, int64_t partial_stride,
                float* scratch);
  // out = 0, lse = -inf: rows that belong to no request.
  void (*clear)(const AttentionParams&, int64_t token_begin, int64_t token_end);
};
namespace baseline {
extern const AttentionCpu attention_cpu;
}
namespace avx2 {
extern const AttentionCpu attention_cpu;
}
namespace avx512 {
extern const AttentionCpu attention_cpu;
}

}  // namespace nld
