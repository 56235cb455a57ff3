// State shared by the emulator's own source files.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <random>
#include <unordered_map>
#include <vector>

#include "emulator/emulator.h"

namespace emu {

// ---- what a thread knows about the others (the checked library only; race.cpp) ------------------------------------
// Epochs of the threads of a cluster, and of its copy engine last.
using Epochs = std::vector<uint32_t>;
// The same of several clusters. Never changed once made, so that whoever knows the same shares one copy.
using Known = std::shared_ptr<const std::map<unsigned, Epochs>>;
struct Clock {
  Epochs own;     // of the own cluster
  Known foreign;  // of others, as fences and atomics brought it here
};

// ---- asynchronous work --------------------------------------------------------------------------------------------
struct CopyOp {
  void* dst;
  const void* src;
  unsigned bytes, valid;
  uint64_t where;
};

struct Accumulator {  // of wgmmas under way: the kernel sees NaN until it has waited
  float* d;
  unsigned n;
  std::vector<float> value;
  unsigned group;
};

struct Thread : Fiber {
  enum class Status : uint8_t { Ready, Blocked, Exited } status = Status::Ready;
  void* sp = nullptr;
  const char* waiting_for = "";
  Loc where{};
  unsigned wait_mask = 0;
  unsigned char* stack = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's

  std::vector<CopyOp> open_copies;
  std::deque<std::vector<CopyOp>> copy_groups;

  std::vector<uint64_t*> unfenced_mbars;  // initialised, not yet visible to the copy engine and other CTAs
  bool knows_cluster_runs = false;        // all of its CTAs have started: has waited for a barrier of the cluster
  bool cluster_arrived = false;           // at the cluster's barrier, and has not waited yet
  unsigned cluster_phase = 0;             // of that barrier, the next to arrive in

  std::vector<Accumulator> accumulators;
  unsigned wgmma_group = 0;  // the open one
  bool wgmma_fenced = false;

  bool may_run_ahead = false;  // of the kernel before: has not called wait_for_previous_kernel()

