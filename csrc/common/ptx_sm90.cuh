// The PTX instructions that came with sm_90: mbarriers with transaction counts, bulk and tensor copies (TMA), clusters.
// They exist everywhere, so that one kernel compiles for all GPUs, and trap where the chip lacks them: guard the code
// path with ptx::kHasSm90. wgmma is in ptx_wgmma.cuh.
#pragma once

#include "common/ptx.cuh"

#if NLD_ON_DEVICE
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define NLD_ASM_SM90(...) asm volatile(__VA_ARGS__)
#else
#define NLD_ASM_SM90(...) __trap()
#endif
#endif

namespace nld::ptx {

#if NLD_ON_DEVICE && (!defined(__CUDA_ARCH__) || __CUDA_ARCH__ < 900)
inline constexpr bool kHasSm90 = false;
#else
inline constexpr bool kHasSm90 = true;
#endif

// ---- mbarrier: 8 bytes of shared memory that count arrivals and bytes ---------------------------------------------
// A phase ends when `count` arrivals have come and all expected bytes have been copied. mbar_wait(bar, parity)
// returns once the phase of that parity has ended: the first one is 0, then 1, 0 ... so a fresh barrier lets parity
// 1 through at once.

// By one thread; before others use it: mbar_init_fence() and a barrier of the CTA (or cluster).
PTX_FN void mbar_init(uint64_t* bar, int count PTX_LOC_) {
#if NLD_ON_DEVICE
  NLD_ASM_SM90("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_u32(bar)), "r"(count) : "memory");
#else
  ::emu::mbar_init(bar, static_cast<unsigned>(count), loc);
#endif
}
// Makes initialised barriers visible to the copy engine and to the other CTAs of the cluster.
PTX_FN void mbar_init_fence() {
#if NLD_ON_DEVICE
  NLD_ASM_SM90("fence.mbarrier_init.release.cluster;" :: : "memory");
#else
  ::emu::mbar_init_fence();
#endif
}
// Before the memory is used for something else.
PTX_FN void mbar_inval(uint64_t* bar PTX_LOC_) {
#if NLD_ON_DEVICE
  NLD_ASM_SM90("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(smem_u32(bar)) : "memory");
#else
  ::emu::mbar_inval(bar, loc);
#endif
}
PTX_FN void mbar_arrive(uint64_t* bar PTX_LOC_) {
#if NLD_ON_DEVICE
  NLD_ASM_SM90("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_u32(bar)) : "memory");
#else
  ::emu::mbar_arrive(bar, 0, loc);
#endif
}
// Announces bytes that copies will bring in this phase, and arrives.
PTX_FN void mbar_arrive_expect_tx(uint64_t* bar, int num_bytes PTX_LOC_) {
#if NLD_ON_DEVICE
  NLD_ASM_SM90("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_u32(bar)),
               "r"(num_bytes) : "memory");
#else
  ::emu::mbar_arrive(bar, static_cast<unsigned>(num_bytes), loc);
#endif
}
// Announces bytes without arriving; this thread or one ordered after it arrives later.
PTX_FN void mbar_expect_tx(uint64_t* bar, int num_bytes PTX_LOC_) {
#if NLD_ON_DEVICE
  NLD_ASM_SM90("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(smem_u32(bar)),
               "r"(num_bytes) : "memory");
#else
  ::emu::mbar_expect_tx(bar, static_cast<unsigned>(num_bytes), loc);
#endif
}
// Arrives at the same barrier of CTA `rank` of the cluster, releasing what this thread wrote to the whole cluster. That
// CTA waits with mbar_wait<kCluster>.
PTX_FN void mbar_arrive_remote(uint64_t* bar, int rank PTX_LOC_) {
#if NLD_ON_DEVICE
  NLD_ASM_SM90(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n}" ::"r"(smem_u32(bar)),
      "r"(rank) : "memory");
#else
  ::emu::mbar_arrive(static_cast<uint64_t*>(::emu::map_rank(bar, static_cast<unsigned>(rank))), 0, loc);
#endif
}

enum class Scope { kCta, kCluster };

// Whether the phase of that parity has ended; may wait a little for it.
template <Scope kScope = Scope::kCta>
PTX_FN bool mbar_try_wait(uint64_t* bar, int parity PTX_LOC_) {
#if NLD_ON_DEVICE
  uint32_t done = 0;
  if constexpr (kScope == Scope::kCta) {
    NLD_ASM_SM90(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.b32 %0, 1, 0, p;\n}" : "=r"(
            done) : "r"(smem_u32(bar)),
        "r"(parity) : "memory");
  } else {
    NLD_ASM_SM90(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.b32 %0, 1, 0, p;\n}" : "=r"(done) : "r"(smem_u32(bar)),
        "r"(parity) : "memory");
  }
  return done != 0;
#else
  return ::emu::mbar_try_wait(bar, static_cast<unsigned>(parity), loc);
#endif
}
template <Scope kScope = Scope::kCta>
PTX_FN void mbar_wait(uint64_t* bar, int parity PTX_LOC_) {
#if NLD_ON_DEVICE
  while (!mbar_try_wait<kScope>(bar, parity)) {
  }
#else
  ::emu::mbar_wait(bar, static_cast<unsigned>(parity), loc);
#endif
}

