// emu.cpp - fibers, scheduling and collectives of the CPU kernel emulator.
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <mutex>
#include <sstream>
#include <thread>

#include "emulator/internal.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if __has_include(<valgrind/valgrind.h>)
#include <valgrind/valgrind.h>
#else
#define VALGRIND_STACK_REGISTER(a, b) 0
#endif

#if !defined(__x86_64__)
#error "emu_switch is written for x86-64: add the same dozen lines for this CPU"
#endif
extern "C" void emu_switch(void** save_sp, void* load_sp);
asm(R"(
.text
.p2align 4
.globl emu_switch
.type emu_switch,@function
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_switch,.-emu_switch
)");

namespace emu {

thread_local Fiber* t_cur __attribute__((tls_model("initial-exec"))) = nullptr;

namespace {
thread_local Group* t_group = nullptr;
thread_local void* t_main_sp = nullptr;
#if defined(__SANITIZE_ADDRESS__)
thread_local void* t_main_fake = nullptr;  // the OS thread's own stack, as ASan told us
thread_local const void* t_main_bottom = nullptr;
thread_local size_t t_main_size = 0;
#endif
thread_local uint64_t t_switches = 0;
thread_local const std::function<void()>* t_kernel = nullptr;
std::atomic<uint64_t> g_switches{0};

struct StackPool {  // mmap'd stacks with a guard page below each
  std::vector<unsigned char*> base;
  size_t bytes = 0;
  unsigned char* get(size_t i, size_t want) {
    if (want != bytes) {
      release();
      bytes = want;
    }
    while (base.size() <= i) {
      void* p = mmap(nullptr, bytes + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (p == MAP_FAILED) throw Error("emu: no memory for fiber stacks");
      mprotect(p, 4096, PROT_NONE);
      auto* b = static_cast<unsigned char*>(p) + 4096;
      (void)VALGRIND_STACK_REGISTER(b, b + bytes);
      base.push_back(b);
    }
    return base[i];
  }
  void release() {
    for (auto* b : base) munmap(b - 4096, bytes + 4096);
    base.clear();
  }
  ~StackPool() { release(); }
};
thread_local StackPool t_stacks;

void switch_to(Thread* from, Thread* to) {  // null means the OS thread's own stack
  ++t_switches;
  t_cur = to;
  void** save = from ? &from->sp : &t_main_sp;
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom = to ? to->stack : t_main_bottom;
  const size_t size = to ? t_stacks.bytes : t_main_size;
  void** fake = from ? (from->status == Thread::Status::Exited ? nullptr : &from->fake_stack) : &t_main_fake;
  __sanitizer_start_switch_fiber(fake, bottom, size);
#endif
  emu_switch(save, to ? to->sp : t_main_sp);
#if defined(__SANITIZE_ADDRESS__)
  const void* ob;
  size_t os;
  __sanitizer_finish_switch_fiber(from ? from->fake_stack : t_main_fake, &ob, &os);
#endif
}

Thread* pick() {
  Group& g = *t_group;
  while (!g.tma.empty() && options().async == Async::Random && g.rng() % 8 == 0) run_tma(g.rng() % g.tma.size());
  for (;;) {
    const size_t n = g.ready.size() - g.ready_head;
    if (n) {
      if (options().order == Order::Random) {
        const size_t k = g.ready_head + g.rng() % n;
        std::swap(g.ready[k], g.ready.back());
        Thread* t = g.ready.back();
        g.ready.pop_back();
        return t;
      }
      Thread* t = g.ready[g.ready_head++];
      if (g.ready_head == g.ready.size()) {
        g.ready.clear();
        g.ready_head = 0;
      }
      return t;
    }
    if (g.tma.empty()) return nullptr;
    run_tma(0);  // nothing else can move: data lands now
  }
}

void suspend() {  // caller has set status and queues
  Thread* me = self();
  Thread* next = pick();
  if (next != me) switch_to(me, next);
}

std::string place(Loc l) {
  std::string f = l.file_name();
  return f.substr(f.find_last_of('/') + 1) + ":" + std::to_string(l.line());
}

std::string describe(const Group& g) {  // who waits where, folded into ranges
  std::ostringstream o;
  for (size_t i = 0; i < g.threads.size();) {
    auto key = [&](size_t k) {
      const Thread* t = g.threads[k];
      if (t->status == Thread::Status::Exited) return std::string("exited");
      if (t->status == Thread::Status::Ready) return std::string("runnable");
      std::ostringstream s;
      s << "waiting in " << t->waiting_for << " at " << place(t->where);
      if (t->wait_mask) s << " mask 0x" << std::hex << t->wait_mask;
      return s.str();
    };
    size_t j = i;
    const std::string k = key(i);
    while (j + 1 < g.threads.size() && g.threads[j + 1]->block == g.threads[i]->block && key(j + 1) == k) ++j;
    const Block* b = g.threads[i]->block;
    o << "\n  block (" << b->idx.x << "," << b->idx.y << "," << b->idx.z << ") threads " << g.threads[i]->linear << "-"
      << g.threads[j]->linear << ": " << k;
    i = j + 1;
  }
  return o.str();
}

[[noreturn]] void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (!t_main_size) {
    t_main_bottom = bottom;
    t_main_size = size;
  }  // first entry comes from there
#endif
  (*t_kernel)();
  Thread* me = self();
  finish_copies(me);
  Group& g = *t_group;
  me->status = Thread::Status::Exited;
  g.idle_spins = 0;
  --g.live;
  if (!options().strict_exit) {  // Volta rule: only live threads count
    auto& bars = g.bars[me->block->rank];
    if (auto it = bars.find(0); it != bars.end() && it->second.arrived) {
      Barrier& b = it->second;
      if (--b.expected == b.arrived) {
        race::join(b.arrivers.data(), b.arrivers.size());
        b.r_count = b.count;
        b.r_all = b.all;
        b.r_any = b.any;
        for (Thread* t : b.waiting) make_ready(t);
        b.waiting.clear();
        b.arrivers.clear();
        b.arrived = 0;
        b.count = b.any = 0;
        b.all = 1;
      }
    }
  }
  switch_to(me, pick());
  std::abort();
}

void prepare(Thread* t, unsigned char* stack, size_t bytes) {
  t->stack = stack;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack, bytes);  // frames of an earlier group never returned
#endif
  // Stagger the tops, or all stacks would compete for one cache set.
  auto top = reinterpret_cast<uintptr_t>(stack + bytes - (t->gid * 7 % 64) * 64) & ~uintptr_t(15);
  auto* ret = reinterpret_cast<void**>(top - 16);
  *ret = reinterpret_cast<void*>(&fiber_main);
  t->sp = ret - 6;
  std::memset(t->sp, 0, 48);
}

void run_group(const Config& cfg, const char* name, const std::function<void()>& kernel, size_t index) {
  Group g;
  g.kernel = name;
  g.rng.seed(options().seed * 0x9e3779b97f4a7c15ull + index);
  t_group = &g;
  t_kernel = &kernel;
  const unsigned nt = cfg.block.x * cfg.block.y * cfg.block.z, nb = cfg.cluster;
  const size_t span = (cfg.smem + 1023) / 1024 * 1024, zone = 4096;
  const size_t total = zone + nb * (span + zone) + 1024;
  thread_local std::vector<unsigned char> storage;
  if (storage.size() < total) storage.resize(total);
  auto at = (reinterpret_cast<uintptr_t>(storage.data()) + 1023) & ~uintptr_t(1023);
  g.arena = reinterpret_cast<unsigned char*>(at);
  g.arena_end = storage.data() + total;
  std::memset(g.arena, 0xff, size_t(g.arena_end - g.arena));  // NaN in every float format
  g.blocks.resize(nb);
  g.bars.resize(nb);
  std::vector<Thread> store(size_t(nb) * nt);
  for (unsigned b = 0; b < nb; ++b) {
    Block& k = g.blocks[b];
    const size_t lin = index * nb + b;
    k.idx = {unsigned(lin % cfg.grid.x), unsigned(lin / cfg.grid.x % cfg.grid.y),
             unsigned(lin / cfg.grid.x / cfg.grid.y)};
    k.dim = cfg.block;
    k.grid = cfg.grid;
    k.rank = b;
    k.nthreads = nt;
    k.group = &g;
    k.smem = g.arena + zone + b * (span + zone);
    k.smem_bytes = cfg.smem;
    for (unsigned i = 0; i < nt; ++i) {
      Thread& t = store[size_t(b) * nt + i];
      t.tid = {i % cfg.block.x, i / cfg.block.x % cfg.block.y, i / cfg.block.x / cfg.block.y};
      t.linear = i;
      t.gid = b * nt + i;
      t.lane = i % 32;
      t.warp = i / 32;
      t.block = &k;
      prepare(&t, t_stacks.get(t.gid, options().stack_bytes), options().stack_bytes);
      g.threads.push_back(&t);
    }
  }
  g.live = g.threads.size();
  const unsigned wpb = (nt + 31) / 32;
  g.warps.resize(size_t(nb) * wpb);
  g.warpgroups.resize(size_t(nb) * ((wpb + 3) / 4));
  g.wgmma.resize(g.warpgroups.size());
  g.ready = g.threads;
  if (options().order == Order::Reverse) std::reverse(g.ready.begin(), g.ready.end());
  race::begin(g);
  if (Thread* first = pick()) switch_to(nullptr, first);
  if (g.error.empty() && g.live) g.error = std::string("deadlock in ") + name + describe(g);
  t_cur = nullptr;
  t_group = nullptr;
  g_switches += std::exchange(t_switches, 0);
  if (!g.error.empty()) throw Error(g.error);
}

}  // namespace

