// Stackful fibers: a CUDA thread that waits leaves its frames where they are.
#include <sys/mman.h>

#include "emulator/internal.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__)
#error "emu_switch is written for x86-64: this CPU needs its own dozen lines, or build with NLD_EMULATOR=OFF"
#endif
extern "C" void emu_switch(void** save_sp, void* load_sp);
asm(R"(
.text
.p2align 4
.globl emu_switch
.hidden emu_switch
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

namespace fiber {
namespace {

constexpr size_t kGuard = 4096;

struct Stacks {  // one mapping; a guard page below each stack
  unsigned char* base = nullptr;
  size_t count = 0, bytes = 0;
  size_t stride() const { return bytes + kGuard; }
  void release() {
    if (base == nullptr) return;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(base, count * stride());  // whoever gets these addresses next knows of no frames
#endif
    munmap(base, count * stride());
    base = nullptr;
  }
  ~Stacks() { release(); }
};
thread_local Stacks t_stacks;
thread_local void* t_main_sp = nullptr;
#if defined(__SANITIZE_ADDRESS__)
thread_local void* t_main_fake = nullptr;  // the OS thread's own stack, as ASan told us
thread_local const void* t_main_bottom = nullptr;
thread_local size_t t_main_size = 0;
#endif

}  // namespace

void reserve(size_t count, size_t bytes) {
  Stacks& s = t_stacks;
  if (s.base && s.count >= count && s.bytes == bytes) return;
  s.release();
  s.count = count;
  s.bytes = bytes;
  void* p =
      mmap(nullptr, count * s.stride(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw Error("emulator: no memory for the stacks of " + std::to_string(count) + " threads");
  s.base = static_cast<unsigned char*>(p);
  for (size_t i = 0; i < count; ++i) mprotect(s.base + i * s.stride(), kGuard, PROT_NONE);
}

bool is_stack(const void* p) {
  const auto* at = static_cast<const unsigned char*>(p);
  return at >= t_stacks.base && at < t_stacks.base + t_stacks.count * t_stacks.stride();
}

void prepare(Thread* t, size_t stack_idx, void (*entry)()) {
  t->stack = t_stacks.base + stack_idx * t_stacks.stride() + kGuard;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(t->stack, t_stacks.bytes);  // frames of an earlier group never returned
#endif
  // Stagger the tops, or all stacks would compete for one cache set.
  const auto end = reinterpret_cast<uintptr_t>(t->stack + t_stacks.bytes);
  const uintptr_t top = (end - stack_idx * 7 % 64 * 64) & ~uintptr_t(15);
  auto* ret = reinterpret_cast<void**>(top - 16);
  *ret = reinterpret_cast<void*>(entry);
  t->sp = ret - 6;
  std::memset(t->sp, 0, 48);
}

void switch_to(Thread* from, Thread* to) {
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
  __sanitizer_finish_switch_fiber(from ? from->fake_stack : t_main_fake, nullptr, nullptr);
#endif
}

void entered() {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (!t_main_size) {  // the first entry comes from there
    t_main_bottom = bottom;
    t_main_size = size;
  }
#endif
}

}  // namespace fiber
}  // namespace emu
