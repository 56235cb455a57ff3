// One register of floats per ISA: 4 lanes (baseline), 8 (AVX2), 16 (AVX-512).
// Everything is static inside the ISA's own namespace: the linker must never merge two builds of one function.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/fp8.h"

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#ifndef NLD_ISA
#error "vec.h is for cpu.cpp files, which are compiled once per ISA with NLD_ISA set"
#endif

#define NLD_INLINE static inline __attribute__((always_inline))

namespace nld::NLD_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float VecF __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecI __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecU __attribute__((vector_size(kLanes * 4)));
typedef uint16_t VecU16 __attribute__((vector_size(kLanes * 2)));
typedef uint8_t VecU8 __attribute__((vector_size(kLanes)));

NLD_INLINE VecF set1(float x) { return x - VecF{}; }  // "scalar op vector" broadcasts
NLD_INLINE VecI as_int(VecF x) { return (VecI)x; }
NLD_INLINE VecF as_float(VecI x) { return (VecF)x; }

// ---- scalar conversions (round to nearest even; a NaN stays a NaN) ----
NLD_INLINE float to_float(float x) { return x; }
NLD_INLINE float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
NLD_INLINE float to_float(f16 x) {
#if defined(__AVX2__)
  return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(x.bits)));
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  float f;
  if (magnitude >= 0x7c00u) {  // inf, NaN
    const uint32_t bits = sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13);
    std::memcpy(&f, &bits, 4);
    return f;
  }
  // The exponent field is moved into place and re-biased by a multiplication, which also handles subnormals.
  const uint32_t bits = magnitude << 13;
  std::memcpy(&f, &bits, 4);
  f *= 0x1p112f;
  uint32_t out;
  std::memcpy(&out, &f, 4);
  out |= sign;
  std::memcpy(&f, &out, 4);
  return f;
#endif
}
NLD_INLINE float to_float(e4m3 x) { return e4m3_to_float(x); }
NLD_INLINE void from_float(float x, float& out) { out = x; }
NLD_INLINE void from_float(float x, e4m3& out) { out = e4m3_from_float(x); }
NLD_INLINE void from_float(float x, bf16& out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    out.bits = static_cast<uint16_t>((bits >> 16) | 0x40u);
    return;
  }
  out.bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
NLD_INLINE void from_float(float x, f16& out) {
#if defined(__AVX2__)
  out.bits = static_cast<uint16_t>(_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(x), _MM_FROUND_TO_NEAREST_INT)));
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    out.bits = static_cast<uint16_t>(sign | 0x7e00u);
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
    out.bits = static_cast<uint16_t>(sign | 0x7c00u);
  } else if (magnitude < 0x38800000u) {  // subnormal result: adding 0.5 leaves the rounded value in the low bits
    float f;
    std::memcpy(&f, &magnitude, 4);
    f += 0.5f;
    uint32_t rounded;
    std::memcpy(&rounded, &f, 4);
    out.bits = static_cast<uint16_t>(sign | (rounded - 0x3f000000u));
  } else {
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u;
    out.bits = static_cast<uint16_t>(sign | (rounded >> 13));
  }
#endif
}

