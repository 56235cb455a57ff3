// Atomics, fences, and what the wrappers tell the race checker about their accesses.
#include <algorithm>

#include "emulator/internal.h"

namespace emu {
namespace {

template <class T>
T apply(Rmw op, T old, T v) {
  switch (op) {
    case Rmw::Add:
      return old + v;
    case Rmw::Sub:
      return old - v;
    case Rmw::Min:
      return std::min(old, v);
    case Rmw::Max:
      return std::max(old, v);
    case Rmw::Exch:
      return v;
    case Rmw::Inc:
      return old >= v ? T(0) : old + 1;
    case Rmw::Dec:
      return old == 0 || old > v ? v : old - 1;
    default:
      break;
  }
  if constexpr (std::is_integral_v<T>) {
    if (op == Rmw::And) return old & v;
    if (op == Rmw::Or) return old | v;
    if (op == Rmw::Xor) return old ^ v;
  }
  fail("atomic: not defined for this type", Loc::current());
}

template <class T>
using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;

// CTAs meet in memory, so this is where another order of theirs can matter.
void let_others_first() {
  Group& g = group();
  if (options().order == Order::Random && g.ctas.size() > 1 && g.rng() % 2) yield();
}

void before(const void* p, size_t n, const char* what, Loc loc) {
  if (reinterpret_cast<uintptr_t>(p) % n) fail(std::string(what) + ": address not aligned to its size", loc);
  let_others_first();
}

void note_rmw(const void* p, size_t n, Sem sem, Loc loc) {
  if (!race::enabled) return;
  race::access(race::AtomicWrite, p, n, pack_where(loc));
  race::collect(self(), p, sem == Sem::Acquire || sem == Sem::AcqRel);
  race::publish(self(), p, sem == Sem::Release || sem == Sem::AcqRel);
}

}  // namespace

template <class T>
T atomic_rmw(T* p, T v, Rmw op, Sem sem, Loc loc) {
  before(p, sizeof v, "atomic", loc);
  note_rmw(p, sizeof v, sem, loc);
  auto* bits = reinterpret_cast<Bits<T>*>(p);
  Bits<T> old = __atomic_load_n(bits, __ATOMIC_SEQ_CST);
  while (!__atomic_compare_exchange_n(bits, &old, emu_bits<Bits<T>>(apply(op, emu_bits<T>(old), v)), false,
                                      __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
  }
  return emu_bits<T>(old);
}
template int32_t atomic_rmw(int32_t*, int32_t, Rmw, Sem, Loc);
template uint32_t atomic_rmw(uint32_t*, uint32_t, Rmw, Sem, Loc);
template int64_t atomic_rmw(int64_t*, int64_t, Rmw, Sem, Loc);
template uint64_t atomic_rmw(uint64_t*, uint64_t, Rmw, Sem, Loc);
template float atomic_rmw(float*, float, Rmw, Sem, Loc);
template double atomic_rmw(double*, double, Rmw, Sem, Loc);

template <class T>
T atomic_cas(T* p, T expected, T v, Sem sem, Loc loc) {
  before(p, sizeof v, "atomicCAS", loc);
  note_rmw(p, sizeof v, sem, loc);
  __atomic_compare_exchange_n(p, &expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
  return expected;
}
template uint32_t atomic_cas(uint32_t*, uint32_t, uint32_t, Sem, Loc);
template uint64_t atomic_cas(uint64_t*, uint64_t, uint64_t, Sem, Loc);

template <class T>
T atomic_load(const T* p, Sem sem, Loc loc) {
  before(p, sizeof(T), "ld", loc);
  if (race::enabled) {
    race::access(race::AtomicRead, p, sizeof(T), pack_where(loc));
    race::collect(self(), p, sem != Sem::Relaxed);
  }
  return __atomic_load_n(p, __ATOMIC_SEQ_CST);
}
template int32_t atomic_load(const int32_t*, Sem, Loc);
template uint32_t atomic_load(const uint32_t*, Sem, Loc);
template int64_t atomic_load(const int64_t*, Sem, Loc);
template uint64_t atomic_load(const uint64_t*, Sem, Loc);

template <class T>
void atomic_store(T* p, T v, Sem sem, Loc loc) {
  before(p, sizeof v, "st", loc);
  if (race::enabled) {
    race::access(race::AtomicWrite, p, sizeof v, pack_where(loc));
    race::publish(self(), p, sem != Sem::Relaxed);
  }
  __atomic_store_n(p, v, __ATOMIC_SEQ_CST);
}
template void atomic_store(int32_t*, int32_t, Sem, Loc);
template void atomic_store(uint32_t*, uint32_t, Sem, Loc);
template void atomic_store(int64_t*, int64_t, Sem, Loc);
template void atomic_store(uint64_t*, uint64_t, Sem, Loc);

void wait_for_previous_kernel() { self()->may_run_ahead = false; }

void fence(Loc) {
  if (race::enabled) race::fence(self());
}

void note_read(const void* p, size_t n, Loc loc) {
  if (race::enabled) race::access(race::Read, p, n, pack_where(loc));
}
void note_write(const void* p, size_t n, Loc loc) {
  if (race::enabled) race::access(race::Write, p, n, pack_where(loc));
}
void note_constant_read(const void* p, size_t n, Loc loc) {
  if (race::enabled) race::access(race::Constant, p, n, pack_where(loc));
}

unsigned smem_addr(const void* p) { return unsigned(static_cast<const unsigned char*>(p) - self()->block->smem); }

}  // namespace emu
