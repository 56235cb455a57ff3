// Copies that land later: cp.async groups, mbarriers, bulk and tensor copies.
#include <algorithm>

#include "emulator/internal.h"

namespace emu {
namespace {

bool aligned(const void* p, size_t n) { return reinterpret_cast<uintptr_t>(p) % n == 0; }

bool in_own_smem(const void* p, size_t n) {
  const Block* b = self()->block;
  auto* byte = static_cast<const unsigned char*>(p);
  return byte >= b->smem && byte + n <= b->smem + b->smem_bytes;
}

}  // namespace

// ---- cp.async -----------------------------------------------------------------------------------------------------
namespace {

void perform(CopyOp& c) {
  if (!c.src) return;  // has landed already
  std::memcpy(c.dst, c.src, c.valid);
  std::memset(static_cast<unsigned char*>(c.dst) + c.valid, 0, c.bytes - c.valid);
  c.src = nullptr;
}

}  // namespace

void finish_copies(Thread* t) {
  for (auto& group : t->copy_groups) {
    for (CopyOp& c : group) perform(c);
  }
  for (CopyOp& c : t->open_copies) perform(c);
}

void cp_async(void* dst, const void* src, unsigned bytes, unsigned valid, Loc loc) {
  if (!aligned(dst, bytes) || !aligned(src, bytes)) fail("cp.async: address not aligned to its size", loc);
  if (valid > bytes) fail("cp.async: source size exceeds copy size", loc);
  if (!in_own_smem(dst, bytes)) fail("cp.async: destination outside the block's shared memory", loc);
  CopyOp c{dst, src, bytes, valid, pack_where(loc)};
  if (race::enabled) {
    race::access(race::Read, src, valid, c.where);
    race::access(race::AsyncIssue, dst, bytes, c.where);
  }
  const Async mode = options().async;
  if (mode == Async::Eager || (mode == Async::Random && group().rng() % 2)) {
    perform(c);
  } else if (mode == Async::Lazy) {
    std::memset(dst, 0xff, bytes);  // NaN until it lands
  }
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
      perform(c);
      if (race::enabled) race::access(race::AsyncDone, c.dst, c.bytes, c.where);
    }
    me->copy_groups.pop_front();
  }
}

// ---- mbarrier -----------------------------------------------------------------------------------------------------
namespace {

constexpr unsigned kMaxCount = (1u << 20) - 1;  // of arrivals and of bytes in one phase
constexpr unsigned kPollsBeforeLanding = 64;

// What an initialised barrier's memory holds: stores over it are noticed.
uint64_t mark(const uint64_t* p) { return 0x6d62617272696572ull ^ reinterpret_cast<uintptr_t>(p); }

MBar& find(uint64_t* p, Loc loc) {
  const auto it = group().mbars.find(p);
  if (it == group().mbars.end()) fail("mbarrier used before mbarrier.init", loc);
  if (*p != mark(p)) fail("mbarrier: its memory was overwritten", loc);
  // Every use comes after the initialisation. Of another CTA's barrier its mbar_init_fence, and a barrier of the
  // cluster without release or acquire, are enough for that.
  if (in_own_smem(p, sizeof *p) || !it->second.fenced) note_read(p, sizeof *p, loc);
  return it->second;
}

void settle(MBar& b) {  // the phase ends when nothing is missing
  if (b.pending || b.tx) return;
  b.phase ^= 1;
  b.pending = b.count;
  b.done = std::exchange(b.next, {});
  const auto over =
      std::partition(b.waiting.begin(), b.waiting.end(), [&](const MBar::Waiter& w) { return w.parity == b.phase; });
  for (auto it = over; it != b.waiting.end(); ++it) make_ready(it->t);
  b.waiting.erase(over, b.waiting.end());
}

}  // namespace

