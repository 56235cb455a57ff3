// Every PTX instruction the kernels use, under a plain name, in two versions:
// inline PTX for the device and an emulated twin for the host.  Kernels contain
// no asm of their own and hold addresses as generic pointers.
#pragma once
#include "common/prelude.cuh"

#if NLD_ON_DEVICE
#define PTX_FN __device__ __forceinline__
#define PTX_LOC_
namespace ptx {
PTX_FN uint32_t smem_u32(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
}  // namespace ptx
#else
#define PTX_FN inline
#define PTX_LOC_ , ::emu::Loc loc = ::emu::Loc::current()
#include "emulator/ptx_host.h"
#endif

namespace ptx {

#if NLD_ON_DEVICE
struct alignas(64) TensorMap2d {
  unsigned char opaque[128];
};  // a CUtensorMap
#else
using TensorMap2d = emu::TensorMap2d;
#endif

// ---- cp.async -------------------------------------------------------------------
// Copies 16 bytes, of which the first `valid` (0..16) come from src and the rest are zero.
PTX_FN void cp_async16(void* dst, const void* src, int valid PTX_LOC_) {
#if NLD_ON_DEVICE
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(smem_u32(dst)), "l"(src), "r"(valid) : "memory");
#else
  emu::cp_async(dst, src, 16, unsigned(valid), loc);
#endif
}
PTX_FN void cp_async_commit() {
#if NLD_ON_DEVICE
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#else
  emu::cp_async_commit();
#endif
}
#if NLD_ON_DEVICE
template <int N>
PTX_FN void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}
#else
template <int N>
void cp_async_wait(EMU_LOC) {
  emu::cp_async_wait(N, loc);
}
#endif

// ---- ldmatrix --------------------------------------------------------------------
// Lane l supplies the address of row (l % 8) of 8x8 matrix (l / 8).
PTX_FN void ldmatrix_x4(uint32_t (&r)[4], const void* row PTX_LOC_) {
#if NLD_ON_DEVICE
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_u32(row))
               : "memory");
#else
  host::ldmatrix_x4(r, row, false, loc);
#endif
}
PTX_FN void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row PTX_LOC_) {
#if NLD_ON_DEVICE
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_u32(row))
               : "memory");
#else
  host::ldmatrix_x4(r, row, true, loc);
#endif
}

// ---- mma.sync m16n8k16, bf16 inputs, f32 accumulator: d += a * b -------------------
PTX_FN void mma_bf16_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1 PTX_LOC_) {
#if NLD_ON_DEVICE
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  host::mma_bf16_16816(d, a, b0, b1, loc);
#endif
}

PTX_FN uint32_t pack_bf16(float lo, float hi) {
  __nv_bfloat162 v = __floats2bfloat162_rn(lo, hi);
  uint32_t u;
  memcpy(&u, &v, 4);
  return u;
}
PTX_FN float exp2_approx(float x) {
#if NLD_ON_DEVICE
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

// ---- named barriers -----------------------------------------------------------------
PTX_FN void named_barrier_sync(int id, int threads PTX_LOC_) {
#if NLD_ON_DEVICE
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
#else
  emu::bar_sync(unsigned(id), unsigned(threads), "bar.sync", loc);
#endif
}

#if !NLD_ON_DEVICE || (defined(__CUDA_ARCH_FEAT_SM90_ALL))
#define PTX_HAS_SM90 1
#else
#define PTX_HAS_SM90 0
#endif

#if PTX_HAS_SM90
// ---- mbarrier --------------------------------------------------------------------------
PTX_FN void mbar_init(uint64_t* bar, int count PTX_LOC_) {
#if NLD_ON_DEVICE
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(smem_u32(bar)), "r"(count) : "memory");
#else
  emu::mbar_init(bar, unsigned(count), loc);
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
  emu::mbar_arrive(bar, 0, loc);
#endif
}
PTX_FN void mbar_arrive_expect_tx(uint64_t* bar, int bytes PTX_LOC_) {
#if NLD_ON_DEVICE
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(smem_u32(bar)), "r"(bytes) : "memory");
#else
  emu::mbar_arrive(bar, unsigned(bytes), loc);
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
  emu::mbar_wait(bar, unsigned(parity), loc);
#endif
}
PTX_FN void fence_proxy_async() {
#if NLD_ON_DEVICE
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
#else
  emu::fence_proxy_async();
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
  emu::tma_load_2d(dst, map, col, row, bar, loc);
#endif
}

// ---- wgmma m64n64k16, bf16, both operands K-major in 128-byte swizzled shared memory ----------
// Address, leading and stride offsets in 16-byte units; layout code 1 = 128-byte swizzle.
PTX_FN uint64_t wgmma_desc_sw128(const void* tile) {
#if NLD_ON_DEVICE
  const uint64_t addr = smem_u32(tile);
#else
  const uint64_t addr = emu::smem_addr(tile);
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
  emu::wgmma_commit();
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
  emu::wgmma_bf16(d, 64, da, db, accumulate != 0, loc);
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
  emu::wgmma_wait(N, loc);
}
#endif
#endif  // PTX_HAS_SM90

}  // namespace ptx
