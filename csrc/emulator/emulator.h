// emu.hpp - run this project's CUDA kernels as ordinary C++20 on a CPU.
//
// Every CUDA thread is a stackful fiber.  A fiber runs until it reaches a
// collective (block barrier, warp collective, mbarrier wait ...) and only
// switches there, so scheduling is deterministic for a given seed.  All blocks
// of one cluster live on one OS thread; clusters are spread over OS threads.
//
// Only kernels/prelude.cuh includes this header, and only without nvcc.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>  // before the macros below: it declares threadIdx and uses gridDim as a member
#include <vector_functions.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <stdexcept>
#include <string>
#include <type_traits>

// ---- keywords ---------------------------------------------------------------
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
// Static shared variables survive only because a block stays on one OS thread.
// They are invisible to the race checker and wrong in clusters: prefer DYN_SMEM.
#define __shared__ static thread_local
#define __launch_bounds__(...)
#define __grid_constant__

#define threadIdx (::emu::t_cur->tid)
#define blockIdx (::emu::t_cur->block->idx)
#define blockDim (::emu::t_cur->block->dim)
#define gridDim (::emu::t_cur->block->grid)
static constexpr int warpSize = 32;

namespace emu {

using Loc = std::source_location;
#define EMU_LOC ::emu::Loc loc = ::emu::Loc::current()

struct Group;  // the co-scheduled blocks: one cluster, or a cooperative grid

struct Block {
  uint3 idx{};
  dim3 dim{}, grid{};
  unsigned rank = 0;  // rank inside its cluster
  unsigned nthreads = 0;
  unsigned char* smem = nullptr;
  size_t smem_bytes = 0;
  Group* group = nullptr;
};

struct Fiber {
  uint3 tid{};
  unsigned linear = 0;  // thread index inside its block
  unsigned gid = 0;     // thread index inside its group
  unsigned lane = 0, warp = 0;
  Block* block = nullptr;
};
extern thread_local Fiber* t_cur __attribute__((tls_model("initial-exec")));

// ---- launching ---------------------------------------------------------------
enum class Order { Forward, Reverse, Random };
enum class Async { Eager, Lazy, Random };  // when cp.async / TMA data lands

struct Options {
  Order order = Order::Forward;
  Async async = Async::Lazy;
  uint64_t seed = 1;
  unsigned workers = 0;     // 0: one per core
  bool strict_exit = true;  // a barrier skipped by an exited thread is an error
  size_t stack_bytes = 64 << 10;
  unsigned max_reports = 8;  // data races kept per launch
};
Options& options();  // process-wide defaults; EMU_* variables override

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Config {
  dim3 grid{1}, block{1};
  size_t smem = 0;
  unsigned cluster = 1;  // blocks per cluster, along x
};
// Runs the kernel to completion.  Throws Error with a full report on misuse.
void launch(const Config&, const char* name, const std::function<void()>& kernel);

[[noreturn]] void fail(const std::string& what, Loc loc);
bool bug_is_on(const char* name);  // see NLD_BUG in common/prelude.cuh
uint64_t switches();  // fiber switches so far, for measurements

// ---- collectives --------------------------------------------------------------
// The last lane to arrive runs `fn` once for the whole warp; args[lane] is that
// lane's argument block (on its own stack) or null when the lane is not in mask.
using WarpFn = void (*)(unsigned mask, void* const* args);
void warp_collective(unsigned mask, const char* op, void* args, WarpFn fn, Loc loc);
// The same for the 4 warps of a warpgroup (args[128]).
void warpgroup_collective(const char* op, void* args, WarpFn fn, Loc loc);

void bar_sync(unsigned id, unsigned count, const char* op, Loc loc);
void bar_arrive(unsigned id, unsigned count, Loc loc);
int bar_reduce(int value, int kind, const char* op, Loc loc);  // 0 count 1 and 2 or
void cluster_sync(Loc loc);
void warp_fence(unsigned mask);  // happens-before among lanes (syncwarp)
void spin_hint(Loc loc);         // a polling loop lets others run

unsigned smem_addr(const void* p);  // 32-bit shared window address
void* smem_ptr(unsigned addr);
void* map_rank(void* p, unsigned rank);  // distributed shared memory

// ---- memory-model hooks (see race.cpp; no-ops unless a check build) -----------
void note_read(const void* p, size_t n, Loc loc);
void note_write(const void* p, size_t n, Loc loc);

// ---- asynchronous copies --------------------------------------------------------
void cp_async(void* dst, const void* src, unsigned bytes, unsigned valid, Loc loc);
void cp_async_commit();
void cp_async_wait(unsigned pending, Loc loc);

// ---- mbarrier -------------------------------------------------------------------
void mbar_init(uint64_t* bar, unsigned count, Loc loc);
void mbar_arrive(uint64_t* bar, unsigned tx_bytes, Loc loc);
void mbar_wait(uint64_t* bar, unsigned parity, Loc loc);
void fence_proxy_async();

// ---- TMA and wgmma ----------------------------------------------------------------
enum class Swizzle : uint32_t { None = 0, B32 = 1, B64 = 2, B128 = 3 };
struct TensorMap2d {  // host twin of a 2-d CUtensorMap
  const void* base = nullptr;
  uint32_t elem = 2, cols = 0, rows = 0;
  uint64_t row_bytes = 0;
  uint32_t box_cols = 0, box_rows = 0;
  Swizzle swizzle = Swizzle::None;
};
void tma_load_2d(void* dst, const TensorMap2d* map, int col, int row, uint64_t* bar, Loc loc);
void wgmma_bf16(float* d, unsigned n, uint64_t desc_a, uint64_t desc_b, bool accumulate, Loc loc);
void wgmma_commit();
void wgmma_wait(unsigned pending, Loc loc);

// ---- atomics (out of line: one place, real hardware atomics) ------------------------
uint32_t atomic_rmw32(void* p, uint32_t v, int op);  // 0 add 1 max 2 min 3 or 4 and 5 exch
int32_t atomic_rmw32s(void* p, int32_t v, int op);
float atomic_addf(float* p, float v);
uint64_t atomic_rmw64(void* p, uint64_t v, int op);
uint32_t atomic_cas32(void* p, uint32_t expect, uint32_t v);
uint64_t atomic_cas64(void* p, uint64_t expect, uint64_t v);

struct ShflArgs {
  uint64_t in, out;
  int src;  // absolute source lane, already resolved
};
void shfl(unsigned mask, ShflArgs&, const char* op, Loc loc);

template <class T>
T shfl_any(unsigned mask, T v, int src, const char* op, Loc loc) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  ShflArgs a{0, 0, src};
  std::memcpy(&a.in, &v, sizeof v);
  shfl(mask, a, op, loc);
  std::memcpy(&v, &a.out, sizeof v);
  return v;
}
unsigned vote(unsigned mask, int pred, const char* op, Loc loc);  // ballot
unsigned match(unsigned mask, uint64_t v, Loc loc);
}  // namespace emu

