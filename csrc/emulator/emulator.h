// The names of CUDA C++ for kernels that a plain C++ compiler builds. Only common/prelude.cuh includes this, without
// nvcc, and the emulator's own files.
#pragma once

#include "emulator/core.h"

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __constant__ static
// Static shared variables would be invisible to the race checker and shared by CTAs that take turns.
#define __shared__ static_shared_memory_must_be_NLD_DYNAMIC_SMEM
#define __launch_bounds__(...)
#define __grid_constant__

#if defined(__SANITIZE_THREAD__)
#define threadIdx (::emu::thread_index())
#define blockIdx (::emu::block_index())
#define blockDim (::emu::block_size())
#define gridDim (::emu::grid_size())
#else
#define threadIdx (::emu::t_cur->tid)
#define blockIdx (::emu::t_cur->block->idx)
#define blockDim (::emu::t_cur->block->dim)
#define gridDim (::emu::t_cur->block->grid)
#endif
static constexpr int warpSize = 32;

// ---- barriers and fences --------------------------------------------------------------------------------------------
inline void __syncthreads(EMU_LOC) { emu::bar_sync(0, 0, "__syncthreads", loc); }
inline int __syncthreads_count(int p, EMU_LOC) {
  return emu::bar_reduce(p, emu::BarReduce::Count, "__syncthreads_count", loc);
}
inline int __syncthreads_and(int p, EMU_LOC) {
  return emu::bar_reduce(p, emu::BarReduce::And, "__syncthreads_and", loc);
}
inline int __syncthreads_or(int p, EMU_LOC) { return emu::bar_reduce(p, emu::BarReduce::Or, "__syncthreads_or", loc); }
inline void __syncwarp(unsigned mask = 0xffffffffu, EMU_LOC) { emu::warp_sync(mask, loc); }
inline void __threadfence(EMU_LOC) { emu::fence(loc); }
inline void __threadfence_system(EMU_LOC) { emu::fence(loc); }
inline void __threadfence_block() {}  // orders nothing here: threads of a CTA must meet at a barrier
inline void __nanosleep(unsigned, EMU_LOC) { emu::spin_hint(loc); }
[[noreturn]] inline void __trap(EMU_LOC) { emu::fail("__trap", loc); }

// ---- warp collectives
// -------------------------------------------------------------------------------------------------
template <class T>
T __shfl_sync(unsigned mask, T v, int src, int width = 32, EMU_LOC) {
  const int lane = emu::lane();
  return emu::shfl_any(mask, v, (lane & ~(width - 1)) + (src & (width - 1)), "__shfl_sync", loc);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int x, int width = 32, EMU_LOC) {
  const int lane = emu::lane(), src = lane ^ x;
  return emu::shfl_any(mask, v, src > (lane | (width - 1)) ? lane : src, "__shfl_xor_sync", loc);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned d, int width = 32, EMU_LOC) {
  const int lane = emu::lane(), src = lane + static_cast<int>(d);
  return emu::shfl_any(mask, v, src > (lane | (width - 1)) ? lane : src, "__shfl_down_sync", loc);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned d, int width = 32, EMU_LOC) {
  const int lane = emu::lane(), src = lane - static_cast<int>(d);
  return emu::shfl_any(mask, v, src < (lane & ~(width - 1)) ? lane : src, "__shfl_up_sync", loc);
}
inline unsigned __ballot_sync(unsigned m, int p, EMU_LOC) { return emu::vote(m, p, "__ballot_sync", loc); }
inline int __any_sync(unsigned m, int p, EMU_LOC) { return emu::vote(m, p, "__any_sync", loc) != 0; }
inline int __all_sync(unsigned m, int p, EMU_LOC) { return emu::vote(m, p, "__all_sync", loc) == m; }
template <class T>
unsigned __match_any_sync(unsigned m, T v, EMU_LOC) {
  uint64_t bits = 0;
  std::memcpy(&bits, &v, sizeof v);
  return emu::match(m, bits, loc);
}

namespace emu {
template <class T, class F>
T reduce(unsigned mask, T v, F combine, const char* op, Loc loc) {
  T result{};
  bool first = true;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const T other = shfl_any(mask, v, lane, op, loc);
    result = first ? other : combine(result, other);
    first = false;
  }
  return result;
}
}  // namespace emu
template <class T>
T __reduce_max_sync(unsigned m, T v, EMU_LOC) {
  return emu::reduce(m, v, [](T a, T b) { return a > b ? a : b; }, "__reduce_max_sync", loc);
}
template <class T>
T __reduce_min_sync(unsigned m, T v, EMU_LOC) {
  return emu::reduce(m, v, [](T a, T b) { return a < b ? a : b; }, "__reduce_min_sync", loc);
}
template <class T>
T __reduce_add_sync(unsigned m, T v, EMU_LOC) {
  return emu::reduce(m, v, [](T a, T b) { return static_cast<T>(a + b); }, "__reduce_add_sync", loc);
}
template <class T>
T __reduce_or_sync(unsigned m, T v, EMU_LOC) {
  return emu::reduce(m, v, [](T a, T b) { return static_cast<T>(a | b); }, "__reduce_or_sync", loc);
}
template <class T>
T __reduce_and_sync(unsigned m, T v, EMU_LOC) {
  return emu::reduce(m, v, [](T a, T b) { return static_cast<T>(a & b); }, "__reduce_and_sync", loc);
}

