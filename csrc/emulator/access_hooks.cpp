// tsan_hooks.cpp - receives the calls that g++ -fsanitize=thread puts before
// every load and store of the kernels (compiled with the flag, linked WITHOUT
// libtsan) and hands them to the shared-memory checker.  This file itself is
// compiled without the flag.
#include "emulator/internal.h"

namespace {
const bool on = (emu::race::enabled = true);
inline void touch(emu::race::Kind k, void* p, size_t n, void* pc) {
  if (emu::t_cur) emu::race::access(k, p, n, reinterpret_cast<uint64_t>(pc));
}
}  // namespace

#define PC __builtin_return_address(0)
#define HOOKS(n)                                                                 \
  void __tsan_read##n(void* p) { touch(emu::race::Read, p, n, PC); }             \
  void __tsan_write##n(void* p) { touch(emu::race::Write, p, n, PC); }           \
  void __tsan_unaligned_read##n(void* p) { touch(emu::race::Read, p, n, PC); }   \
  void __tsan_unaligned_write##n(void* p) { touch(emu::race::Write, p, n, PC); } \
  void __tsan_volatile_read##n(void* p) { touch(emu::race::Read, p, n, PC); }    \
  void __tsan_volatile_write##n(void* p) { touch(emu::race::Write, p, n, PC); }
extern "C" {
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16) void __tsan_read_range(void* p, unsigned long n) {
  touch(emu::race::Read, p, n, PC);
}
void __tsan_write_range(void* p, unsigned long n) { touch(emu::race::Write, p, n, PC); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
