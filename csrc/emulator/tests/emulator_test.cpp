// The emulator itself: what its primitives compute, under any order of threads; kernels that break one rule each, and
// must be told so; kernels that break none, and must not. Arguments: order, landing, seed, max_resident.
#include "emulator/tests/misuse.cuh"
#include "emulator/tests/races.cuh"
#include "emulator/tests/semantics.cuh"

int main(int argc, char** argv) {
  using namespace nld::emulator_test;
  ::emu::Options defaults;
  if (argc > 1) defaults.order = static_cast<::emu::Order>(std::atoi(argv[1]));
  if (argc > 2) defaults.async = static_cast<::emu::Async>(std::atoi(argv[2]));
  if (argc > 3) defaults.seed = static_cast<uint64_t>(std::atoll(argv[3]));
  if (argc > 4) defaults.max_resident = static_cast<unsigned>(std::atoi(argv[4]));
  int num_failed = 0;
  for (const auto* cases : {&kSemantics, &kMisuse, &kRaces}) {
    for (const Case& c : *cases) {
      ::emu::options() = defaults;
      std::string failure;
      try {
        c.run();
      } catch (const std::exception& e) {
        failure = e.what();
      }
      std::printf(failure.empty() ? "ok %s\n" : "FAIL %s: %s\n", c.name, failure.c_str());
      std::fflush(stdout);
      num_failed += !failure.empty();
    }
  }
  std::printf("%d failed\n", num_failed);
  return num_failed != 0;
}
