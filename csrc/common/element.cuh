// Elements of the tensors in device code: loaded and stored in 16-byte vectors, computed on in float32.
#pragma once

#include "common/fp8.h"
#include "common/prelude.cuh"

namespace nld {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(__nv_bfloat16(__nv_bfloat16_raw{x.bits})); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(__half(__half_raw{x.bits})); }
__device__ __forceinline__ float to_float(e4m3 x) { return e4m3_to_float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
  return {static_cast<__nv_bfloat16_raw>(__float2bfloat16_rn(x)).x};
}
template <>
__device__ __forceinline__ f16 from_float<f16>(float x) {
  return {static_cast<__half_raw>(__float2half_rn(x)).x};
}
template <>
__device__ __forceinline__ e4m3 from_float<e4m3>(float x) {
  return e4m3_from_float(x);
}

// kSize elements that are loaded and stored at once.
template <class T, int kSize>
struct alignas(kSize * sizeof(T)) Vec {
  T at[kSize];
};

// The most elements (a power of two, at most 16 bytes of them) that divide the length and every stride and address.
inline int vec_size(int64_t element_size, int64_t length, std::initializer_list<int64_t> strides,
                    std::initializer_list<const void*> pointers) {
  int64_t size = 16 / element_size;
  for (; size > 1; size /= 2) {
    bool fits = length % size == 0;
    for (const int64_t stride : strides) fits &= stride % size == 0;
    for (const void* p : pointers) fits &= reinterpret_cast<uintptr_t>(p) % (size * element_size) == 0;
    if (fits) break;
  }
  return static_cast<int>(size);
}

}  // namespace nld
