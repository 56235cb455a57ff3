// What collectives, barriers, atomics and launches compute.
#pragma once

#include <algorithm>
#include <set>

#include "emulator/tests/launching.cuh"

namespace nld::emulator_test {

inline void test_shuffles() {
  expect_silence({2, 64}, [] {
    const int lane = static_cast<int>(threadIdx.x) % 32, value = static_cast<int>(threadIdx.x) * 10;
    const int first = value - lane * 10;  // of lane 0
    for (const int width : {32, 16, 8, 1}) {
      const int base = lane / width * width, in_group = lane % width;
      require(__shfl_sync(kFullMask, value, 5, width) == first + (base + 5 % width) * 10, "shfl");
      require(__shfl_xor_sync(kFullMask, value, 3, width) == first + (width > 3 ? lane ^ 3 : lane) * 10 || width < 4,
              "shfl.xor");
      require(__shfl_up_sync(kFullMask, value, 2, width) == first + (in_group >= 2 ? lane - 2 : lane) * 10, "shfl.up");
      require(__shfl_down_sync(kFullMask, value, 2, width) == first + (in_group + 2 < width ? lane + 2 : lane) * 10,
              "shfl.down");
    }
    require(__shfl_sync(kFullMask, 1.5 + lane, 31) == 32.5, "shfl of 8 bytes");
    const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;  // both halves at once, in different calls
    if (lane < 16) {
      require(__shfl_xor_sync(half, lane, 15) == 15 - lane, "shfl of the lower half");
    } else {
      require(__shfl_xor_sync(half, lane, 15) == 47 - lane, "shfl of the upper half");
    }
  });
}

inline void test_votes() {
  expect_silence({1, 96}, [] {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    require(__ballot_sync(kFullMask, lane % 3 == warp) == (0x49249249u << warp), "ballot");
    require(__any_sync(kFullMask, lane == 31) && !__any_sync(kFullMask, 0), "any");
    require(__all_sync(kFullMask, 1) && !__all_sync(kFullMask, lane != 7), "all");
    if (lane % 2 == 0) {
      require(__ballot_sync(0x55555555u, lane < 8) == 0x55u, "ballot of even lanes");
      require(__all_sync(0x55555555u, lane % 2 == 0), "all of even lanes");
    }
  });
}

inline void test_match_and_reduce() {
  expect_silence({1, 64}, [] {
    const unsigned lane = threadIdx.x % 32;
    require(__match_any_sync(kFullMask, lane / 4) == 0xfu << lane / 4 * 4, "match_any");
    require(__match_any_sync(kFullMask, static_cast<long long>(lane % 2)) == (lane % 2 ? 0xaaaaaaaau : 0x55555555u),
            "match_any of 8 bytes");
    const int value = static_cast<int>(lane * 7 % 32) - 16;
    require(__reduce_max_sync(kFullMask, value) == 15 && __reduce_min_sync(kFullMask, value) == -16, "max, min");
    require(__reduce_add_sync(kFullMask, value) == -16, "add");
    require(__reduce_or_sync(kFullMask, 1u << lane) == kFullMask, "or");
    require(__reduce_and_sync(kFullMask, ~(1u << lane / 8)) == 0xfffffff0u, "and");
    if (lane >= 24) require(__reduce_add_sync(0xff000000u, 1u << (lane - 24)) == 0xffu, "add of eight lanes");
  });
}

inline void test_syncthreads_variants() {
  expect_silence({3, 160}, [] {
    const int i = static_cast<int>(threadIdx.x);
    for (int round = 0; round < 20; ++round) {
      require(__syncthreads_count(i < round * 3) == round * 3, "count");
      require(__syncthreads_and(i != round) == 0 && __syncthreads_and(i < 160) != 0, "and");
      require(__syncthreads_or(i == round) != 0 && __syncthreads_or(i > 160) == 0, "or");
    }
  });
}

// Two producer warps fill two buffers, two consumer warps empty them; four named barriers (full and empty, each twice).
inline void test_named_barriers() {
  constexpr int kRounds = 9;
  Array<int> out(64 * kRounds);
  const ::emu::Loc loc = ::emu::Loc::current();
  expect_silence({1, 128, 512}, [&] {
    const int i = static_cast<int>(threadIdx.x) % 64;
    for (int round = 0; round < kRounds; ++round) {
      const unsigned full = 1 + round % 2, empty = 3 + round % 2;
      int* const buffer = smem<int>() + round % 2 * 64;
      if (threadIdx.x < 64) {
        if (round >= 2) ::emu::bar_sync(empty, 128, "bar.sync", loc);
        buffer[i] = 100 * round + i;
        ::emu::bar_arrive(full, 128, loc);
      } else {
        ::emu::bar_sync(full, 128, "bar.sync", loc);
        out[64 * round + i] = buffer[63 - i];
        if (round + 2 < kRounds) ::emu::bar_arrive(empty, 128, loc);
      }
    }
  });
  for (int k = 0; k < 64 * kRounds; ++k) expect(out[k] == k / 64 * 100 + 63 - k % 64, "element %d is %d", k, out[k]);
  // Who only arrives has not waited for the others, and what it does afterwards is not covered by the barrier.
  const auto one_way = [&](bool reads_back, bool writes_again) {
    int* const data = smem<int>();
    const unsigned i = threadIdx.x % 32;
    data[threadIdx.x] = 0;
    __syncthreads();
    data[threadIdx.x] = 1;
    if (threadIdx.x < 32) {
      ::emu::bar_arrive(1, 64, loc);
      if (reads_back) use(data[32 + i]);
      if (writes_again) data[i] = 2;
    } else {
      ::emu::bar_sync(1, 64, "bar.sync", loc);
      use(data[31 - i]);
    }
  };
  expect_silence({1, 64, 512}, [&] { one_way(false, false); });
  expect_checked_report("race: ", {1, 64, 512}, [&] { one_way(true, false); });
  expect_checked_report("race: ", {1, 64, 512}, [&] { one_way(false, true); });
}

template <class T>
void test_atomics() {
  constexpr int kN = 320;
  Array<T> all(8, T(0));
  all[2] = T(1000), all[3] = static_cast<T>(~T(0)), all[5] = T(7);
  expect_silence({5, 64, 64}, [&] {
    const unsigned n = blockIdx.x * 64 + threadIdx.x;
    T* const local = smem<T>();
    if (threadIdx.x == 0) *local = T(0);
    __syncthreads();
    atomicAdd(local, T(1));
    __syncthreads();
    require(*local == T(64), "atomicAdd in shared memory");
    atomicAdd(&all[0], T(n));
    atomicMax(&all[1], T(n));
    atomicMin(&all[2], T(n));
    atomicAnd(&all[3], static_cast<T>(~(T(1) << n % 8)));
    atomicOr(&all[4], T(1) << n % 16);
    atomicXor(&all[5], T(n));
    for (T seen = 0, before; (before = atomicCAS(&all[6], seen, seen + T(2))) != seen; seen = before) {
    }
    require(atomicExch(&all[7], T(n + 1)) <= T(kN), "atomicExch");
  });
  T want_xor = 7;
  for (int n = 0; n < kN; ++n) want_xor ^= static_cast<T>(n);
  expect(all[0] == T(kN * (kN - 1) / 2) && all[1] == T(kN - 1) && all[2] == T(0), "add, max, min");
  expect(all[3] == static_cast<T>(~T(0xff)) && all[4] == T(0xffff) && all[5] == want_xor, "and, or, xor");
  expect(all[6] == T(2 * kN) && all[7] >= T(1) && all[7] <= T(kN), "cas, exch");
}
inline void test_signed_and_other_atomics() {
  Array<int> ints(4);
  ints[0] = -5, ints[1] = 5;
  Array<unsigned> counters(2);
  counters[1] = 3;
  Array<float> floats(2);
  Array<double> doubles(1);
  expect_silence({2, 32}, [&] {
    const int lane = static_cast<int>(threadIdx.x);
    atomicMax(&ints[0], -lane);
    atomicMin(&ints[1], -lane);
    atomicSub(&ints[2], 3);
    require(atomicInc(&counters[0], 9) <= 9, "atomicInc");
    require(atomicDec(&counters[1], 4) <= 4, "atomicDec");
    atomicAdd(&floats[0], 0.5f);
    atomicExch(&floats[1], 2.5f);
    atomicAdd(&doubles[0], 0.25);
  });
  expect(ints[0] == 0 && ints[1] == -31 && ints[2] == -192, "signed max, min, sub");
  expect(counters[0] == 64 % 10 && counters[1] == (3 + 64 * 4) % 5, "inc %u, dec %u", counters[0], counters[1]);
  expect(floats[0] == 32.0f && floats[1] == 2.5f && doubles[0] == 16.0, "floats");
}

inline void test_exit_before_a_barrier() {
  const auto kernel = [] {
    if (threadIdx.x % 3 == 0) return;
    smem<int>()[threadIdx.x] = 1;
    __syncthreads();
    use(smem<int>()[threadIdx.x == 1 ? 64 - 2 : threadIdx.x]);
    __syncthreads();
  };
  expect_report("exited", {1, 64, 256}, kernel);
  ::emu::options().strict_exit = false;  // as a GPU does since Volta
  expect_silence({1, 64, 256}, kernel);
}

// Every CTA and thread of a grid in three dimensions exactly once, whatever runs together on however many OS threads.
inline void test_grid() {
  const unsigned resident = ::emu::options().max_resident;
  for (const unsigned workers : {1u, 3u}) {
    for (const unsigned max_resident : {0u, 100u, resident}) {
      ::emu::options().workers = workers;
      ::emu::options().max_resident = max_resident;
      Array<int> count(3 * 5 * 2 * 64);
      expect_silence({dim3(3, 5, 2), dim3(4, 8, 2)}, [&] {
        require(gridDim.x == 3 && gridDim.y == 5 && gridDim.z == 2 && blockDim.x == 4 && blockDim.y == 8, "sizes");
        const unsigned block = (blockIdx.z * 5 + blockIdx.y) * 3 + blockIdx.x;
        const unsigned thread = (threadIdx.z * 8 + threadIdx.y) * 4 + threadIdx.x;
        require(__shfl_sync(kFullMask, thread, 9) == thread / 32 * 32 + 9, "warps run along x, then y, then z");
        ++count[block * 64 + thread];
      });
      for (size_t i = 0; i < count.size(); ++i) expect(count[i] == 1, "thread %zu ran %d times", i, count[i]);
    }
  }
}

// Which CTA draws the last ticket.
inline unsigned last_of(unsigned num_ctas) {
  Array<unsigned> ticket(2);
  expect_silence({num_ctas, 32}, [&] {
    __syncthreads();
    if (threadIdx.x == 0 && atomicAdd(&ticket[0], 1u) == gridDim.x - 1) ticket[1] = blockIdx.x;
  });
  return ticket[1];
}
inline void test_every_cta_can_be_last() {
  constexpr unsigned kCtas = 7;
  for (const ::emu::Order order : {::emu::Order::Forward, ::emu::Order::Reverse}) {
    for (const unsigned max_resident : {0u, 1024u}) {
      ::emu::options().order = order;
      ::emu::options().max_resident = max_resident;
      std::set<unsigned> seen;
      for (unsigned seed = 0; seed < kCtas; ++seed) {
        ::emu::options().seed = seed;
        seen.insert(last_of(kCtas));
      }
      expect(seen.size() == kCtas, "%zu of %u CTAs were last", seen.size(), kCtas);
    }
  }
  ::emu::options().order = ::emu::Order::Random;
  std::set<unsigned> seen;
  for (unsigned seed = 0; seed < 60; ++seed) {
    ::emu::options().seed = seed;
    seen.insert(last_of(kCtas));
  }
  expect(seen.size() == kCtas, "at random, %zu of %u CTAs were last", seen.size(), kCtas);
}

// The first CTA waits for the last one: they take turns only if they are resident together.
inline void test_polling() {
  Array<unsigned> flag(1);
  const auto kernel = [&] {
    if (threadIdx.x != 0) return;
    if (blockIdx.x == gridDim.x - 1) {
      ::emu::atomic_store(&flag[0], 1u, ::emu::Sem::Release, ::emu::Loc::current());
    } else {
      while (::emu::atomic_load(&flag[0], ::emu::Sem::Acquire, ::emu::Loc::current()) == 0) __nanosleep(20);
    }
  };
  ::emu::options().max_resident = 1024;
  expect_silence({4, 32}, kernel);
  flag[0] = 0;
  ::emu::options().max_resident = 0;
  ::emu::options().order = ::emu::Order::Forward;
  ::emu::options().seed = 0;
  expect_report("no progress", {4, 32}, kernel);
}

inline void test_same_seed_same_run() {
  const auto trace = [] {
    std::vector<unsigned> order;
    expect_silence({3, 64}, [&] {
      for (int i = 0; i < 3; ++i) {
        order.push_back(blockIdx.x * 64 + threadIdx.x);  // one OS thread: no lock needed
        __syncthreads();
      }
    });
    return order;
  };
  if (kIsChecked) return;  // the shared vector is a race, of course
  ::emu::options().order = ::emu::Order::Random;
  const auto first = trace();
  expect(first == trace(), "the same seed must give the same run");
  ++::emu::options().seed;
  expect(first != trace(), "another seed must give another run");
}

inline void test_exceptions_and_refusals() {
  expect_report("exception in kernel: thrown", {1, 32}, [] {
    if (threadIdx.x == 3) throw std::runtime_error("thrown");
    __syncthreads();
  });
  expect_report("bad grid or block size", {1, 1056}, [] {});
  expect_report("bad grid or block size", {0, 32}, [] {});
  expect_report("more than 227 KiB", {1, 32, 228 << 10}, [] {});
  expect_report("not a multiple of the cluster", {3, 32, 0, 2}, [] {});
  expect_report("must hold: n is small", {1, 32}, [] {
    const int n = 5;
    NLD_DEVICE_CHECK(n < 5, "n is small");
  });
  expect_report("__trap", {1, 32}, [] { __trap(); });
  expect_silence({1, 32}, [] {});  // nothing is left behind
}

inline void test_bug_switches() {
  std::vector<int> seen;
  const auto kernel = [&] {
    if (threadIdx.x == 0) seen.push_back(NLD_BUG(one) + 2 * NLD_BUG(two));
  };
  for (const char* name : {"", "one", "two", "one", ""}) {
    ::emu::set_bug(name);
    ::emu::launch({1, 32}, "kernel", kernel);
  }
  expect(seen == std::vector<int>{0, 1, 2, 1, 0}, "only the bug that is on must be on");
}

inline void test_bits() {
  expect(__byte_perm(0x33221100u, 0x77665544u, 0x1404u) == 0x11440044u, "bytes");
  expect(__popc(0xf0u) == 4 && __popcll(~0ull) == 64 && __clz(1) == 31 && __clz(0) == 32 && __clzll(1) == 63, "counts");
  expect(__ffs(8) == 4 && __ffs(0) == 0 && __ffsll(1ll << 40) == 41 && __brev(1u) == 0x80000000u, "places");
  expect(__umulhi(0x80000000u, 6u) == 3 && __float_as_int(1.0f) == 0x3f800000, "words");
}

inline const Cases kSemantics = {
    {"shuffles", test_shuffles},
    {"votes", test_votes},
    {"match and reduce", test_match_and_reduce},
    {"__syncthreads_count, _and, _or", test_syncthreads_variants},
    {"named barriers", test_named_barriers},
    {"atomics of 32 bits", test_atomics<unsigned>},
    {"atomics of 64 bits", test_atomics<unsigned long long>},
    {"signed, wrapping and floating-point atomics", test_signed_and_other_atomics},
    {"exit before a barrier", test_exit_before_a_barrier},
    {"every CTA and thread once", test_grid},
    {"every CTA can be last", test_every_cta_can_be_last},
    {"polling", test_polling},
    {"the same seed gives the same run", test_same_seed_same_run},
    {"exceptions and refusals", test_exceptions_and_refusals},
    {"injected bugs", test_bug_switches},
    {"bit counts", test_bits},
};

}  // namespace nld::emulator_test
