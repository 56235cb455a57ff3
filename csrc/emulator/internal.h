// internal.hpp - state shared by the emulator's own source files.
#pragma once
#include <deque>
#include <random>
#include <unordered_map>
#include <vector>

#include "emulator/emulator.h"

namespace emu {

using Clock = std::vector<uint32_t>;

struct CopyOp {
  void* dst;
  const void* src;
  unsigned bytes, valid;
  uint64_t where;
};

struct PendingAcc {  // one accumulator tile owned by in-flight wgmmas
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

  std::vector<PendingAcc> accs;
  unsigned wg_open_group = 0;

  Clock clock;               // check builds only
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
  std::vector<Thread*> waiting, arrivers;
  int count = 0, all = 1, any = 0, r_count = 0, r_all = 1, r_any = 0;
};

struct MBar {
  unsigned count = 0, pending = 0, phase = 0;
  int64_t tx = 0;
  struct Waiter {
    Thread* t;
    unsigned parity;
  };
  std::vector<Waiter> waiting;
  Clock next, done;
};

struct TmaOp {
  unsigned char* dst;
  TensorMap2d map;
  int col, row;
  uint64_t* bar;
  Thread* issuer;
  Clock clock;
  uint64_t where;
};

struct WgOp {
  uint64_t da, db;
  bool accumulate, ran = false;
  unsigned n, group;
  Block* block;
  float* d[128];
  Thread* who[128];
};

struct Group {
  std::vector<Block> blocks;
  std::vector<Thread*> threads;
  std::vector<Thread*> ready;
  size_t ready_head = 0;
  size_t live = 0;
  std::mt19937_64 rng;
  std::vector<std::unordered_map<unsigned, Barrier>> bars;  // per block
  Barrier cluster_bar;
  std::vector<std::vector<Rendezvous>> warps, warpgroups;  // per group-wide index
  std::vector<std::vector<WgOp>> wgmma;                    // per warpgroup
  std::unordered_map<uint64_t*, MBar> mbars;
  std::vector<TmaOp> tma;
  uint64_t idle_spins = 0;
  unsigned char *arena = nullptr, *arena_end = nullptr;
  std::string error;
  const char* kernel = "";
};

inline Thread* self() { return static_cast<Thread*>(t_cur); }
Group& group();

// emulator.cpp: the scheduler
void make_ready(Thread*);
void block_on(const char* what, Loc loc, unsigned mask = 0);  // until somebody calls make_ready
void barrier(Barrier&, unsigned expected, const char* op, bool wait, Loc loc);

// async.cpp
void run_tma(size_t i);       // lets copy i of the group's TMA queue land
void finish_copies(Thread*);  // an exiting thread's cp.async land
// Swizzle<B,4,3> on byte addresses: xor bits 4.. with the bits three places up.
inline uintptr_t swizzled(uintptr_t a, Swizzle s) { return a ^ ((a >> 3) & (((1u << unsigned(s)) - 1) << 4)); }

inline uint64_t pack_where(Loc l) {
  return (1ull << 63) | (uint64_t(l.line() & 0x7fff) << 48) |
         (reinterpret_cast<uint64_t>(l.file_name()) & 0xffffffffffffull);
}

// race.cpp -----------------------------------------------------------------------
namespace race {
extern bool enabled;  // set by tsan_hooks.cpp when it is linked in
enum Kind { Read, Write, AsyncIssue, AsyncDone, AsyncRead };
void begin(Group&);
void access(Kind, const void*, size_t, uint64_t where);
void tma_write(const TmaOp&, const void*, size_t);  // by the copy engine
void join(Thread* const* who, size_t n);            // barrier
void release(Thread*, Clock& into);
void acquire(Thread*, const Clock& from);
void merge(Clock& into, const Clock& from);
void proxy_fence(Thread*);
std::vector<std::string> take_reports();
}  // namespace race
}  // namespace emu
