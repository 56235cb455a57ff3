// Tests of common/ptx.cuh: one small kernel per wrapper, compared with layouts.h or with values worked out by hand.
#pragma once

#include <cmath>
#include <cstring>

#include "common/element.cuh"
#include "common/ptx.cuh"
#include "emulator/tests/harness.cuh"
#include "emulator/tests/layouts.h"

namespace nld::ptx_test {

// ---- packing ------------------------------------------------------------------------------------------------------

// The value of 16 bits, from the definition of the formats.
inline double decode_half(uint32_t bits, bool is_bf16) {
  const int mantissa_bits = is_bf16 ? 7 : 10, exponent_bits = 15 - mantissa_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = static_cast<int>(bits >> mantissa_bits & ((1u << exponent_bits) - 1));
  const double mantissa = bits & ((1u << mantissa_bits) - 1), sign = bits >> 15 & 1 ? -1.0 : 1.0;
  if (exponent == (1 << exponent_bits) - 1) return mantissa != 0 ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
}
// Round to nearest even by searching the neighbours; for finite values inside the range.
inline uint32_t encode_half(double x, bool is_bf16) {
  uint32_t low = 0, high = is_bf16 ? 0x7f80 : 0x7c00;  // magnitudes are monotonic in the bits
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    (decode_half(middle, is_bf16) <= std::fabs(x) ? low : high) = middle;
  }
  const double below = std::fabs(x) - decode_half(low, is_bf16), above = decode_half(high, is_bf16) - std::fabs(x);
  const uint32_t nearest = below < above || (below == above && low % 2 == 0) ? low : high;
  return nearest | (std::signbit(x) ? 0x8000u : 0u);
}

template <class T>
__global__ void unpack_kernel(float2* out) {
  const uint32_t lo = blockIdx.x * blockDim.x + threadIdx.x;
  out[lo] = ptx::unpack<T>(lo | (lo ^ 0x8001u) << 16);
}
template <class T>
__global__ void pack_kernel(const float2* in, uint32_t* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = ptx::pack<T>(in[i].x, in[i].y);
}

template <class T>
void test_pack() {
  const bool is_bf16 = ptx::kIsBf16<T>;
  Array<float2> values(65536);
  NLD_LAUNCH(unpack_kernel<T>, 256, 256, 0, nullptr, values.data());
  finish();
  const auto same = [](double a, double b) { return std::isnan(a) ? std::isnan(b) : a == b; };
  for (uint32_t lo = 0; lo < 65536; ++lo) {
    expect(same(values[lo].x, decode_half(lo, is_bf16)), "unpack: low half of %#x", lo);
    expect(same(values[lo].y, decode_half(lo ^ 0x8001u, is_bf16)), "unpack: high half of %#x", lo);
  }
  const int n = 1024;
  Array<float2> in(n);
  Array<uint32_t> out(n);
  for (int i = 0; i < n; ++i) {
    const uint32_t bits = static_cast<uint32_t>(random_int(0, is_bf16 ? 0x7f7e : 0x7bfe));
    const double a = decode_half(bits, is_bf16), b = decode_half(bits + 1, is_bf16);
    in[i].x = static_cast<float>(i % 3 == 0 ? (a + b) / 2 : a + (b - a) * random_int(0, 64) / 64.0);  // ties and others
    in[i].y = -in[(i * 7) % (i + 1)].x;
  }
  NLD_LAUNCH(pack_kernel<T>, n / 256, 256, 0, nullptr, in.data(), out.data());
  finish();
  for (int i = 0; i < n; ++i) {
    const uint32_t want = encode_half(in[i].x, is_bf16) | encode_half(in[i].y, is_bf16) << 16;
    expect(out[i] == want, "pack of %a, %a: %#x, want %#x", in[i].x, in[i].y, out[i], want);
  }
}

__global__ void mul_bf16x2_kernel(const uint32_t* a, const uint32_t* b, uint32_t* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = ptx::mul_bf16x2(a[i], b[i]);
}