void make_ready(Thread* t) {
  t->status = Thread::Status::Ready;
  t_group->ready.push_back(t);
  t_group->idle_spins = 0;
}

void block_on(const char* what, Loc loc, unsigned mask) {
  Thread* me = self();
  me->status = Thread::Status::Blocked;
  me->waiting_for = what;
  me->where = loc;
  me->wait_mask = mask;
  suspend();
}

Group& group() { return *t_group; }
uint64_t switches() { return g_switches; }

Options& options() {
  static Options o;
  return o;
}

namespace {
std::string g_bug;
}
bool bug_is_on(const char* name) { return g_bug == name; }
void set_bug(const char* name) { g_bug = name; }

void fail(const std::string& what, Loc loc) {
  Thread* me = self();
  Group& g = *t_group;
  std::ostringstream o;
  o << what << "\n  in " << g.kernel << " at " << place(loc) << ", block (" << me->block->idx.x << ","
    << me->block->idx.y << "," << me->block->idx.z << ") thread " << me->linear << " (warp " << me->warp << " lane "
    << me->lane << ")" << describe(g);
  g.error = o.str();
  switch_to(me, nullptr);  // abandon every fiber of the group
  std::abort();
}

void launch(const Config& cfg, const char* name, const std::function<void()>& kernel) {
  const size_t blocks = size_t(cfg.grid.x) * cfg.grid.y * cfg.grid.z;
  const unsigned nt = cfg.block.x * cfg.block.y * cfg.block.z;
  if (!blocks || !nt || nt > 1024) throw Error(std::string(name) + ": bad grid or block size");
  if (cfg.smem > 227 * 1024) throw Error(std::string(name) + ": more than 227 KiB of shared memory");
  if (blocks % cfg.cluster) throw Error(std::string(name) + ": grid is not a multiple of the cluster");
  const size_t groups = blocks / cfg.cluster;
  std::vector<size_t> order(groups);
  for (size_t i = 0; i < groups; ++i) order[i] = i;
  if (options().order == Order::Reverse) std::reverse(order.begin(), order.end());
  if (options().order == Order::Random) std::shuffle(order.begin(), order.end(), std::mt19937_64(options().seed));

  std::atomic<size_t> next{0};
  std::mutex m;
  std::string error;
  std::vector<std::string> races;
  auto work = [&] {
    for (size_t i; (i = next++) < groups;) {
      try {
        run_group(cfg, name, kernel, order[i]);
      } catch (const std::exception& e) {
        std::lock_guard l(m);
        if (error.empty()) error = e.what();
        next = groups;
      }
    }
    auto r = race::take_reports();
    std::lock_guard l(m);
    races.insert(races.end(), r.begin(), r.end());
  };
  unsigned workers = options().workers ? options().workers : std::max(1u, std::thread::hardware_concurrency());
  workers = unsigned(std::min<size_t>(workers, groups));
  if (workers <= 1) {
    work();
  } else {
    std::vector<std::thread> pool;
    for (unsigned i = 0; i < workers; ++i) pool.emplace_back(work);
    for (auto& t : pool) t.join();
  }
  for (auto& r : races) error += (error.empty() ? "" : "\n") + r;
  if (!error.empty()) throw Error(error);
}

