// The commit rules: one functor each, for CPU and CUDA. A rule judges one masked row from the figures of its request
// alone, so rows can be judged in any order or side by side; nothing is sorted and nothing is stored.
//
// To add a rule: a functor here, a value in CommitRule, a `case` in cpu.cpp and kernel.cuh, a branch in
// reference/sampler.py, a test parameter.
#pragma once

#include "common/philox.h"

namespace nld {
namespace {  // compiled once per ISA: no two files may share a copy

// One request before anything is committed; the arrays hold its rows only.
struct RuleInput {
  int64_t num_rows;
  const bool* is_masked;
  const float* confidence;
  const float* entropy;  // filled for the entropy rule
  float threshold;
  int64_t quota;
};

// Is masked row a ahead of b: more confident, or as confident and further left?
NLD_HD bool more_confident(const RuleInput& in, int64_t a, int64_t b) {
  return in.confidence[a] > in.confidence[b] || (in.confidence[a] == in.confidence[b] && a < b);
}

// Fewer than `limit` masked rows are ahead of `row`.
NLD_HD bool among_most_confident(const RuleInput& in, int64_t row, int64_t limit) {
  int64_t rank = 0;
  for (int64_t other = 0; other < in.num_rows && rank < limit; ++other) {
    rank += in.is_masked[other] && more_confident(in, other, row);
  }
  return rank < limit;
}

// Every row at or above the threshold, and always the most confident one.
struct ThresholdRule {
  NLD_HD bool commits(const RuleInput& in, int64_t row) {
    return in.confidence[row] >= in.threshold || among_most_confident(in, row, 1);
  }
};

// The `quota` most confident rows, at least one.
struct QuotaRule {
  NLD_HD bool commits(const RuleInput& in, int64_t row) {
    return among_most_confident(in, row, in.quota > 1 ? in.quota : 1);
  }
};

struct AllRule {
  NLD_HD bool commits(const RuleInput&, int64_t) { return true; }
};

// By increasing entropy, the longest prefix whose entropies without the largest sum to at most the threshold: a row
// belongs to it when the rows before it have that little entropy together. The first always does. Source:
// entropy-bounded unmasking (Ben-Hamu et al. 2025).
struct EntropyRule {
  NLD_HD bool commits(const RuleInput& in, int64_t row) {
    float sum = 0.0f;
    bool is_first = true;
    for (int64_t other = 0; other < in.num_rows; ++other) {
      const bool before = in.entropy[other] < in.entropy[row] || (in.entropy[other] == in.entropy[row] && other < row);
      if (!in.is_masked[other] || !before) continue;
      sum = add_rn(sum, in.entropy[other]);
      is_first = false;
    }
    return is_first || sum <= in.threshold;
  }
};

// Commits as ThresholdRule; a row committed earlier is masked again when its token is no longer believed.
struct ReviseRule {
  NLD_HD bool commits(const RuleInput& in, int64_t row) { return ThresholdRule::commits(in, row); }
  NLD_HD bool masks_again(float held_confidence, float revise_threshold) { return held_confidence < revise_threshold; }
};

}  // namespace
}  // namespace nld
