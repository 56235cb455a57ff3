// NLD_HD marks a function that CPU kernels, CUDA kernels and the emulator share. Each file gets its own copy: the CPU
// kernels are compiled once per ISA, and the linker must not mix those.
#pragma once

#if defined(__CUDACC__)
#define NLD_HD static __host__ __device__ __forceinline__
#else
#define NLD_HD static inline __attribute__((always_inline))
#endif