// Every bfloat16 below 2 * 2^-112 (those that e4m3 codes become, subnormals too) times 2^120, which is exact; then
// products that round.
void test_mul_bf16x2() {
  const int n = 4096;
  Array<uint32_t> a(n), b(n), out(n);
  for (int i = 0; i < n; ++i) {
    const bool is_exact = i < 2048;
    const uint32_t x = is_exact ? static_cast<uint32_t>(i) : static_cast<uint32_t>(random_int(0x3000, 0x4f00));
    const uint32_t y = is_exact ? 0x7b80u : static_cast<uint32_t>(random_int(0x3000, 0x4f00));
    a[i] = x | (x ^ 0x8000u) << 16;
    b[i] = y | y << 16;
  }
  NLD_LAUNCH(mul_bf16x2_kernel, n / 256, 256, 0, nullptr, a.data(), b.data(), out.data());
  finish();
  for (int i = 0; i < n; ++i) {
    const uint32_t want = encode_half(decode_half(a[i] & 0xffffu, true) * decode_half(b[i] & 0xffffu, true), true);
    expect(out[i] == (want | (want ^ 0x8000u) << 16), "%#x * %#x = %#x, want %#x", a[i], b[i], out[i], want);
  }
}

// ---- approximate functions ----------------------------------------------------------------------------------------

__global__ void approx_kernel(const float* x, float* exp2, float* log2, float* tanh) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  exp2[i] = ptx::exp2_approx(x[i]);
  log2[i] = ptx::log2_approx(x[i]);
  tanh[i] = ptx::tanh_approx(x[i]);
}

inline void test_approx() {
  const int n = 4096;
  Array<float> x(n), e(n), l(n), t(n);
  for (int i = 0; i < n; ++i) x[i] = static_cast<float>(random_int(-126000, 127000)) * 0.001f;
  const float inf = INFINITY, tiny = 1e-40f;
  const float special[] = {-inf, inf, NAN, 0.0f, -0.0f, tiny, -tiny, -126.0f, -126.5f, -200.0f, -1e30f, 127.5f, 128.0f};
  std::memcpy(x.host(), special, sizeof special);
  NLD_LAUNCH(approx_kernel, n / 256, 256, 0, nullptr, x.data(), e.data(), l.data(), t.data());
  finish();
  expect(e[0] == 0 && e[1] == inf && std::isnan(e[2]), "exp2 of -inf, inf, NaN");
  expect(e[3] == 1 && e[4] == 1 && e[5] == 1 && e[6] == 1, "exp2 of zeros and denormals must be 1");
  expect(e[7] == std::ldexp(1.0f, -126), "exp2(-126) is normal");
  expect(e[8] == 0 && e[9] == 0 && e[10] == 0, "exp2 below -126 must be flushed to 0");
  expect(std::isfinite(e[11]) && e[12] == inf, "exp2(127.5), exp2(128)");
  expect(std::isnan(l[0]) && l[1] == inf && std::isnan(l[2]), "log2 of -inf, inf, NaN");
  expect(l[3] == -inf && l[4] == -inf && l[5] == -inf && l[6] == -inf, "log2 of zeros and denormals must be -inf");
  expect(t[0] == -1 && t[1] == 1 && std::isnan(t[2]) && t[3] == 0, "tanh of -inf, inf, NaN, 0");
  for (int i = 13; i < n; ++i) {
    const double want = std::exp2(static_cast<double>(x[i]));
    expect(std::fabs(e[i] - want) <= want * 3e-7, "exp2(%a) = %a", x[i], e[i]);
    const double tanh = std::tanh(static_cast<double>(x[i]));
    expect(std::fabs(t[i] - tanh) <= std::fabs(tanh) * 6e-4, "tanh(%a) = %a", x[i], t[i]);
    if (x[i] > 0) {
      const double log2 = std::log2(static_cast<double>(x[i]));
      expect(std::fabs(l[i] - log2) <= std::fmax(std::fabs(log2), 1.0) * 3e-7, "log2(%a) = %a", x[i], l[i]);
    } else if (x[i] < 0) {
      expect(std::isnan(l[i]), "log2(%a) = %a", x[i], l[i]);
    }
  }
}

// ---- cp.async -----------------------------------------------------------------------------------------------------

struct CopySmem {
  alignas(16) unsigned char bytes[3][64 * 16];
};
template <int kBytes, int kPrefetch>
__global__ void cp_async_kernel(const unsigned char* src, const int* valid, unsigned char* out) {
  NLD_DYNAMIC_SMEM(CopySmem, sm);
  const int i = threadIdx.x;
  for (int group = 0; group < 3; ++group) {
    ptx::cp_async<kBytes, kPrefetch>(&sm->bytes[group][i * kBytes], src + (group * 64 + i) * kBytes,
                                     valid[group * 64 + i]);
    ptx::cp_async_commit();
  }
  ptx::cp_async_wait<1>();  // the first two groups are here
  __syncthreads();
  const int other = 63 - i;
  for (int group = 0; group < 2; ++group)
    for (int b = 0; b < kBytes; ++b) out[(group * 64 + other) * kBytes + b] = sm->bytes[group][other * kBytes + b];
  ptx::cp_async_wait<0>();
  for (int b = 0; b < kBytes; ++b) out[(2 * 64 + i) * kBytes + b] = sm->bytes[2][i * kBytes + b];
}