void mbar_init(uint64_t* p, unsigned count, Loc loc) {
  if (!aligned(p, 8)) fail("mbarrier: not 8-byte aligned", loc);
  if (!in_own_smem(p, 8)) fail("mbarrier: outside the block's shared memory", loc);
  if (!count || count > kMaxCount) fail("mbarrier: count must be 1 to 2^20 - 1", loc);
  if (const auto it = group().mbars.find(p); it != group().mbars.end() && !it->second.waiting.empty()) {
    fail("mbarrier.init while threads wait on it", loc);
  }
  note_write(p, sizeof *p, loc);
  MBar b;
  b.count = b.pending = count;
  group().mbars[p] = std::move(b);
  *p = mark(p);
  self()->unfenced_mbars.push_back(p);
}
void mbar_init_fence() {
  for (uint64_t* p : std::exchange(self()->unfenced_mbars, {})) {
    if (const auto it = group().mbars.find(p); it != group().mbars.end()) it->second.fenced = true;
  }
}
void mbar_inval(uint64_t* p, Loc loc) {
  if (!find(p, loc).waiting.empty()) fail("mbarrier.inval while threads wait on it", loc);
  note_write(p, sizeof *p, loc);
  group().mbars.erase(p);
  *p = ~uint64_t{0};
}
void mbar_arrive(uint64_t* p, unsigned tx, Loc loc) {
  MBar& b = find(p, loc);
  if (!b.fenced && !in_own_smem(p, 8)) fail("mbarrier of another CTA used without its mbar_init_fence", loc);
  if (!b.pending) fail("mbarrier: more arrivals than its count in one phase", loc);
  if (b.tx + tx > kMaxCount) fail("mbarrier: more than 2^20 - 1 bytes expected in one phase", loc);
  b.tx += tx;
  --b.pending;
  race::release(self(), b.next);
  settle(b);
}
void mbar_expect_tx(uint64_t* p, unsigned tx, Loc loc) {
  MBar& b = find(p, loc);
  if (b.tx + tx > kMaxCount) fail("mbarrier: more than 2^20 - 1 bytes expected in one phase", loc);
  b.tx += tx;
  settle(b);
}
bool mbar_try_wait(uint64_t* p, unsigned parity, Loc loc) {
  MBar& b = find(p, loc);
  if (!in_own_smem(p, 8)) fail("mbarrier: only the CTA that owns it can wait", loc);
  if (parity > 1) fail("mbarrier: parity must be 0 or 1", loc);
  if (b.phase == parity) {
    // Threads that poll are never blocked, so the engine would never get its turn.
    auto& bulk = group().bulk;
    if (++b.failed_polls % kPollsBeforeLanding == 0 && !bulk.empty()) land_bulk(0);
    spin_hint(loc);
    return false;
  }
  race::acquire(self(), b.done);
  return true;
}
void mbar_wait(uint64_t* p, unsigned parity, Loc loc) {
  MBar& b = find(p, loc);
  if (!in_own_smem(p, 8)) fail("mbarrier: only the CTA that owns it can wait", loc);
  if (parity > 1) fail("mbarrier: parity must be 0 or 1", loc);
  if (b.phase == parity) {
    b.waiting.push_back({self(), parity});
    block_on("mbarrier wait", loc);
  }
  race::acquire(self(), find(p, loc).done);
}
void fence_proxy_async() {
  race::proxy_fence(self());
  mbar_init_fence();
}

// ---- bulk and tensor copies ---------------------------------------------------------------------------------------
namespace {

// Calls f(byte offset in the box, address in global memory or null where the box leaves the tensor, bytes) for runs of
// the box along dimension 0.
template <class F>
void for_each_run(const TensorMap& m, const int* at, F f) {
  size_t num_rows = 1;
  for (int i = 1; i < m.rank; ++i) num_rows *= m.box[i];
  const auto inside = [&](int i, int64_t x) { return x >= 0 && x < static_cast<int64_t>(m.dims[i]); };
  for (size_t row = 0; row < num_rows; ++row) {
    const auto* from = static_cast<const unsigned char*>(m.base);
    bool is_inside = true;
    size_t rest = row;
    for (int i = 1; i < m.rank; ++i) {
      const int64_t x = at[i] + static_cast<int64_t>(rest % m.box[i]);
      rest /= m.box[i];
      is_inside &= inside(i, x);
      if (is_inside) from += static_cast<uint64_t>(x) * m.stride_bytes[i];
    }
    for (unsigned c = 0; c < m.box[0]; ++c) {
      const int64_t x = at[0] + static_cast<int64_t>(c);
      const bool has_source = is_inside && inside(0, x);
      f((row * m.box[0] + c) * m.elem_bytes, has_source ? from + static_cast<uint64_t>(x) * m.elem_bytes : nullptr,
        m.elem_bytes);
    }
  }
}

void issue(BulkOp op, Loc loc) {
  MBar& b = find(op.bar, loc);
  if (!b.fenced) fail("mbarrier used by the copy engine without mbar_init_fence", loc);
  if (!op.has_value && !in_own_smem(op.dst, op.bytes))
    fail("bulk copy: destination outside the block's shared memory", loc);
  if (race::enabled) {
    race::access(race::AsyncIssue, op.dst, op.bytes, op.where);
    race::release(self(), op.clock);
  }
  if (options().async == Async::Lazy) std::memset(op.dst, 0xff, op.bytes);
  group().bulk.push_back(std::move(op));
  if (options().async == Async::Eager) land_bulk(group().bulk.size() - 1);
}

}  // namespace

