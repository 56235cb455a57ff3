// The race checker: which accesses to shared and global memory are ordered, and which are not.
//
// Every thread has a clock: its own epoch, and the epochs of others up to which it has seen their accesses. Barriers,
// __syncwarp, mbarriers and finished asynchronous copies hand clocks on inside a cluster; shuffles, votes and mma do
// not. Between clusters a clock travels through a word of memory: __threadfence() makes a snapshot of what the thread
// knows, an atomic leaves the last snapshot at its word and picks up what others left there, and the next
// __threadfence() makes the thread know that. So a fence missing on either side is a missing order.
//
// Every cell of memory remembers its last write and some reads since. An access that is not ordered after them is a
// race.
#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <set>
#include <sstream>

#include "emulator/internal.h"

namespace emu::race {

bool enabled = false;

namespace {

struct Access {
  uint64_t where = 0;
  uint32_t epoch = 0;        // 0: none
  uint32_t thread : 29 = 0;  // in the launch, see thread_id
  uint32_t is_atomic : 1 = 0;
  uint32_t is_async : 1 = 0;   // by the copy engine or wgmma
  uint32_t in_flight : 1 = 0;  // issued, not landed
};

constexpr int kReads = 4;
struct Cell {
  Access write, reads[kReads];
};

// Cells of 4 bytes; of fewer where a page has been accessed in smaller or unaligned pieces.
class Shadow {
 public:
  void clear() {
    pages_.clear();
    recent_.fill({});
  }
  template <class F>  // f(cell) returns false to stop
  void visit(uintptr_t at, size_t n, F f) {
    for (uintptr_t end = at + n; at < end;) {
      const uintptr_t base = at & ~(kPageBytes - 1), stop = std::min(end, base + kPageBytes);
      Page& page = find(base);
      while ((at | stop) & ((uintptr_t(1) << page.shift) - 1)) refine(page);
      for (uintptr_t i = (at - base) >> page.shift, e = (stop - base) >> page.shift; i < e; ++i) {
        if (!f(page.cells[i])) return;
      }
      at = stop;
    }
  }

