// Random numbers without state: Philox4x32-10 keyed by (request seed, absolute position, purpose, token id).
// The same bits on every CPU ISA and on CUDA: only separately rounded float32 additions and multiplications, no libm.
// Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
#pragma once

#include <stdint.h>

#include "common/rounded.h"

namespace nld {

// What a number is drawn for: the same place can need several independent ones.
enum class Purpose : int32_t { kSample = 0, kDraft = 1, kAccept = 2, kResidual = 3 };

// Names one stream of numbers, one per token id; `position` is the absolute place of the token being drawn.
struct NoiseKey {
  uint64_t seed;
  uint32_t position;
  uint32_t purpose;
};

struct Philox4 {
  uint32_t word[4];
};

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;  // round multipliers
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;  // key increments
constexpr int kPhiloxRounds = 10;

// -log1p(-u) has no argument that gives 0 or infinity: u lies in [2^-33, 1 - 2^-33], Gumbel noise in (-3.14, 22.88).
constexpr float kMaxGumbel = 22.88f;

NLD_HD Philox4 philox(Philox4 counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < kPhiloxRounds; ++round, key0 += kPhiloxW0, key1 += kPhiloxW1) {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * counter.word[0];
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * counter.word[2];
    counter = {{static_cast<uint32_t>(p1 >> 32) ^ counter.word[1] ^ key0, static_cast<uint32_t>(p1),
                static_cast<uint32_t>(p0 >> 32) ^ counter.word[3] ^ key1, static_cast<uint32_t>(p0)}};
  }
  return counter;
}

// The four words of token ids 4 * group .. 4 * group + 3.
NLD_HD Philox4 philox_words(const NoiseKey& key, uint32_t group) {
  return philox({{group, key.position, key.purpose, 0}}, static_cast<uint32_t>(key.seed),
                static_cast<uint32_t>(key.seed >> 32));
}
NLD_HD uint32_t philox_word(const NoiseKey& key, uint32_t token_id) {
  return philox_words(key, token_id / 4).word[token_id % 4];
}

// log(1 + f) = f - f^2 / 2 + f^3 * Q(f) for f in [sqrt(1/2) - 1, sqrt(2) - 1]. Q: least-squares fit weighted towards
// the smallest largest relative error, 6e-9 before rounding. (Constants as macros so that device code can use them.)
constexpr int kLogTerms = 8;
#define NLD_LOG_TERMS                                                \
  {0x1.555554p-2f, -0x1.000228p-2f, 0x1.99a012p-3f, -0x1.5471f6p-3f, \
   0x1.22d90ap-3f, -0x1.0d875cp-3f, 0x1.056496p-3f, -0x1.38c19cp-4f}
constexpr float kLn2 = 0x1.62e430p-1f;
constexpr int32_t kSqrtHalfBits = 0x3f3504f3;  // sqrt(1/2)
constexpr float kLogSplit = 0.29289323f;       // 1 - sqrt(1/2)

NLD_HD float log1p_poly(float f) {
  const float terms[kLogTerms] = NLD_LOG_TERMS;
  float q = terms[kLogTerms - 1];
  for (int i = kLogTerms - 2; i >= 0; --i) q = add_rn(mul_rn(q, f), terms[i]);
  const float f2 = mul_rn(f, f);
  return add_rn(add_rn(mul_rn(mul_rn(f2, f), q), mul_rn(f2, -0.5f)), f);
}

// Natural logarithm of a positive, finite, normal float; error below 1.5e-7 relative (or absolute where |log x| < 1).
NLD_HD float exact_log(float x) {
  const int32_t bits = float_bits(x);
  const int32_t exponent = (bits - kSqrtHalfBits) >> 23;
  const float f = add_rn(bits_float(bits - (exponent << 23)), -1.0f);
  return add_rn(log1p_poly(f), mul_rn(int_to_float(exponent), kLn2));
}

// Gumbel(0, 1) noise -log(-log1p(-u)) with u = (word + 0.5) * 2^-32. Both ends keep their digits: the lower half of the
// words works on u, the upper half on 1 - u, each converted to float from its exact integer.
NLD_HD float gumbel(uint32_t word) {
  const bool upper = (word >> 31) != 0;
  const int32_t distance = static_cast<int32_t>(upper ? ~word : word);  // to the nearer end, < 2^31
  const float w = mul_rn(add_rn(int_to_float(distance), 0.5f), 0x1p-32f);
  float exponential;
  if (upper) {
    exponential = -exact_log(w);
  } else if (w < kLogSplit) {
    exponential = -log1p_poly(-w);
  } else {  // log(1 - w) = log(2 - 2 w) - log 2, where 2 - 2 w - 1 is exact
    exponential = -add_rn(log1p_poly(add_rn(1.0f, mul_rn(w, -2.0f))), -kLn2);
  }
  return -exact_log(exponential);
}

// Uniform in [0, 1), 24 bits: u < p happens with probability p for every float p that is a multiple of 2^-24.
NLD_HD float uniform(uint32_t word) { return mul_rn(int_to_float(static_cast<int32_t>(word >> 8)), 0x1p-24f); }

// Factor on the logits of a draw; 0 means greedy. Temperatures of 1e-6 and below, and NaN, are greedy.
NLD_HD float inverse_temperature(float temperature) { return temperature > 1e-6f ? 1.0f / temperature : 0.0f; }

}  // namespace nld
