// Kernels that break one rule of an asynchronous instruction each: the emulator must tell. Not for GPUs.
#pragma once

#include <cmath>
#include <cstring>

#include "emulator/tests/ptx_wgmma.cuh"

namespace nld::ptx_test {

// Runs a kernel whose report must hold `text`. Parts between bars are alternatives: which one depends on the order.
template <class Kernel>
void expect_report(const char* text, unsigned num_threads, size_t smem_bytes, Kernel kernel, unsigned num_ctas = 1) {
  const std::string report = report_of({dim3(num_ctas), dim3(num_threads), smem_bytes, num_ctas}, kernel);
  const std::string wanted = text;
  for (size_t begin = 0, end; begin <= wanted.size(); begin = end + 1) {
    end = std::min(wanted.find('|', begin), wanted.size());
    if (report.find(wanted.substr(begin, end - begin)) != std::string::npos) return;
  }
  throw Failure("the report must hold \"" + wanted + "\", got: " + (report.empty() ? "none" : report));
}
// The same for what only the race checker sees.
template <class Kernel>
void expect_checked(const char* text, unsigned num_threads, size_t smem_bytes, Kernel kernel, unsigned num_ctas = 1) {
  if (kIsChecked) expect_report(text, num_threads, smem_bytes, kernel, num_ctas);
}

struct MisuseSmem {
  alignas(1024) unsigned char tile[4096];
  uint64_t bar;
  int value[256];
};
constexpr size_t kMisuseSmem = sizeof(MisuseSmem);

inline MisuseSmem* misuse_smem() {
  NLD_DYNAMIC_SMEM(MisuseSmem, sm);
  return sm;
}
// By thread 0, and everybody waits for it.
inline MisuseSmem* with_barrier(int count, bool fenced = true) {
  MisuseSmem* sm = misuse_smem();
  if (threadIdx.x == 0) {
    ptx::mbar_init(&sm->bar, count);
    if (fenced) ptx::mbar_init_fence();
  }
  __syncthreads();
  return sm;
}
template <class T>
void use(T value) {  // a read that the compiler cannot leave out
  asm volatile("" ::"r"(value));
}

inline void misuse_cp_async() {
  Array<uint32_t> src(1024, 1);
  const uint32_t* from = src.data();
  expect_checked("asynchronous copy still in flight", 32, kMisuseSmem, [=] {
    MisuseSmem* sm = misuse_smem();
    ptx::cp_async<16>(sm->tile + threadIdx.x * 16, from);
    ptx::cp_async_commit();
    use(sm->tile[threadIdx.x * 16]);
  });
  expect_checked("asynchronous copy still in flight", 32, kMisuseSmem, [=] {  // the second group, one wait too shallow
    MisuseSmem* sm = misuse_smem();
    for (int i = 0; i < 2; ++i) {
      ptx::cp_async<16>(sm->tile + (i * 32 + threadIdx.x) * 16, from);
      ptx::cp_async_commit();
    }
    ptx::cp_async_wait<1>();
    use(sm->tile[(32 + threadIdx.x) * 16]);
  });
  expect_checked("race: read not ordered after write|never written|still in flight", 64, kMisuseSmem,
                 [=] {  // waited for its own copies only
                   MisuseSmem* sm = misuse_smem();
                   ptx::cp_async<16>(sm->tile + threadIdx.x * 16, from);
                   ptx::cp_async_commit();
                   ptx::cp_async_wait<0>();
                   use(sm->tile[(threadIdx.x ^ 32) * 16]);
                 });
  expect_report("not aligned", 1, kMisuseSmem, [=] { ptx::cp_async<16>(misuse_smem()->tile, from + 1, 0); });
  expect_report("source size exceeds", 1, kMisuseSmem, [=] { ptx::cp_async<8>(misuse_smem()->tile, from, 16); });
  expect_report("outside the block's shared memory", 1, kMisuseSmem,
                [=] { ptx::cp_async<4>(const_cast<uint32_t*>(from), from); });
}

inline void misuse_mbar() {
  expect_report("before mbarrier.init", 1, kMisuseSmem, [] { ptx::mbar_arrive(&misuse_smem()->bar); });
  expect_checked("race: read not ordered after write|before mbarrier.init", 2, kMisuseSmem, [] {
    MisuseSmem* sm = misuse_smem();
    if (threadIdx.x == 0) ptx::mbar_init(&sm->bar, 2);
    ptx::mbar_arrive(&sm->bar);
  });
  expect_report("more arrivals than its count", 1, kMisuseSmem, [] {
    MisuseSmem* sm = with_barrier(1);
    ptx::mbar_arrive_expect_tx(&sm->bar, 16);
    ptx::mbar_arrive(&sm->bar);
  });
  expect_report("deadlock", 32, kMisuseSmem, [] {  // one arrival short
    MisuseSmem* sm = with_barrier(33);
    ptx::mbar_arrive(&sm->bar);
    ptx::mbar_wait(&sm->bar, 0);
  });
  expect_report("parity must be 0 or 1", 1, kMisuseSmem, [] { ptx::mbar_wait(&with_barrier(1)->bar, 2); });
  expect_report("its memory was overwritten", 1, kMisuseSmem, [] {
    MisuseSmem* sm = with_barrier(1);
    std::memset(sm, 0, sizeof *sm);
    ptx::mbar_arrive(&sm->bar);
  });
  expect_report("count must be 1", 1, kMisuseSmem, [] { ptx::mbar_init(&misuse_smem()->bar, 0); });
  expect_checked("race: write not ordered after read", 2, kMisuseSmem,
                 [] {  // reinitialised under another thread's hands
                   MisuseSmem* sm = with_barrier(2);
                   ptx::mbar_arrive(&sm->bar);
                   ptx::mbar_wait(&sm->bar, 0);
                   if (threadIdx.x == 0) ptx::mbar_inval(&sm->bar);
                 });
}

inline void misuse_bulk() {
  Array<unsigned char> src(4096, 1);
  const unsigned char* from = src.data();
  const auto copy = [=](MisuseSmem* sm, int expected, int actual) {
    if (threadIdx.x == 0) {
      ptx::mbar_arrive_expect_tx(&sm->bar, expected);
      ptx::bulk_load(sm->tile, from, actual, &sm->bar);
    }
  };
  expect_report("without mbar_init_fence", 32, kMisuseSmem, [=] { copy(with_barrier(1, false), 256, 256); });
  for (const int expected : {128, 512}) {
    expect_report("deadlock", 32, kMisuseSmem, [=] {
      MisuseSmem* sm = with_barrier(1);
      copy(sm, expected, 256);
      ptx::mbar_wait(&sm->bar, 0);
    });
  }
  expect_report("multiples of 16", 32, kMisuseSmem, [=] { copy(with_barrier(1), 8, 8); });
  expect_checked("still in flight|race: read not ordered after write|deadlock", 32, kMisuseSmem,
                 [=] {  // waits for a phase long over
                   MisuseSmem* sm = with_barrier(1);
                   copy(sm, 256, 256);
                   __syncthreads();
                   ptx::mbar_wait(&sm->bar, 1);
                   use(sm->tile[threadIdx.x]);
                 });
  expect_checked("race: write not ordered after read", 64, kMisuseSmem,
                 [=] {  // a stage refilled before all have read it
                   MisuseSmem* sm = with_barrier(1);
                   copy(sm, 256, 256);
                   ptx::mbar_wait(&sm->bar, 0);
                   use(sm->tile[threadIdx.x]);
                   if (threadIdx.x == 0) use(sm->tile[0]);
                   __syncwarp();
                   copy(sm, 256, 256);
                   ptx::mbar_wait(&sm->bar, 1);
                 });
  ptx::TensorMap map;
  const TensorMapSpec spec{from, DType::kBF16, 2, {64, 8}, {1, 64}, {64, 8}, ptx::Swizzle::k128};
  expect(make_tensor_map(&map, spec) == nullptr, "the map is fine");
  expect_report("not aligned for its swizzle", 1, kMisuseSmem, [=] {
    MisuseSmem* sm = with_barrier(1);
    ptx::tma_load<2>(sm->tile + 512, &map, {0, 0}, &sm->bar);
  });
  expect_report("another rank", 1, kMisuseSmem, [=] {
    MisuseSmem* sm = with_barrier(1);
    ptx::tma_load<3>(sm->tile, &map, {0, 0, 0}, &sm->bar);
  });
}

inline void misuse_cluster() {
  expect_report("arrived twice", 32, kMisuseSmem, [] {
    ptx::cluster_arrive();
    ptx::cluster_arrive();
  });
  expect_report("wait without arrive", 32, kMisuseSmem, [] { ptx::cluster_wait(); });
  expect_checked(
      "race: read not ordered after write|never written", 32, kMisuseSmem,
      [] {
        MisuseSmem* sm = misuse_smem();
        ptx::cluster_arrive_relaxed();
        sm->value[threadIdx.x] = 1;
        ptx::cluster_wait();
        use(*ptx::map_to_rank(&sm->value[threadIdx.x], 1 - ptx::cluster_rank()));
        ptx::cluster_sync();
      },
      2);
  expect_report(
      "may not have started", 32, kMisuseSmem,
      [] {
        use(*ptx::map_to_rank(&misuse_smem()->value[threadIdx.x], 1 - ptx::cluster_rank()));
        ptx::cluster_sync();
      },
      2);
  expect_report(
      "has exited", 32, kMisuseSmem,
      [] {
        MisuseSmem* sm = misuse_smem();
        sm->value[threadIdx.x] = 1;
        ptx::cluster_sync();
        if (ptx::cluster_rank() == 0) return;
        for (int i = 0; i < 1000; ++i) __nanosleep(20);  // the other CTA is gone by now
        use(*ptx::map_to_rank(&sm->value[threadIdx.x], 0));
      },
      2);
  expect_report("no CTA of that rank", 32, kMisuseSmem, [] { ptx::map_to_rank(&misuse_smem()->value[0], 1); });
  expect_report(
      "without its mbar_init_fence", 32, kMisuseSmem,
      [] {
        MisuseSmem* sm = with_barrier(32, false);
        ptx::cluster_sync();
        ptx::mbar_arrive_remote(&sm->bar, 1 - ptx::cluster_rank());
        ptx::cluster_sync();
      },
      2);
  expect_report(
      "only the CTA that owns it can wait", 32, kMisuseSmem,
      [] {
        MisuseSmem* sm = with_barrier(32);
        ptx::cluster_sync();
        ptx::mbar_wait(ptx::map_to_rank(&sm->bar, 1 - ptx::cluster_rank()), 1);
        ptx::cluster_sync();
      },
      2);
  expect_report("deadlock", 32, 0, [] {  // in a part of the warp
    if (threadIdx.x < 16) use(ptx::elect_one());
  });
  expect_report("different numbers", 128, 0, [] {
    if (threadIdx.x < 64) {
      ptx::give_up_registers<40>();
    } else {
      ptx::give_up_registers<48>();
    }
  });
}

// A warpgroup multiplies a tile by itself.
inline void misuse_wgmma() {
  constexpr auto kSpan = ptx::Swizzle::k128;
  const auto fill = [] {
    MisuseSmem* sm = misuse_smem();
    for (int i = threadIdx.x; i < 2048; i += 128) reinterpret_cast<uint16_t*>(sm->tile)[i] = 0x3f80;
    return sm;
  };
  const auto ready = [=] {
    MisuseSmem* sm = fill();
    ptx::fence_proxy_async();
    __syncthreads();
    return sm;
  };
  const auto desc = [](MisuseSmem* sm, int offset) { return ptx::wgmma_desc(sm->tile + offset, 16, 1024, kSpan); };
  const auto multiply = [=](MisuseSmem* sm, float (&d)[8]) {
    ptx::wgmma_reg_a<bf16, 16>(d, {0x3f803f80u, 0x3f803f80u, 0x3f803f80u, 0x3f803f80u}, desc(sm, 0), false);
    ptx::wgmma_commit();
  };
  expect_checked("without fence.proxy.async", 128, kMisuseSmem, [=] {
    MisuseSmem* sm = fill();
    __syncthreads();
    float d[8];
    ptx::wgmma_fence();
    multiply(sm, d);
    ptx::wgmma_wait<0>();
  });
  expect_report("without wgmma_fence", 128, kMisuseSmem, [=] {
    MisuseSmem* sm = ready();
    float d[8];
    multiply(sm, d);
    ptx::wgmma_wait<0>();
  });
  expect_report("without wgmma_fence", 128, kMisuseSmem, [=] {  // the second round
    MisuseSmem* sm = ready();
    float d[8];
    ptx::wgmma_fence();
    for (int i = 0; i < 2; ++i) {
      multiply(sm, d);
      ptx::wgmma_wait<0>();
    }
  });
  expect_report("must agree", 128, kMisuseSmem, [=] {
    MisuseSmem* sm = ready();
    float d[8];
    ptx::wgmma_fence();
    ptx::wgmma<bf16, 16>(d, desc(sm, 0), desc(sm, threadIdx.x < 64 ? 0 : 32), false);
  });
  expect_report("not aligned to its swizzle", 128, kMisuseSmem, [=] {
    MisuseSmem* sm = ready();
    float d[8];
    ptx::wgmma_fence();
    ptx::wgmma<bf16, 16>(d, desc(sm, 0), desc(sm, 128), false);
  });
  expect_checked("race", 128, kMisuseSmem, [=] {  // operands overwritten while they are read
    MisuseSmem* sm = ready();
    float d[8];
    ptx::wgmma_fence();
    multiply(sm, d);
    sm->tile[threadIdx.x] = 0;
    ptx::wgmma_wait<0>();
  });
  expect_report("deadlock", 128, kMisuseSmem, [=] {  // by three of the four warps
    MisuseSmem* sm = ready();
    float d[8];
    ptx::wgmma_fence();
    if (threadIdx.x < 96) multiply(sm, d);
  });
  Array<float> out(2 * 128);  // not waited for, and waited for one group too few
  float* to = out.data();
  ::emu::launch({dim3(1), dim3(128), kMisuseSmem}, "misuse", [=] {
    MisuseSmem* sm = ready();
    float d[8], e[8];
    ptx::wgmma_fence();
    multiply(sm, d);
    to[threadIdx.x] = d[0];
    multiply(sm, e);
    ptx::wgmma_wait<1>();
    to[128 + threadIdx.x] = e[7];
    ptx::wgmma_wait<0>();
    if (d[0] != 16.0f || e[7] != 16.0f) ::emu::fail("wrong product", ::emu::Loc::current());
  });
  for (int i = 0; i < 256; ++i) expect(std::isnan(out[i]), "thread %d sees %g before it has waited", i, out[i]);
}

}  // namespace nld::ptx_test
