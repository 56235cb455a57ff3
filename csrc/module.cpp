// nld_cuda._C: what is not an op. It includes no torch header.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "common/cpu_isa.h"
#include "common/export.h"

namespace py = pybind11;

namespace {

void set_cpu_isa(const std::string& name) {
  for (int isa = 0; isa < 3; ++isa) {
    if (name != nld::kCpuIsaNames[isa]) continue;
    if (nld_set_cpu_isa(isa) != 0) {
      throw std::invalid_argument("set_cpu_isa: isa must be at most '" +
                                  std::string(nld::kCpuIsaNames[nld_best_cpu_isa()]) + "' on this machine, got '" +
                                  name + "'");
    }
    return;
  }
  throw std::invalid_argument("set_cpu_isa: isa must be 'baseline', 'avx2' or 'avx512', got '" + name + "'");
}

void set_max_capability(int capability) {
  if (nld_set_max_capability(capability) != 0) {
    throw std::invalid_argument("set_max_capability: capability must be 0 (that of the GPU) or at least 80, got " +
                                std::to_string(capability));
  }
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information and CPU instruction-set selection of nld_cuda.";
  m.def("cpu_isa", [] { return nld::kCpuIsaNames[nld_cpu_isa()]; }, "Return the instruction set the CPU kernels use.");
  m.def(
      "best_cpu_isa", [] { return nld::kCpuIsaNames[nld_best_cpu_isa()]; },
      "Return the most capable instruction set this machine can run.");
  m.def("set_cpu_isa", &set_cpu_isa, py::arg("isa"),
        "Force an instruction set: 'baseline', 'avx2' or 'avx512'. For tests; raises ValueError where it cannot run.");
  m.def("set_max_capability", &set_max_capability, py::arg("capability"),
        "Let launchers take a GPU for an older one: 80 for 8.0; 0: for what it is. For tuning and tests.");
  m.def("cuda_archs", &nld_cuda_archs,
        "Return the compiled GPU architectures, comma separated; '' for a CPU-only build.");
  m.def("version", &nld_version, "Return the version the library was built as.");
}