// ---- atomics --------------------------------------------------------------------------------------------------------
namespace emu {
template <class T>  // CUDA has its own 64-bit type
T rmw(T* p, T v, Rmw op, Loc loc) {
  if constexpr (std::is_same_v<T, unsigned long long>) {
    return atomic_rmw<uint64_t>(reinterpret_cast<uint64_t*>(p), v, op, Sem::Relaxed, loc);
  } else if constexpr (std::is_same_v<T, long long>) {
    return atomic_rmw<int64_t>(reinterpret_cast<int64_t*>(p), v, op, Sem::Relaxed, loc);
  } else {
    return atomic_rmw<T>(p, v, op, Sem::Relaxed, loc);
  }
}
template <class T>
constexpr bool is_32_or_64_bit_integer = std::is_same_v<T, int> || std::is_same_v<T, unsigned> ||
                                         std::is_same_v<T, long long> || std::is_same_v<T, unsigned long long>;
}  // namespace emu
template <class T>
T atomicAdd(T* p, std::type_identity_t<T> v, EMU_LOC) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long> ||
                std::is_floating_point_v<T>);
  return emu::rmw(p, v, emu::Rmw::Add, loc);
}
template <class T>
T atomicSub(T* p, std::type_identity_t<T> v, EMU_LOC) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>);
  return emu::rmw(p, v, emu::Rmw::Sub, loc);
}
template <class T>
T atomicMin(T* p, std::type_identity_t<T> v, EMU_LOC) {
  static_assert(emu::is_32_or_64_bit_integer<T>);
  return emu::rmw(p, v, emu::Rmw::Min, loc);
}
template <class T>
T atomicMax(T* p, std::type_identity_t<T> v, EMU_LOC) {
  static_assert(emu::is_32_or_64_bit_integer<T>);
  return emu::rmw(p, v, emu::Rmw::Max, loc);
}
template <class T>
T atomicAnd(T* p, std::type_identity_t<T> v, EMU_LOC) {
  static_assert(emu::is_32_or_64_bit_integer<T>);
  return emu::rmw(p, v, emu::Rmw::And, loc);
}
template <class T>
T atomicOr(T* p, std::type_identity_t<T> v, EMU_LOC) {
  static_assert(emu::is_32_or_64_bit_integer<T>);
  return emu::rmw(p, v, emu::Rmw::Or, loc);
}
template <class T>
T atomicXor(T* p, std::type_identity_t<T> v, EMU_LOC) {
  static_assert(emu::is_32_or_64_bit_integer<T>);
  return emu::rmw(p, v, emu::Rmw::Xor, loc);
}
template <class T>
T atomicExch(T* p, std::type_identity_t<T> v, EMU_LOC) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long> ||
                std::is_same_v<T, float>);
  return emu::rmw(p, v, emu::Rmw::Exch, loc);
}
inline unsigned atomicInc(unsigned* p, unsigned limit, EMU_LOC) { return emu::rmw(p, limit, emu::Rmw::Inc, loc); }
inline unsigned atomicDec(unsigned* p, unsigned limit, EMU_LOC) { return emu::rmw(p, limit, emu::Rmw::Dec, loc); }
inline int atomicCAS(int* p, int expected, int v, EMU_LOC) {
  return static_cast<int>(emu::atomic_cas(reinterpret_cast<uint32_t*>(p), static_cast<uint32_t>(expected),
                                          static_cast<uint32_t>(v), emu::Sem::Relaxed, loc));
}
inline unsigned atomicCAS(unsigned* p, unsigned expected, unsigned v, EMU_LOC) {
  return emu::atomic_cas<uint32_t>(p, expected, v, emu::Sem::Relaxed, loc);
}
inline unsigned long long atomicCAS(unsigned long long* p, unsigned long long expected, unsigned long long v, EMU_LOC) {
  return emu::atomic_cas<uint64_t>(reinterpret_cast<uint64_t*>(p), expected, v, emu::Sem::Relaxed, loc);
}

// ---- loads and stores with a cache hint
// -------------------------------------------------------------------------------
template <class T>
T __ldg(const T* p, EMU_LOC) {
#if defined(__SANITIZE_THREAD__)
  emu::note_constant_read(p, sizeof(T), loc);
#endif
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, std::type_identity_t<T> v) {
  *p = v;
}
template <class T>
void __stcg(T* p, std::type_identity_t<T> v) {
  *p = v;
}

// ---- arithmetic -----------------------------------------------------------------------------------------------------
template <class To, class From>
To emu_bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline unsigned __float_as_uint(float x) { return emu_bits<unsigned>(x); }
inline int __float_as_int(float x) { return emu_bits<int>(x); }
inline float __uint_as_float(unsigned x) { return emu_bits<float>(x); }
inline float __int_as_float(int x) { return emu_bits<float>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
// Nibble i of the selector names byte i of the result: 0-3 of a, 4-7 of b; 8-15 would repeat a sign, which nobody
// needs.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const unsigned long long bytes = a | static_cast<unsigned long long>(b) << 32;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= (bytes >> (selector >> (4 * i) & 7u) * 8 & 0xffu) << (8 * i);
  return result;
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned y = 0;
  for (int i = 0; i < 32; ++i) y |= (x >> i & 1) << (31 - i);
  return y;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<unsigned long long>(a) * b >> 32);
}
template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
