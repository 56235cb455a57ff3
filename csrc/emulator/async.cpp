// Asynchronous copies of the emulator: cp.async groups, mbarriers, TMA; clusters.
#include "emulator/internal.h"

namespace emu {

// ---- cp.async -----------------------------------------------------------------------------
namespace {
void perform(CopyOp& c) {
  std::memcpy(c.dst, c.src, c.valid);
  std::memset(static_cast<unsigned char*>(c.dst) + c.valid, 0, c.bytes - c.valid);
}
}  // namespace

void finish_copies(Thread* t) {
  for (auto& grp : t->copy_groups) {
    for (CopyOp& c : grp) {
      if (c.src) perform(c);
    }
  }
}

void cp_async(void* dst, const void* src, unsigned bytes, unsigned valid, Loc loc) {
  if (reinterpret_cast<uintptr_t>(dst) % bytes || (valid && reinterpret_cast<uintptr_t>(src) % bytes))
    fail("cp.async: address not aligned to its size", loc);
  if (valid > bytes) fail("cp.async: source size exceeds copy size", loc);
  const Block* b = self()->block;
  auto* d = static_cast<unsigned char*>(dst);
  if (d < b->smem || d + bytes > b->smem + b->smem_bytes)
    fail("cp.async: destination outside the block's shared memory", loc);
  CopyOp c{dst, src, bytes, valid, pack_where(loc)};
  if (race::enabled) {
    race::access(race::Read, src, valid, c.where);
    race::access(race::AsyncIssue, dst, bytes, c.where);
  }
  const Async mode = options().async;
  const bool now = mode == Async::Eager || (mode == Async::Random && group().rng() % 2);
  if (now) {
    perform(c);
    c.src = nullptr;
  } else if (mode == Async::Lazy)
    std::memset(dst, 0xff, bytes);  // NaN until it lands
  self()->open_copies.push_back(c);
}
void cp_async_commit() {
  Thread* me = self();
  me->copy_groups.push_back(std::move(me->open_copies));
  me->open_copies.clear();
}
void cp_async_wait(unsigned pending, Loc) {
  Thread* me = self();
  while (me->copy_groups.size() > pending) {
    for (CopyOp& c : me->copy_groups.front()) {
      if (c.src) perform(c);
      if (race::enabled) race::access(race::AsyncDone, c.dst, c.bytes, c.where);
    }
    me->copy_groups.pop_front();
  }
}

// ---- mbarrier --------------------------------------------------------------------------------
namespace {
MBar& find_bar(uint64_t* p, Loc loc) {
  auto it = group().mbars.find(p);
  if (it == group().mbars.end()) fail("mbarrier used before mbarrier.init", loc);
  return it->second;
}
void settle(MBar& b) {
  if (b.pending || b.tx) return;
  b.phase ^= 1;
  b.pending = b.count;
  b.done = std::exchange(b.next, {});
  for (auto it = b.waiting.begin(); it != b.waiting.end();)
    if (it->parity != b.phase) {
      make_ready(it->t);
      it = b.waiting.erase(it);
    } else
      ++it;
}
}  // namespace

void mbar_init(uint64_t* p, unsigned count, Loc loc) {
  if (reinterpret_cast<uintptr_t>(p) % 8) fail("mbarrier: not 8-byte aligned", loc);
  MBar b;
  b.count = b.pending = count;
  group().mbars[p] = std::move(b);
}
void mbar_arrive(uint64_t* p, unsigned tx, Loc loc) {
  MBar& b = find_bar(p, loc);
  if (!b.pending) fail("mbarrier: more arrivals than its count in one phase", loc);
  b.tx += tx;
  --b.pending;
  race::release(self(), b.next);
  settle(b);
}
void mbar_wait(uint64_t* p, unsigned parity, Loc loc) {
  MBar& b = find_bar(p, loc);
  if (b.phase == parity) {
    b.waiting.push_back({self(), parity});
    block_on("mbarrier wait", loc);
  }
  race::acquire(self(), find_bar(p, loc).done);
}
void fence_proxy_async() { race::proxy_fence(self()); }

// ---- TMA -----------------------------------------------------------------------------------------
void run_tma(size_t i) {
  Group& g = group();
  TmaOp op = std::move(g.tma[i]);
  g.tma.erase(g.tma.begin() + long(i));
  const TensorMap2d& m = op.map;
  const size_t row_bytes = size_t(m.box_cols) * m.elem;
  for (uint32_t r = 0; r < m.box_rows; ++r)
    for (uint32_t c = 0; c < m.box_cols; ++c) {
      const int64_t gr = int64_t(op.row) + r, gc = int64_t(op.col) + c;
      auto at = swizzled(reinterpret_cast<uintptr_t>(op.dst) + r * row_bytes + c * m.elem, m.swizzle);
      auto* d = reinterpret_cast<unsigned char*>(at);
      if (gr < 0 || gc < 0 || gr >= m.rows || gc >= m.cols)
        std::memset(d, 0, m.elem);
      else
        std::memcpy(d, static_cast<const unsigned char*>(m.base) + uint64_t(gr) * m.row_bytes + uint64_t(gc) * m.elem,
                    m.elem);
    }
  const size_t bytes = row_bytes * m.box_rows;
  race::tma_write(op, op.dst, bytes);
  MBar& b = g.mbars[op.bar];
  b.tx -= int64_t(bytes);
  race::merge(b.next, op.clock);
  settle(b);
}

void tma_load_2d(void* dst, const TensorMap2d* map, int col, int row, uint64_t* bar, Loc loc) {
  find_bar(bar, loc);
  const uintptr_t need = map->swizzle == Swizzle::B128 ? 1024 : map->swizzle == Swizzle::None ? 128 : 512;
  if (reinterpret_cast<uintptr_t>(dst) % need) fail("TMA: shared destination not aligned for its swizzle", loc);
  if (map->swizzle == Swizzle::B128 && map->box_cols * map->elem > 128)
    fail("TMA: box row wider than the swizzle span", loc);
  if (map->row_bytes % 16) fail("TMA: row stride not a multiple of 16 bytes", loc);
  TmaOp op{static_cast<unsigned char*>(dst), *map, col, row, bar, self(), {}, pack_where(loc)};
  const size_t bytes = size_t(map->box_cols) * map->elem * map->box_rows;
  if (race::enabled) {
    race::access(race::AsyncIssue, dst, bytes, op.where);
    race::release(self(), op.clock);
  }
  if (options().async == Async::Lazy) std::memset(dst, 0xff, bytes);
  group().tma.push_back(std::move(op));
  if (options().async == Async::Eager) run_tma(group().tma.size() - 1);
}

// ---- clusters ------------------------------------------------------------------------------------
void cluster_sync(Loc loc) {
  Cluster& cluster = *cta().cluster;
  barrier(cluster.barrier, unsigned(cluster.threads.size()), "cluster_sync", true, loc);
}

void* map_rank(void* p, unsigned rank) { return cta().cluster->ctas.at(rank)->smem + smem_addr(p); }

}  // namespace emu
