// Running CUDA kernels as ordinary C++20 on a CPU: what the CUDA names in emulator.h and the wrappers in
// common/ptx.cuh are made of. docs/emulator.md has the picture.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>  // before the macros of emulator.h: it declares threadIdx and uses gridDim as a member
#include <vector_functions.h>

#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace emu {

using Loc = std::source_location;
#define EMU_LOC ::emu::Loc loc = ::emu::Loc::current()

struct Block {  // a CTA, as its threads see it
  uint3 idx{};
  dim3 dim{}, grid{};
  unsigned rank = 0;  // in its cluster
  unsigned nthreads = 0;
  unsigned char* smem = nullptr;
  size_t smem_bytes = 0;
};

struct Fiber {  // a CUDA thread
  uint3 tid{};
  unsigned linear = 0;  // in its CTA
  unsigned gid = 0;     // in its cluster
  unsigned lane = 0, warp = 0;
  Block* block = nullptr;
};
extern thread_local Fiber* t_cur __attribute__((tls_model("initial-exec")));

// The same through calls, for code whose every load is reported to the race checker.
uint3 thread_index();
uint3 block_index();
dim3 block_size();
dim3 grid_size();
unsigned char* dynamic_smem();
int lane();

// ---- launching --------------------------------------------------------------------------------------------------
enum class Order { Forward, Reverse, Random };  // of threads and CTAs
enum class Async { Eager, Lazy, Random };       // when cp.async and TMA data land

struct Options {
  Order order = Order::Forward;
  Async async = Async::Lazy;
  uint64_t seed = 1;              // of Random; the other orders start at the seed-th cluster of the grid
  unsigned workers = 1;           // OS threads; 0: one per core. The checked library always uses one
  unsigned max_resident = 1024;   // threads whose CTAs take turns; 0: the CTAs run one cluster after the other
  bool strict_exit = true;        // a barrier skipped by an exited thread is an error
  size_t stack_bytes = 64 << 10;  // of each thread
  unsigned max_reports = 8;       // data races told about per launch
  int capability = 90;            // 10 * major + minor of the GPU that launchers see; below 90 no clusters
  int num_sms = 4;                // multiprocessors of that GPU
};
Options& options();

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Config {
  dim3 grid{1}, block{1};
  size_t smem = 0;
  unsigned cluster = 1;            // CTAs per cluster, along x
  bool overlaps_previous = false;  // global memory is touched after wait_for_previous_kernel() only
};
// Runs the kernel to its end. Throws Error with a full report on misuse.
void launch(const Config&, const char* name, const std::function<void()>& kernel);

[[noreturn]] void fail(const std::string& what, Loc loc);

// ---- injected bugs (NLD_BUG in common/prelude.cuh) ------------------------------------------------------------------
struct BugSwitch {
  const char* name;
  std::atomic<unsigned> state = 0;  // twice the version of set_bug that it was compared with, plus one where it is on
};
void set_bug(const char* name);  // "" for none
bool bug_is_on(BugSwitch&);

// ---- collectives --------------------------------------------------------------------------------------------------
// The last lane to arrive runs `fn` once for the whole warp; args[lane] is that lane's argument block (on its own
// stack), or null when the lane is not in the mask.
using WarpFn = void (*)(unsigned mask, void* const* args);
void warp_collective(unsigned mask, const char* op, void* args, WarpFn fn, Loc loc);
// The same for the 4 warps of a warpgroup (args[128]).
void warpgroup_collective(const char* op, void* args, WarpFn fn, Loc loc);

void warp_sync(unsigned mask, Loc loc);
void bar_sync(unsigned id, unsigned count, const char* op, Loc loc);
void bar_arrive(unsigned id, unsigned count, Loc loc);
enum class BarReduce { Count, And, Or };
int bar_reduce(int value, BarReduce, const char* op, Loc loc);
void spin_hint(Loc loc);  // a polling loop lets others run

unsigned smem_addr(const void* p);  // 32-bit address in the shared window

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

// ---- memory -------------------------------------------------------------------------------------------------------
// Accesses that the compiler does not report to the race checker, because they happen in wrappers.
void note_read(const void* p, size_t n, Loc loc);
void note_write(const void* p, size_t n, Loc loc);
void note_constant_read(const void* p, size_t n, Loc loc);  // by ld.global.nc: nobody may write it in this launch

void fence(Loc loc);  // __threadfence
void wait_for_previous_kernel();

enum class Rmw { Add, Sub, Min, Max, And, Or, Xor, Exch, Inc, Dec };
enum class Sem { Relaxed, Acquire, Release, AcqRel };  // of scope .gpu
template <class T>
T atomic_rmw(T* p, T v, Rmw op, Sem sem, Loc loc);  // int32_t, uint32_t, int64_t, uint64_t, float, double
template <class T>
T atomic_cas(T* p, T expected, T v, Sem sem, Loc loc);  // uint32_t, uint64_t
template <class T>
T atomic_load(const T* p, Sem sem, Loc loc);  // integers of 4 or 8 bytes
template <class T>
void atomic_store(T* p, T v, Sem sem, Loc loc);

// ---- asynchronous copies (async.cpp) --------------------------------------------------------------------------------
void cp_async(void* dst, const void* src, unsigned bytes, unsigned valid, Loc loc);
void cp_async_commit();
void cp_async_wait(unsigned pending, Loc loc);

void mbar_init(uint64_t* bar, unsigned count, Loc loc);
void mbar_init_fence();
void mbar_inval(uint64_t* bar, Loc loc);
void mbar_arrive(uint64_t* bar, unsigned tx_bytes, Loc loc);
void mbar_expect_tx(uint64_t* bar, unsigned tx_bytes, Loc loc);
bool mbar_try_wait(uint64_t* bar, unsigned parity, Loc loc);
void mbar_wait(uint64_t* bar, unsigned parity, Loc loc);
void fence_proxy_async();

struct TensorMap {  // host twin of a CUtensorMap; dimension 0 is the innermost and contiguous
  const void* base = nullptr;
  int rank = 0;
  unsigned elem_bytes = 0;
  uint64_t dims[5] = {};
  uint64_t stride_bytes[5] = {};  // [0]: elem_bytes
  unsigned box[5] = {};
  unsigned swizzle_bytes = 0;  // 0, 32, 64 or 128
};
void bulk_load(void* dst, const void* src, unsigned bytes, uint64_t* bar, Loc loc);
void store_async(void* dst, const void* value, uint64_t* bar, unsigned rank,
                 Loc loc);  // 16 bytes to a CTA of the cluster
void tma_load(void* dst, const TensorMap* map, const int* at, int rank, uint64_t* bar, Loc loc);

// ---- clusters (cluster.cpp) -----------------------------------------------------------------------------------------
unsigned cluster_size();
void cluster_arrive(Loc loc, bool releases = true);
void cluster_wait(Loc loc);
void* map_rank(void* p, unsigned rank);  // the same place in the shared memory of another CTA

// ---- wgmma (wgmma.cpp) ----------------------------------------------------------------------------------------------
struct Wgmma {  // one m64nNk16
  float* d;
  unsigned n;
  const uint32_t* a_registers;  // or null: `a` is a descriptor
  uint64_t a, b;
  bool trans_a, trans_b, is_bf16, accumulate;
};
void wgmma(const Wgmma&, Loc loc);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(unsigned pending, Loc loc);

}  // namespace emu
