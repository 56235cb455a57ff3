// CPU code of verification, compiled once per ISA: what a slice of a row says, and the verdict of a row.
#include "common/part_scan.h"
#include "verify/accept.h"
#include "verify/verify.h"

namespace nld::NLD_ISA {
namespace {

constexpr float kMinNormal = __FLT_MIN__;

// The logits of a row without one id: the residual of a one-hot draft, whose mass is all on that id.
template <class T>
struct Without {
  Logits<T> logits;
  int64_t id;

  inline __attribute__((always_inline)) VecF drop(int64_t i, VecF v) const {
    if (id >= i && id < i + kLanes) v[id - i] = -kInf;
    return v;
  }
  inline __attribute__((always_inline)) VecF vec(int64_t i) const { return drop(i, logits.vec(i)); }
  inline __attribute__((always_inline)) VecF partial(int64_t i, int n) const { return drop(i, logits.partial(i, n)); }
};

// log(max(p - q, 0)) with p = exp(logit - top) / sum. NaN and negative draft probabilities count as 0.
template <class T>
struct Residual {
  Logits<T> logits;
  const float* draft_probs;
  float top, inverse_sum;

  inline __attribute__((always_inline)) VecF log_mass(VecF logit, VecF q) const {
    const VecF mass = exp(max(logit - top, set1(-100.0f))) * inverse_sum - max(q, VecF{});
    const VecI some = mass >= kMinNormal;  // exact_log() takes normal numbers only
    return some ? exact_log(some ? mass : set1(1.0f)) : set1(-kInf);
  }
  inline __attribute__((always_inline)) VecF vec(int64_t i) const {
    return log_mass(logits.vec(i), load(draft_probs + i));
  }
  inline __attribute__((always_inline)) VecF partial(int64_t i, int n) const {
    return log_mass(logits.partial(i, n), load_partial(draft_probs + i, n, 0.0f));
  }
};

Banned banned(const VerifyParams& p) { return {p.banned_token_ids, p.num_banned}; }

NoiseKey noise_key(const VerifyParams& p, int64_t request, int64_t row, Purpose purpose) {
  return {static_cast<uint64_t>(p.seed[request]), static_cast<uint32_t>(p.positions[row]) + 1u,
          static_cast<uint32_t>(purpose)};
}

// Calls fn(Logits) with the row's values times `scale`, in their own element type.
template <class Fn>
NLD_INLINE void with_logits(const VerifyParams& p, int64_t row, float scale, const Fn& fn) {
  const int64_t offset = row * p.logits_stride;
  switch (p.dtype) {
    case DType::kF32:
      return fn(Logits<float>{static_cast<const float*>(p.logits) + offset, scale});
    case DType::kBF16:
      return fn(Logits<bf16>{static_cast<const bf16*>(p.logits) + offset, scale});
    case DType::kF16:
      return fn(Logits<f16>{static_cast<const f16*>(p.logits) + offset, scale});
  }
}

int64_t num_slices(const VerifyParams& p) { return (p.vocab + kSliceLen - 1) / kSliceLen; }
int64_t slice_end(const VerifyParams& p, int64_t slice) {
  const int64_t end = (slice + 1) * kSliceLen;
  return end < p.vocab ? end : p.vocab;
}

// Rejection sampling weighs its draft; every other row just draws its target.
bool weighs_draft(const VerifyParams& p, int64_t request, bool is_last) {
  return !is_last && verify_mode(p, request) == VerifyMode::kRejection;
}

// Softmax sums over the allowed ids only: from one banned id to the next.
template <class Values>
void scan_allowed(const Values& values, int64_t begin, int64_t end, const Banned& ban, ExpSum& sums) {
  while (begin < end) {
    int64_t stop = end;
    for (int64_t i = 0; i < ban.num_ids; ++i) {
      if (ban.ids[i] >= begin && ban.ids[i] < stop) stop = ban.ids[i];
    }
    scan_exp_sum<false>(values, begin, stop, sums);
    begin = stop + 1;
  }
}

void scan_slice(const VerifyParams& p, int64_t request, int64_t row, bool is_last, int64_t slice, RowPart& part) {
  const int64_t begin = slice * kSliceLen, end = slice_end(p, slice);
  const bool greedy = verify_mode(p, request) == VerifyMode::kGreedy || draw_scale(p, request) == 0.0f;
  Best best;
  ExpSum sums;
  with_logits(p, row, greedy ? 1.0f : draw_scale(p, request), [&](const auto& logits) __attribute__((always_inline)) {
    if (weighs_draft(p, request, is_last)) {
      scan_allowed(logits, begin, end, banned(p), sums);
    } else if (greedy) {
      scan_argmax(logits, begin, end, banned(p), best);
    } else {
      scan_gumbel(logits, begin, end, noise_key(p, request, row, Purpose::kSample), banned(p), best);
    }
  });
  part = {best.value, best.id, sums.max, sums.sum};
}

void scan_shard_slice(const VerifyParams& p, int64_t request, int64_t row, int64_t slice) {
  const int64_t first = p.first_token_id, begin = first + slice * kSliceLen, end = first + slice_end(p, slice);
  RowQuestion asked;
  if (verify_mode(p, request) != VerifyMode::kGreedy && draw_scale(p, request) > 0.0f) {
    asked.scale = draw_scale(p, request);
    asked.key = noise_key(p, request, row, Purpose::kSample);
  }
  with_logits(p, row, 1.0f, [&](const auto& logits) __attribute__((always_inline)) {
    *part_at(p.shards, row, slice) = scan_part<false>(logits.data, first, begin, end, asked, banned(p));
  });
}

Best merged_best(const RowPart* parts, int64_t num_parts) {
  Best best;
  for (int64_t i = 0; i < num_parts; ++i) merge(best, {parts[i].best_value, parts[i].best_id});
  return best;
}
ExpSum merged_sums(const VerifyParams& p, const RowPart* parts) {
  ExpSum sums;
  for (int64_t i = 0; i < num_slices(p); ++i) merge(sums, {parts[i].max, parts[i].sum, 0.0f});
  return sums;
}

// Is the draft kept: u * q(d) < p(d), strictly, so never where p(d) is 0.
bool keeps_draft(const VerifyParams& p, int64_t request, int64_t row, int64_t draft, const ExpSum& sums) {
  if (draft < 0 || draft >= p.vocab || is_banned(banned(p), draft)) return false;
  float logit = -kInf;
  with_logits(p, row, draw_scale(p, request),
              [&](const auto& logits) __attribute__((always_inline)) { logit = logits.at(draft); });
  const float shifted = logit - sums.max;
  const float target_prob = shifted > -100.0f ? exp(shifted) / sums.sum : 0.0f;
  float draft_prob = 1.0f;
  if (p.draft_probs != nullptr) {
    draft_prob = p.draft_probs[(row + 1) * p.draft_probs_stride + draft];
    if (!(draft_prob > 0.0f)) draft_prob = 0.0f;
  }
  return uniform(philox_word(noise_key(p, request, row, Purpose::kAccept), 0)) * draft_prob < target_prob;
}

int64_t judge(const VerifyParams& p, int64_t request, int64_t row, bool is_last, const RowPart* parts,
              int64_t num_parts) {
  int64_t target;
  if (weighs_draft(p, request, is_last)) {
    const ExpSum sums = merged_sums(p, parts);
    if (sums.sum > 0.0f) return keeps_draft(p, request, row, p.block_tokens[row + 1], sums) ? kAccepted : kResidual;
    target = -1;
  } else {
    target = merged_best(parts, num_parts).id;
  }
  if (target < 0) target = lowest_allowed(banned(p), p.vocab);
  return !is_last && p.block_tokens[row + 1] == target ? kAccepted : target;
}

void residual_slice(const VerifyParams& p, int64_t request, int64_t row, const RowPart* parts, int64_t slice,
                    RowPart& part) {
  const int64_t begin = slice * kSliceLen, end = slice_end(p, slice);
  const NoiseKey key = noise_key(p, request, row, Purpose::kResidual);
  Best best;
  with_logits(p, row, draw_scale(p, request), [&](const auto& logits) __attribute__((always_inline)) {
    if (p.draft_probs == nullptr) {
      scan_gumbel(Without{logits, p.block_tokens[row + 1]}, begin, end, key, banned(p), best);
    } else {
      const ExpSum sums = merged_sums(p, parts);
      const float* draft_probs = p.draft_probs + (row + 1) * p.draft_probs_stride;
      scan_gumbel(Residual{logits, draft_probs, sums.max, 1.0f / sums.sum}, begin, end, key, banned(p), best);
    }
  });
  part = {best.value, best.id, -kInf, 0.0f};
}

int64_t pick_residual(const VerifyParams& p, int64_t request, int64_t row, const RowPart* residual_parts) {
  Best best = merged_best(residual_parts, num_slices(p));
  if (best.id < 0) {  // nothing left: the draft distribution covers the target everywhere
    with_logits(p, row, draw_scale(p, request), [&](const auto& logits) __attribute__((always_inline)) {
      scan_gumbel(logits, 0, p.vocab, noise_key(p, request, row, Purpose::kResidual), banned(p), best);
    });
  }
  return best.id < 0 ? lowest_allowed(banned(p), p.vocab) : best.id;
}

}  // namespace

extern const VerifyCpu verify_cpu = {kSliceLen, scan_shard_slice, scan_slice, judge, residual_slice, pick_residual};

}  // namespace nld::NLD_ISA
