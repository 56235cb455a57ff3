// What the tests of the emulator share: kernels as lambdas, and what the emulator must say about them.
#pragma once

#include "emulator/tests/harness.cuh"

namespace nld::emulator_test {

using ptx_test::Array;
using ptx_test::Case;
using ptx_test::Cases;
using ptx_test::expect;
using ptx_test::Failure;
using ptx_test::kIsChecked;
using ptx_test::report_of;

template <class Kernel>
void expect_silence(const ::emu::Config& config, Kernel kernel) {
  const std::string report = report_of(config, kernel);
  if (!report.empty()) throw Failure("nothing to report, got: " + report);
}

template <class Kernel>
void expect_report(const char* text, const ::emu::Config& config, Kernel kernel) {
  const std::string report = report_of(config, kernel);
  if (report.find(text) == std::string::npos) {
    throw Failure(std::string("the report must hold \"") + text + "\", got: " + (report.empty() ? "none" : report));
  }
}
// What only the race checker sees: nothing is said without it.
template <class Kernel>
void expect_checked_report(const char* text, const ::emu::Config& config, Kernel kernel) {
  if (kIsChecked) {
    expect_report(text, config, kernel);
  } else {
    expect_silence(config, kernel);
  }
}

// A condition inside a kernel.
inline void require(bool holds, const char* text, EMU_LOC) {
  if (!holds) ::emu::fail(text, loc);
}

template <class T>
T* smem() {
  NLD_DYNAMIC_SMEM(T, data);
  return data;
}

// A load that the compiler cannot leave out, and a value it cannot guess.
template <class T>
void use(T value) {
  asm volatile("" ::"r"(value));
}

}  // namespace nld::emulator_test