// ---- warp and warpgroup collectives --------------------------------------------------
namespace {
void rendezvous(std::vector<Rendezvous>& pending, unsigned slots, unsigned slot, unsigned mask, unsigned need,
                const char* op, void* args, WarpFn fn, Loc loc) {
  Thread* me = self();
  Rendezvous* r = nullptr;
  for (auto& p : pending) {
    if (p.mask != mask) {
      if (slots == 32 && (p.mask >> slot & 1))
        fail(std::string(op) + ": this lane is awaited by " + p.op + " at " + place(p.where) +
                 " with a different mask (divergent warp collective)",
             loc);
      continue;
    }
    r = &p;
  }
  if (!r) {
    pending.push_back({mask, 0, op, loc, {}, {}});
    r = &pending.back();
  } else if (std::strcmp(r->op, op) != 0) {
    fail(std::string("divergent warp collective: this lane runs ") + op + " while others wait in " + r->op + " at " +
             place(r->where),
         loc);
  }
  r->args[slot] = args;
  r->who[slot] = me;
  if (++r->arrived < need) return block_on(op, loc, mask);
  const Rendezvous done = *r;
  pending.erase(pending.begin() + (r - pending.data()));
  if (fn) fn(mask, done.args);
  for (unsigned l = 0; l < slots; ++l)
    if (done.who[l] && done.who[l] != me) make_ready(done.who[l]);
}
}  // namespace

