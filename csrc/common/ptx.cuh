// The PTX instructions of the portable kernels (sm_80 and later) under plain names, each in two versions: inline PTX
// for the device and an emulated twin for the host. ptx_sm90.cuh has those of Hopper. Kernels contain no asm of their
// own and hold addresses as generic pointers; a wrapper converts them. Every wrapper is tested by csrc/emulator/tests.
// .aligned instructions (ldmatrix, mma, named barriers) want all 32 lanes of the warp in the same call.
#pragma once

#include "common/dtype.h"
#include "common/prelude.cuh"

#if NLD_ON_DEVICE
#define PTX_FN __device__ __forceinline__
#define PTX_LOC_  // the caller's line, for the reports of the emulator
#define PTX_LOC_ONLY_
#else
#define PTX_FN inline
#define PTX_LOC_ , ::emu::Loc loc = ::emu::Loc::current()
#define PTX_LOC_ONLY_ ::emu::Loc loc = ::emu::Loc::current()
#include "emulator/ptx_host.h"
#endif

namespace nld::ptx {

// ---- addresses and bits -------------------------------------------------------------------------------------------

#if NLD_ON_DEVICE
__device__ __forceinline__ uint32_t smem_u32(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ uint64_t gmem_u64(const void* p) {
  return static_cast<uint64_t>(__cvta_generic_to_global(p));
}
#endif

template <class T>
constexpr bool kIsHalf = false;
template <>
inline constexpr bool kIsHalf<bf16> = true;
template <>
inline constexpr bool kIsHalf<f16> = true;
template <class T>
constexpr bool kIsBf16 = false;
template <>
inline constexpr bool kIsBf16<bf16> = true;

// Two floats rounded to nearest even and packed as an mma fragment wants them: `lo` in bits 0..15.
template <class T>
PTX_FN uint32_t pack(float lo, float hi) {
  static_assert(kIsHalf<T>);
  uint32_t bits;
  if constexpr (kIsBf16<T>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(lo, hi);
    memcpy(&bits, &pair, sizeof bits);
  } else {
    const __half2 pair = __floats2half2_rn(lo, hi);
    memcpy(&bits, &pair, sizeof bits);
  }
  return bits;
}
// The inverse: x is the element in bits 0..15.
template <class T>
PTX_FN float2 unpack(uint32_t bits) {
  static_assert(kIsHalf<T>);
  if constexpr (kIsBf16<T>) {
    return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
  } else {
    const auto lo = static_cast<unsigned short>(bits), hi = static_cast<unsigned short>(bits >> 16);
    return __half22float2(__half2(__half2_raw{lo, hi}));
  }
}

// Two products of bfloat16, each rounded once, subnormals and signs of zeros kept.
PTX_FN uint32_t mul_bf16x2(uint32_t a, uint32_t b) {
#if NLD_ON_DEVICE
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(0x80008000u));  // + -0: no sign is lost
  return d;
#else
  const float2 x = unpack<bf16>(a), y = unpack<bf16>(b);
  return pack<bf16>(x.x * y.x, x.y * y.y);
#endif
}

// ---- approximate functions ----------------------------------------------------------------------------------------
// The twins are exact and flush denormal inputs and results to zero as .ftz does; compare with tolerances.

// 2^x, within 2 ulp. exp2(-inf) = 0, exp2(x < -126) = 0, exp2(x >= 128) = inf, NaN stays NaN.
PTX_FN float exp2_approx(float x) {
#if NLD_ON_DEVICE
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return host::flush(std::exp2(host::flush(x)));
#endif
}
// log2(x), absolute error below 2^-22 around 1. log2(0) = -inf, NaN for x < 0, log2(inf) = inf.
PTX_FN float log2_approx(float x) {
#if NLD_ON_DEVICE
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return host::flush(std::log2(host::flush(x)));
#endif
}
// tanh(x), relative error about 2^-11: good enough in front of a rounding to half precision, not elsewhere.
PTX_FN float tanh_approx(float x) {
#if NLD_ON_DEVICE
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::tanh(x);
#endif
}

// ---- cp.async: global to shared memory without registers ----------------------------------------------------------
// Copies kBytes (4, 8 or 16; both addresses aligned to that), of which the first `valid` come from src and the rest are
// zero; with valid = 0 nothing is read, but src must still be aligned. 16 bytes bypass L1, 4 and 8 cannot. kPrefetch
// (0, 64, 128 or 256 bytes) asks L2 to fetch the surrounding bytes too. The data may be read by this thread after
// cp_async_wait, by others after a barrier on top.
template <int kBytes = 16, int kPrefetch = 0>
PTX_FN void cp_async(void* dst, const void* src, int valid = kBytes PTX_LOC_) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  static_assert(kPrefetch == 0 || kPrefetch == 64 || kPrefetch == 128 || kPrefetch == 256);
#if NLD_ON_DEVICE
#define NLD_CP_ASYNC(op) \
  asm volatile(op " [%0], [%1], %2, %3;" ::"r"(smem_u32(dst)), "l"(gmem_u64(src)), "n"(kBytes), "r"(valid) : "memory")
  if constexpr (kBytes == 16) {
    if constexpr (kPrefetch == 64) NLD_CP_ASYNC("cp.async.cg.shared.global.L2::64B");
    if constexpr (kPrefetch == 128) NLD_CP_ASYNC("cp.async.cg.shared.global.L2::128B");
    if constexpr (kPrefetch == 256) NLD_CP_ASYNC("cp.async.cg.shared.global.L2::256B");
    if constexpr (kPrefetch == 0) NLD_CP_ASYNC("cp.async.cg.shared.global");
  } else {
    if constexpr (kPrefetch == 64) NLD_CP_ASYNC("cp.async.ca.shared.global.L2::64B");
    if constexpr (kPrefetch == 128) NLD_CP_ASYNC("cp.async.ca.shared.global.L2::128B");
    if constexpr (kPrefetch == 256) NLD_CP_ASYNC("cp.async.ca.shared.global.L2::256B");
    if constexpr (kPrefetch == 0) NLD_CP_ASYNC("cp.async.ca.shared.global");
  }
#undef NLD_CP_ASYNC
#else
  ::emu::cp_async(dst, src, kBytes, static_cast<unsigned>(valid), loc);
#endif
}
PTX_FN void cp_async_commit() {
#if NLD_ON_DEVICE
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  ::emu::cp_async_commit();
#endif
}
// Waits until at most kPending of this thread's latest groups are still under way.
template <int kPending>
PTX_FN void cp_async_wait(PTX_LOC_ONLY_) {
#if NLD_ON_DEVICE
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#else
  ::emu::cp_async_wait(kPending, loc);
#endif
}

