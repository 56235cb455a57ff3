// float8 e4m3 (OCP "e4m3fn": 4 exponent bits of bias 7, 3 of mantissa, no infinity, 0x7f and 0xff are NaN), the element
// of fp8 caches. Every value is exact in float16, bfloat16 and float32. For CPU, CUDA and the emulator, equal bits.
#pragma once

#include "common/dtype.h"
#include "common/rounded.h"

namespace nld {

constexpr float kE4m3Max = 448.0f;
constexpr int32_t kE4m3Rebias = (127 - 7) << 23;  // from its exponent to that of float32
constexpr float kE4m3MinNormal = 0.015625f;       // 2^-6; below, steps of 2^-9
constexpr int32_t kE4m3MinNormalBits = 0x3c800000, kE4m3MaxBits = 0x43e00000;

// Without float32 subnormals on the way: threads may run with those flushed.
NLD_HD float e4m3_to_float(e4m3 x) {
  const int32_t magnitude = x.bits & 0x7f, sign = static_cast<int32_t>(static_cast<uint32_t>(x.bits & 0x80) << 24);
  const int32_t shifted = magnitude << 20;
  if (magnitude == 0x7f) return bits_float(sign | 0x7fc00000);
  if (magnitude < 8) {
    const float tiny = add_rn(bits_float(shifted + kE4m3MinNormalBits), -kE4m3MinNormal);
    return bits_float(sign | float_bits(tiny));
  }
  return bits_float(sign | (shifted + kE4m3Rebias));
}

// To nearest, ties to even; what is larger than 448, infinity too, becomes 448; NaN stays NaN; the sign is kept. (The
// casts of torch differ from one version to the next in what becomes of values from 464 on.)
NLD_HD e4m3 e4m3_from_float(float x) {
  const int32_t bits = float_bits(x), magnitude = bits & 0x7fffffff;
  int32_t code;
  if (magnitude > 0x7f800000) {
    code = 0x7f;
  } else if (magnitude >= kE4m3MaxBits) {
    code = 0x7e;
  } else if (magnitude < kE4m3MinNormalBits) {  // next to 2^14 the steps of float32 are 2^-9, too
    code = float_bits(add_rn(bits_float(magnitude), 16384.0f)) - float_bits(16384.0f);
  } else {
    code = (magnitude - kE4m3Rebias + 0x7ffff + (magnitude >> 20 & 1)) >> 20;
  }
  return {static_cast<uint8_t>(code | (static_cast<uint32_t>(bits) >> 24 & 0x80))};
}

// Scales of a cache, one per kv head: what is stored is x / scale. Null: 1.
NLD_HD float scale_of_head(const float* scales, int64_t kv_head) { return scales == nullptr ? 1.0f : scales[kv_head]; }

}  // namespace nld
