// Kernels that break one rule each inside a CTA or warp, and their correct twins.
#pragma once

#include "common/ptx.cuh"
#include "emulator/tests/launching.cuh"

namespace nld::emulator_test {

inline const ::emu::Config kTwoWarps{1, 64, 1024};

inline void test_barrier_misuse() {
  expect_silence(kTwoWarps, [] {
    smem<float>()[threadIdx.x] = 1;
    __syncthreads();
    use(smem<float>()[63 - threadIdx.x]);
  });
  expect_report("divergent __syncthreads", kTwoWarps, [] {
    if (threadIdx.x < 32) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  });
  expect_report("divergent __syncthreads", kTwoWarps, [] {
    if (threadIdx.x < 32) {
      __syncthreads();
    } else {
      __syncthreads_or(1);
    }
  });
  expect_report("exited", kTwoWarps, [] {
    if (threadIdx.x == 5) return;
    __syncthreads();
  });
  expect_report("threads 0-31: waiting in __syncthreads at misuse.cuh:", kTwoWarps, [] {
    if (threadIdx.x < 32) __syncthreads();
  });
  ::emu::options().order = ::emu::Order::Forward;  // in reverse, warp 1 passes and warp 0 waits for ever
  expect_report("two different thread counts", kTwoWarps,
                [] { ::emu::bar_sync(1, threadIdx.x < 32 ? 64 : 32, "bar.sync", ::emu::Loc::current()); });
  expect_report("above 15", kTwoWarps, [] { ::emu::bar_sync(16, 64, "bar.sync", ::emu::Loc::current()); });
  expect_report("multiple of 32", kTwoWarps, [] { ::emu::bar_sync(1, 20, "bar.sync", ::emu::Loc::current()); });
  expect_report("more threads than the CTA has", kTwoWarps, [] { ::emu::bar_arrive(1, 96, ::emu::Loc::current()); });
}

inline void test_collective_misuse() {
  expect_report("not in the mask", kTwoWarps, [] { __shfl_sync(1u << threadIdx.x % 32, 1, 3); });
  expect_report("not in its own mask", kTwoWarps, [] { __syncwarp(1u); });
  expect_report("divergent warp collective", kTwoWarps, [] {
    if (threadIdx.x % 2) {
      __shfl_xor_sync(kFullMask, 1, 1);
    } else {
      __ballot_sync(kFullMask, 1);
    }
  });
  ::emu::options().order = ::emu::Order::Forward;  // in reverse, the upper half passes
  expect_report("with a different mask", kTwoWarps,
                [] { __ballot_sync(threadIdx.x % 32 < 16 ? kFullMask : 0xffff0000u, 1); });
  expect_report("deadlock", kTwoWarps, [] {
    if (threadIdx.x < 16) __shfl_xor_sync(kFullMask, 1, 1);
  });
  expect_report("no progress", {1, 32}, [] {
    for (;;) __nanosleep(1);
  });
}

inline void test_shared_memory_misuse() {
  expect_checked_report("shared memory access out of bounds", {1, 64, 1000},
                        [] { smem<float>()[187 + threadIdx.x] = 1; });
  expect_checked_report("never written", kTwoWarps, [] { use(smem<float>()[threadIdx.x]); });
  expect_checked_report("write not ordered after write", kTwoWarps, [] { smem<float>()[0] = float(threadIdx.x); });
  const auto neighbour = [](bool sync) {
    smem<float>()[threadIdx.x] = 1;
    if (sync) {
      __syncwarp();
    } else {
      __shfl_xor_sync(kFullMask, 1, 1);  // orders nothing in memory
    }
    use(smem<float>()[threadIdx.x ^ 1]);
  };
  expect_silence(kTwoWarps, [&] { neighbour(true); });
  expect_checked_report("race: read not ordered after write at shared offset", kTwoWarps, [&] { neighbour(false); });
  const auto reuse = [](bool sync) {
    int* const data = smem<int>();
    for (int round = 0; round < 3; ++round) {
      data[threadIdx.x] = round;
      __syncthreads();
      use(data[63 - threadIdx.x]);
      if (sync) __syncthreads();
    }
  };
  expect_silence(kTwoWarps, [&] { reuse(true); });
  expect_checked_report("race: write not ordered after read", kTwoWarps, [&] { reuse(false); });
  // Threads that write neighbouring bytes do not disturb each other.
  expect_silence(kTwoWarps, [] {
    smem<unsigned char>()[threadIdx.x] = 1;
    smem<uint16_t>()[64 + threadIdx.x] = 2;
    __syncthreads();
    use(smem<uint32_t>()[threadIdx.x % 16]);
    use(smem<uint64_t>()[16 + threadIdx.x % 16]);
  });
  expect_checked_report("write not ordered after write", kTwoWarps, [] {
    if (threadIdx.x == 0) smem<uint32_t>()[3] = 1;
    if (threadIdx.x == 33) smem<unsigned char>()[13] = 1;
  });
  const auto atomics = [](bool sync) {
    if (threadIdx.x == 0) *smem<int>() = 0;
    __syncthreads();
    atomicAdd(smem<int>(), 1);
    if (sync) __syncthreads();
    use(*smem<int>());
  };
  expect_silence(kTwoWarps, [&] { atomics(true); });
  expect_checked_report("race: ", kTwoWarps, [&] { atomics(false); });
}

inline void test_copy_misuse() {
  Array<int> data(256, 7);
  expect_report("not 16-byte aligned", kTwoWarps, [] {
    uint32_t r[4];
    ptx::ldmatrix_x4(r, smem<char>() + 2);
  });
  expect_report("not aligned to its size", kTwoWarps, [&] { ptx::cp_async(smem<int>() + 1, data.data()); });
  expect_report("outside the block's shared memory", kTwoWarps, [&] { ptx::cp_async(smem<int>() + 256, data.data()); });
  const auto copy = [&](bool waits, bool sync) {
    int* const to = smem<int>();
    const int i = static_cast<int>(threadIdx.x);
    ptx::cp_async(to + 4 * i, data.data() + 4 * i);
    ptx::cp_async_commit();
    if (waits) ptx::cp_async_wait<0>();
    if (sync) __syncthreads();
    use(to[sync ? 255 - 4 * i : 4 * i]);
  };
  expect_silence(kTwoWarps, [&] { copy(true, true); });
  expect_silence(kTwoWarps, [&] { copy(true, false); });
  expect_checked_report("copy still in flight", kTwoWarps, [&] { copy(false, false); });
  expect_checked_report("race: ", kTwoWarps, [&] {
    copy(true, false);
    use(smem<int>()[255 - 4 * static_cast<int>(threadIdx.x)]);  // another thread's copy
  });
}

inline const Cases kMisuse = {
    {"misuse of barriers", test_barrier_misuse},
    {"misuse of warp collectives", test_collective_misuse},
    {"misuse of shared memory", test_shared_memory_misuse},
    {"misuse of copies", test_copy_misuse},
};

}  // namespace nld::emulator_test
