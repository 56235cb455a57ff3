// Arithmetic that no compiler may fuse or reorder: equal bits on every CPU ISA and on CUDA.
#pragma once

#include <stdint.h>
#include <string.h>

#include "common/hd.h"

namespace nld {

NLD_HD float mul_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;  // host files are built with -ffp-contract=off
#endif
}
NLD_HD float add_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}
NLD_HD float div_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}
NLD_HD float fma_rn(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}
NLD_HD double mul_rn(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}
NLD_HD double add_rn(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dadd_rn(a, b);
#else
  return a + b;
#endif
}
NLD_HD float int_to_float(int32_t x) {
#if defined(__CUDA_ARCH__)
  return __int2float_rn(x);
#else
  return static_cast<float>(x);
#endif
}
NLD_HD int32_t float_bits(float x) {
  int32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
NLD_HD float bits_float(int32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

}  // namespace nld
