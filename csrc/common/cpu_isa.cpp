#include "common/cpu_isa.h"

#include <atomic>

#include "common/capability.h"
#include "common/export.h"

namespace nld {

// This file is compiled without ISA flags, so that asking the question never needs the answer.
CpuIsa best_cpu_isa() {
#if defined(NLD_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd") &&
      __builtin_cpu_supports("avx512bf16")) {
    return CpuIsa::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
    return CpuIsa::kAvx2;  // every CPU with these three has F16C too
  }
#endif
  return CpuIsa::kBaseline;
}

static std::atomic<CpuIsa> current{best_cpu_isa()};

CpuIsa cpu_isa() { return current.load(std::memory_order_relaxed); }
void set_cpu_isa(CpuIsa isa) { current.store(isa, std::memory_order_relaxed); }

}  // namespace nld

// C interface for nld_cuda._C and for anyone who loads the library without it.
NLD_EXPORT int nld_cpu_isa() { return static_cast<int>(nld::cpu_isa()); }
NLD_EXPORT int nld_best_cpu_isa() { return static_cast<int>(nld::best_cpu_isa()); }
NLD_EXPORT int nld_set_cpu_isa(int isa) {
  if (isa < 0 || isa > static_cast<int>(nld::best_cpu_isa())) return -1;
  nld::set_cpu_isa(static_cast<nld::CpuIsa>(isa));
  return 0;
}
NLD_EXPORT int nld_set_max_capability(int capability) {
  if (capability != 0 && capability < 80) return -1;
  nld::max_capability = capability;
  return 0;
}
NLD_EXPORT const char* nld_cuda_archs() { return NLD_CUDA_ARCH_NAMES; }
NLD_EXPORT const char* nld_version() { return NLD_VERSION; }
