// The PTX instructions that Hopper brought: mbarriers, TMA, wgmma.
#pragma once

#include "common/ptx.cuh"

#if !NLD_ON_DEVICE || defined(__CUDA_ARCH_FEAT_SM90_ALL)

namespace nld::ptx {

#if NLD_ON_DEVICE
struct alignas(64) TensorMap2d {
  unsigned char opaque[128];
};  // a CUtensorMap
#else
using TensorMap2d = ::emu::TensorMap2d;
#endif

// ---- mbarrier --------------------------------------------------------------------------
PTX_FN void mbar_init(uint64_t* bar, int count PTX_LOC_) {
#if NLD_ON_DEVICE
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(smem_u32(bar)), "r"(count) : "memory");
#else
  ::emu::mbar_init(bar, unsigned(count), loc);
#endif
}
PTX_FN void mbar_init_fence() {
#if NLD_ON_DEVICE
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
#endif
}
PTX_FN void mbar_arrive(uint64_t* bar PTX_LOC_) {
#if NLD_ON_DEVICE
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(smem_u32(bar)) : "memory");
#else
  ::emu::mbar_arrive(bar, 0, loc);
#endif
}
PTX_FN void mbar_arrive_expect_tx(uint64_t* bar, int bytes PTX_LOC_) {
#if NLD_ON_DEVICE
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(smem_u32(bar)), "r"(bytes) : "memory");
#else
  ::emu::mbar_arrive(bar, unsigned(bytes), loc);
#endif
}
PTX_FN void mbar_wait(uint64_t* bar, int parity PTX_LOC_) {
#if NLD_ON_DEVICE
  asm volatile(
      "{\n .reg .pred p;\n"
      "WAIT_%=: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      " @p bra DONE_%=;\n bra WAIT_%=;\n DONE_%=:\n}\n" ::"r"(smem_u32(bar)),
      "r"(parity)
      : "memory");
#else
  ::emu::mbar_wait(bar, unsigned(parity), loc);
#endif
}
PTX_FN void fence_proxy_async() {
#if NLD_ON_DEVICE
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
#else
  ::emu::fence_proxy_async();
#endif
}

// ---- TMA ----------------------------------------------------------------------------------
PTX_FN void tma_load_2d(void* dst, const TensorMap2d* map, int col, int row, uint64_t* bar PTX_LOC_) {
#if NLD_ON_DEVICE
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];\n" ::"r"(smem_u32(dst)),
      "l"(map), "r"(col), "r"(row), "r"(smem_u32(bar))
      : "memory");
#else
  ::emu::tma_load_2d(dst, map, col, row, bar, loc);
#endif
}

// ---- wgmma m64n64k16, bf16, both operands K-major in 128-byte swizzled shared memory ----------
// Address, leading and stride offsets in 16-byte units; layout code 1 = 128-byte swizzle.
PTX_FN uint64_t wgmma_desc_sw128(const void* tile) {
#if NLD_ON_DEVICE
  const uint64_t addr = smem_u32(tile);
#else
  const uint64_t addr = ::emu::smem_addr(tile);
#endif
  return ((addr & 0x3ffff) >> 4) | (uint64_t(1) << 16) | (uint64_t(1024 >> 4) << 32) | (uint64_t(1) << 62);
}
PTX_FN void wgmma_fence() {
#if NLD_ON_DEVICE
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
#endif
}
PTX_FN void wgmma_commit() {
#if NLD_ON_DEVICE
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
#else
  ::emu::wgmma_commit();
#endif
}
PTX_FN void wgmma_m64n64k16(float (&d)[32], uint64_t da, uint64_t db, int accumulate PTX_LOC_) {
#if NLD_ON_DEVICE
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, "
      "%32, %33, p, 1, 1, 0, 0;\n}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
        "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
        "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "l"(da), "l"(db), "r"(accumulate));
#else
  ::emu::wgmma_bf16(d, 64, da, db, accumulate != 0, loc);
#endif
}
#if NLD_ON_DEVICE
template <int N>
PTX_FN void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(N) : "memory");
}
#else
template <int N>
void wgmma_wait(EMU_LOC) {
  ::emu::wgmma_wait(N, loc);
}
#endif

}  // namespace nld::ptx

#endif