// Between ordinary writes to shared memory and their use by the copy engine or by wgmma (the "async proxy").
PTX_FN void fence_proxy_async() {
#if NLD_ON_DEVICE
  NLD_ASM_SM90("fence.proxy.async.shared::cta;" :: : "memory");
#else
  ::emu::fence_proxy_async();
#endif
}

// ---- bulk copies: issued by one thread, landing on an mbarrier ----------------------------------------------------

// Contiguous bytes; both addresses and the size are multiples of 16.
PTX_FN void bulk_load(void* dst, const void* src, int num_bytes, uint64_t* bar PTX_LOC_) {
#if NLD_ON_DEVICE
  NLD_ASM_SM90(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(smem_u32(dst)),
      "l"(gmem_u64(src)), "r"(num_bytes), "r"(smem_u32(bar)) : "memory");
#else
  ::emu::bulk_load(dst, src, static_cast<unsigned>(num_bytes), bar, loc);
#endif
}

// How 16-byte chunks of shared memory are shuffled: each row of 32, 64 or 128 bytes differently, so that a column of
// chunks touches all banks. See layouts in csrc/emulator/tests/layouts.h.
enum class Swizzle : int { kNone = 0, k32 = 32, k64 = 64, k128 = 128 };

// Describes a tensor and the box that one copy brings; made on the host by common/tensor_map.h and passed to the kernel
// as a __grid_constant__ parameter.
#if NLD_ON_DEVICE
struct alignas(64) TensorMap {
  unsigned char opaque[128];  // a CUtensorMap
};
#else
using TensorMap = ::emu::TensorMap;
#endif