template <int kBytes, int kPrefetch>
void test_cp_async() {
  const int n = 3 * 64;
  Array<unsigned char> src(n * kBytes), out(n * kBytes, 0xee);
  Array<int> valid(n);
  for (size_t i = 0; i < src.size(); ++i) src[i] = static_cast<unsigned char>(random_int(1, 255));
  for (int i = 0; i < n; ++i) valid[i] = i % (kBytes + 1);
  NLD_LAUNCH((cp_async_kernel<kBytes, kPrefetch>), 1, 64, sizeof(CopySmem), nullptr, src.data(), valid.data(),
             out.data());
  finish();
  for (int i = 0; i < n; ++i)
    for (int b = 0; b < kBytes; ++b) {
      const int want = b < valid[i] ? src[i * kBytes + b] : 0;
      expect(out[i * kBytes + b] == want, "copy %d of %d valid bytes: byte %d is %d, want %d", i, valid[i], b,
             out[i * kBytes + b], want);
    }
}
inline void test_cp_async_all() {
  test_cp_async<16, 0>();
  test_cp_async<16, 64>();
  test_cp_async<16, 128>();
  test_cp_async<16, 256>();
  test_cp_async<8, 0>();
  test_cp_async<8, 128>();
  test_cp_async<4, 0>();
  test_cp_async<4, 64>();
  test_cp_async<4, 256>();
}

// ---- ldmatrix -----------------------------------------------------------------------------------------------------

struct LdmatrixSmem {
  alignas(16) uint16_t rows[64][8];
};
// Matrix m's row i lies in row `where[m * 8 + i]`; lanes that name no row point at poison.
template <int kMatrices, bool kTrans>
__global__ void ldmatrix_kernel(const int* where, uint32_t* out) {
  NLD_DYNAMIC_SMEM(LdmatrixSmem, sm);
  const int lane = threadIdx.x;
  for (int i = lane; i < 64 * 8; i += 32) sm->rows[i / 8][i % 8] = 0xdead;
  __syncwarp();
  for (int j = 0; lane < kMatrices * 8 && j < 8; ++j) sm->rows[where[lane]][j] = static_cast<uint16_t>(lane * 8 + j);
  __syncwarp();
  const void* row = sm->rows[where[lane]];
  uint32_t r[kMatrices];
  if constexpr (kMatrices == 4) ptx::ldmatrix_x4<kTrans>(r, row);
  if constexpr (kMatrices == 2) ptx::ldmatrix_x2<kTrans>(r, row);
  if constexpr (kMatrices == 1) ptx::ldmatrix_x1<kTrans>(r[0], row);
  for (int m = 0; m < kMatrices; ++m) out[lane * kMatrices + m] = r[m];
}

template <int kMatrices, bool kTrans>
void test_ldmatrix() {
  Array<int> where(32);
  Array<uint32_t> out(32 * kMatrices);
  for (int i = 0; i < 32; ++i) where[i] = i * 29 % 64;  // scattered rows
  NLD_LAUNCH((ldmatrix_kernel<kMatrices, kTrans>), 1, 32, sizeof(LdmatrixSmem), nullptr, where.data(), out.data());
  finish();
  for (int lane = 0; lane < 32; ++lane)
    for (int m = 0; m < kMatrices; ++m)
      for (int e = 0; e < 2; ++e) {
        const layouts::At at = layouts::ldmatrix(lane, e, kTrans);
        const unsigned got = out[lane * kMatrices + m] >> (16 * e) & 0xffff;
        const unsigned want = static_cast<unsigned>((m * 8 + at.row) * 8 + at.col);
        expect(got == want, "matrix %d, lane %d, half %d: %#x, want %#x", m, lane, e, got, want);
      }
}
inline void test_ldmatrix_all() {
  test_ldmatrix<4, false>();
  test_ldmatrix<4, true>();
  test_ldmatrix<2, false>();
  test_ldmatrix<2, true>();
  test_ldmatrix<1, false>();
  test_ldmatrix<1, true>();
}

// ---- mma ----------------------------------------------------------------------------------------------------------

template <class T>
__global__ void mma_kernel(const uint32_t* a, const uint32_t* b, float* d) {
  const int lane = threadIdx.x;
  uint32_t fragment[4];
  float sum[4];
  for (int i = 0; i < 4; ++i) fragment[i] = a[lane * 4 + i];
  for (int i = 0; i < 4; ++i) sum[i] = d[lane * 4 + i];
  ptx::mma_m16n8k16<T>(sum, fragment, b[lane * 2], b[lane * 2 + 1]);
  for (int i = 0; i < 4; ++i) d[lane * 4 + i] = sum[i];
}

