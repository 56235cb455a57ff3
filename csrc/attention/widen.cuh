// e4m3 codes in registers to bfloat16.
#pragma once

#include "common/ptx.cuh"

namespace nld {

// Four codes as bfloat16, exactly; but NaN becomes 480. Sign, exponent and mantissa go to their places, and a product
// with 2^120 makes up for the other bias; it is exact for subnormals, too. Five instructions for two elements; the
// conversion instruction of sm_89 (to float16, then on by way of float32) would be no fewer.
__device__ __forceinline__ uint2 widen(uint32_t codes) {
  const uint32_t low = __byte_perm(codes, 0, 0x1404), high = __byte_perm(codes, 0, 0x3424);
  const auto place = [](uint32_t x) { return (x & 0x80008000u) | (x >> 4 & 0x07f007f0u); };
  return make_uint2(ptx::mul_bf16x2(place(low), 0x7b807b80u), ptx::mul_bf16x2(place(high), 0x7b807b80u));
}

// Bits 7 of the bytes that are NaN.
__device__ __forceinline__ uint32_t nan_bytes(uint32_t codes) {
  return ((codes & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u;
}

// Puts NaN where a code is one; rare.
__device__ __forceinline__ uint2 restore_nan(uint32_t codes, uint2 wide) {
  const uint32_t nan = nan_bytes(codes) >> 7;
  wide.x |= (nan & 1u) * 0x7fc0u | (nan >> 8 & 1u) * 0x7fc00000u;
  wide.y |= (nan >> 16 & 1u) * 0x7fc0u | (nan >> 24 & 1u) * 0x7fc00000u;
  return wide;
}

// Sixteen codes as two chunks.
__device__ __forceinline__ void widen_chunk(const uint4& codes, uint4& left, uint4& right) {
  uint2 a = widen(codes.x), b = widen(codes.y), c = widen(codes.z), d = widen(codes.w);
  const uint32_t nan = nan_bytes(codes.x) | nan_bytes(codes.y) | nan_bytes(codes.z) | nan_bytes(codes.w);
  if (nan != 0 && !NLD_BUG(attention_fp8_lost_nan)) {
    a = restore_nan(codes.x, a);
    b = restore_nan(codes.y, b);
    c = restore_nan(codes.z, c);
    d = restore_nan(codes.w, d);
  }
  left = make_uint4(a.x, a.y, b.x, b.y);
  right = make_uint4(c.x, c.y, d.x, d.y);
}

}  // namespace nld