// ---- vector loads and stores: unaligned, converting ----
NLD_INLINE VecF load(const float* p) {
  VecF v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
NLD_INLINE VecF load(const bf16* p) {
  VecU16 half;
  std::memcpy(&half, p, sizeof(half));
  return (VecF)(__builtin_convertvector(half, VecU) << 16);
}
NLD_INLINE VecF load(const f16* p) {
#if defined(__AVX512F__)
  return (VecF)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return (VecF)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  return VecF{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
#endif
}
NLD_INLINE VecF load(const e4m3* p) {  // e4m3_to_float(), a register at a time
  VecU8 bytes;
  std::memcpy(&bytes, p, sizeof(bytes));
  const VecI code = __builtin_convertvector(bytes, VecI), magnitude = code & 0x7f, shifted = magnitude << 20;
  const VecF normal = as_float(shifted + kE4m3Rebias);
  const VecF tiny = as_float(shifted + kE4m3MinNormalBits) - kE4m3MinNormal;
  VecI bits = as_int(magnitude < 8 ? tiny : normal);
  bits = magnitude == 0x7f ? bits | 0x7fc00000 : bits;
  return as_float(bits | (code & 0x80) << 24);
}
NLD_INLINE void store(float* p, VecF v) { std::memcpy(p, &v, sizeof(v)); }
NLD_INLINE void store(e4m3* p, VecF v) {  // e4m3_from_float(), a register at a time
  const VecI bits = as_int(v), magnitude = bits & 0x7fffffff;
  const VecI normal = (magnitude - kE4m3Rebias + 0x7ffff + (magnitude >> 20 & 1)) >> 20;
  const VecI tiny = as_int(as_float(magnitude) + 16384.0f) - 0x46800000;
  VecI code = magnitude < kE4m3MinNormalBits ? tiny : normal;
  code = magnitude >= kE4m3MaxBits ? 0x7e - VecI{} : code;
  code = magnitude > 0x7f800000 ? 0x7f - VecI{} : code;
  const VecU8 bytes = __builtin_convertvector(code | (bits >> 24 & 0x80), VecU8);
  std::memcpy(p, &bytes, sizeof(bytes));
}
NLD_INLINE void store(bf16* p, VecF v) {  // from_float(), a register at a time
  const VecU bits = (VecU)v, rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const VecU16 half = __builtin_convertvector(v == v ? rounded >> 16 : (bits >> 16) | 0x40u, VecU16);
  std::memcpy(p, &half, sizeof(half));
}
NLD_INLINE void store(f16* p, VecF v) {
#if defined(__AVX512F__)
  const __m256i half = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(p, &half, sizeof(half));
#elif defined(__AVX2__)
  const __m128i half = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(p, &half, sizeof(half));
#else
  for (int i = 0; i < kLanes; ++i) from_float(v[i], p[i]);
#endif
}

// First n lanes of memory, the rest filled; for tails.
template <class T>
NLD_INLINE VecF load_partial(const T* p, int n, float fill) {
  VecF v = set1(fill);
  for (int i = 0; i < n; ++i) v[i] = to_float(p[i]);
  return v;
}
template <class T>
NLD_INLINE void store_partial(T* p, VecF v, int n) {
  for (int i = 0; i < n; ++i) from_float(v[i], p[i]);
}

// ---- arithmetic ----
NLD_INLINE VecF fma(VecF a, VecF b, VecF c) {
#if defined(__AVX512F__)
  return (VecF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (VecF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
// max(a, b) returns b where a is NaN: max(x, set1(-inf)) turns NaN into -inf.
// (Written out because g++ makes a comparison and a blend of "a > b ? a : b" where one side is a constant.)
NLD_INLINE VecF max(VecF a, VecF b) {
#if defined(__AVX512F__)
  return (VecF)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (VecF)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE__)
  return (VecF)__builtin_ia32_maxps(a, b);
#else
  return a > b ? a : b;
#endif
}
NLD_INLINE VecF min(VecF a, VecF b) {
#if defined(__AVX512F__)
  return (VecF)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (VecF)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__SSE__)
  return (VecF)__builtin_ia32_minps(a, b);
#else
  return a < b ? a : b;
#endif
}

// Folds the upper half of the lanes onto the lower half until one is left: the same order for every use. (Written as
// shuffles because g++ makes loops over memory of the plain form.)
template <class Op>
NLD_INLINE float reduce(VecF v, const Op& op) {
  typedef float Vec4 __attribute__((vector_size(16)));
#if defined(__AVX512F__)
  typedef float Vec8 __attribute__((vector_size(32)));
  const Vec8 half = op((Vec8)__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7),
                       (Vec8)__builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
#elif defined(__AVX2__)
  const VecF half = v;
#endif
#if defined(__AVX2__)
  const Vec4 four =
      op((Vec4)__builtin_shufflevector(half, half, 0, 1, 2, 3), (Vec4)__builtin_shufflevector(half, half, 4, 5, 6, 7));
#else
  const Vec4 four = v;
#endif
  const Vec4 two = op(four, (Vec4)__builtin_shufflevector(four, four, 2, 3, 2, 3));
  return op(two, (Vec4)__builtin_shufflevector(two, two, 1, 1, 1, 1))[0];
}
NLD_INLINE float reduce_add(VecF v) {
  return reduce(v, [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
}
NLD_INLINE float reduce_max(VecF v) {
  return reduce(v, [](auto a, auto b) __attribute__((always_inline)) { return a > b ? a : b; });
}

// e^x for x <= 88: relative error about 1e-7. Below -87.3 the result is 0 (subnormals are flushed).
NLD_INLINE VecF exp(VecF x) {
  constexpr float kLog2e = 1.44269504088896341f, kLn2Hi = 0.693359375f, kLn2Lo = -2.12194440e-4f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer held in the low bits
  const VecI underflow = x < -87.3f;
  const VecF t = fma(x, set1(kLog2e), set1(kRound));
  const VecF n = t - kRound;
  VecF r = fma(n, set1(-kLn2Hi), x);
  r = fma(n, set1(-kLn2Lo), r);
  VecF p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, r * r, r) + 1.0f;
  const VecI exponent = as_int(t) << 23;
  const VecF scaled = as_float(as_int(p) + exponent);
  return underflow ? VecF{} : scaled;
}

// tanh, relative error about 2e-7: a polynomial near 0 (where the other form cancels), 1 - 2 / (e^2|x| + 1) elsewhere.
NLD_INLINE VecF tanh(VecF x) {
  const VecF magnitude = as_float(as_int(x) & 0x7fffffff);
  const VecF square = x * x;
  VecF p = set1(-5.70498872745e-3f);
  p = fma(p, square, set1(2.06390887954e-2f));
  p = fma(p, square, set1(-5.37397155531e-2f));
  p = fma(p, square, set1(1.33314422036e-1f));
  p = fma(p, square, set1(-3.33332819422e-1f));
  const VecF small = fma(p * square, x, x);
  const VecF large = 1.0f - 2.0f / (exp(2.0f * min(set1(10.0f), magnitude)) + 1.0f);
  const VecF signed_large = as_float(as_int(large) | (as_int(x) & (int32_t)0x80000000));
  return magnitude < 0.625f ? small : signed_large;
}

}  // namespace nld::NLD_ISA
