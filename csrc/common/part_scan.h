// The scan of a slice of a row for a SlicePart, on the CPU: the same for a whole vocabulary and for a shard of it.
#pragma once

#include "common/row_scan.h"
#include "common/slice_part.h"

namespace nld::NLD_ISA {

// Draws among ids begin .. end, wherever they begin: the four ids of a Philox block may lie in two shards.
template <class T>
static void scan_draw(const Logits<T>& logits, int64_t begin, int64_t end, const NoiseKey& key, const Banned& banned,
                      Best& best) {
  for (; begin % 4 != 0 && begin < end; ++begin) {
    const float noisy = add_rn(logits.at(begin), gumbel(philox_word(key, static_cast<uint32_t>(begin))));
    if (!is_banned(banned, begin)) merge(best, {noisy, begin});
  }
  scan_gumbel(logits, begin, end, key, banned, best);
}

// Ids begin .. end of a row whose first logit is that of id `first`. Not kSums: no softmax sums.
template <bool kSums, class T>
static SlicePart scan_part(const T* row, int64_t first, int64_t begin, int64_t end, const RowQuestion& asked,
                           const Banned& banned) {
  const RawLogits<T> logits = {row, first};
  const Logits<T> cleaned = logits.cleaned();
  const bool draws = !asked.is_held && asked.scale > 0.0f;
  Best best;
  ExpSum sums;
  if constexpr (!kSums) {
    if (!draws && !asked.is_held) scan_argmax(cleaned, begin, end, banned, best);
  } else if (asked.wants_dot) {
    draws ? scan_softmax<true, false>(logits, begin, end, banned, best, sums)
          : scan_softmax<true, true>(logits, begin, end, banned, best, sums);
  } else {
    draws ? scan_softmax<false, false>(logits, begin, end, banned, best, sums)
          : scan_softmax<false, true>(logits, begin, end, banned, best, sums);
  }
  float logit = best.value;
  if (asked.is_held) {
    const bool is_here = asked.held >= begin && asked.held < end;
    best = is_here ? Best{0.0f, asked.held} : Best{};
    if (is_here) logit = cleaned.at(asked.held);
  } else if (draws) {  // the slice lies in the L2 cache now
    scan_draw(Logits<T>{row, asked.scale, first}, begin, end, asked.key, banned, best);
    if (best.id >= 0) logit = cleaned.at(best.id);
  }
  if (best.id < 0) logit = 0.0f;
  return {sums.max, sums.sum, sums.dot, best.value, static_cast<int32_t>(best.id), logit, {0, 0}};
}

}  // namespace nld::NLD_ISA