// Whole numbers, so that every product and sum is exact in any order.
template <class T>
void test_mma() {
  const bool is_bf16 = ptx::kIsBf16<T>;
  int A[16][16], B[16][8], C[16][8];
  for (auto& row : A)
    for (int& x : row) x = random_int(-100, 100);
  for (auto& row : B)
    for (int& x : row) x = random_int(-100, 100);
  for (auto& row : C)
    for (int& x : row) x = random_int(-10000, 10000);
  Array<uint32_t> a(32 * 4), b(32 * 2);
  Array<float> d(32 * 4);
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 8; ++i) {
      const layouts::At at = layouts::mma_a(lane, i / 2, i % 2);
      a[lane * 4 + i / 2] |= encode_half(A[at.row][at.col], is_bf16) << (i % 2 * 16);
    }
    for (int i = 0; i < 4; ++i) {
      const layouts::At at = layouts::mma_b(lane, i / 2, i % 2), to = layouts::mma_c(lane, i);
      b[lane * 2 + i / 2] |= encode_half(B[at.row][at.col], is_bf16) << (i % 2 * 16);
      d[lane * 4 + i] = static_cast<float>(C[to.row][to.col]);
    }
  }
  NLD_LAUNCH(mma_kernel<T>, 1, 32, 0, nullptr, a.data(), b.data(), d.data());
  finish();
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const layouts::At at = layouts::mma_c(lane, i);
      int want = C[at.row][at.col];
      for (int k = 0; k < 16; ++k) want += A[at.row][k] * B[k][at.col];
      expect(d[lane * 4 + i] == static_cast<float>(want), "row %d, column %d: %g, want %d", at.row, at.col,
             d[lane * 4 + i], want);
    }
}

// ---- named barriers -----------------------------------------------------------------------------------------------

struct BarrierSmem {
  int value[64];
};
// Two warps write, two warps read, for some rounds: barrier 1 says "full", barrier 2 "empty". The writers do not wait
// for the first and the readers not for the second.
__global__ void barrier_kernel(int num_rounds, int* out) {
  NLD_DYNAMIC_SMEM(BarrierSmem, sm);
  const int i = threadIdx.x % 64;
  if (threadIdx.x < 64) {
    for (int round = 0; round < num_rounds; ++round) {
      ptx::barrier_sync(2, 128);
      sm->value[i] = round * 64 + i;
      ptx::barrier_arrive(1, 128);
    }
  } else {
    ptx::barrier_arrive(2, 128);
    for (int round = 0; round < num_rounds; ++round) {
      ptx::barrier_sync(1, 128);
      out[round * 64 + i] = sm->value[63 - i];
      if (round + 1 < num_rounds) ptx::barrier_arrive(2, 128);
    }
  }
}
inline void test_barriers() {
  const int num_rounds = 5;
  Array<int> out(num_rounds * 64, -1);
  NLD_LAUNCH(barrier_kernel, 1, 128, sizeof(BarrierSmem), nullptr, num_rounds, out.data());
  finish();
  for (int i = 0; i < num_rounds * 64; ++i) {
    expect(out[i] == i / 64 * 64 + 63 - i % 64, "round %d, thread %d: %d", i / 64, i % 64, out[i]);
  }
}

// ---- 16-byte accesses ---------------------------------------------------------------------------------------------

__global__ void stream_kernel(const Vec<f16, 8>* in, Vec<f16, 8>* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  Vec<f16, 8> v = ptx::load_once(in + i);
  const f16 first = v.at[0];
  v.at[0] = v.at[7];
  v.at[7] = first;
  ptx::store_streaming(out + i, v);
}
inline void test_streaming() {
  const int n = 512;
  Array<Vec<f16, 8>> in(n), out(n);
  for (int i = 0; i < n * 8; ++i) in[i / 8].at[i % 8].bits = static_cast<uint16_t>(i * 40503);
  NLD_LAUNCH(stream_kernel, n / 128, 128, 0, nullptr, in.data(), out.data());
  finish();
  for (int i = 0; i < n * 8; ++i) {
    const int from = i % 8 == 0 ? i + 7 : i % 8 == 7 ? i - 7 : i;
    expect(out[i / 8].at[i % 8].bits == static_cast<uint16_t>(from * 40503), "element %d", i);
  }
}

// ---- CTAs that talk through global memory -------------------------------------------------------------------------

