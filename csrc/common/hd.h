// NLD_HD marks a function that CPU kernels, CUDA kernels and the emulator share. Each file gets its own copy: the CPU
// kernels are compiled once per ISA, and the linker must not mix those. NLD_HD_CALLS_ARGUMENT goes before an NLD_HD
// template that calls what its argument brings along: on a GPU that is device code. NLD_ROLLED keeps a loop that is
// seldom long from being unrolled by nvcc, which costs registers.
#pragma once

#if defined(__CUDACC__)
#define NLD_HD static __host__ __device__ __forceinline__
#define NLD_HD_CALLS_ARGUMENT _Pragma("nv_exec_check_disable")
#define NLD_ROLLED _Pragma("unroll 1")
#else
#define NLD_HD static inline __attribute__((always_inline))
#define NLD_HD_CALLS_ARGUMENT
#define NLD_ROLLED
#endif