  Clock clock;
  Known fenced;              // what the last __threadfence() lets atomics publish
  Known collected;           // what atomics have seen: known from the next __threadfence() on
  uint32_t proxy_fence = 0;  // own epoch at the last fence.proxy.async
};

struct Rendezvous {  // a warp or warpgroup collective being gathered
  unsigned mask, arrived;
  const char* op;
  Loc where;
  void* args[128];
  Thread* who[128];
};

struct Barrier {
  unsigned expected = 0, arrived = 0;
  const char* op = "";
  Loc where{};
  std::vector<Thread*> waiting;
  Clock clock;  // of those that have arrived
  struct Votes {
    int count = 0, all = 1, any = 0;
  } votes, result;
};

struct MBar {
  unsigned count = 0, pending = 0, phase = 0;
  int64_t tx = 0;
  bool fenced = false;
  unsigned failed_polls = 0;
  struct Waiter {
    Thread* t;
    unsigned parity;
  };
  std::vector<Waiter> waiting;
  Clock next, done;
};

struct BulkOp {  // a copy that the engine has not made yet
  unsigned char* dst;
  bool has_value = false;  // `value` is what is written; else
  unsigned char value[16] = {};
  const void* src;  // contiguous `bytes`, or null: the box of `map` at `at`
  TensorMap map;
  int at[5];
  size_t bytes;
  uint64_t* bar;
  Thread* issuer;
  Clock clock;
  uint64_t where;
};

struct WgmmaOp {
  Wgmma call;
  unsigned group;
  Thread* who[128];
  float* d[128];
  uint32_t a[128][4];
  uint64_t where;
};

// ---- the co-scheduled CTAs ----------------------------------------------------------------------------------------
struct Cluster;

struct Cta : Block {
  Cluster* cluster = nullptr;
  std::map<unsigned, Barrier> barriers;
  std::vector<std::vector<Rendezvous>> warps, warpgroups;  // pending, by index
  std::vector<std::deque<WgmmaOp>> wgmma;                  // by warpgroup
};

struct Cluster {
  unsigned index = 0;  // in the launch
  std::vector<Cta*> ctas;
  std::vector<Thread*> threads;
  struct {
    unsigned arrived = 0, phase = 0;
    std::vector<Thread*> waiting;
    Clock next, done;
  } barrier;
};

struct Group {  // some clusters whose threads take turns on one OS thread
  std::vector<Cluster> clusters;
  std::vector<Cta> ctas;
  std::vector<Thread> threads;
  std::vector<Thread*> ready;
  size_t ready_head = 0;
  size_t live = 0;
  std::mt19937_64 rng;
  std::unordered_map<uint64_t*, MBar> mbars;
  std::vector<BulkOp> bulk;
  uint64_t idle_spins = 0;
  unsigned char *arena = nullptr, *arena_end = nullptr;  // the shared memory of all CTAs
  std::string error;
  const char* kernel = "";
};

inline Thread* self() { return static_cast<Thread*>(t_cur); }
inline Cta& cta() { return *static_cast<Cta*>(t_cur->block); }
Group& group();

// scheduler.cpp
void make_ready(Thread*);
void block_on(const char* what, Loc loc, unsigned mask = 0);  // until somebody calls make_ready
void yield();                                                 // others first
std::string place(Loc);

// collectives.cpp
void barrier(Barrier&, unsigned expected, const char* op, bool wait, Loc loc);
void leave_barrier(Thread* exited);  // without strict_exit the others need not wait for it

// async.cpp
void land_bulk(size_t i);     // lets copy i of the group's engine land
void finish_copies(Thread*);  // an exiting thread's cp.async land
// The address bits 4.. xored with those three places up, as many as the span of the swizzle asks for.
inline uintptr_t swizzled(uintptr_t address, unsigned span) {
  const uintptr_t mask = span / 16 == 0 ? 0 : (span / 16 - 1) << 4;
  return address ^ (address >> 3 & mask);
}

// fiber.cpp
namespace fiber {
// Room for that many stacks on this OS thread; stacks handed out before are gone.
void reserve(size_t count, size_t bytes);
void prepare(Thread*, size_t stack_idx, void (*entry)());
void switch_to(Thread* from, Thread* to);  // null: the OS thread's own stack
void entered();                            // first call of a fiber's entry
bool is_stack(const void*);
}  // namespace fiber

// ---- race.cpp: a no-op but in the checked library -----------------------------------------------------------------
// A place in the sources: a packed Loc (top bit set) or the return address of an access hook.
inline uint64_t pack_where(Loc l) {
  return (1ull << 63) | (uint64_t(l.line() & 0x7fff) << 48) |
         (reinterpret_cast<uint64_t>(l.file_name()) & 0xffffffffffffull);
}

namespace race {
extern bool enabled;  // set by access_hooks.cpp when it is linked in
// AsyncIssue to AsyncDone: a copy is under way. AsyncRead: by wgmma. Constant: by ld.global.nc.
enum Kind { Read, Write, AsyncIssue, AsyncDone, AsyncRead, Constant, AtomicRead, AtomicWrite };
void begin_launch(const Config&, const char* kernel);
void begin_group(Group&);
void access(Kind, const void*, size_t, uint64_t where);
void bulk_write(BulkOp&, const void*, size_t);  // by the copy engine

void join(Thread* const* who, size_t n);  // they met at a barrier
void release(Thread*, Clock& into);
void acquire(Thread*, const Clock& from);
void merge(Clock& into, const Clock& from);
void proxy_fence(Thread*);
void fence(Thread*);                              // __threadfence
void publish(Thread*, const void*, bool fenced);  // an atomic write: what was fenced, or with `fenced` all
void collect(Thread*, const void*, bool fenced);  // an atomic read: known at the next fence, or with `fenced` at once
std::vector<std::string> end_launch();            // the reports
}  // namespace race

// ---- traffic.cpp: bytes that kernels move in ranges of global memory (the checked library only) -------------------
namespace traffic {
void count(bool is_write, const void*, size_t);
std::string name(const void*);  // "range 3 + 16", or the address
}  // namespace traffic

}  // namespace emu
