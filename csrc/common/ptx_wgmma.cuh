// Hopper's matrix instructions (sm_90a only; elsewhere the wrappers trap): wgmma m64nNk16 by the four warps of a
// warpgroup, asynchronous, accumulators in registers.
//
// Use: write the operands, fence_proxy_async() if ordinary stores wrote them, barrier; wgmma_use(d) if d was written;
// wgmma_fence(); wgmma<...>() one or more times; wgmma_commit(); wgmma_wait<0>(); wgmma_use(d). Between the fence and
// the wait no thread touches the accumulators or the registers of A.
#pragma once

#include "common/ptx_sm90.cuh"

#if NLD_ON_DEVICE
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define NLD_ASM_SM90A(...) asm volatile(__VA_ARGS__)
#else
#define NLD_ASM_SM90A(...) __trap()
#endif
#endif

namespace nld::ptx {

#if NLD_ON_DEVICE && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
inline constexpr bool kHasWgmma = false;
#else
inline constexpr bool kHasWgmma = true;
#endif

// Where an operand lies in shared memory. A tile consists of pieces of 8 rows of `swizzle` bytes (16 without one),
// aligned to their size. K-major (each row runs along k): `stride` bytes lead to the next 8 rows, `leading` bytes to
// the next 16 bytes of k (only without a swizzle: with one, k steps of 32 bytes are added to the tile's address).
// MN-major (each row runs along the rows of A or columns of B; kTransA, kTransB): 8 rows are 8 steps of k, `stride`
// bytes lead to the next 8; `leading` bytes lead to the next swizzle-width along the row. (MN-major without a swizzle:
// the two change places.)
PTX_FN uint64_t wgmma_desc(const void* tile, int leading, int stride, Swizzle swizzle) {
#if NLD_ON_DEVICE
  const uint64_t address = smem_u32(tile);
#else
  const uint64_t address = ::emu::smem_addr(tile);
#endif
  const uint64_t code = swizzle == Swizzle::k128 ? 1 : swizzle == Swizzle::k64 ? 2 : swizzle == Swizzle::k32 ? 3 : 0;
  return (address & 0x3ffff) >> 4 | static_cast<uint64_t>(leading >> 4 & 0x3fff) << 16 |
         static_cast<uint64_t>(stride >> 4 & 0x3fff) << 32 | code << 62;
}

// Before the first wgmma, and again after registers of A or accumulators were written.
PTX_FN void wgmma_fence() {
#if NLD_ON_DEVICE
  NLD_ASM_SM90A("wgmma.fence.sync.aligned;" :: : "memory");
#else
  ::emu::wgmma_fence();
#endif
}
PTX_FN void wgmma_commit() {
#if NLD_ON_DEVICE
  NLD_ASM_SM90A("wgmma.commit_group.sync.aligned;" :: : "memory");
#else
  ::emu::wgmma_commit();
#endif
}
// Waits until at most kPending groups are under way.
template <int kPending>
PTX_FN void wgmma_wait(PTX_LOC_ONLY_) {
  static_assert(kPending >= 0 && kPending <= 7);
#if NLD_ON_DEVICE
  NLD_ASM_SM90A("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#else
  ::emu::wgmma_wait(kPending, loc);
#endif
}
// The compiler does not know that the accumulators change until wgmma_wait: this keeps its reads of them behind the
// wait, and its writes in front of the fence.
template <int kSize>
PTX_FN void wgmma_use(float (&d)[kSize]) {
#if NLD_ON_DEVICE
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+f"(d[i])::"memory");
#else
  static_cast<void>(d);
#endif
}
// The same for registers of A, which must not change before the wait.
template <int kSize>
PTX_FN void wgmma_use(uint32_t (&a)[kSize]) {
#if NLD_ON_DEVICE
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+r"(a[i])::"memory");
#else
  static_cast<void>(a);
#endif
}

#if NLD_ON_DEVICE
#define NLD_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define NLD_D8(i) NLD_D4(i), NLD_D4(i + 4)
#define NLD_D16(i) NLD_D8(i), NLD_D8(i + 8)
#define NLD_D32(i) NLD_D16(i), NLD_D16(i + 16)
#define NLD_D64(i) NLD_D32(i), NLD_D32(i + 32)
#define NLD_R4 "%0, %1, %2, %3"
#define NLD_R8 NLD_R4 ", %4, %5, %6, %7"
#define NLD_R16 NLD_R8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define NLD_R32 NLD_R16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NLD_R48 NLD_R32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define NLD_R64 NLD_R48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NLD_R96                                                                      \
  NLD_R64                                                                            \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define NLD_R128                                                                                 \
  NLD_R96                                                                                        \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
// i0 ...: the numbers of the operands after the accumulators.
// One instruction for n columns: `regs` names the accumulators, i0 to i6 are the numbers of the operands after them.
#define NLD_WGMMA(types, n, regs, i0, i1, i2, i3, i4, i5, i6, ...)                                                     \
  NLD_ASM_SM90A("{\n.reg .pred p;\nsetp.ne.b32 p, %" #i2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n "k16.f32." types \
                " {" regs "}, %" #i0 ", %" #i1 ", p, 1, 1, %" #i3 ", %" #i4 ";\n}" : __VA_ARGS__ : "l"(a),             \
                "l"(b), "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(kTransA)),                             \
                "n"(static_cast<int>(kTransB)))
#define NLD_WGMMA_REG_A(types, n, regs, i0, i1, i2, i3, i4, i5, i6, ...)                                               \
  NLD_ASM_SM90A(                                                                                                       \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %" #i5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n "k16.f32." types " {" regs \
      "}, {%" #i0 ", %" #i1 ", %" #i2 ", %" #i3 "}, %" #i4 ", p, 1, 1, %" #i6 ";\n}" : __VA_ARGS__ : "r"(a[0]),        \
      "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(kTransB)))
#define NLD_WGMMA_BY_N(instruction, types)                                                                           \
  if constexpr (kN == 8) instruction(types, 8, NLD_R4, 4, 5, 6, 7, 8, 9, 10, NLD_D4(0));                             \
  if constexpr (kN == 16) instruction(types, 16, NLD_R8, 8, 9, 10, 11, 12, 13, 14, NLD_D8(0));                       \
  if constexpr (kN == 32) instruction(types, 32, NLD_R16, 16, 17, 18, 19, 20, 21, 22, NLD_D16(0));                   \
  if constexpr (kN == 64) instruction(types, 64, NLD_R32, 32, 33, 34, 35, 36, 37, 38, NLD_D32(0));                   \
  if constexpr (kN == 96) instruction(types, 96, NLD_R48, 48, 49, 50, 51, 52, 53, 54, NLD_D32(0), NLD_D16(32));      \
  if constexpr (kN == 128) instruction(types, 128, NLD_R64, 64, 65, 66, 67, 68, 69, 70, NLD_D64(0));                 \
  if constexpr (kN == 192) instruction(types, 192, NLD_R96, 96, 97, 98, 99, 100, 101, 102, NLD_D64(0), NLD_D32(64)); \
  if constexpr (kN == 256) instruction(types, 256, NLD_R128, 128, 129, 130, 131, 132, 133, 134, NLD_D64(0), NLD_D64(64))
#endif

template <int kN>
constexpr bool kIsWgmmaN =
    kN == 8 || kN == 16 || kN == 32 || kN == 64 || kN == 96 || kN == 128 || kN == 192 || kN == 256;

// d = a * b, or with `accumulate` d += a * b: 64 x 16 times 16 x kN, T (bf16 or f16) inputs, f32 accumulators. Thread t
// of the warpgroup holds rows t / 32 * 16 + t % 32 / 4 + {0, 8}: d[i] belongs to row + i / 2 % 2 * 8, column i / 4 * 8
// + t % 4 * 2 + i % 2. a and b are descriptors; with kTransA, kTransB the operand is MN-major.
template <class T, int kN, bool kTransA = false, bool kTransB = false>
PTX_FN void wgmma(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate PTX_LOC_) {
  static_assert(kIsHalf<T> && kIsWgmmaN<kN>);
#if NLD_ON_DEVICE
  if constexpr (kIsBf16<T>) {
    NLD_WGMMA_BY_N(NLD_WGMMA, "bf16.bf16");
  } else {
    NLD_WGMMA_BY_N(NLD_WGMMA, "f16.f16");
  }
#else
  ::emu::wgmma({d, kN, nullptr, a, b, kTransA, kTransB, kIsBf16<T>, accumulate}, loc);
#endif
}
// The same with A in registers: warp w holds rows 16 * w ... as an mma_m16n8k16 fragment.
template <class T, int kN, bool kTransB = false>
PTX_FN void wgmma_reg_a(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate PTX_LOC_) {
  static_assert(kIsHalf<T> && kIsWgmmaN<kN>);
#if NLD_ON_DEVICE
  if constexpr (kIsBf16<T>) {
    NLD_WGMMA_BY_N(NLD_WGMMA_REG_A, "bf16.bf16");
  } else {
    NLD_WGMMA_BY_N(NLD_WGMMA_REG_A, "f16.f16");
  }
#else
  ::emu::wgmma({d, kN, a, 0, b, false, kTransB, kIsBf16<T>, accumulate}, loc);
#endif
}

// Moves registers between warpgroups of a kernel: every warp of the warpgroup calls it. kRegisters is a multiple of 8
// from 24 to 256; give up before another warpgroup asks.
template <int kRegisters>
PTX_FN void give_up_registers(PTX_LOC_ONLY_) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
#if NLD_ON_DEVICE
  NLD_ASM_SM90A("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#else
  host::set_registers(kRegisters, loc);
#endif
}
template <int kRegisters>
PTX_FN void ask_for_registers(PTX_LOC_ONLY_) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
#if NLD_ON_DEVICE
  NLD_ASM_SM90A("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#else
  host::set_registers(kRegisters, loc);
#endif
}

#if NLD_ON_DEVICE
#undef NLD_D4
#undef NLD_D8
#undef NLD_D16
#undef NLD_D32
#undef NLD_D64
#undef NLD_R4
#undef NLD_R8
#undef NLD_R16
#undef NLD_R32
#undef NLD_R48
#undef NLD_R64
#undef NLD_R96
#undef NLD_R128
#undef NLD_WGMMA
#undef NLD_WGMMA_REG_A
#undef NLD_WGMMA_BY_N
#endif

}  // namespace nld::ptx
