// The C functions that libnld_ops.so offers beside its torch ops.
#pragma once

#define NLD_EXPORT extern "C" __attribute__((visibility("default")))

NLD_EXPORT int nld_cpu_isa();                           // level in use: 0 baseline, 1 avx2, 2 avx512
NLD_EXPORT int nld_best_cpu_isa();                      // best level this machine can run
NLD_EXPORT int nld_set_cpu_isa(int isa);                // 0 on success, -1 when this machine cannot run that level
NLD_EXPORT int nld_set_max_capability(int capability);  // 80 and more, 0: no limit; -1: neither
NLD_EXPORT const char* nld_cuda_archs();                // "80-real,90a-real", or "" for a CPU-only build
NLD_EXPORT const char* nld_version();
