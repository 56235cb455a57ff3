// Verification of drafts: targets from logits, accept, emit, roll back. Shared by CPU and CUDA; knows no torch.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/slice_part.h"

namespace nld {

// How a request judges its drafts; a value of `VerifyParams::mode`. Anything else counts as kGreedy.
enum class VerifyMode : int32_t { kGreedy = 0, kSampled = 1, kRejection = 2, kCommit = 3 };

struct VerifyParams {
  DType dtype;
  int64_t rows, vocab, batch, capacity, num_eos, num_banned;
  const void* logits;        // [rows, vocab], row i predicts the token after row i
  int64_t logits_stride;     // elements from row to row
  int64_t first_token_id;    // of the logits' columns; 0 but for shards
  RowParts shards;           // verify_scan: written; verify_parts_: what all shards say
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
  // Workspace of the CUDA path, at addresses that are multiples of 16.
  int32_t* tickets;               // [batch]; zeros, before and after
  struct VerifyPart* parts;       // [rows, verify_slices(vocab)]
  struct RowVerdict* verdicts;    // [rows], in the place of parts: whoever needs these needs no parts
  struct ResidualTask* residual;  // [batch]; null without draft_probs
};

// CUDA: what one slice of a row says. A row that races has a best id, a row that weighs its draft has softmax sums, and
// one whose draft was certain (one-hot) has both: the race is then the one for its residual.
struct alignas(16) VerifyPart {
  float best_value;
  int32_t best_id;  // -1: no allowed finite logit
  float max, sum;
};

// CUDA: the bonus token that a request has yet to draw, from max(p - q, 0) at `row`; its accepted drafts are known.
struct alignas(16) ResidualTask {
  int32_t accepted;  // -1: nothing to draw
  float max, sum;    // softmax sums of the row
  int32_t unused;
};

// CUDA: what a row says once it is judged.
struct alignas(16) RowVerdict {
  int64_t value;   // see accept.h
  float max, sum;  // softmax sums of the row, for a residual
};

int64_t verify_slices(int64_t vocab);
// CTAs of a cluster that takes a row on a GPU of that compute capability (10 * major + minor); 0: the portable way.
int verify_cluster_size(const VerifyParams&, int capability);
// On the given cudaStream_t; null, or why the launch failed.
const char* launch_verify(const VerifyParams&, void* stream);
const char* launch_verify_cluster(const VerifyParams&, int cluster, void* stream);
const char* launch_verify_scan(const VerifyParams&, void* stream);
const char* launch_verify_parts(const VerifyParams&, void* stream);

// CPU: what one slice of a row's vocabulary says; the parts of a row are merged in order.
struct RowPart {
  float best_value;  // largest logit, or logit plus noise ...
  int64_t best_id;   // ... and its id; -1: no allowed finite logit
  float max, sum;    // softmax sums, for rejection sampling
};

// CPU steps of verification: all slices of a row, then judge; the slices of a residual, then pick. Of a shard: its
// slices only; judge is then asked about one part, what all shards say together.
struct VerifyCpu {
  int64_t slice_len;
  void (*scan_shard_slice)(const VerifyParams&, int64_t request, int64_t row, int64_t slice);
  void (*scan_slice)(const VerifyParams&, int64_t request, int64_t row, bool is_last, int64_t slice, RowPart& part);
  int64_t (*judge)(const VerifyParams&, int64_t request, int64_t row, bool is_last, const RowPart* parts,
                   int64_t num_parts);  // the verdict
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