void warp_collective(unsigned mask, const char* op, void* args, WarpFn fn, Loc loc) {
  Thread* me = self();
  const unsigned wpb = (me->block->nthreads + 31) / 32;
  if (!(mask >> me->lane & 1)) fail(std::string(op) + ": calling lane is not in its own mask", loc);
  rendezvous(t_group->warps[me->block->rank * wpb + me->warp], 32, me->lane, mask, unsigned(__builtin_popcount(mask)),
             op, args, fn, loc);
}

void warpgroup_collective(const char* op, void* args, WarpFn fn, Loc loc) {
  Thread* me = self();
  const unsigned per = ((me->block->nthreads + 31) / 32 + 3) / 4;
  rendezvous(t_group->warpgroups[me->block->rank * per + me->warp / 4], 128, me->linear % 128, 0xffffffffu, 128, op,
             args, fn, loc);
}

void shfl(unsigned mask, ShflArgs& a, const char* op, Loc loc) {
  if (!(mask >> a.src & 1))
    fail(std::string(op) + ": source lane " + std::to_string(a.src) + " is not in the mask", loc);
  warp_collective(
      mask, op, &a,
      [](unsigned m, void* const* p) {
        for (int l = 0; l < 32; ++l)
          if (m >> l & 1) {
            auto* me = static_cast<ShflArgs*>(p[l]);
            me->out = static_cast<ShflArgs*>(p[me->src])->in;
          }
      },
      loc);
}

