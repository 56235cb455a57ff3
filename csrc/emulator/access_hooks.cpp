// Receives the calls that -fsanitize=thread puts before every load and store of the kernels. They are compiled with the
// flag but linked without libtsan; this file is compiled without it.
#include "emulator/internal.h"

namespace {
using emu::race::Kind;

const bool g_on = (emu::race::enabled = true);

inline void touch(Kind kind, const void* p, size_t n, void* code) {
  if (emu::t_cur) emu::race::access(kind, p, n, reinterpret_cast<uint64_t>(code));
}

// A volatile access to global memory is a relaxed atomic one; in shared memory it is an access like any other.
inline void touch_volatile(bool is_write, const void* p, size_t n, void* code) {
  emu::Thread* t = emu::self();
  if (!t || emu::fiber::is_stack(p)) return;
  const emu::Group& g = emu::group();
  if (p >= g.arena && p < g.arena_end) return touch(is_write ? Kind::Write : Kind::Read, p, n, code);
  touch(is_write ? Kind::AtomicWrite : Kind::AtomicRead, p, n, code);
  if (is_write) {
    emu::race::publish(t, p, false);
  } else {
    emu::race::collect(t, p, false);
  }
}
}  // namespace

// std::atomic and guards of static variables, in the host code beside the kernels: only performed.
#define ATOMIC_HOOKS(bits, T)                                                                                       \
  T __tsan_atomic##bits##_load(const volatile T* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }           \
  void __tsan_atomic##bits##_store(volatile T* p, T v, int) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }           \
  T __tsan_atomic##bits##_exchange(volatile T* p, T v, int) { return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST); } \
  T __tsan_atomic##bits##_fetch_add(volatile T* p, T v, int) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); } \
  bool __tsan_atomic##bits##_compare_exchange_strong(volatile T* p, T* expected, T v, int, int) {                   \
    return __atomic_compare_exchange_n(p, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                  \
  }                                                                                                                 \
  bool __tsan_atomic##bits##_compare_exchange_weak(volatile T* p, T* expected, T v, int, int) {                     \
    return __atomic_compare_exchange_n(p, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                  \
  }

#define CODE __builtin_return_address(0)
#define HOOKS(n)                                                                         \
  void __tsan_read##n(void* p) { touch(Kind::Read, p, n, CODE); }                        \
  void __tsan_write##n(void* p) { touch(Kind::Write, p, n, CODE); }                      \
  void __tsan_unaligned_read##n(void* p) { touch(Kind::Read, p, n, CODE); }              \
  void __tsan_unaligned_write##n(void* p) { touch(Kind::Write, p, n, CODE); }            \
  void __tsan_volatile_read##n(void* p) { touch_volatile(false, p, n, CODE); }           \
  void __tsan_volatile_write##n(void* p) { touch_volatile(true, p, n, CODE); }           \
  void __tsan_unaligned_volatile_read##n(void* p) { touch_volatile(false, p, n, CODE); } \
  void __tsan_unaligned_volatile_write##n(void* p) { touch_volatile(true, p, n, CODE); }
extern "C" {
ATOMIC_HOOKS(8, uint8_t)
ATOMIC_HOOKS(32, uint32_t)
ATOMIC_HOOKS(64, uint64_t)
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16) void __tsan_read_range(void* p, unsigned long n) {
  touch(Kind::Read, p, n, CODE);
}
void __tsan_write_range(void* p, unsigned long n) { touch(Kind::Write, p, n, CODE); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
