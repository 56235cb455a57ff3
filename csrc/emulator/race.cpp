// race.cpp - happens-before checking of shared memory.
//
// Each thread has a vector clock, each 2 bytes of shared memory a cell with the
// last write and up to four reads since.  Only barriers, __syncwarp, mbarriers
// and completed asynchronous copies create order; shuffles and mma do not.
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <set>
#include <sstream>

#include "emulator/internal.h"

namespace emu::race {

bool enabled = false;

namespace {
struct Access {
  uint32_t epoch = 0;
  uint16_t tid = 0;
  uint16_t proxy = 0;
  uint64_t where = 0;
};
struct Cell {
  Access w, r[4];
  bool in_flight = false;
};

thread_local std::vector<Cell> t_cells;
thread_local std::vector<std::string> t_reports;
thread_local std::set<std::pair<uint64_t, uint64_t>> t_seen;

std::string where_text(uint64_t w) {
  if (!w) return "(asynchronous engine)";
  if (w >> 63) {
    std::string f = reinterpret_cast<const char*>(w & 0xffffffffffffull);
    return f.substr(f.find_last_of('/') + 1) + ":" + std::to_string(w >> 48 & 0x7fff);
  }
  Dl_info d;
  if (!dladdr(reinterpret_cast<void*>(w), &d)) return "?";
  char cmd[600], line[400] = "?";
  std::snprintf(cmd, sizeof cmd, "addr2line -s -e '%s' 0x%lx 2>/dev/null", d.dli_fname,
                static_cast<unsigned long>(w - 1 - reinterpret_cast<uintptr_t>(d.dli_fbase)));
  if (FILE* f = popen(cmd, "r")) {
    if (!std::fgets(line, sizeof line, f)) line[0] = '?';
    pclose(f);
  }
  std::string s = line;
  s.erase(std::remove(s.begin(), s.end(), '\n'), s.end());
  return s;
}

void report(const char* what, size_t off, const Thread* t, uint64_t where, const Access* other) {
  const uint64_t o = other ? other->where : 0;
  if (t_reports.size() >= options().max_reports || !t_seen.insert({where, o}).second) return;
  std::ostringstream s;
  s << what << " at shared offset " << off << "\n  in " << group().kernel << ", thread " << t->gid << " at "
    << where_text(where);
  if (other) s << "\n  against thread " << other->tid << " at " << where_text(o);
  t_reports.push_back(s.str());
}
}  // namespace

void begin(Group& g) {
  if (!enabled) return;
  t_cells.assign(size_t(g.arena_end - g.arena) / 2 + 1, Cell{});
  for (Thread* t : g.threads) {
    t->clock.assign(g.threads.size() + 1, 0);  // the last entry is the copy engine
    t->clock[t->gid] = 1;
    t->proxy_fence = 0;
  }
}

void access(Kind kind, const void* p, size_t n, uint64_t where) {
  Thread* t = self();
  if (!t || !n) return;
  Group& g = group();
  auto* a = static_cast<const unsigned char*>(p);
  if (a < g.arena || a >= g.arena_end) return;
  const Block* home = nullptr;
  for (auto& b : g.blocks)
    if (a >= b.smem && a + n <= b.smem + b.smem_bytes) home = &b;
  const size_t off = size_t(a - t->block->smem);
  if (!home) return report("shared memory access out of bounds", off, t, where, nullptr);
  const Access now{t->clock[t->gid], uint16_t(t->gid), uint16_t(kind == AsyncRead), where};
  auto ordered = [&](const Access& x) { return !x.epoch || x.tid == t->gid || t->clock[x.tid] >= x.epoch; };
  for (size_t i = size_t(a - g.arena) / 2, e = size_t(a + n - 1 - g.arena) / 2; i <= e; ++i) {
    Cell& c = t_cells[i];
    if (kind == AsyncDone) {
      c.in_flight = false;
      c.w = now;
      continue;
    }
    if (c.in_flight) return report("access to bytes with an asynchronous copy still in flight", off, t, where, &c.w);
    const bool read = kind == Read || kind == AsyncRead;
    if (!ordered(c.w))
      return report(read ? "race: read not ordered after write" : "race: write not ordered after write", off, t, where,
                    &c.w);
    if (read) {
      if (!c.w.epoch) return report("read of shared memory never written", off, t, where, nullptr);
      if (kind == AsyncRead && !c.w.proxy && g.threads[c.w.tid % g.threads.size()]->proxy_fence < c.w.epoch)
        return report("async-proxy read of a generic-proxy write without fence.proxy.async", off, t, where, &c.w);
      Access* slot = nullptr;
      for (auto& r : c.r)
        if (!slot && ordered(r)) slot = &r;
      *(slot ? slot : &c.r[g.rng() % 4]) = now;
    } else {
      for (auto& r : c.r)
        if (!ordered(r)) return report("race: write not ordered after read", off, t, where, &r);
      c = Cell{};
      c.w = now;
      c.in_flight = kind == AsyncIssue;
    }
  }
}

void tma_write(const TmaOp& op, const void* p, size_t n) {
  if (!enabled) return;
  Group& g = group();
  const auto engine = uint16_t(g.threads.size());
  auto& clk = const_cast<Clock&>(op.clock);
  static thread_local uint32_t tick = 0;
  clk[engine] = ++tick;
  for (size_t i = size_t(static_cast<const unsigned char*>(p) - g.arena) / 2, e = i + n / 2; i < e; ++i) {
    t_cells[i] = Cell{};
    t_cells[i].w = {tick, engine, 1, op.where};
  }
}

void merge(Clock& into, const Clock& from) {
  if (into.size() < from.size()) into.resize(from.size(), 0);
  for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}
void join(Thread* const* who, size_t n) {
  if (!enabled || !n) return;
  Clock all = who[0]->clock;
  for (size_t i = 1; i < n; ++i) merge(all, who[i]->clock);
  for (size_t i = 0; i < n; ++i) {
    who[i]->clock = all;
    ++who[i]->clock[who[i]->gid];
  }
}
void release(Thread* t, Clock& into) {
  if (!enabled) return;
  merge(into, t->clock);
  ++t->clock[t->gid];
}
void acquire(Thread* t, const Clock& from) {
  if (enabled) merge(t->clock, from);
}
void proxy_fence(Thread* t) {
  if (!enabled) return;
  t->proxy_fence = t->clock[t->gid];
  ++t->clock[t->gid];
}
std::vector<std::string> take_reports() {
  t_seen.clear();
  return std::exchange(t_reports, {});
}
}  // namespace emu::race
