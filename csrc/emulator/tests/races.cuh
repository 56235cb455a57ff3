// CTAs that meet in global memory, rightly and wrongly; and the bytes that kernels move.
#pragma once

#include "common/ptx.cuh"
#include "emulator/tests/launching.cuh"

extern "C" {  // emulator/traffic.cpp
int nld_emulator_track(const void* p, uint64_t bytes);
void nld_emulator_untrack(int id);
void nld_emulator_traffic(int id, uint64_t* read, uint64_t* written);
}

namespace nld::emulator_test {

constexpr int kCtas = 6, kThreads = 64;
inline const ::emu::Config kGrid{kCtas, kThreads, 64};

// The ticket protocol of our kernels, and what can be left out of it.
struct Ticket {
  bool barrier_before = true, release = true, acquire = true, barrier_after = true;
  bool all_threads_fence = false;  // before the barrier, instead of the thread of the atomic
};
inline std::string run_ticket(const Ticket& has) {
  Array<int> parts(kCtas * kThreads), total(kThreads), ticket(1);
  std::string report;
  for (int launch = 0; launch < 2; ++launch) {  // the second one finds the ticket reset, and the parts of the first
    report += report_of(kGrid, [&] {
      int* const is_last = smem<int>();
      parts[blockIdx.x * kThreads + threadIdx.x] = static_cast<int>(blockIdx.x + threadIdx.x);
      if (has.all_threads_fence) __threadfence();
      if (has.barrier_before) __syncthreads();
      if (threadIdx.x == 0) {
        if (has.release) __threadfence();
        *is_last = atomicAdd(&ticket[0], 1) == kCtas - 1;
        if (has.acquire) __threadfence();
        if (*is_last) ticket[0] = 0;
      }
      if (has.barrier_after) __syncthreads();
      if (!*is_last) return;
      int sum = 0;
      for (int cta = 0; cta < kCtas; ++cta) sum += parts[cta * kThreads + threadIdx.x];
      total[threadIdx.x] = sum;
    });
    if (!report.empty()) return report;
    for (int i = 0; i < kThreads; ++i) expect(total[i] == kCtas * i + 15, "total %d is %d", i, total[i]);
    expect(ticket[0] == 0, "the ticket must be reset");
  }
  return report;
}
inline void expect_race(const std::string& report, const char* text) {
  const bool is_right = kIsChecked ? report.find(text) != std::string::npos : report.empty();
  if (!is_right) throw Failure("the report must be about \"" + std::string(text) + "\", got: " + report);
}
inline void test_ticket() {
  const std::string silence = run_ticket({});
  expect(silence.empty(), "nothing to report, got: %s", silence.c_str());
  if (!kIsChecked) return;  // the sums of the others depend on the schedule
  const char* const kRace = "race: read not ordered after write at global address";
  expect_race(run_ticket({.barrier_before = false}), kRace);
  expect_race(run_ticket({.release = false}), kRace);
  expect_race(run_ticket({.acquire = false}), kRace);
  expect_race(run_ticket({.release = false, .acquire = false}), kRace);
  expect_race(run_ticket({.release = false, .all_threads_fence = true}), kRace);
  expect_race(run_ticket({.barrier_after = false}), "at shared offset 0");
}

// A message from CTA 0 to CTA 1 through a flag. kPlain: an ordinary int.
enum class Flag { kPlain, kVolatile, kReleaseAcquire };
inline std::string pass_message(Flag kind, bool fence_there, bool fence_here) {
  Array<int> message(1);
  Array<unsigned> flag(1);
  ::emu::options().max_resident = 1024;
  return report_of({2, 32, 0}, [&] {
    const ::emu::Loc loc = ::emu::Loc::current();
    volatile unsigned* const seen = &flag[0];
    if (threadIdx.x != 0) return;
    if (blockIdx.x == 0) {
      message[0] = 42;
      if (fence_there) __threadfence();
      if (kind == Flag::kReleaseAcquire) {
        ::emu::atomic_store(&flag[0], 1u, ::emu::Sem::Release, loc);
      } else if (kind == Flag::kVolatile) {
        *seen = 1;
      } else {
        flag[0] = 1;
      }
    } else {
      if (kind == Flag::kReleaseAcquire) {
        while (::emu::atomic_load(&flag[0], ::emu::Sem::Acquire, loc) == 0) __nanosleep(1);
      } else {
        while (*seen == 0) __nanosleep(1);
      }
      if (fence_here) __threadfence();
      require(message[0] == 42, "the message");
    }
  });
}
inline void test_messages() {
  expect_race(pass_message(Flag::kPlain, true, true), "race: ");
  expect_race(pass_message(Flag::kVolatile, false, true), "race: read not ordered after write");
  expect_race(pass_message(Flag::kVolatile, true, false), "race: read not ordered after write");
  for (const std::string& report :
       {pass_message(Flag::kVolatile, true, true), pass_message(Flag::kReleaseAcquire, false, false)}) {
    expect(report.empty(), "nothing to report, got: %s", report.c_str());
  }
}

// CTA 0 tells CTA 1, which tells CTA 2, which reads what CTA 0 wrote.
inline void test_order_is_transitive() {
  Array<int> message(2);
  Array<unsigned> flags(3);
  ::emu::options().max_resident = 1024;
  const auto kernel = [&](bool passes_on) {
    const unsigned cta = blockIdx.x;
    if (threadIdx.x != 0) return;
    if (cta == 0) message[0] = 1;
    if (cta > 0) {
      while (atomicAdd(&flags[cta], 0u) == 0) __nanosleep(1);
      if (passes_on || cta == 2) __threadfence();
    }
    if (cta == 2) return use(message[0]);
    if (cta == 0) __threadfence();
    atomicExch(&flags[cta + 1], 1u);
  };
  expect_silence({3, 32}, [&] { kernel(true); });
  flags[1] = flags[2] = 0;
  expect_checked_report("race: read not ordered after write", {3, 32}, [&] { kernel(false); });
}

inline void test_cells() {
  Array<int> ints(kCtas + 1);
  Array<uint16_t> halves(kCtas);
  Array<unsigned char> bytes(kCtas);
  expect_silence(kGrid, [&] {  // neighbours
    if (threadIdx.x != 0) return;
    ints[blockIdx.x] = 1;
    halves[blockIdx.x] = 1;
    bytes[blockIdx.x] = 1;
  });
  expect_checked_report("race: write not ordered after write", kGrid, [&] { ints[0] = 5; });
  expect_checked_report("race: ", kGrid, [&] {  // a word over another CTA's half
    if (threadIdx.x != 0) return;
    if (blockIdx.x == 0) *reinterpret_cast<uint32_t*>(&halves[2]) = 7;
    if (blockIdx.x == 3) halves[3] = 1;
  });
  expect_checked_report("race: ", kGrid, [&] {  // which of read and write comes first depends on the schedule
    if (threadIdx.x != 0) return;
    if (blockIdx.x == 2) ints[4] = 1;
    if (blockIdx.x == 4) use(ints[4]);
  });
  expect_checked_report("race: ", kGrid, [&] {
    atomicAdd(&ints[6], 1);
    if (threadIdx.x == 0 && blockIdx.x == 1) use(ints[6]);
  });
  expect_checked_report("race: ", kGrid, [&] {
    if (threadIdx.x == 0 && blockIdx.x == 1) ints[6] = 0;
    if (threadIdx.x == 0 && blockIdx.x == 2) atomicAdd(&ints[6], 1);
  });
  expect_silence(kGrid, [&] { use(ints[blockIdx.x] + ints[3]); });  // launches are ordered
  // Inside a CTA barriers do.
  const auto exchange = [&](bool sync) {
    halves[threadIdx.x % 4] = 0;
    if (sync) __syncthreads();
  };
  expect_checked_report("race: write not ordered after write", {1, 64}, [&] { exchange(true); });
  Array<int> own(kCtas * kThreads);
  const auto own_cta = [&](bool sync) {
    int* const mine = own.data() + blockIdx.x * kThreads;
    mine[threadIdx.x] = 1;
    if (sync) __syncthreads();
    use(mine[63 - threadIdx.x]);
  };
  expect_silence(kGrid, [&] { own_cta(true); });
  expect_checked_report("race: read not ordered after write", kGrid, [&] { own_cta(false); });
}

inline void test_read_only_loads() {
  Array<int> data(64, 3);
  expect_silence(kGrid, [&] { use(__ldg(&data[threadIdx.x])); });
  expect_checked_report("read-only cache", {1, 64}, [&] {
    data[threadIdx.x] = 1;
    use(__ldg(&data[threadIdx.x]));
  });
}

inline void test_copies_read_global_memory() {
  Array<int> data(64), turn(1);
  expect_checked_report("race: ", {2, 32, 256}, [&] {
    if (blockIdx.x == 1) {
      data[4 * (threadIdx.x % 16)] = 1;
    } else if (threadIdx.x < 16) {
      atomicAdd(&turn[0], 0);  // lets the other CTA go first, sometimes
      ptx::cp_async(smem<int>() + 4 * threadIdx.x, data.data() + 4 * threadIdx.x);
    }
  });
}

struct Bytes {
  uint64_t read = 0, written = 0;
};
template <class Kernel>
Bytes count_bytes(const void* p, uint64_t size, const ::emu::Config& config, Kernel kernel) {
  const int id = nld_emulator_track(p, size);
  expect_silence(config, kernel);
  Bytes bytes;
  nld_emulator_traffic(id, &bytes.read, &bytes.written);
  nld_emulator_untrack(id);
  return bytes;
}
inline void test_traffic() {
  if (!kIsChecked) return;
  Array<uint4> from(96), to(96);
  const auto copy = [&] {
    const unsigned i = blockIdx.x * 32 + threadIdx.x;
    smem<uint4>()[threadIdx.x] = from[i];  // shared memory is nobody's traffic
    to[i] = smem<uint4>()[threadIdx.x];
  };
  const ::emu::Config config{3, 32, 512};
  Bytes bytes = count_bytes(from.data(), 96 * 16, config, copy);
  expect(bytes.read == 96 * 16 && bytes.written == 0, "source: %d read, %d written", int(bytes.read),
         int(bytes.written));
  bytes = count_bytes(to.data(), 96 * 16, config, copy);
  expect(bytes.read == 0 && bytes.written == 96 * 16, "target: %d read, %d written", int(bytes.read),
         int(bytes.written));
  bytes = count_bytes(reinterpret_cast<char*>(from.data()) + 20, 100, config, copy);
  expect(bytes.read == 100, "part of the source: %d read", int(bytes.read));
  bytes = count_bytes(from.data(), 96 * 16, config, [&] {
    ptx::cp_async(smem<uint4>() + threadIdx.x, &from[threadIdx.x], threadIdx.x < 20 ? 16 : threadIdx.x == 20 ? 6 : 0);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
  });
  expect(bytes.read == 3 * (20 * 16 + 6), "cp.async: %d read", int(bytes.read));
  Array<int> counter(1);
  bytes = count_bytes(counter.data(), 4, config, [&] { atomicAdd(&counter[0], 1); });
  expect(bytes.read == 4 * 96 && bytes.written == 4 * 96, "atomics: %d read", int(bytes.read));
}

inline const Cases kRaces = {
    {"tickets", test_ticket},
    {"messages", test_messages},
    {"order is transitive", test_order_is_transitive},
    {"cells of global memory", test_cells},
    {"read-only loads", test_read_only_loads},
    {"copies read global memory", test_copies_read_global_memory},
    {"traffic", test_traffic},
};

}  // namespace nld::emulator_test
