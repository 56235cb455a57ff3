// Philox and Gumbel noise of common/philox.h, a register at a time: the same bits, operation by operation.
#pragma once

#include "common/philox.h"
#include "common/vec.h"

namespace nld::NLD_ISA {

using nld::exact_log;  // the scalar forms stay in sight beside the vector ones
using nld::gumbel;
using nld::int_to_float;
using nld::log1p_poly;
using nld::philox_words;

typedef uint64_t VecU64 __attribute__((vector_size(kLanes * 4)));  // kLanes / 2 lanes

constexpr int kNoiseStep = 2 * kLanes;  // token ids of one group of counters

// Product of the low 32 bits of each 64-bit lane.
NLD_INLINE VecU64 mul_low(VecU64 a, uint32_t b) {
  const VecU64 factor = VecU64{} + b;
#if defined(__AVX512F__)
  return (VecU64)_mm512_maskz_mul_epu32(0xff, (__m512i)a,
                                        (__m512i)factor);  // plain form: g++ 12 warns in its own header
#elif defined(__AVX2__)
  return (VecU64)_mm256_mul_epu32((__m256i)a, (__m256i)factor);
#elif defined(__SSE2__)
  return (VecU64)__builtin_ia32_pmuludq128((VecI)a, (VecI)factor);
#else
  return (a & 0xffffffffu) * factor;
#endif
}

// Words of token ids first .. first + kGroups * kNoiseStep, kLanes in each register. `first` is a multiple of 4. Every
// round waits for the one before it, so two groups at once take much less time than one after the other.
template <int kGroups>
NLD_INLINE void philox_words(const NoiseKey& key, int64_t first, VecU* words) {
  // One counter per 64-bit lane; only the low half of a lane counts, so the high halves may hold anything.
  VecU64 c0[kGroups], c1[kGroups], c2[kGroups], c3[kGroups];
  VecU64 lanes;
  for (int i = 0; i < kLanes / 2; ++i) lanes[i] = i;
  for (int g = 0; g < kGroups; ++g) {
    c0[g] = lanes + static_cast<uint64_t>(first / 4 + g * (kLanes / 2));
    c1[g] = VecU64{} + key.position;
    c2[g] = VecU64{} + key.purpose;
    c3[g] = VecU64{};
  }
  uint32_t key0 = static_cast<uint32_t>(key.seed), key1 = static_cast<uint32_t>(key.seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < kPhiloxRounds; ++round, key0 += kPhiloxW0, key1 += kPhiloxW1) {
#pragma GCC unroll 2
    for (int g = 0; g < kGroups; ++g) {
      const VecU64 p0 = mul_low(c0[g], kPhiloxM0), p1 = mul_low(c2[g], kPhiloxM1);
      c0[g] = (p1 >> 32) ^ c1[g] ^ key0;
      c2[g] = (p0 >> 32) ^ c3[g] ^ key1;
      c1[g] = p1;
      c3[g] = p0;
    }
  }
#pragma GCC unroll 2
  for (int g = 0; g < kGroups; ++g) {
    const VecU64 even = (c0[g] & 0xffffffffu) | (c1[g] << 32), odd = (c2[g] & 0xffffffffu) | (c3[g] << 32);
#if defined(__AVX512F__)
    words[2 * g] = (VecU)__builtin_shufflevector(even, odd, 0, 8, 1, 9, 2, 10, 3, 11);
    words[2 * g + 1] = (VecU)__builtin_shufflevector(even, odd, 4, 12, 5, 13, 6, 14, 7, 15);
#elif defined(__AVX2__)
    words[2 * g] = (VecU)__builtin_shufflevector(even, odd, 0, 4, 1, 5);
    words[2 * g + 1] = (VecU)__builtin_shufflevector(even, odd, 2, 6, 3, 7);
#else
    words[2 * g] = (VecU)__builtin_shufflevector(even, odd, 0, 2);
    words[2 * g + 1] = (VecU)__builtin_shufflevector(even, odd, 1, 3);
#endif
  }
}

NLD_INLINE VecF int_to_float(VecI x) { return __builtin_convertvector(x, VecF); }

NLD_INLINE VecF log1p_poly(VecF f) {
  constexpr float terms[kLogTerms] = NLD_LOG_TERMS;
  VecF q = set1(terms[kLogTerms - 1]);
#pragma GCC unroll 8
  for (int i = kLogTerms - 2; i >= 0; --i) q = q * f + terms[i];
  const VecF f2 = f * f;
  return (f2 * f * q + f2 * -0.5f) + f;
}

// exact_log() of philox.h: positive, finite, normal floats.
NLD_INLINE VecF exact_log(VecF x) {
  const VecI bits = as_int(x), exponent = (bits - kSqrtHalfBits) >> 23;
  const VecF f = as_float(bits - (exponent << 23)) + -1.0f;
  return log1p_poly(f) + int_to_float(exponent) * kLn2;
}

// gumbel() of philox.h.
NLD_INLINE VecF gumbel(VecU word) {
  const VecI upper = (VecI)word >> 31;  // -1 in the upper half
  const VecF w = (int_to_float((VecI)word ^ upper) + 0.5f) * 0x1p-32f;
  // log of w (upper) or of 1 - w, both as log(1 + f) + exponent * log 2 with a single polynomial.
  const VecI bits = as_int(w), w_exponent = (bits - kSqrtHalfBits) >> 23;
  const VecF w_fraction = as_float(bits - (w_exponent << 23)) + -1.0f;
  const VecI near = w < kLogSplit;
  const VecF f = upper ? w_fraction : near ? -w : w * -2.0f + 1.0f;
  const VecI exponent = upper ? w_exponent : near ? VecI{} : VecI{} - 1;
  return -exact_log(-(log1p_poly(f) + int_to_float(exponent) * kLn2));
}

// At least gumbel(word), for a few operations: g <= -log(u), and the bits of a float are nearly its logarithm.
NLD_INLINE VecF gumbel_bound(VecU word) {
  const VecF bits = int_to_float(as_int(int_to_float((VecI)(word >> 1))));  // u * 2^31, rounded down but for 2^-24
  return fma(bits, set1(-kLn2 * 0x1p-23f), set1(158.0f * kLn2 + 1e-3f));
}

// Does any lane of a comparison hold?
NLD_INLINE bool any(VecI mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask) != 0;
#else
  return (mask[0] | mask[1] | mask[2] | mask[3]) != 0;
#endif
}

}  // namespace nld::NLD_ISA