// ---- CUDA names --------------------------------------------------------------------
inline void __syncthreads(EMU_LOC) { emu::bar_sync(0, 0, "__syncthreads", loc); }
inline int __syncthreads_count(int p, EMU_LOC) { return emu::bar_reduce(p, 0, "__syncthreads_count", loc); }
inline int __syncthreads_and(int p, EMU_LOC) { return emu::bar_reduce(p, 1, "__syncthreads_and", loc); }
inline int __syncthreads_or(int p, EMU_LOC) { return emu::bar_reduce(p, 2, "__syncthreads_or", loc); }
void __syncwarp(unsigned mask = 0xffffffffu, EMU_LOC);
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned, EMU_LOC) { emu::spin_hint(loc); }
inline unsigned __activemask() { return 0xffffffffu; }  // not meaningful here: do not rely on it
[[noreturn]] inline void __trap(EMU_LOC) { emu::fail("__trap", loc); }

template <class T>
T __shfl_sync(unsigned mask, T v, int src, int width = 32, EMU_LOC) {
  const int lane = emu::t_cur->lane;
  return emu::shfl_any(mask, v, (lane & ~(width - 1)) + (src & (width - 1)), "__shfl_sync", loc);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int x, int width = 32, EMU_LOC) {
  const int lane = emu::t_cur->lane, src = lane ^ x;
  return emu::shfl_any(mask, v, src > (lane | (width - 1)) ? lane : src, "__shfl_xor_sync", loc);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned d, int width = 32, EMU_LOC) {
  const int lane = emu::t_cur->lane, src = lane + static_cast<int>(d);
  return emu::shfl_any(mask, v, src > (lane | (width - 1)) ? lane : src, "__shfl_down_sync", loc);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned d, int width = 32, EMU_LOC) {
  const int lane = emu::t_cur->lane, src = lane - static_cast<int>(d);
  return emu::shfl_any(mask, v, src < (lane & ~(width - 1)) ? lane : src, "__shfl_up_sync", loc);
}
inline unsigned __ballot_sync(unsigned m, int p, EMU_LOC) { return emu::vote(m, p, "__ballot_sync", loc); }
inline int __any_sync(unsigned m, int p, EMU_LOC) { return emu::vote(m, p, "__any_sync", loc) != 0; }
inline int __all_sync(unsigned m, int p, EMU_LOC) { return emu::vote(m, p, "__all_sync", loc) == m; }
template <class T>
unsigned __match_any_sync(unsigned m, T v, EMU_LOC) {
  uint64_t b = 0;
  std::memcpy(&b, &v, sizeof v);
  return emu::match(m, b, loc);
}
template <class T, class F>
T emu_reduce(unsigned m, T v, F f, const char* op, emu::Loc loc) {
  T acc{};
  bool first = true;
  for (int l = 0; l < 32; ++l)
    if (m >> l & 1) {
      T o = emu::shfl_any(m, v, l, op, loc);
      acc = first ? o : f(acc, o);
      first = false;
    }
  return acc;
}
template <class T>
T __reduce_max_sync(unsigned m, T v, EMU_LOC) {
  return emu_reduce(m, v, [](T a, T b) { return a > b ? a : b; }, "__reduce_max_sync", loc);
}
template <class T>
T __reduce_min_sync(unsigned m, T v, EMU_LOC) {
  return emu_reduce(m, v, [](T a, T b) { return a < b ? a : b; }, "__reduce_min_sync", loc);
}
template <class T>
T __reduce_add_sync(unsigned m, T v, EMU_LOC) {
  return emu_reduce(m, v, [](T a, T b) { return T(a + b); }, "__reduce_add_sync", loc);
}