unsigned vote(unsigned mask, int pred, const char* op, Loc loc) {
  unsigned v = pred != 0;
  warp_collective(
      mask, op, &v,
      [](unsigned m, void* const* p) {
        unsigned all = 0;
        for (int l = 0; l < 32; ++l)
          if (m >> l & 1) all |= *static_cast<unsigned*>(p[l]) << l;
        for (int l = 0; l < 32; ++l)
          if (m >> l & 1) *static_cast<unsigned*>(p[l]) = all;
      },
      loc);
  return v;
}

unsigned match(unsigned mask, uint64_t v, Loc loc) {
  uint64_t a = v;
  warp_collective(
      mask, "__match_any_sync", &a,
      [](unsigned m, void* const* p) {
        uint64_t in[32] = {};
        for (int l = 0; l < 32; ++l)
          if (m >> l & 1) in[l] = *static_cast<uint64_t*>(p[l]);
        for (int l = 0; l < 32; ++l)
          if (m >> l & 1) {
            uint64_t out = 0;
            for (int k = 0; k < 32; ++k)
              if ((m >> k & 1) && in[k] == in[l]) out |= 1ull << k;
            *static_cast<uint64_t*>(p[l]) = out;
          }
      },
      loc);
  return unsigned(a);
}

// ---- block and cluster barriers ---------------------------------------------------------
namespace {
void complete(Barrier& b, Thread* me) {
  race::join(b.arrivers.data(), b.arrivers.size());
  b.r_count = b.count;
  b.r_all = b.all;
  b.r_any = b.any;
  for (Thread* t : b.waiting)
    if (t != me) make_ready(t);
  b.waiting.clear();
  b.arrivers.clear();
  b.arrived = 0;
  b.count = b.any = 0;
  b.all = 1;
}
}  // namespace
void barrier(Barrier& b, unsigned expected, const char* op, bool wait, Loc loc) {
  Thread* me = self();
  if (!b.arrived) {
    b.expected = expected;
    b.op = op;
    b.where = loc;
  } else if (b.expected != expected)
    fail(std::string(op) + ": barrier used with two different thread counts", loc);
  else if (std::strcmp(b.op, op) == 0 && std::strcmp(op, "__syncthreads") == 0 &&
           (b.where.line() != loc.line() || std::strcmp(b.where.file_name(), loc.file_name()) != 0))
    fail("divergent __syncthreads: other threads of the block wait at " + place(b.where), loc);
  b.arrivers.push_back(me);
  if (wait) b.waiting.push_back(me);
  if (++b.arrived == b.expected) return complete(b, me);
  if (wait) block_on(op, loc);
}
namespace {
unsigned resolve(unsigned count, Loc loc) {
  if (count % 32) fail("bar.sync: thread count is not a multiple of 32", loc);
  if (count) return count;
  if (options().strict_exit) return self()->block->nthreads;
  unsigned n = 0;
  for (Thread* t : t_group->threads) n += t->block == self()->block && t->status != Thread::Status::Exited;
  return n;
}
}  // namespace

void bar_sync(unsigned id, unsigned count, const char* op, Loc loc) {
  if (id > 15) fail("bar.sync: barrier number above 15", loc);
  barrier(t_group->bars[self()->block->rank][id], resolve(count, loc), op, true, loc);
}
void bar_arrive(unsigned id, unsigned count, Loc loc) {
  barrier(t_group->bars[self()->block->rank][id], resolve(count, loc), "bar.arrive", false, loc);
}
int bar_reduce(int v, int kind, const char* op, Loc loc) {
  Barrier& b = t_group->bars[self()->block->rank][0];
  b.count += v != 0;
  b.all &= v != 0;
  b.any |= v != 0;
  barrier(b, resolve(0, loc), op, true, loc);
  return kind == 0 ? b.r_count : kind == 1 ? b.r_all : b.r_any;
}
void spin_hint(Loc loc) {
  Thread* me = self();
  if (++t_group->idle_spins > 20'000'000)
    fail("a polling loop makes no progress (is the awaited block co-scheduled?)", loc);
  me->waiting_for = "spin";
  me->where = loc;
  t_group->ready.push_back(me);
  suspend();
}

