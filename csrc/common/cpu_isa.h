// Which CPU instruction set the kernels run with: found once at load, forced by tests through nld_cuda._C.
#pragma once

namespace nld {

// Ordered: a CPU that can run one level can run those before it.
enum class CpuIsa : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

inline constexpr const char* kCpuIsaNames[] = {"baseline", "avx2", "avx512"};

CpuIsa best_cpu_isa();  // the most capable level this machine can run
CpuIsa cpu_isa();       // the level in use
void set_cpu_isa(CpuIsa isa);

// Chooses one of the per-ISA function tables that a cpu.cpp defines.
template <class Table>
const Table& pick_isa(const Table& baseline, [[maybe_unused]] const Table& avx2, [[maybe_unused]] const Table& avx512) {
  switch (cpu_isa()) {
    case CpuIsa::kAvx512:
      return avx512;
    case CpuIsa::kAvx2:
      return avx2;
    case CpuIsa::kBaseline:
      break;
  }
  return baseline;
}

}  // namespace nld
