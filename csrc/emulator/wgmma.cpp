// wgmma: operands in shared memory are read as late as the landing mode says, and the accumulators are NaN for the
// kernel until wgmma.wait_group.
#include <algorithm>

#include "emulator/internal.h"

namespace emu {
namespace {

float to_float(uint16_t bits, bool is_bf16) {
  return is_bf16 ? __bfloat162float(__nv_bfloat16(__nv_bfloat16_raw{bits})) : __half2float(__half(__half_raw{bits}));
}

// A descriptor, decoded.
struct Operand {
  uint32_t start, leading, stride;  // bytes
  unsigned span;                    // of the swizzle: 0, 32, 64, 128
  explicit Operand(uint64_t desc)
      : start((desc & 0x3fff) << 4),
        leading((desc >> 16 & 0x3fff) << 4),
        stride((desc >> 32 & 0x3fff) << 4),
        span(unsigned(desc >> 62) == 0 ? 0 : 256u >> (desc >> 62)) {}
};

void check(uint64_t desc, Loc loc) {
  const Operand o(desc);
  if (desc & ~(0x3fffull | 0x3fffull << 16 | 0x3fffull << 32 | 3ull << 62))
    fail("wgmma: descriptor with a base offset", loc);
  // The rows of a swizzled piece are recognised by their address bits, so it must start at a multiple of its size.
  if (o.span && (o.start / o.span & 7) != 0) fail("wgmma: tile not aligned to its swizzle", loc);
}

// The operand's elements as [mn][k]: 16-byte chunks of 8 elements along the contiguous direction.
void gather(const Block* block, const WgmmaOp& op, uint64_t desc, bool trans, unsigned num_mn, float* out) {
  const Operand o(desc);
  const unsigned width = o.span ? o.span / 16 : 1;  // chunks of a row of a piece
  const unsigned num_along = trans ? num_mn / 8 : 2, num_across = trans ? 16 : num_mn;
  // From piece to piece along its rows, and across them. Without a swizzle, MN-major has the two fields swapped.
  const bool swapped = trans && o.span == 0;
  const uint32_t along = swapped ? o.stride : o.leading, across = swapped ? o.leading : o.stride;
  for (unsigned row = 0; row < num_across; ++row) {
    for (unsigned chunk = 0; chunk < num_along; ++chunk) {
      const uint32_t address =
          o.start + row / 8 * across + row % 8 * width * 16 + chunk / width * along + chunk % width * 16;
      const unsigned char* p = block->smem + swizzled(address, o.span);
      if (p + 16 > block->smem + block->smem_bytes)
        fail("wgmma: operand outside the block's shared memory", Loc::current());
      if (race::enabled) race::access(race::AsyncRead, p, 16, op.where);
      uint16_t bits[8];
      std::memcpy(bits, p, sizeof bits);
      for (unsigned e = 0; e < 8; ++e) {
        const unsigned mn = trans ? chunk * 8 + e : row, k = trans ? row : chunk * 8 + e;
        out[mn * 16 + k] = to_float(bits[e], op.call.is_bf16);
      }
    }
  }
}

void run(const WgmmaOp& op) {
  const Wgmma& call = op.call;
  const Block* block = op.who[0]->block;
  std::vector<float> A(64 * 16), B(call.n * 16);
  if (call.a_registers) {
    for (unsigned t = 0; t < 128; ++t)
      for (unsigned i = 0; i < 8; ++i) {  // each warp a fragment of mma.m16n8k16
        const unsigned row = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, k = t % 4 * 2 + i / 4 * 8 + i % 2;
        A[row * 16 + k] = to_float(static_cast<uint16_t>(op.a[t][i / 2] >> (i % 2 * 16)), call.is_bf16);
      }
  } else {
    gather(block, op, call.a, call.trans_a, 64, A.data());
  }
  gather(block, op, call.b, call.trans_b, call.n, B.data());
  for (unsigned t = 0; t < 128; ++t) {
    auto& list = op.who[t]->accumulators;
    auto& value = std::find_if(list.begin(), list.end(), [&](const Accumulator& a) { return a.d == op.d[t]; })->value;
    for (unsigned i = 0; i < call.n / 2; ++i) {
      const unsigned row = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, col = i / 4 * 8 + t % 4 * 2 + i % 2;
      float sum = call.accumulate ? value[i] : 0.0f;
      for (unsigned k = 0; k < 16; ++k) sum += A[row * 16 + k] * B[col * 16 + k];
      value[i] = sum;
    }
  }
}

// In the order in which they were started, as the accumulators want it.
void run_until(std::deque<WgmmaOp>& ops, unsigned group) {
  for (; !ops.empty() && ops.front().group < group; ops.pop_front()) run(ops.front());
}

struct Args {
  const Wgmma* call;
  Thread* who;
  Loc loc;
};

void start(unsigned, void* const* args) {  // by the last thread to arrive
  const auto* first = static_cast<Args*>(args[0]);
  WgmmaOp op{};
  op.call = *first->call;
  op.group = first->who->wgmma_group;
  op.where = pack_where(first->loc);
  for (int t = 0; t < 128; ++t) {
    const auto* at = static_cast<Args*>(args[t]);
    const Wgmma &a = *at->call, &b = op.call;
    if (a.n != b.n || a.a != b.a || a.b != b.b || a.accumulate != b.accumulate || a.trans_a != b.trans_a ||
        a.trans_b != b.trans_b || a.is_bf16 != b.is_bf16 || !a.a_registers != !b.a_registers) {
      fail("wgmma: the threads of a warpgroup must agree on shape, descriptors and scale", at->loc);
    }
    if (at->who->wgmma_group != op.group)
      fail("wgmma: the threads have committed different numbers of groups", at->loc);
    op.d[t] = a.d;
    op.who[t] = at->who;
    if (a.a_registers) std::copy(a.a_registers, a.a_registers + 4, op.a[t]);
  }
  auto& ops = cta().wgmma[self()->warp / 4];
  ops.push_back(op);
  const Async mode = options().async;
  if (mode == Async::Eager || (mode == Async::Random && group().rng() % 2)) run_until(ops, op.group + 1);
}

}  // namespace

void wgmma_fence() { self()->wgmma_fenced = true; }

void wgmma(const Wgmma& call, Loc loc) {
  Thread* me = self();
  if (!me->wgmma_fenced) fail("wgmma without wgmma_fence at the start or since the last wait", loc);
  if (!call.a_registers) check(call.a, loc);
  check(call.b, loc);
  auto& list = me->accumulators;
  auto it = std::find_if(list.begin(), list.end(), [&](const Accumulator& a) { return a.d == call.d; });
  if (it == list.end()) {
    list.push_back({call.d, call.n, std::vector<float>(call.d, call.d + call.n / 2), 0});
    it = list.end() - 1;
  }
  if (it->n != call.n) fail("wgmma: accumulators still under way with another shape", loc);
  it->group = me->wgmma_group;
  for (unsigned i = 0; i < call.n / 2; ++i) call.d[i] = __uint_as_float(0x7fc00000u);
  Args args{&call, me, loc};
  warpgroup_collective("wgmma", &args, start, loc);
}

void wgmma_commit() { ++self()->wgmma_group; }

void wgmma_wait(unsigned pending, Loc) {
  Thread* me = self();
  auto& ops = cta().wgmma[me->warp / 4];
  const unsigned limit = me->wgmma_group > pending ? me->wgmma_group - pending : 0;
  run_until(ops, limit);
  auto& list = me->accumulators;
  const auto done = std::partition(list.begin(), list.end(), [&](const Accumulator& a) { return a.group >= limit; });
  for (auto it = done; it != list.end(); ++it) std::copy(it->value.begin(), it->value.begin() + it->n / 2, it->d);
  if (done != list.end()) me->wgmma_fenced = false;
  list.erase(done, list.end());
}

}  // namespace emu
