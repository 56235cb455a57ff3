// What a slice of a row of logits says, and what it is asked. Knows neither CPU nor GPU.
#pragma once

#include <cstdint>

#include "common/philox.h"

namespace nld {

// Parts of a row are put together in order of their ids, also those that other processes hold (tensor parallel): as
// words of an int32 tensor they go from process to process. Layout: ops/shards.py (commit_scan).
struct alignas(16) SlicePart {
  float max, sum, dot;  // ExpSum of all its logits; -inf, 0, 0: none above -inf, or nobody asked
  float value;          // largest (tempered, noisy) value of an allowed id
  int32_t id;   // whose it is; -1: every allowed id is at -inf. Of a held token: itself, in the slice that has it
  float logit;  // the untempered logit of `id`
  int32_t unused[2];
};
static_assert(sizeof(SlicePart) == 32);
constexpr int64_t kSlicePartWords = sizeof(SlicePart) / sizeof(int32_t);

NLD_HD SlicePart no_part() {
  constexpr float kNothing = -__builtin_huge_valf();
  return {kNothing, 0.0f, 0.0f, kNothing, -1, 0.0f, {0, 0}};
}

// The parts of all rows, shard by shard of the vocabulary: [num_shards, rows, num_parts].
struct RowParts {
  SlicePart* parts;
  int64_t num_shards, rows, num_parts;
};
NLD_HD int64_t parts_of_row(const RowParts& p) { return p.num_shards * p.num_parts; }
// Part i of a row, in order of the ids.
NLD_HD SlicePart* part_at(const RowParts& p, int64_t row, int64_t i) {
  return p.parts + ((i / p.num_parts * p.rows + row) * p.num_parts + i % p.num_parts);
}

// What is asked about a row.
struct RowQuestion {
  float scale = 0.0f;      // of the logits of a draw; 0: argmax
  NoiseKey key = {};       // of a draw
  bool is_held = false;    // nothing is chosen: `held` is looked up
  int32_t held = -1;       // see held_token()
  bool wants_dot = false;  // of the sums, where there are any
};

// A token as RowQuestion has it: what is no id of any vocabulary is -1.
NLD_HD int32_t held_token(int64_t token) { return token >= 0 && token <= INT32_MAX ? static_cast<int32_t>(token) : -1; }

}  // namespace nld
