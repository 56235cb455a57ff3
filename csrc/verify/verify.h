// Verification of drafts: targets from logits, accept, emit, roll back. Shared by CPU and CUDA; knows no torch.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace nld {

// How a request judges its drafts; a value of `VerifyParams::mode`. Anything else counts as kGreedy.
enum class VerifyMode : int32_t { kGreedy = 0, kSampled = 1, kRejection = 2, kCommit = 3 };

struct VerifyParams {
  DType dtype;
  int64_t rows, vocab, batch, capacity, num_eos, num_banned;
  const void* logits;        // [rows, vocab], row i predicts the token after row i
  int64_t logits_stride;     // elements from row to row
  const float* draft_probs;  // [rows, vocab], row i + 1 judges the draft of row i + 1; null = one-hot drafts
  int64_t draft_probs_stride;
  const int64_t* block_tokens;      // [rows]: seed, drafts
  const int32_t* cu_seqlens;        // [batch + 1]
  const int32_t* mode;              // [batch]
  const int32_t* positions;         // [rows], place of the token in that row; null when nothing is drawn or forced
  const float* temperature;         // [batch]; null = 0
  const int64_t* seed;              // [batch]; read where temperature > 0
  const int64_t* eos_token_ids;     // [batch, num_eos], -1 = unused
  const int64_t* banned_token_ids;  // [num_banned], -1 = unused
  int32_t* force_positions;         // [batch], -1 = none; written
  const int64_t* force_tokens;      // [batch]
  int64_t* out_tokens;              // [batch, capacity], appended
  int64_t out_tokens_stride;
  int32_t* out_lens;            // [batch], written
  const int32_t* max_out_lens;  // [batch]
  int64_t* next_tokens;         // [batch], written
  int32_t* seq_lens;            // [batch], written
  bool* done;                   // [batch], written
  int32_t* num_emitted;         // [batch], written
  int32_t* num_accepted;        // [batch], written
};

// What one slice of a row's vocabulary says; the parts of a row are merged in order.
struct RowPart {
  float best_value;  // largest logit, or logit plus noise ...
  int64_t best_id;   // ... and its id; -1: no allowed finite logit
  float max, sum;    // softmax sums, for rejection sampling
};

// CPU steps of verification: all slices of a row, then judge; the slices of a residual, then pick.
struct VerifyCpu {
  int64_t slice_len;
  void (*scan_slice)(const VerifyParams&, int64_t request, int64_t row, bool is_last, int64_t slice, RowPart& part);
  int64_t (*judge)(const VerifyParams&, int64_t request, int64_t row, bool is_last,
                   const RowPart* parts);  // the verdict
  void (*residual_slice)(const VerifyParams&, int64_t request, int64_t row, const RowPart* parts, int64_t slice,
                         RowPart& part);
  int64_t (*pick_residual)(const VerifyParams&, int64_t request, int64_t row,
                           const RowPart* residual_parts);  // the bonus
};
namespace baseline {
extern const VerifyCpu verify_cpu;
}
namespace avx2 {
extern const VerifyCpu verify_cpu;
}
namespace avx512 {
extern const VerifyCpu verify_cpu;
}

}  // namespace nld