// ---- ldmatrix: 8x8 matrices of 16-bit elements from shared memory -------------------------------------------------
// Lane l names row l % 8 (16 bytes, aligned) of matrix l / 8; lanes beyond the last matrix are ignored. Register m of
// lane l gets elements (l / 4, l % 4 * 2 + {0, 1}) of matrix m; with kTrans of the transposed matrix.
template <bool kTrans = false>
PTX_FN void ldmatrix_x4(uint32_t (&r)[4], const void* row PTX_LOC_) {
#if NLD_ON_DEVICE
#define NLD_LDMATRIX(op)                                        \
  asm volatile(op " {%0, %1, %2, %3}, [%4];"                    \
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) \
               : "r"(smem_u32(row))                             \
               : "memory")
  if constexpr (kTrans) {
    NLD_LDMATRIX("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16");
  } else {
    NLD_LDMATRIX("ldmatrix.sync.aligned.m8n8.x4.shared.b16");
  }
#undef NLD_LDMATRIX
#else
  host::ldmatrix(r, 4, row, kTrans, loc);
#endif
}
template <bool kTrans = false>
PTX_FN void ldmatrix_x2(uint32_t (&r)[2], const void* row PTX_LOC_) {
#if NLD_ON_DEVICE
#define NLD_LDMATRIX(op) asm volatile(op " {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(smem_u32(row)) : "memory")
  if constexpr (kTrans) {
    NLD_LDMATRIX("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16");
  } else {
    NLD_LDMATRIX("ldmatrix.sync.aligned.m8n8.x2.shared.b16");
  }
#undef NLD_LDMATRIX
#else
  host::ldmatrix(r, 2, row, kTrans, loc);
#endif
}
template <bool kTrans = false>
PTX_FN void ldmatrix_x1(uint32_t& r, const void* row PTX_LOC_) {
#if NLD_ON_DEVICE
  if constexpr (kTrans) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(r)
                 : "r"(smem_u32(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r) : "r"(smem_u32(row)) : "memory");
  }
#else
  host::ldmatrix(&r, 1, row, kTrans, loc);
#endif
}

// ---- mma.sync m16n8k16: d += a * b, T (bf16 or f16) inputs, f32 accumulator ---------------------------------------
// With g = lane / 4 and t = lane % 4 * 2, each register holding columns t, t + 1 (of b: rows t, t + 1): a[0] (row g,
// k t), a[1] (g + 8, t), a[2] (g, t + 8), a[3] (g + 8, t + 8); b0 (k t, column g), b1 (k t + 8, column g); d[0],
// d[1] (row g, columns t, t + 1), d[2], d[3] (row g + 8).
template <class T>
PTX_FN void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1 PTX_LOC_) {
  static_assert(kIsHalf<T>);
#if NLD_ON_DEVICE
#define NLD_MMA(types)                                                                \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." types                         \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (kIsBf16<T>) {
    NLD_MMA("bf16.bf16");
  } else {
    NLD_MMA("f16.f16");
  }