 private:
  static constexpr uintptr_t kPageBytes = 1024;
  struct Page {
    int shift = 2;
    std::vector<Cell> cells = std::vector<Cell>(kPageBytes >> 2);
  };
  Page& find(uintptr_t base) {
    Recent& r = recent_[base / kPageBytes % recent_.size()];
    if (!r.page || r.base != base) r = {base, &pages_[base]};
    return *r.page;
  }
  static void refine(Page& page) {
    std::vector<Cell> halves;
    halves.reserve(page.cells.size() * 2);
    for (const Cell& c : page.cells) halves.insert(halves.end(), 2, c);
    page.cells = std::move(halves);
    --page.shift;
  }
  struct Recent {
    uintptr_t base = 0;
    Page* page = nullptr;
  };
  std::unordered_map<uintptr_t, Page> pages_;
  std::array<Recent, 256> recent_{};
};

// The stack of the OS thread, where the launcher holds the kernel's arguments.
struct Stack {
  const char *begin = nullptr, *end = nullptr;
  bool contains(const void* p) const { return p >= begin && p < end; }
};
Stack own_stack() {
  pthread_attr_t attributes;
  void* begin = nullptr;
  size_t bytes = 0;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &begin, &bytes);
  pthread_attr_destroy(&attributes);
  return {static_cast<char*>(begin), static_cast<char*>(begin) + bytes};
}

// Of the launch under way; the checked library runs all of it on one OS thread.
struct Launch {
  Config cfg;
  const char* kernel = "";
  Stack launcher;
  uint32_t per_cluster = 0;  // clock entries: the threads and the copy engine
  Shadow shared, global;
  std::unordered_map<uintptr_t, Known> words;  // what atomics have left at them
  uint32_t engine_epoch = 0;
  std::vector<std::string> reports;
  std::set<std::pair<uint64_t, uint64_t>> seen;
} g_launch;

unsigned cluster_of(const Thread* t) { return static_cast<const Cta*>(t->block)->cluster->index; }
uint32_t thread_id(unsigned cluster, unsigned gid) { return cluster * g_launch.per_cluster + gid; }
uint32_t& own_epoch(Thread* t) { return t->clock.own[t->gid]; }

// `first` is the id of the first thread of t's cluster.
bool knows(const Thread* t, uint32_t first, const Access& x) {
  const uint32_t in_cluster = x.thread - first;
  if (in_cluster < g_launch.per_cluster) return t->clock.own[in_cluster] >= x.epoch;
  if (!t->clock.foreign) return false;
  const auto it = t->clock.foreign->find(x.thread / g_launch.per_cluster);
  return it != t->clock.foreign->end() && it->second[x.thread % g_launch.per_cluster] >= x.epoch;
}

// ---- reports ----------------------------------------------------------------------------------------------------
std::string source_line(const void* code) {
  Dl_info info;
  if (!dladdr(code, &info)) return "?";
  const auto offset = static_cast<const char*>(code) - 1 - static_cast<const char*>(info.dli_fbase);
  char command[600], line[400];
  std::snprintf(command, sizeof command, "addr2line -s -i -e '%s' 0x%tx 2>/dev/null", info.dli_fname, offset);
  std::string text;
  if (FILE* f = popen(command, "r")) {
    for (int i = 0; std::fgets(line, sizeof line, f); ++i) {  // inlined functions, the innermost first
      line[std::strcspn(line, " \n")] = '\0';
      if (i < 3) text += (i ? ", inlined at " : "") + std::string(line);
    }
    pclose(f);
  }
  return text.empty() ? "?" : text;
}

std::string where_text(uint64_t where) {
  if (!where) return "an asynchronous operation";
  if (!(where >> 63)) return source_line(reinterpret_cast<const void*>(where));
  const std::string file = reinterpret_cast<const char*>(where & 0xffffffffffffull);
  return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(where >> 48 & 0x7fff);
}

std::string thread_text(const Access& x) {
  const Config& cfg = g_launch.cfg;
  const unsigned nt = cfg.block.x * cfg.block.y * cfg.block.z;
  const unsigned cluster = x.thread / g_launch.per_cluster, gid = x.thread % g_launch.per_cluster;
  if (gid == nt * cfg.cluster) return "the copy engine";
  const size_t block = size_t(cluster) * cfg.cluster + gid / nt;
  std::ostringstream o;
  o << "block (" << block % cfg.grid.x << "," << block / cfg.grid.x % cfg.grid.y << ","
    << block / cfg.grid.x / cfg.grid.y << ") thread " << gid % nt;
  return o.str();
}

void report(const char* what, const std::string& address, const Access& now, const Access* other) {
  Launch& l = g_launch;
  if (l.reports.size() >= options().max_reports) return;
  if (!l.seen.insert({now.where, other ? other->where : 0}).second) return;
  std::string s = std::string(what) + " at " + address + "\n  in " + l.kernel + ", " + thread_text(now) + " at " +
                  where_text(now.where);
  if (other) {
    s += "\n  against " + thread_text(*other) + " at " + where_text(other->where);
    if (other->thread / l.per_cluster != now.thread / l.per_cluster) {
      s += "\n  (between clusters: write, __threadfence(), atomic there; atomic, __threadfence(), access here; "
           "each by one thread, the rest of its CTA joined by barriers)";
    }
  }
  l.reports.push_back(s);
}

// ---- clocks -----------------------------------------------------------------------------------------------------
void raise(Epochs& into, const Epochs& from) {
  if (into.size() < from.size()) into.resize(from.size(), 0);
  for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}

Known unite(const Known& a, const Known& b) {
  if (!a || a == b) return b;
  if (!b) return a;
  auto both = std::make_shared<std::map<unsigned, Epochs>>(*a);
  for (const auto& [cluster, epochs] : *b) raise((*both)[cluster], epochs);
  return both;
}

Known snapshot(Thread* t) {
  auto all = t->clock.foreign ? std::make_shared<std::map<unsigned, Epochs>>(*t->clock.foreign)
                              : std::make_shared<std::map<unsigned, Epochs>>();
  (*all)[cluster_of(t)] = t->clock.own;
  ++own_epoch(t);  // what follows is not part of it
  return all;
}

void learn(Thread* t, const Known& what) {
  if (!what) return;
  if (const auto it = what->find(cluster_of(t)); it != what->end()) raise(t->clock.own, it->second);
  t->clock.foreign = unite(t->clock.foreign, what);
}

}  // namespace

void begin_launch(const Config& cfg, const char* kernel) {
  if (!enabled) return;
  Launch& l = g_launch;
  l.cfg = cfg;
  l.kernel = kernel;
  l.launcher = own_stack();
  l.per_cluster = cfg.block.x * cfg.block.y * cfg.block.z * cfg.cluster + 1;
  l.global.clear();
  l.words.clear();
  l.reports.clear();
  l.seen.clear();
}

void begin_group(Group& g) {
  if (!enabled) return;
  g_launch.shared.clear();
  for (Thread& t : g.threads) {
    t.clock.own.assign(g_launch.per_cluster, 0);
    own_epoch(&t) = 1;
  }
}

std::vector<std::string> end_launch() {
  g_launch.global.clear();
  g_launch.shared.clear();
  return std::exchange(g_launch.reports, {});
}

