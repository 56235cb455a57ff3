// Confidence commit: which masked rows of a diffusion block become tokens. Shared by CPU and CUDA; knows no torch.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/slice_part.h"

namespace nld {

enum class CommitRule : int32_t { kThreshold = 0, kQuota = 1, kAll = 2, kEntropy = 3, kRevise = 4 };
constexpr int32_t kNumCommitRules = 5;

struct CommitParams {
  DType dtype;
  int64_t rows, vocab, batch;
  const void* logits;  // [rows, vocab]
  int64_t logits_row_stride;
  int64_t first_token_id;         // of the logits' columns
  RowParts parts;                 // between the scan of the logits and the commit; rows not judged: anything
  int64_t* block_tokens;          // [rows], in place
  bool* is_masked;                // [rows], in place
  const int32_t* cu_seqlens;      // [batch + 1]
  const int32_t* rule;            // [batch], CommitRule
  const float* threshold;         // [batch]
  int64_t mask_token_id;          // written where a row is masked again
  const int32_t* quota;           // [batch] or null: 1
  const float* revise_threshold;  // [batch] or null: 0
  const bool* is_fixed;           // [rows] or null: none
  const int64_t* banned;          // [num_banned]
  int64_t num_banned;
  const int64_t* eos;  // [batch, num_eos], padded with -1; or null
  int64_t num_eos;
  const float* temperature;  // [batch] or null: greedy
  const int64_t* seed;       // [batch], needed with temperature
  const int32_t* positions;  // [rows], needed with temperature
  uint32_t purpose;
  int64_t* candidates;                     // [rows]
  float* confidence;                       // [rows]
  int32_t *num_committed, *num_remaining;  // [batch]
  bool* done;                              // [batch]
  bool bans_mask_id;                       // CUDA: no list was given, mask_token_id alone is banned (`banned` null)
  int32_t* tickets;                        // [batch], CUDA: zero, and zero again afterwards
  // Workspace.
  float* entropy;                          // [rows]
  bool* commits;                           // [rows]
  int32_t *judged_rows, *judged_requests;  // [rows], CPU
};

struct GumbelNoiseParams {
  int64_t rows, vocab;
  const int64_t* seed;       // [rows]
  const int32_t* positions;  // [rows]
  uint32_t purpose;
  float* noise;  // [rows, vocab], written
  int64_t noise_row_stride;
};

struct SamplerCpu {
  int64_t slice_len;                                                        // ids per work item
  int64_t (*plan)(const CommitParams&);                                     // lists the rows to judge: their number
  void (*scan)(const CommitParams&, int64_t item_begin, int64_t item_end);  // item = judged row * num_slices + slice
  void (*commit)(const CommitParams&, int64_t request_begin, int64_t request_end);
  void (*gumbel_noise)(const GumbelNoiseParams&, int64_t row_begin, int64_t row_end);
};
// CUDA: on the given cudaStream_t; null, or why the launch failed.
const char* launch_commit(const CommitParams&, void* stream);
const char* launch_gumbel_noise(const GumbelNoiseParams&, void* stream);
const char* launch_commit_scan(const CommitParams&, void* stream);
const char* launch_commit_parts(const CommitParams&, void* stream);
int64_t commit_slices(int64_t vocab);  // parts of a row
// Bytes of logits that commit_ has to read: what its traffic is measured against.
inline int64_t commit_logits_bytes(int64_t judged_rows, int64_t vocab, int64_t element_size) {
  return judged_rows * vocab * element_size;
}

namespace baseline {
extern const SamplerCpu sampler_cpu;
}
namespace avx2 {
extern const SamplerCpu sampler_cpu;
}
namespace avx512 {
extern const SamplerCpu sampler_cpu;
}

}  // namespace nld