unsigned smem_addr(const void* p) { return unsigned(static_cast<const unsigned char*>(p) - self()->block->smem); }
void* smem_ptr(unsigned a) { return self()->block->smem + a; }
void note_read(const void* p, size_t n, Loc l) {
  if (race::enabled) race::access(race::Read, p, n, pack_where(l));
}
void note_write(const void* p, size_t n, Loc l) {
  if (race::enabled) race::access(race::Write, p, n, pack_where(l));
}

// ---- atomics -------------------------------------------------------------------------------------------
namespace {
template <class T>
T rmw(void* p, T v, int op) {
  auto* q = static_cast<T*>(p);
  if (op == 0) return __atomic_fetch_add(q, v, __ATOMIC_SEQ_CST);
  if (op == 3) return __atomic_fetch_or(q, v, __ATOMIC_SEQ_CST);
  if (op == 4) return __atomic_fetch_and(q, v, __ATOMIC_SEQ_CST);
  if (op == 5) return __atomic_exchange_n(q, v, __ATOMIC_SEQ_CST);
  T old = __atomic_load_n(q, __ATOMIC_SEQ_CST);
  while (!__atomic_compare_exchange_n(q, &old, op == 1 ? std::max(old, v) : std::min(old, v), false, __ATOMIC_SEQ_CST,
                                      __ATOMIC_SEQ_CST)) {
  }
  return old;
}
}  // namespace
uint32_t atomic_rmw32(void* p, uint32_t v, int op) { return rmw(p, v, op); }
int32_t atomic_rmw32s(void* p, int32_t v, int op) { return rmw(p, v, op); }
uint64_t atomic_rmw64(void* p, uint64_t v, int op) { return rmw(p, v, op); }
float atomic_addf(float* p, float v) {
  auto* q = reinterpret_cast<uint32_t*>(p);
  uint32_t old = __atomic_load_n(q, __ATOMIC_SEQ_CST);
  while (!__atomic_compare_exchange_n(q, &old, __float_as_uint(__uint_as_float(old) + v), false, __ATOMIC_SEQ_CST,
                                      __ATOMIC_SEQ_CST)) {
  }
  return __uint_as_float(old);
}
uint32_t atomic_cas32(void* p, uint32_t e, uint32_t v) {
  __atomic_compare_exchange_n(static_cast<uint32_t*>(p), &e, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
  return e;
}
uint64_t atomic_cas64(void* p, uint64_t e, uint64_t v) {
  __atomic_compare_exchange_n(static_cast<uint64_t*>(p), &e, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
  return e;
}
}  // namespace emu

void __syncwarp(unsigned mask, emu::Loc loc) {
  emu::Thread* me = emu::self();
  emu::warp_collective(
      mask, "__syncwarp", me,
      [](unsigned m, void* const* p) {
        emu::Thread* who[32];
        size_t n = 0;
        for (int l = 0; l < 32; ++l)
          if (m >> l & 1) who[n++] = static_cast<emu::Thread*>(p[l]);
        emu::race::join(who, n);
      },
      loc);
}

namespace emu {
void set_bug(const char* name);
}
extern "C" __attribute__((visibility("default"))) void nld_emulator_set_bug(const char* name) { emu::set_bug(name); }

// For the tests, which load the library through torch and set this through ctypes.
extern "C" __attribute__((visibility("default"))) void nld_emulator_set(int order, int async, uint64_t seed,
                                                                        unsigned workers) {
  emu::Options& o = emu::options();
  o.order = static_cast<emu::Order>(order);
  o.async = static_cast<emu::Async>(async);
  o.seed = seed;
  o.workers = workers;
}