inline int atomicAdd(int* p, int v) { return int(emu::atomic_rmw32(p, unsigned(v), 0)); }
inline unsigned atomicAdd(unsigned* p, unsigned v) { return emu::atomic_rmw32(p, v, 0); }
inline float atomicAdd(float* p, float v) { return emu::atomic_addf(p, v); }
inline unsigned long long atomicAdd(unsigned long long* p, unsigned long long v) { return emu::atomic_rmw64(p, v, 0); }
inline int atomicMax(int* p, int v) { return emu::atomic_rmw32s(p, v, 1); }
inline int atomicMin(int* p, int v) { return emu::atomic_rmw32s(p, v, 2); }
inline unsigned atomicMax(unsigned* p, unsigned v) { return emu::atomic_rmw32(p, v, 1); }
inline unsigned long long atomicMax(unsigned long long* p, unsigned long long v) { return emu::atomic_rmw64(p, v, 1); }
inline unsigned atomicOr(unsigned* p, unsigned v) { return emu::atomic_rmw32(p, v, 3); }
inline unsigned atomicAnd(unsigned* p, unsigned v) { return emu::atomic_rmw32(p, v, 4); }
inline unsigned atomicExch(unsigned* p, unsigned v) { return emu::atomic_rmw32(p, v, 5); }
inline unsigned atomicCAS(unsigned* p, unsigned e, unsigned v) { return emu::atomic_cas32(p, e, v); }
inline unsigned long long atomicCAS(unsigned long long* p, unsigned long long e, unsigned long long v) {
  return emu::atomic_cas64(p, e, v);
}

template <class T>
T __ldg(const T* p) {
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
void __stcs(T* p, T v) {
  *p = v;
}
template <class T>
void __stcg(T* p, T v) {
  *p = v;
}

inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline unsigned __float_as_uint(float x) {
  unsigned u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline int __float_as_int(float x) {
  int u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline float __uint_as_float(unsigned x) {
  float u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline float __int_as_float(int x) {
  float u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
