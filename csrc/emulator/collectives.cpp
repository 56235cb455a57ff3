// Collectives of warps and warpgroups, barriers of CTAs and named ones.
#include "emulator/internal.h"

namespace emu {
namespace {

void rendezvous(std::vector<Rendezvous>& pending, unsigned slots, unsigned slot, unsigned mask, unsigned need,
                const char* op, void* args, WarpFn fn, Loc loc) {
  Thread* me = self();
  Rendezvous* r = nullptr;
  for (auto& p : pending) {
    if (p.mask == mask) {
      r = &p;
    } else if (slots == 32 && (p.mask >> slot & 1)) {
      fail(std::string(op) + ": this lane is awaited by " + p.op + " at " + place(p.where) +
               " with a different mask (divergent warp collective)",
           loc);
    }
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
  for (unsigned l = 0; l < slots; ++l) {
    if (done.who[l] && done.who[l] != me) make_ready(done.who[l]);
  }
}

void complete(Barrier& b, const Thread* me) {
  b.result = std::exchange(b.votes, {});
  for (Thread* t : b.waiting) {
    race::acquire(t, b.clock);
    if (t != me) make_ready(t);
  }
  b.clock = {};
  b.waiting.clear();
  b.arrived = 0;
}

bool is_syncthreads(const char* op) { return std::strncmp(op, "__syncthreads", 13) == 0; }

unsigned resolve(unsigned count, Loc loc) {  // 0: all threads of the CTA
  if (count % 32) fail("bar.sync: thread count is not a multiple of 32", loc);
  if (count > cta().nthreads) fail("bar.sync: more threads than the CTA has", loc);
  if (count) return count;
  if (options().strict_exit) return cta().nthreads;
  unsigned live = 0;
  for (const Thread* t : cta().cluster->threads) {
    live += t->block == self()->block && t->status != Thread::Status::Exited;
  }
  return live;
}

}  // namespace

void barrier(Barrier& b, unsigned expected, const char* op, bool wait, Loc loc) {
  Thread* me = self();
  if (!b.arrived) {
    b.expected = expected;
    b.op = op;
    b.where = loc;
  } else if (b.expected != expected) {
    fail(std::string(op) + ": barrier used with two different thread counts", loc);
  } else if (is_syncthreads(b.op) && is_syncthreads(op) &&
             (b.where.line() != loc.line() || std::strcmp(b.where.file_name(), loc.file_name()) != 0)) {
    fail(std::string("divergent ") + op + ": other threads of the block wait at " + place(b.where), loc);
  }
  race::release(me, b.clock);
  if (wait) b.waiting.push_back(me);
  if (++b.arrived == b.expected) return complete(b, me);
  if (wait) block_on(op, loc);
}

void leave_barrier(Thread* exited) {
  auto& barriers = static_cast<Cta*>(exited->block)->barriers;
  const auto it = barriers.find(0);
  if (it == barriers.end() || !it->second.arrived) return;
  if (--it->second.expected == it->second.arrived) complete(it->second, exited);
}

void bar_sync(unsigned id, unsigned count, const char* op, Loc loc) {
  if (id > 15) fail("bar.sync: barrier number above 15", loc);
  barrier(cta().barriers[id], resolve(count, loc), op, true, loc);
}

void bar_arrive(unsigned id, unsigned count, Loc loc) {
  if (id > 15) fail("bar.arrive: barrier number above 15", loc);
  barrier(cta().barriers[id], resolve(count, loc), "bar.arrive", false, loc);
}

int bar_reduce(int v, BarReduce kind, const char* op, Loc loc) {
  Barrier& b = cta().barriers[0];
  b.votes.count += v != 0;
  b.votes.all &= v != 0;
  b.votes.any |= v != 0;
  barrier(b, resolve(0, loc), op, true, loc);
  const Barrier::Votes& r = b.result;
  return kind == BarReduce::Count ? r.count : kind == BarReduce::And ? r.all : r.any;
}

void warp_collective(unsigned mask, const char* op, void* args, WarpFn fn, Loc loc) {
  Thread* me = self();
  if (!(mask >> me->lane & 1)) fail(std::string(op) + ": calling lane is not in its own mask", loc);
  rendezvous(cta().warps[me->warp], 32, me->lane, mask, unsigned(__builtin_popcount(mask)), op, args, fn, loc);
}

void warpgroup_collective(const char* op, void* args, WarpFn fn, Loc loc) {
  Thread* me = self();
  rendezvous(cta().warpgroups[me->warp / 4], 128, me->linear % 128, 0xffffffffu, 128, op, args, fn, loc);
}

void warp_sync(unsigned mask, Loc loc) {
  warp_collective(
      mask, "__syncwarp", self(),
      [](unsigned m, void* const* args) {
        Thread* who[32];
        size_t n = 0;
        for (int l = 0; l < 32; ++l) {
          if (m >> l & 1) who[n++] = static_cast<Thread*>(args[l]);
        }
        race::join(who, n);
      },
      loc);
}

void shfl(unsigned mask, ShflArgs& a, const char* op, Loc loc) {
  if (!(mask >> a.src & 1)) {
    fail(std::string(op) + ": source lane " + std::to_string(a.src) + " is not in the mask", loc);
  }
  warp_collective(
      mask, op, &a,
      [](unsigned m, void* const* args) {
        for (int l = 0; l < 32; ++l) {
          if (!(m >> l & 1)) continue;
          auto* lane = static_cast<ShflArgs*>(args[l]);
          lane->out = static_cast<ShflArgs*>(args[lane->src])->in;
        }
      },
      loc);
}

unsigned vote(unsigned mask, int pred, const char* op, Loc loc) {
  unsigned v = pred != 0;
  warp_collective(
      mask, op, &v,
      [](unsigned m, void* const* args) {
        unsigned ballot = 0;
        for (int l = 0; l < 32; ++l) {
          if (m >> l & 1) ballot |= *static_cast<unsigned*>(args[l]) << l;
        }
        for (int l = 0; l < 32; ++l) {
          if (m >> l & 1) *static_cast<unsigned*>(args[l]) = ballot;
        }
      },
      loc);
  return v;
}

unsigned match(unsigned mask, uint64_t v, Loc loc) {
  warp_collective(
      mask, "__match_any_sync", &v,
      [](unsigned m, void* const* args) {
        uint64_t in[32] = {};
        for (int l = 0; l < 32; ++l) {
          if (m >> l & 1) in[l] = *static_cast<uint64_t*>(args[l]);
        }
        for (int l = 0; l < 32; ++l) {
          if (!(m >> l & 1)) continue;
          uint64_t same = 0;
          for (int k = 0; k < 32; ++k) {
            if ((m >> k & 1) && in[k] == in[l]) same |= 1ull << k;
          }
          *static_cast<uint64_t*>(args[l]) = same;
        }
      },
      loc);
  return unsigned(v);
}

}  // namespace emu