constexpr int kTicketThreads = 64;
struct TicketSmem {
  uint32_t ticket;
};
// Every CTA writes its part; the last to arrive adds up all parts and resets the ticket. kStyle: which wrappers order
// it.
enum class Ordering { kAcqRel, kFence };
template <Ordering kOrdering>
__global__ void ticket_kernel(int* parts, uint32_t* ticket, int* total) {
  NLD_DYNAMIC_SMEM(TicketSmem, sm);
  const unsigned last = gridDim.x - 1;
  parts[blockIdx.x * kTicketThreads + threadIdx.x] = static_cast<int>(blockIdx.x * 1000 + threadIdx.x);
  __syncthreads();
  if (threadIdx.x == 0) {  // both fences in the thread of the atomic: those of other threads would order nothing
    if constexpr (kOrdering == Ordering::kFence) {
      ptx::fence_acq_rel();
      sm->ticket = atomicAdd(ticket, 1u);
      ptx::fence_acq_rel();
    } else {
      sm->ticket = ptx::atomic_add_acq_rel(ticket, 1);
    }
  }
  __syncthreads();
  if (sm->ticket == last) {
    int sum = 0;
    for (unsigned cta = 0; cta <= last; ++cta) sum += parts[cta * kTicketThreads + threadIdx.x];
    total[threadIdx.x] = sum;
    if (threadIdx.x == 0) *ticket = 0;
  }
}
template <Ordering kOrdering>
void test_ticket() {
  const int num_ctas = 23;
  Array<int> parts(num_ctas * kTicketThreads), total(kTicketThreads);
  Array<uint32_t> ticket(1);
  for (int repeat = 0; repeat < 3; ++repeat) {
    NLD_LAUNCH(ticket_kernel<kOrdering>, num_ctas, kTicketThreads, sizeof(TicketSmem), nullptr, parts.data(),
               ticket.data(), total.data());
    finish();
    expect(ticket[0] == 0, "the ticket must be reset");
    for (int i = 0; i < kTicketThreads; ++i) {
      expect(total[i] == num_ctas * i + 1000 * num_ctas * (num_ctas - 1) / 2, "sum %d is %d", i, total[i]);
      total[i] = 0;
    }
  }
}

// CTA 0 hands a message to CTA 1 through a flag, and CTA 1 an answer back; both must be resident at once.
__global__ void message_kernel(int* message, uint32_t* flags, int* out) {
  const int i = threadIdx.x;
  if (blockIdx.x == 0) {
    message[i] = 100 + i;
    __syncthreads();
    if (i == 0) ptx::store_release(flags, 7);
    while (ptx::load_acquire(flags + 1) != 32) __nanosleep(20);
    out[i] = message[32 + 31 - i];
  } else {
    while (ptx::load_acquire(flags) != 7) __nanosleep(20);
    message[32 + i] = message[31 - i] * 2;
    ptx::red_add_release(flags + 1, 1);  // of each thread, for its own write
  }
}
inline void test_messages() {
  Array<int> message(64), out(32);
  Array<uint32_t> flags(2);
  const LaunchShape shape{2, 32, 0, NLD_ON_DEVICE ? 1u : 2u};
  NLD_LAUNCH_SHAPED(message_kernel, shape, nullptr, message.data(), flags.data(), out.data());
  finish();
  expect(flags[0] == 7 && flags[1] == 32, "flags %u, %u", flags[0], flags[1]);
  for (int i = 0; i < 32; ++i) expect(out[i] == 2 * (100 + i), "thread %d: %d", i, out[i]);
}

// ---- programmatic dependent launch --------------------------------------------------------------------------------

__global__ void early_kernel(int* data) {
  ptx::allow_next_kernel();
#if NLD_ON_DEVICE
  for (int i = 0; i < 1000; ++i) __nanosleep(100);
#endif
  data[threadIdx.x] = 5;
}
__global__ void late_kernel(const int* data, int* out) {
  ptx::wait_for_previous_kernel();
  out[threadIdx.x] = data[31 - threadIdx.x] + static_cast<int>(threadIdx.x);
}
inline void test_dependent_launch() {
  Array<int> data(32), out(32);
  NLD_LAUNCH(early_kernel, 1, 32, 0, nullptr, data.data());
  const LaunchShape shape{1, 32, 0, 1, compute_capability() >= 90};
  NLD_LAUNCH_SHAPED(late_kernel, shape, nullptr, data.data(), out.data());
  finish();
  for (int i = 0; i < 32; ++i) expect(out[i] == 5 + i, "thread %d: %d", i, out[i]);
}

}  // namespace nld::ptx_test