PTX_FN void prefetch_tensor_map(const TensorMap* map) {
#if NLD_ON_DEVICE
  NLD_ASM_SM90("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#else
  static_cast<void>(map);
#endif
}

// How long L2 is to keep what a copy reads: the words that createpolicy makes for whole lines, as CUTLASS passes them.
enum class L2Keep : uint64_t {
  kNormally = 0x1000000000000000,
  kLeast = 0x12f0000000000000,  // the first to go: data that is read once
  kMost = 0x14f0000000000000,
};

// Copies the box that starts at element at[0] of the innermost dimension, at[1] of the next ... Coordinates may be
// negative or beyond the end: such elements become zero and count as bytes all the same. dst is aligned to 128 bytes,
// with a swizzle of 128 bytes to 1024 (64: 512, 32: 256).
template <int kRank>
PTX_FN void tma_load(void* dst, const TensorMap* map, const int (&at)[kRank], uint64_t* bar,
                     L2Keep keep = L2Keep::kNormally PTX_LOC_) {
  static_assert(kRank >= 1 && kRank <= 5);
#if NLD_ON_DEVICE
#define NLD_TMA(dim, corner, ...)                                                                             \
  NLD_ASM_SM90("cp.async.bulk.tensor." dim                                                                    \
               ".shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {" corner \
               "}], [%2], %3;" ::"r"(to),                                                                     \
               "l"(map), "r"(on), "l"(static_cast<uint64_t>(keep)), __VA_ARGS__ : "memory")
  const uint32_t to = smem_u32(dst), on = smem_u32(bar);
  if constexpr (kRank == 1) {
    NLD_TMA("1d", "%4", "r"(at[0]));
  } else if constexpr (kRank == 2) {
    NLD_TMA("2d", "%4, %5", "r"(at[0]), "r"(at[1]));
  } else if constexpr (kRank == 3) {
    NLD_TMA("3d", "%4, %5, %6", "r"(at[0]), "r"(at[1]), "r"(at[2]));
  } else if constexpr (kRank == 4) {
    NLD_TMA("4d", "%4, %5, %6, %7", "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]));
  } else {
    NLD_TMA("5d", "%4, %5, %6, %7, %8", "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4]));
  }
#undef NLD_TMA
#else
  static_cast<void>(keep);
  ::emu::tma_load(dst, map, at, kRank, bar, loc);
#endif
}

// ---- clusters: CTAs that run together and see each other's shared memory ------------------------------------------
// A launch without clusters has clusters of one CTA, on older GPUs too.

PTX_FN int cluster_rank() {
#if NLD_ON_DEVICE
  uint32_t rank = 0;
  if constexpr (kHasSm90) NLD_ASM_SM90("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
#else
  return static_cast<int>(::emu::t_cur->block->rank);
#endif
}
PTX_FN int cluster_size() {
#if NLD_ON_DEVICE
  uint32_t size = 1;
  if constexpr (kHasSm90) NLD_ASM_SM90("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return static_cast<int>(size);
#else
  return static_cast<int>(::emu::cluster_size());
#endif
}
// Every thread of the cluster arrives and then waits; in between it may do what needs no other CTA. What was written to
// any shared memory before an arrive is visible after the wait. A CTA whose memory others read must not exit before the
// last of them has arrived: end with cluster_sync().
PTX_FN void cluster_arrive(PTX_LOC_ONLY_) {
#if NLD_ON_DEVICE
  NLD_ASM_SM90("barrier.cluster.arrive.release.aligned;" :: : "memory");
#else
  ::emu::cluster_arrive(loc);
#endif
}
// The same without making writes visible (they cost a fence of the whole GPU): tells that this CTA has started, and
// mbarriers that went through mbar_init_fence().
PTX_FN void cluster_arrive_relaxed(PTX_LOC_ONLY_) {
#if NLD_ON_DEVICE
  NLD_ASM_SM90("barrier.cluster.arrive.relaxed.aligned;" :: : "memory");
#else
  ::emu::cluster_arrive(loc, false);
#endif
}
PTX_FN void cluster_wait(PTX_LOC_ONLY_) {
#if NLD_ON_DEVICE
  NLD_ASM_SM90("barrier.cluster.wait.acquire.aligned;" :: : "memory");
#else
  ::emu::cluster_wait(loc);
#endif
}
PTX_FN void cluster_sync(PTX_LOC_ONLY_) {
#if NLD_ON_DEVICE
  if constexpr (kHasSm90) {
    cluster_arrive();
    cluster_wait();
  } else {
    __syncthreads();
  }
#else
  ::emu::cluster_arrive(loc);
  ::emu::cluster_wait(loc);
#endif
}

// The address of *p of CTA `rank`, good for ordinary loads, stores and atomics.
template <class T>
PTX_FN T* map_to_rank(T* p, int rank) {
#if NLD_ON_DEVICE
  if constexpr (kHasSm90) {
    uint64_t there = 0;
    NLD_ASM_SM90("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(p), "r"(rank));
    return reinterpret_cast<T*>(there);
  } else {
    return p;
  }
#else
  return static_cast<T*>(::emu::map_rank(p, static_cast<unsigned>(rank)));
#endif
}
// The same with an explicit state space. (nvcc 13 makes the same generic loads and stores of both.)
PTX_FN uint32_t load_from_rank(const uint32_t* p, int rank) {
#if NLD_ON_DEVICE
  uint32_t value = 0;
  if constexpr (kHasSm90) {
    NLD_ASM_SM90(
        "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %1, %2;\nld.shared::cluster.u32 %0, [there];\n}" : "=r"(
            value) : "r"(smem_u32(p)),
        "r"(rank) : "memory");
  } else {
    value = *p;
  }
  return value;
#else
  return *static_cast<const uint32_t*>(::emu::map_rank(const_cast<uint32_t*>(p), static_cast<unsigned>(rank)));
#endif
}
PTX_FN void store_to_rank(uint32_t* p, uint32_t value, int rank) {
#if NLD_ON_DEVICE
  if constexpr (kHasSm90) {
    NLD_ASM_SM90(
        "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %2;\nst.shared::cluster.u32 [there], %1;\n}" ::"r"(
            smem_u32(p)),
        "r"(value), "r"(rank) : "memory");
  } else {
    *p = value;
  }
#else
  *static_cast<uint32_t*>(::emu::map_rank(p, static_cast<unsigned>(rank))) = value;
#endif
}

// Writes 16 bytes to *p of CTA `rank`, some time later: they count as bytes on *bar of that CTA, whose threads may read
// them after mbar_wait<kCluster>. No fence, no arrival; that CTA announces the bytes (mbar_arrive_expect_tx).
PTX_FN void store_async_to_rank(void* p, uint4 value, uint64_t* bar, int rank PTX_LOC_) {
#if NLD_ON_DEVICE
  NLD_ASM_SM90(
      "{\n.reg .b32 there, on;\nmapa.shared::cluster.u32 there, %0, %6;\nmapa.shared::cluster.u32 on, %1, %6;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 [there], {%2, %3, %4, %5}, [on];\n}" ::"r"(
          smem_u32(p)),
      "r"(smem_u32(bar)), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(rank) : "memory");
#else
  ::emu::store_async(p, &value, bar, static_cast<unsigned>(rank), loc);
#endif
}

// True in one lane of the full warp; the same lane every time, but do not rely on which.
PTX_FN bool elect_one(PTX_LOC_ONLY_) {
#if NLD_ON_DEVICE
  uint32_t elected = 0;
  NLD_ASM_SM90("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.b32 %0, 1, 0, p;\n}" : "=r"(elected)::"memory");
  return elected != 0;
#else
  return host::elect_one(loc);
#endif
}

}  // namespace nld::ptx
