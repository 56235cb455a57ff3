// Attention over a paged KV cache, a mask mode per request. Shared by CPU and CUDA; knows no torch.
#pragma once

#include <cstdint>

#include "attention/plan.h"
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
  int64_t split_len;  // keys per split, at absolute multiples, merged in order; 0 (CUDA only) = the plan chooses
  void* out;          // [total_q, num_heads, head_dim]
  int64_t out_token_stride, out_head_stride;
  float* lse;  // [num_heads, total_q], natural log
  int64_t lse_head_stride, lse_token_stride;
  bool is_fp8;           // the caches hold e4m3 of x / scale, else the dtype of q
  const float* k_scale;  // [num_kv_heads] or null: 1; a factor on the scores of the head
  const float* v_scale;  // [num_kv_heads] or null: 1; a factor on the head's output, applied where `out` is written
};

// ---- CUDA ----

// Partial results of slot s, kv head h, tile row r: row (s * num_kv_heads + h) * tile_rows + r of each array. A row
// that saw nothing in its split has m = -inf and l = 0; its o is then never read.
struct AttentionCudaParams : AttentionParams {
  PlanShape plan_shape;
  const int32_t* plan;
  float* partial_o;  // [slots, num_kv_heads, tile_rows, head_dim], sum of exp2(score - m) * v
  float* partial_m;  // [slots, num_kv_heads, tile_rows], largest score, times log2(e)
  float* partial_l;  // [slots, num_kv_heads, tile_rows], sum of exp2(score - m)
  int32_t num_sms;
  int32_t cluster_size;  // more than 1: a cluster of that many CTAs shares a tile's keys and merges its results itself
};

// Launchers: on the given cudaStream_t; null, or why the launch failed. An attention kernel writes `out` and `lse` of
// tiles with one split, the partials of the others, and 0 and -inf to rows that belong to no request; combine merges
// the partials (and where there is no tile at all, and so no attention kernel, it writes those rows). With clusters
// there are no partials. launch_attention_simt takes every dtype and head_dim up to kMaxSimtDim.
typedef const char* AttentionLauncher(const AttentionCudaParams&, void* stream);
AttentionLauncher launch_attention_simt, launch_attention_combine;
// Tensor cores: bfloat16 and float16 with head_dim 64, 96 or 128; rows of q, K and V that start at multiples of 16
// bytes, as in every tensor torch allocates. Anything else is the other kernel's.
AttentionLauncher launch_attention_mma;
bool attention_mma_takes(const AttentionParams&);
int32_t attention_mma_cluster_size(const AttentionCudaParams&);  // for this batch on this GPU, see cluster.h
// The same by Hopper's instructions, for tiles of 64 and 128 rows, where the current device and this build have them.
AttentionLauncher launch_attention_wgmma;
bool attention_wgmma_takes(const AttentionParams&, int32_t tile_rows);
int32_t attention_wgmma_cluster_size(const AttentionCudaParams&);
const char* launch_attention_plan(const AttentionPlanParams&, void* stream);
constexpr int64_t kMaxSimtDim = 512;
int32_t device_sms();            // of the current device
constexpr int32_t kHostSms = 4;  // what the CPU's attention_plan takes for its SMs, as the emulator does

// ---- CPU ----

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
