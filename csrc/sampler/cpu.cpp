// CPU code of the confidence commit, compiled once per ISA.
#include "common/row_scan.h"
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
    p.first_judged[request] = static_cast<int32_t>(num_judged);
    const RowRange range = request_rows(p, request);
    for (int64_t row = range.begin; row < range.end; ++row) {
      if (!is_judged(p, request, row) || num_judged == p.rows) continue;  // full: only if cu_seqlens overlaps
      p.judged_rows[num_judged] = static_cast<int32_t>(row);
      p.judged_requests[num_judged++] = static_cast<int32_t>(request);
    }
  }
  p.first_judged[p.batch] = static_cast<int32_t>(num_judged);
  return num_judged;
}

// ---- one slice of one row ----

template <class T>
const T* logits_row(const CommitParams& p, int64_t row) {
  return static_cast<const T*>(p.logits) + row * p.logits_row_stride;
}

template <class T>
void scan_items(const CommitParams& p, int64_t item_begin, int64_t item_end) {
  const Banned banned = {p.banned, p.num_banned};
  for (int64_t item = item_begin; item < item_end; ++item) {
    const int64_t judged = item / p.num_slices, slice = item % p.num_slices;
    const int64_t row = p.judged_rows[judged], request = p.judged_requests[judged];
    const int64_t begin = slice * kSliceLen, end = begin + kSliceLen < p.vocab ? begin + kSliceLen : p.vocab;
    const float scale = p.temperature != nullptr ? inverse_temperature(p.temperature[request]) : 0.0f;
    const RawLogits<T> logits = {logits_row<T>(p, row)};
    const bool draws = p.is_masked[row] && scale > 0.0f;  // a held token is judged, not drawn
    Best best;
    ExpSum total;
    if (rule_of(p, request) == CommitRule::kEntropy) {
      draws ? scan_softmax<true, false>(logits, begin, end, banned, best, total)
            : scan_softmax<true, true>(logits, begin, end, banned, best, total);
    } else {
      draws ? scan_softmax<false, false>(logits, begin, end, banned, best, total)
            : scan_softmax<false, true>(logits, begin, end, banned, best, total);
    }
    if (draws) {  // the slice lies in the L2 cache now
      const NoiseKey key = {static_cast<uint64_t>(p.seed[request]), static_cast<uint32_t>(p.positions[row]), p.purpose};
      scan_gumbel(Logits<T>{logits.data, scale}, begin, end, key, banned, best);
    }
    p.parts[item] = {best.value, static_cast<int32_t>(best.id), total.max, total.sum, total.dot};
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

float clean_logit(const CommitParams& p, int64_t row, int64_t id) {
  switch (p.dtype) {
    case DType::kF32:
      return Logits<float>{logits_row<float>(p, row), 1.0f}.at(id);
    case DType::kBF16:
      return Logits<bf16>{logits_row<bf16>(p, row), 1.0f}.at(id);
    case DType::kF16:
      return Logits<f16>{logits_row<f16>(p, row), 1.0f}.at(id);
  }
  return 0.0f;
}

// Puts the slices of a judged row together: candidate (a held token stays), its confidence, the entropy of the row.
void finish_row(const CommitParams& p, int64_t judged) {
  const int64_t row = p.judged_rows[judged];
  Best best;
  ExpSum total;
  for (int64_t slice = 0; slice < p.num_slices; ++slice) {
    const CommitPart& part = p.parts[judged * p.num_slices + slice];
    merge(best, {part.best_value, part.best_id});
    merge(total, {part.max, part.sum, part.dot});
  }
  const bool is_held = !p.is_masked[row];
  const int64_t id = is_held ? p.block_tokens[row] : best.id;
  float confidence = 0.0f, entropy = kInf;
  if (id >= 0 && id < p.vocab && total.sum > 0.0f) {
    confidence = exp(clean_logit(p, row, id) - total.max) / total.sum;
    const float positive = exact_log(total.sum) - total.dot / total.sum;
    entropy = positive > 0.0f ? positive : 0.0f;
  }
  p.candidates[row] = is_held || id >= 0 ? id : lowest_allowed({p.banned, p.num_banned}, p.vocab);
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
    }
    for (int64_t judged = p.first_judged[request]; judged < p.first_judged[request + 1]; ++judged)
      finish_row(p, judged);
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
