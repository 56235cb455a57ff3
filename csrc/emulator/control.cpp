// What the tests set, through ctypes, after torch has loaded the library.
#include <mutex>

#include "emulator/internal.h"

namespace emu {
namespace {
std::mutex g_mutex;
std::string g_bug;
std::atomic<unsigned> g_version{1};
}  // namespace

void set_bug(const char* name) {
  std::lock_guard lock(g_mutex);
  g_bug = name;
  ++g_version;
}

bool bug_is_on(BugSwitch& bug) {
  unsigned state = bug.state.load(std::memory_order_relaxed);
  if (state / 2 != g_version) {
    std::lock_guard lock(g_mutex);
    state = 2 * g_version + (g_bug == bug.name);
    bug.state.store(state, std::memory_order_relaxed);
  }
  return state % 2 != 0;
}
}  // namespace emu

#define NLD_TEST_API extern "C" __attribute__((visibility("default")))

NLD_TEST_API void nld_emulator_set_bug(const char* name) { emu::set_bug(name); }

NLD_TEST_API void nld_emulator_set_gpu(int capability, int num_sms) {
  emu::options().capability = capability;
  emu::options().num_sms = num_sms;
}

NLD_TEST_API void nld_emulator_set(int order, int async, uint64_t seed, unsigned workers, unsigned max_resident) {
  emu::Options& o = emu::options();
  o.order = static_cast<emu::Order>(order);
  o.async = static_cast<emu::Async>(async);
  o.seed = seed;
  o.workers = workers;
  o.max_resident = max_resident;
}