void land_bulk(size_t i) {
  Group& g = group();
  BulkOp op = std::move(g.bulk[i]);
  g.bulk.erase(g.bulk.begin() + static_cast<std::ptrdiff_t>(i));
  if (op.src || op.has_value) {
    std::memcpy(op.dst, op.has_value ? op.value : op.src, op.bytes);
  } else {
    for_each_run(op.map, op.at, [&](size_t offset, const unsigned char* from, size_t n) {
      auto* to = reinterpret_cast<void*>(swizzled(reinterpret_cast<uintptr_t>(op.dst) + offset, op.map.swizzle_bytes));
      if (from) {
        std::memcpy(to, from, n);
      } else {
        std::memset(to, 0, n);
      }
    });
  }
  race::bulk_write(op, op.dst, op.bytes);
  MBar& b = g.mbars[op.bar];
  b.tx -= static_cast<int64_t>(op.bytes);
  if (race::enabled) race::merge(b.next, op.clock);
  settle(b);
}

void bulk_load(void* dst, const void* src, unsigned bytes, uint64_t* bar, Loc loc) {
  if (!aligned(dst, 16) || !aligned(src, 16) || bytes % 16 || !bytes) {
    fail("cp.async.bulk: addresses and size must be multiples of 16 bytes", loc);
  }
  BulkOp op{};
  op.dst = static_cast<unsigned char*>(dst);
  op.src = src;
  op.bytes = bytes;
  op.bar = bar;
  op.issuer = self();
  op.where = pack_where(loc);
  if (race::enabled) race::access(race::Read, src, bytes, op.where);
  issue(std::move(op), loc);
}

void store_async(void* dst, const void* value, uint64_t* bar, unsigned rank, Loc loc) {
  if (!aligned(dst, 16)) fail("st.async: destination not aligned to 16 bytes", loc);
  BulkOp op{};
  op.dst = static_cast<unsigned char*>(map_rank(dst, rank));
  op.bar = static_cast<uint64_t*>(map_rank(bar, rank));
  op.bytes = sizeof op.value;
  op.has_value = true;
  std::memcpy(op.value, value, op.bytes);
  op.issuer = self();
  op.where = pack_where(loc);
  issue(std::move(op), loc);
}

void tma_load(void* dst, const TensorMap* map, const int* at, int rank, uint64_t* bar, Loc loc) {
  if (rank != map->rank) fail("TMA: the tensor map has another rank", loc);
  const unsigned span = map->swizzle_bytes;
  if (!aligned(dst, span ? 8 * span : 128)) fail("TMA: shared destination not aligned for its swizzle", loc);
  size_t bytes = map->elem_bytes;
  for (int i = 0; i < rank; ++i) bytes *= map->box[i];
  BulkOp op{};
  op.dst = static_cast<unsigned char*>(dst);
  op.map = *map;
  op.bytes = bytes;
  op.bar = bar;
  op.issuer = self();
  op.where = pack_where(loc);
  std::copy(at, at + rank, op.at);
  if (race::enabled) {
    for_each_run(*map, at, [&](size_t, const unsigned char* from, size_t n) {
      if (from) race::access(race::Read, from, n, op.where);
    });
  }
  issue(std::move(op), loc);
}

}  // namespace emu
