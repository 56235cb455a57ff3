// CPU code of the confidence commit, compiled once per ISA.
#include "common/part_scan.h"
#include "sampler/rules.h"
#include "sampler/sampler.h"

namespace nld::NLD_ISA {
namespace {

// Rows of a request, kept inside the tensor whatever cu_seqlens says.
struct RowRange {
  int64_t begin, end;
};
RowRange request_rows(const CommitParams& p, int64_t request) {
  const int64_t begin = p.cu_seqlens[request] > 0 ? p.cu_seqlens[request] : 0;
  const int64_t end = p.cu_seqlens[request + 1] < p.rows ? p.cu_seqlens[request + 1] : p.rows;
  return {begin, end > begin ? end : begin};
}

bool is_fixed(const CommitParams& p, int64_t row) { return p.is_fixed != nullptr && p.is_fixed[row]; }
CommitRule rule_of(const CommitParams& p, int64_t request) { return static_cast<CommitRule>(p.rule[request]); }

bool is_judged(const CommitParams& p, int64_t request, int64_t row) {
  return p.is_masked[row] || (rule_of(p, request) == CommitRule::kRevise && !is_fixed(p, row));
}

int64_t plan(const CommitParams& p) {
  int64_t num_judged = 0;
  for (int64_t request = 0; request < p.batch; ++request) {
    const RowRange range = request_rows(p, request);
    for (int64_t row = range.begin; row < range.end; ++row) {
      if (!is_judged(p, request, row) || num_judged == p.rows) continue;  // full: only if cu_seqlens overlaps
      p.judged_rows[num_judged] = static_cast<int32_t>(row);
      p.judged_requests[num_judged++] = static_cast<int32_t>(request);
    }
  }
  return num_judged;
}

// ---- one slice of one row ----

template <class T>
void scan_items(const CommitParams& p, int64_t item_begin, int64_t item_end) {
  const int64_t num_slices = (p.vocab + kSliceLen - 1) / kSliceLen;
  for (int64_t item = item_begin; item < item_end; ++item) {
    const int64_t judged = item / num_slices, slice = item % num_slices;
    const int64_t row = p.judged_rows[judged], request = p.judged_requests[judged];
    const int64_t begin = slice * kSliceLen, end = begin + kSliceLen < p.vocab ? begin + kSliceLen : p.vocab;
    RowQuestion asked = {.is_held = !p.is_masked[row],  // a held token is judged, not drawn
                         .held = held_token(p.block_tokens[row]),
                         .wants_dot = rule_of(p, request) == CommitRule::kEntropy};
    if (p.temperature != nullptr) {
      asked.scale = inverse_temperature(p.temperature[request]);
      asked.key = {static_cast<uint64_t>(p.seed[request]), static_cast<uint32_t>(p.positions[row]), p.purpose};
    }
    *part_at(p.parts, row, slice) =
        scan_part<true>(static_cast<const T*>(p.logits) + row * p.logits_row_stride, p.first_token_id,
                        p.first_token_id + begin, p.first_token_id + end, asked, {p.banned, p.num_banned});
  }
}

void scan(const CommitParams& p, int64_t item_begin, int64_t item_end) {
  switch (p.dtype) {
    case DType::kF32:
      return scan_items<float>(p, item_begin, item_end);
    case DType::kBF16:
      return scan_items<bf16>(p, item_begin, item_end);
    case DType::kF16:
      return scan_items<f16>(p, item_begin, item_end);
  }
}

// ---- one request ----

// Puts the parts of a judged row together: candidate (a held token stays), its confidence, the entropy of the row.
void finish_row(const CommitParams& p, int64_t row) {
  SlicePart best = no_part();
  ExpSum total;
  for (int64_t i = 0; i < parts_of_row(p.parts); ++i) {
    const SlicePart& part = *part_at(p.parts, row, i);
    if (part.value > best.value) best = part;
    merge(total, {part.max, part.sum, part.dot});
  }
  float confidence = 0.0f, entropy = kInf;
  if (best.id >= 0 && total.sum > 0.0f) {
    confidence = exp(best.logit - total.max) / total.sum;
    const float positive = exact_log(total.sum) - total.dot / total.sum;
    entropy = positive > 0.0f ? positive : 0.0f;
  }
  if (p.is_masked[row]) p.candidates[row] = best.id >= 0 ? best.id : lowest_allowed({p.banned, p.num_banned}, p.vocab);
  p.confidence[row] = confidence;
  p.entropy[row] = entropy;
}

template <class Rule>
void judge_rows(const CommitParams& p, const RuleInput& in, RowRange range) {
  for (int64_t row = range.begin; row < range.end; ++row) {
    p.commits[row] = p.is_masked[row] && Rule::commits(in, row - range.begin);
  }
}

void judge_request(const CommitParams& p, int64_t request, RowRange range) {
  const RuleInput in = {.num_rows = range.end - range.begin,
                        .is_masked = p.is_masked + range.begin,
                        .confidence = p.confidence + range.begin,
                        .entropy = p.entropy + range.begin,
                        .threshold = p.threshold[request],
                        .quota = p.quota != nullptr ? p.quota[request] : 1};
  switch (rule_of(p, request)) {
    case CommitRule::kThreshold:
      return judge_rows<ThresholdRule>(p, in, range);
    case CommitRule::kQuota:
      return judge_rows<QuotaRule>(p, in, range);
    case CommitRule::kAll:
      return judge_rows<AllRule>(p, in, range);
    case CommitRule::kEntropy:
      return judge_rows<EntropyRule>(p, in, range);
    case CommitRule::kRevise:
      return judge_rows<ReviseRule>(p, in, range);
  }
}

// Everything right of the first EOS that no later step can move becomes that EOS.
void freeze_after_eos(const CommitParams& p, int64_t request, RowRange range) {
  const Banned eos = {p.eos + request * p.num_eos, p.num_eos};
  for (int64_t row = range.begin; row < range.end && !p.is_masked[row]; ++row) {
    const int64_t token = p.block_tokens[row];
    if (is_fixed(p, row) || token < 0 || !is_banned(eos, token)) continue;
    for (int64_t right = row + 1; right < range.end; ++right) {
      p.block_tokens[right] = token;
      p.is_masked[right] = false;
    }
    return;
  }
}

void commit(const CommitParams& p, int64_t request_begin, int64_t request_end) {
  for (int64_t request = request_begin; request < request_end; ++request) {
    const RowRange range = request_rows(p, request);
    for (int64_t row = range.begin; row < range.end; ++row) {
      p.candidates[row] = p.block_tokens[row];
      p.confidence[row] = 1.0f;
      if (is_judged(p, request, row)) finish_row(p, row);
    }
    judge_request(p, request, range);

    const bool revises = rule_of(p, request) == CommitRule::kRevise;
    const float revise_threshold = p.revise_threshold != nullptr ? p.revise_threshold[request] : 0.0f;
    int32_t num_committed = 0, num_remaining = 0;
    for (int64_t row = range.begin; row < range.end; ++row) {
      if (p.commits[row]) {
        p.block_tokens[row] = p.candidates[row];
        p.is_masked[row] = false;
        ++num_committed;
      } else if (revises && !p.is_masked[row] && !is_fixed(p, row) &&
                 ReviseRule::masks_again(p.confidence[row], revise_threshold)) {
        p.block_tokens[row] = p.mask_token_id;
        p.is_masked[row] = true;
      }
    }
    if (p.eos != nullptr) freeze_after_eos(p, request, range);
    for (int64_t row = range.begin; row < range.end; ++row) num_remaining += p.is_masked[row];
    p.num_committed[request] = num_committed;
    p.num_remaining[request] = num_remaining;
    p.done[request] = num_remaining == 0;
  }
}

void gumbel_noise(const GumbelNoiseParams& p, int64_t row_begin, int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    const NoiseKey key = {static_cast<uint64_t>(p.seed[row]), static_cast<uint32_t>(p.positions[row]), p.purpose};
    float* out = p.noise + row * p.noise_row_stride;
    for (int64_t i = 0; i < p.vocab; i += kNoiseStep) {
      VecU words[2];
      philox_words<1>(key, i, words);
      for (int half = 0; half < 2; ++half) {
        const int64_t left = p.vocab - i - half * kLanes;
        if (left <= 0) break;
        store_partial(out + i + half * kLanes, gumbel(words[half]), static_cast<int>(left < kLanes ? left : kLanes));
      }
    }
  }
}

}  // namespace

extern const SamplerCpu sampler_cpu = {kSliceLen, plan, scan, commit, gumbel_noise};

}  // namespace nld::NLD_ISA