#undef NLD_MMA
#else
  host::mma_m16n8k16(d, a, b0, b1, kIsBf16<T>, loc);
#endif
}

// ---- named barriers (0 is __syncthreads): `num_threads` is a multiple of 32 and counts arrivals and waits ---------
PTX_FN void barrier_sync(int id, int num_threads PTX_LOC_) {
#if NLD_ON_DEVICE
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
#else
  ::emu::bar_sync(static_cast<unsigned>(id), static_cast<unsigned>(num_threads), "bar.sync", loc);
#endif
}
PTX_FN void barrier_arrive(int id, int num_threads PTX_LOC_) {
#if NLD_ON_DEVICE
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
#else
  ::emu::bar_arrive(static_cast<unsigned>(id), static_cast<unsigned>(num_threads), loc);
#endif
}

// ---- global memory, 16 bytes at a time, for data that is used once ------------------------------------------------
// Read-only for the whole kernel (.nc) and kept out of L1; `p` is aligned to 16 bytes. What the previous kernel wrote
// may be read so after wait_for_previous_kernel(), but not touched before.
template <class V>
PTX_FN V load_once(const V* p PTX_LOC_) {
  static_assert(sizeof(V) == 16);
#if NLD_ON_DEVICE
  uint4 r;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
               : "l"(gmem_u64(p)));
  V v;
  memcpy(&v, &r, sizeof v);
  return v;
#else
  return __ldg(p, loc);
#endif
}
// Marked as the first to leave the caches (.cs).
template <class V>
PTX_FN void store_streaming(V* p, const V& v) {
  static_assert(sizeof(V) == 16);
#if NLD_ON_DEVICE
  uint4 r;
  memcpy(&r, &v, sizeof r);
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(gmem_u64(p)), "r"(r.x), "r"(r.y), "r"(r.z), "r"(r.w)
               : "memory");
#else
  *p = v;
#endif
}

// ---- synchronisation between CTAs through global memory (.gpu scope) ----------------------------------------------
// A release makes what this thread wrote and observed before visible to the thread whose acquire reads the value;
// for the writes of a whole CTA put __syncthreads before the release and after the acquire.
PTX_FN uint32_t atomic_add_acq_rel(uint32_t* p, uint32_t v PTX_LOC_) {
#if NLD_ON_DEVICE
  uint32_t old;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(gmem_u64(p)), "r"(v) : "memory");
  return old;
#else
  return ::emu::atomic_rmw(p, v, ::emu::Rmw::Add, ::emu::Sem::AcqRel, loc);
#endif
}
PTX_FN void red_add_release(uint32_t* p, uint32_t v PTX_LOC_) {
#if NLD_ON_DEVICE
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(gmem_u64(p)), "r"(v) : "memory");
#else
  ::emu::atomic_rmw(p, v, ::emu::Rmw::Add, ::emu::Sem::Release, loc);
#endif
}
PTX_FN uint32_t load_acquire(const uint32_t* p PTX_LOC_) {
#if NLD_ON_DEVICE
  uint32_t v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(gmem_u64(p)) : "memory");
  return v;
#else
  return ::emu::atomic_load(p, ::emu::Sem::Acquire, loc);
#endif
}
PTX_FN void store_release(uint32_t* p, uint32_t v PTX_LOC_) {
#if NLD_ON_DEVICE
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(gmem_u64(p)), "r"(v) : "memory");
#else
  ::emu::atomic_store(p, v, ::emu::Sem::Release, loc);
#endif
}
// Orders this thread's earlier accesses before its later ones for all threads of the GPU (lighter than __threadfence).
PTX_FN void fence_acq_rel(PTX_LOC_ONLY_) {
#if NLD_ON_DEVICE
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
#else
  ::emu::fence(loc);
#endif
}

// ---- programmatic dependent launch (sm_90; nothing elsewhere) -----------------------------------------------------
// Waits until the kernels this launch depends on have finished and their writes are visible. Every read of what they
// wrote, and every write of what they read, comes after it.
PTX_FN void wait_for_previous_kernel() {
#if !NLD_ON_DEVICE
  ::emu::wait_for_previous_kernel();
#elif __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The next kernel may be scheduled once every CTA has called this or exited; says nothing about visibility.
PTX_FN void allow_next_kernel() {
#if NLD_ON_DEVICE && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace nld::ptx