void access(Kind kind, const void* p, size_t n, uint64_t where) {
  Thread* t = self();
  if (!enabled || !t || !n || fiber::is_stack(p)) return;
  Group& g = group();
  Launch& l = g_launch;
  const auto* byte = static_cast<const unsigned char*>(p);
  const bool is_shared = byte >= g.arena && byte < g.arena_end;
  const bool is_write = kind == Write || kind == AsyncIssue || kind == AtomicWrite;
  const bool is_atomic = kind == AtomicRead || kind == AtomicWrite;

  Access now;
  now.where = where;
  now.epoch = own_epoch(t);
  const uint32_t first = thread_id(cluster_of(t), 0);
  now.thread = first + t->gid;
  now.is_atomic = is_atomic;
  now.is_async = kind == AsyncRead;
  now.in_flight = kind == AsyncIssue;
  const auto tell = [&](const char* what, const Access* other) {
    report(what, is_shared ? "shared offset " + std::to_string(byte - t->block->smem) : traffic::name(p), now, other);
    return false;
  };

  if (is_shared) {
    bool inside = false;
    for (const Cta* c : cta().cluster->ctas) inside |= byte >= c->smem && byte + n <= c->smem + c->smem_bytes;
    if (!inside) return (void)tell("shared memory access out of bounds", nullptr);
  } else if (l.launcher.contains(p)) {
    return;  // arguments of the kernel
  } else if (t->may_run_ahead) {
    return (void)tell("global memory touched before wait_for_previous_kernel(), in a launch that overlaps", nullptr);
  } else if (kind != Constant) {
    if (kind != Write) traffic::count(false, p, n);
    if (is_write) traffic::count(true, p, n);
  }
  const auto ordered = [&](const Access& x) {
    return !x.epoch || x.thread == now.thread || (is_atomic && x.is_atomic) || knows(t, first, x);
  };
  (is_shared ? l.shared : l.global).visit(reinterpret_cast<uintptr_t>(p), n, [&](Cell& c) {
    if (kind == AsyncDone) {
      c.write = now;
      return true;
    }
    if (kind == Constant) {
      if (!c.write.epoch) return true;
      return tell("read through the read-only cache (__ldg) of memory that the same launch writes", &c.write);
    }
    if (c.write.in_flight) return tell("access to bytes with an asynchronous copy still in flight", &c.write);
    if (!ordered(c.write)) {
      return tell(is_write ? "race: write not ordered after write" : "race: read not ordered after write", &c.write);
    }
    if (is_write) {
      for (const Access& r : c.reads) {
        if (!ordered(r)) return tell("race: write not ordered after read", &r);
      }
      c = Cell{};
      c.write = now;
      return true;
    }
    if (is_shared && !c.write.epoch) return tell("read of shared memory never written", nullptr);
    if (kind == AsyncRead && !c.write.is_async &&
        cta().cluster->threads[c.write.thread % l.per_cluster]->proxy_fence < c.write.epoch) {
      return tell("async-proxy read of a generic-proxy write without fence.proxy.async", &c.write);
    }
    Access* slot = nullptr;
    for (Access& r : c.reads) {
      if (!slot && ordered(r)) slot = &r;
    }
    *(slot ? slot : &c.reads[g.rng() % kReads]) = now;
    return true;
  });
}

void bulk_write(BulkOp& op, const void* p, size_t n) {
  if (!enabled) return;
  const uint32_t engine = g_launch.per_cluster - 1;
  Clock& clock = op.clock;
  if (clock.own.size() <= engine) clock.own.resize(engine + 1, 0);
  clock.own[engine] = ++g_launch.engine_epoch;
  g_launch.shared.visit(reinterpret_cast<uintptr_t>(p), n, [&](Cell& c) {
    c = Cell{};
    c.write.where = op.where;
    c.write.epoch = g_launch.engine_epoch;
    c.write.thread = thread_id(cluster_of(op.issuer), engine);
    c.write.is_async = true;
    return true;
  });
}

void merge(Clock& into, const Clock& from) {
  raise(into.own, from.own);
  into.foreign = unite(into.foreign, from.foreign);
}

void join(Thread* const* who, size_t n) {
  if (!enabled) return;
  Clock all;
  for (size_t i = 0; i < n; ++i) release(who[i], all);
  for (size_t i = 0; i < n; ++i) acquire(who[i], all);
}

void release(Thread* t, Clock& into) {
  if (!enabled) return;
  merge(into, t->clock);
  ++own_epoch(t);
}

void acquire(Thread* t, const Clock& from) {
  if (enabled) merge(t->clock, from);
}

void proxy_fence(Thread* t) {
  if (!enabled) return;
  t->proxy_fence = own_epoch(t);
  ++own_epoch(t);
}

void fence(Thread* t) {
  learn(t, std::exchange(t->collected, nullptr));
  t->fenced = snapshot(t);
}

void publish(Thread* t, const void* word, bool fenced) {
  Known& at = g_launch.words[reinterpret_cast<uintptr_t>(word)];
  at = unite(at, fenced ? snapshot(t) : t->fenced);
}

void collect(Thread* t, const void* word, bool fenced) {
  const auto it = g_launch.words.find(reinterpret_cast<uintptr_t>(word));
  if (it == g_launch.words.end()) return;
  if (fenced) {
    learn(t, it->second);
  } else {
    t->collected = unite(t->collected, it->second);
  }
}

}  // namespace emu::race
