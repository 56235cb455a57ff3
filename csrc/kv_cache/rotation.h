// The numbers rope_append_ multiplies with, for CPU and CUDA. cpu.cpp works out rotation() a register at a time, with
// equal bits where the CPU has fused multiply-adds.
#pragma once

#include "common/philox.h"
#include "common/rounded.h"
#include "kv_cache/kv_cache.h"

namespace nld {

struct Rotation {
  float cos, sin;
};

// Cosine and sine of any float32 angle below 2^31, error about 1e-7. The quadrant is taken off in double: angles are
// positions, up to hundreds of thousands of radians, and float32 has no digits left there.
NLD_HD Rotation rotation(float angle) {
  constexpr double kTwoOverPi = 0.63661977236758134, kHalfPi = 1.57079632679489662;
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer held in the low bits
  const double wide = angle, rounded = add_rn(mul_rn(wide, kTwoOverPi), kRound);
  uint64_t bits;
  memcpy(&bits, &rounded, 8);
  const uint32_t quadrant = static_cast<uint32_t>(bits);
  const float r = static_cast<float>(add_rn(wide, -mul_rn(add_rn(rounded, -kRound), kHalfPi)));  // in [-pi/4, pi/4]
  const float r2 = mul_rn(r, r);
  float s = fma_rn(r2, -1.9515295891e-4f, 8.3321608736e-3f);
  s = fma_rn(fma_rn(s, r2, -1.6666654611e-1f), mul_rn(r2, r), r);
  float c = fma_rn(r2, 2.443315711809948e-5f, -1.388731625493765e-3f);
  c = fma_rn(fma_rn(c, r2, 4.166664568298827e-2f), mul_rn(r2, r2), fma_rn(r2, -0.5f, 1.0f));
  const bool odd = (quadrant & 1u) != 0;
  const uint32_t cos_sign = ((quadrant + 1u) & 2u) << 30, sin_sign = (quadrant & 2u) << 30;
  return {bits_float(float_bits(odd ? s : c) ^ static_cast<int32_t>(cos_sign)),
          bits_float(float_bits(odd ? c : s) ^ static_cast<int32_t>(sin_sign))};
}

// The factor on the queries of a position.
NLD_HD float query_scale(const RopeAppendParams& p, int32_t position) {
  if (p.query_scale_len <= 0) return 1.0f;
  const int32_t interval = p.query_scale_len <= INT32_MAX ? position / static_cast<int32_t>(p.query_scale_len) : 0;
  return add_rn(1.0f, mul_rn(p.query_scale_beta, exact_log(add_rn(1.0f, int_to_float(interval)))));
}

}  // namespace nld
