// wgmma of the emulator: results stay unreadable (NaN) until wgmma.wait_group.
#include "emulator/internal.h"

namespace emu {

namespace {
float bf16_at(const unsigned char* p) {
  uint16_t h;
  std::memcpy(&h, p, 2);
  return __uint_as_float(unsigned(h) << 16);
}
// Element (row, k) of a K-major operand: 8-row groups are `stride` bytes apart,
// rows 128 bytes apart, and the swizzle acts on the final address.
void gather(const Block* b, uint64_t desc, unsigned rows, float* out) {
  const uintptr_t start = uintptr_t(desc & 0x3fff) << 4, stride = uintptr_t(desc >> 32 & 0x3fff) << 4;
  for (unsigned r = 0; r < rows; ++r) {
    const uintptr_t base = start + r / 8 * stride + r % 8 * 128;
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned char* p = b->smem + swizzled(base + k * 2, Swizzle::B128);
      if (race::enabled && k % 8 == 0) race::access(race::AsyncRead, p, 16, 0);
      out[r * 16 + k] = bf16_at(p);
    }
  }
}
void run_wgmma(WgOp& op) {
  std::vector<float> A(64 * 16), B(op.n * 16);
  gather(op.block, op.da, 64, A.data());
  gather(op.block, op.db, op.n, B.data());
  for (unsigned t = 0; t < 128; ++t) {
    PendingAcc* acc = nullptr;
    for (auto& a : op.who[t]->accs)
      if (a.d == op.d[t]) acc = &a;
    const unsigned warp = t / 32, lane = t % 32;
    for (unsigned i = 0; i < op.n / 2; ++i) {
      const unsigned row = warp * 16 + lane / 4 + (i / 2 % 2) * 8, col = i / 4 * 8 + lane % 4 * 2 + i % 2;
      float s = op.accumulate ? acc->value[i] : 0.0f;
      for (unsigned k = 0; k < 16; ++k) s += A[row * 16 + k] * B[col * 16 + k];
      acc->value[i] = s;
    }
  }
  op.ran = true;
}
struct WgArgs {
  float* d;
  unsigned n;
  uint64_t da, db;
  bool acc;
  Thread* who;
};
}  // namespace

void wgmma_bf16(float* d, unsigned n, uint64_t da, uint64_t db, bool accumulate, Loc loc) {
  if ((da >> 62) != 1 || (db >> 62) != 1) fail("wgmma: only 128-byte swizzled operands are emulated", loc);
  Thread* me = self();
  WgArgs a{d, n, da, db, accumulate, me};
  PendingAcc* mine = nullptr;
  for (auto& p : me->accs)
    if (p.d == d) mine = &p;
  if (!mine) {
    me->accs.push_back({d, n, std::vector<float>(d, d + n / 2), 0});
    mine = &me->accs.back();
  }
  mine->group = me->wg_open_group;
  for (unsigned i = 0; i < n / 2; ++i) d[i] = __uint_as_float(0x7fc00000u);  // unreadable until waited for
  warpgroup_collective(
      "wgmma", &a,
      [](unsigned, void* const* args) {
        Thread* last = self();
        auto& list = cta().wgmma[last->warp / 4];
        WgOp op{};
        auto* a0 = static_cast<WgArgs*>(args[0]);
        op.da = a0->da;
        op.db = a0->db;
        op.accumulate = a0->acc;
        op.n = a0->n;
        op.block = last->block;
        op.group = last->wg_open_group;
        for (int t = 0; t < 128; ++t) {
          auto* at = static_cast<WgArgs*>(args[t]);
          if (at->da != op.da || at->db != op.db || at->acc != op.accumulate)
            fail("wgmma: descriptors or scale differ between the threads of a warpgroup", Loc::current());
          op.d[t] = at->d;
          op.who[t] = at->who;
        }
        if (options().async == Async::Eager) run_wgmma(op);
        list.push_back(op);
      },
      loc);
}
void wgmma_commit() { ++self()->wg_open_group; }
void wgmma_wait(unsigned pending, Loc) {
  Thread* me = self();
  auto& list = cta().wgmma[me->warp / 4];
  const unsigned limit = me->wg_open_group > pending ? me->wg_open_group - pending : 0;
  for (auto& op : list)
    if (!op.ran && op.group < limit) run_wgmma(op);
  while (!list.empty() && list.front().ran) list.erase(list.begin());
  for (auto it = me->accs.begin(); it != me->accs.end();)
    if (it->group < limit) {
      std::copy(it->value.begin(), it->value.begin() + it->n / 2, it->d);
      it = me->accs.erase(it);
    } else
      ++it;
}

}  // namespace emu
