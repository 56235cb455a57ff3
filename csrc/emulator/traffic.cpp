// Bytes that kernels read and write in chosen ranges of global memory: the performance test of machines without a GPU.
#include "emulator/internal.h"

namespace emu::traffic {
namespace {
struct Range {
  uintptr_t begin, end;
  uint64_t read = 0, written = 0;
};
std::map<int, Range> g_ranges;
int g_next = 0;

// Calls f(id, range, bytes) for every range with bytes of [p, p + n).
template <class F>
void overlap(const void* p, size_t n, F f) {
  const auto begin = reinterpret_cast<uintptr_t>(p), end = begin + n;
  for (auto& [id, r] : g_ranges) {
    if (begin < r.end && r.begin < end) f(id, r, std::min(end, r.end) - std::max(begin, r.begin));
  }
}
}  // namespace

void count(bool is_write, const void* p, size_t n) {
  overlap(p, n, [&](int, Range& r, uint64_t bytes) { (is_write ? r.written : r.read) += bytes; });
}

std::string name(const void* p) {
  std::string text;
  overlap(p, 1, [&](int id, const Range& r, uint64_t) {
    text = "byte " + std::to_string(reinterpret_cast<uintptr_t>(p) - r.begin) + " of range " + std::to_string(id);
  });
  if (text.empty()) {
    char address[32];
    std::snprintf(address, sizeof address, "%p", p);
    text = std::string("global address ") + address;
  }
  return text;
}
}  // namespace emu::traffic

#define NLD_TEST_API extern "C" __attribute__((visibility("default")))

NLD_TEST_API int nld_emulator_track(const void* p, uint64_t bytes) {
  using namespace emu::traffic;
  const auto begin = reinterpret_cast<uintptr_t>(p);
  g_ranges[g_next] = {begin, begin + bytes};
  return g_next++;
}
NLD_TEST_API void nld_emulator_untrack(int id) { emu::traffic::g_ranges.erase(id); }
NLD_TEST_API void nld_emulator_traffic(int id, uint64_t* read, uint64_t* written) {
  const auto& r = emu::traffic::g_ranges.at(id);
  *read = r.read;
  *written = r.written;
}
