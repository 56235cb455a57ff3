// Tests of common/ptx_wgmma.cuh: every shape, operand layout and type against sums of whole numbers.
#pragma once

#include "common/ptx_wgmma.cuh"
#include "emulator/tests/harness.cuh"
#include "emulator/tests/layouts.h"
#include "emulator/tests/ptx_portable.cuh"

namespace nld::ptx_test {

constexpr int kWgmmaK = 32;  // two steps of 16

struct WgmmaSmem {
  alignas(1024) unsigned char a[64 * kWgmmaK * 2 * 4];  // room for gaps between the pieces
  alignas(1024) unsigned char b[256 * kWgmmaK * 2 * 2];
};

// Where the operands lie; made by the test.
struct WgmmaShape {
  int a_bytes, b_bytes;             // of the images of both in shared memory
  int a_leading, a_stride, a_step;  // a_step: from one 16 of k to the next
  int b_leading, b_stride, b_step;
};

// d = a * b over two steps of k, then once more with `d +=` in a group of its own, of which the first is not waited
// for.
template <class T, int kN, ptx::Swizzle kSwizzle, bool kRegA, bool kTransA, bool kTransB>
__global__ void __launch_bounds__(128) wgmma_kernel(WgmmaShape s, const unsigned char* a, const unsigned char* b,
                                                    const uint32_t* a_registers, float* out) {
  NLD_DYNAMIC_SMEM(WgmmaSmem, sm);
  const int thread = threadIdx.x;
  for (int i = thread; i < s.a_bytes; i += 128) sm->a[i] = a[i];
  for (int i = thread; i < s.b_bytes; i += 128) sm->b[i] = b[i];
  ptx::fence_proxy_async();
  __syncthreads();
  float d[kN / 2];
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) d[i] = 1e6f;  // the first step must not see it
  uint32_t fragment[2][4];
#pragma unroll
  for (int i = 0; i < 8; ++i) fragment[i / 4][i % 4] = a_registers[thread * 8 + i];
  ptx::wgmma_use(d);
  ptx::wgmma_fence();
#pragma unroll
  for (int repeat = 0; repeat < 2; ++repeat) {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const bool accumulate = repeat + step > 0;
      const uint64_t b_desc = ptx::wgmma_desc(sm->b + step * s.b_step, s.b_leading, s.b_stride, kSwizzle);
      if constexpr (kRegA) {
        ptx::wgmma_reg_a<T, kN, kTransB>(d, fragment[step], b_desc, accumulate);
      } else {
        const uint64_t a_desc = ptx::wgmma_desc(sm->a + step * s.a_step, s.a_leading, s.a_stride, kSwizzle);
        ptx::wgmma<T, kN, kTransA, kTransB>(d, a_desc, b_desc, accumulate);
      }
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();
  }
  ptx::wgmma_wait<0>();
  ptx::wgmma_use(d);
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) out[thread * (kN / 2) + i] = d[i];
}

// Fields of the descriptor and size of the image of an operand with num_mn rows (columns of B).
struct OperandShape {
  int leading, stride, step, num_bytes;
};
inline OperandShape operand_shape(int num_mn, bool mn_major, int span) {
  const int width = span == 0 ? 8 : span / 2, piece = 8 * width * 2;  // elements of a row, bytes of 8 rows
  if (!mn_major && span == 0) {
    const int leading = piece * (num_mn / 8) + 128;  // a gap, so that the field matters
    return {leading, piece, 2 * leading, leading * (kWgmmaK / 8)};
  }
  if (!mn_major) {  // one span of k after the other
    const int next_span = piece * (num_mn / 8);
    return {16, piece, width == 16 ? next_span : 32, next_span * ((kWgmmaK + width - 1) / width)};
  }
  // mn_major: for each piece of mn, all of k.
  const int along_k = piece, along_mn = piece * (kWgmmaK / 8) + (span == 0 ? 128 : piece);
  const int num_bytes = along_mn * ((num_mn + width - 1) / width);
  return span == 0 ? OperandShape{along_k, along_mn, 2 * along_k, num_bytes}
                   : OperandShape{along_mn, along_k, 2 * along_k, num_bytes};
}
inline uint32_t operand_offset(const OperandShape& s, int mn, int k, bool mn_major, int span) {
  const int step = k / 16, within = k % 16;
  const uint32_t in_step = mn_major ? layouts::wgmma_mn_major(mn, within, span, s.leading, s.stride)
                                    : layouts::wgmma_k_major(mn, within, span, s.leading, s.stride);
  return layouts::swizzle(in_step + static_cast<uint32_t>(step * s.step), span);
}

template <class T, int kN, ptx::Swizzle kSwizzle, bool kRegA, bool kTransA, bool kTransB>
void test_wgmma_one() {
  const bool is_bf16 = ptx::kIsBf16<T>;
  const int span = static_cast<int>(kSwizzle);
  const OperandShape as = operand_shape(64, kTransA, span), bs = operand_shape(kN, kTransB, span);
  expect(
      as.num_bytes <= static_cast<int>(sizeof(WgmmaSmem::a)) && bs.num_bytes <= static_cast<int>(sizeof(WgmmaSmem::b)),
      "the test needs more shared memory: %d, %d", as.num_bytes, bs.num_bytes);
  std::vector<int> A(64 * kWgmmaK), B(kN * kWgmmaK);
  for (int& x : A) x = random_int(-20, 20);
  for (int& x : B) x = random_int(-20, 20);
  Array<unsigned char> a(static_cast<size_t>(as.num_bytes), 0x7f), b(static_cast<size_t>(bs.num_bytes), 0x7f);
  Array<uint32_t> registers(128 * 8);
  const auto put = [&](Array<unsigned char>& image, uint32_t at, int x) {
    const auto bits = static_cast<uint16_t>(encode_half(x, is_bf16));
    std::memcpy(image.host() + at, &bits, 2);
  };
  for (int m = 0; m < 64; ++m)
    for (int k = 0; k < kWgmmaK; ++k) put(a, operand_offset(as, m, k, kTransA, span), A[m * kWgmmaK + k]);
  for (int n = 0; n < kN; ++n)
    for (int k = 0; k < kWgmmaK; ++k) put(b, operand_offset(bs, n, k, kTransB, span), B[n * kWgmmaK + k]);
  for (int t = 0; t < 128; ++t)
    for (int i = 0; i < 16; ++i) {
      const layouts::At at = layouts::wgmma_a(t, i / 2 % 4, i % 2);
      registers[t * 8 + i / 2] |= encode_half(A[at.row * kWgmmaK + i / 8 * 16 + at.col], is_bf16) << (i % 2 * 16);
    }
  Array<float> out(128 * kN / 2);
  const WgmmaShape shape{as.num_bytes, bs.num_bytes, as.leading, as.stride, as.step, bs.leading, bs.stride, bs.step};
  using Kernel = void (*)(WgmmaShape, const unsigned char*, const unsigned char*, const uint32_t*, float*);
  const Kernel kernel = wgmma_kernel<T, kN, kSwizzle, kRegA, kTransA, kTransB>;
  if (LaunchError error = allow_smem(kernel, sizeof(WgmmaSmem))) throw Failure(error);
  NLD_LAUNCH(kernel, 1, 128, sizeof(WgmmaSmem), nullptr, shape, a.data(), b.data(), registers.data(), out.data());
  finish();
  for (int t = 0; t < 128; ++t)
    for (int i = 0; i < kN / 2; ++i) {
      const layouts::At at = layouts::wgmma_c(t, i);
      int want = 0;
      for (int k = 0; k < kWgmmaK; ++k) want += 2 * A[at.row * kWgmmaK + k] * B[at.col * kWgmmaK + k];
      expect(out[t * (kN / 2) + i] == static_cast<float>(want),
             "n %d, span %d, %s%s%s: row %d, column %d is %g, want %d", kN, span, kRegA ? "A in registers" : "",
             kTransA ? "A MN-major" : "", kTransB ? " B MN-major" : "", at.row, at.col, out[t * (kN / 2) + i], want);
    }
}

template <class T, int kN, ptx::Swizzle kSwizzle>
void test_wgmma_layouts() {
  test_wgmma_one<T, kN, kSwizzle, false, false, false>();
  test_wgmma_one<T, kN, kSwizzle, false, true, false>();
  test_wgmma_one<T, kN, kSwizzle, false, false, true>();
  test_wgmma_one<T, kN, kSwizzle, true, false, true>();
}
template <class T>
void test_wgmma_swizzles() {
  test_wgmma_layouts<T, 64, ptx::Swizzle::kNone>();
  test_wgmma_layouts<T, 64, ptx::Swizzle::k32>();
  test_wgmma_layouts<T, 64, ptx::Swizzle::k64>();
  test_wgmma_layouts<T, 64, ptx::Swizzle::k128>();
}
template <class T, int kN>
void test_wgmma_n() {
  test_wgmma_one<T, kN, ptx::Swizzle::k128, false, false, false>();
  test_wgmma_one<T, kN, ptx::Swizzle::k128, true, false, (kN >= 64)>();
}
template <class T>
void test_wgmma_all_n() {
  test_wgmma_n<T, 8>();
  test_wgmma_n<T, 16>();
  test_wgmma_n<T, 32>();
  test_wgmma_n<T, 64>();
  test_wgmma_n<T, 96>();
  test_wgmma_n<T, 128>();
  test_wgmma_n<T, 192>();
  test_wgmma_n<T, 256>();
}

// ---- setmaxnreg ---------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(256, 1) registers_kernel(int* out) {
  if (threadIdx.x < 128) {
    ptx::give_up_registers<40>();
    out[threadIdx.x] = 1;
  } else {
    ptx::ask_for_registers<232>();
    out[threadIdx.x] = 2;
  }
}
inline void test_registers() {
  Array<int> out(256);
  NLD_LAUNCH(registers_kernel, 1, 256, 0, nullptr, out.data());
  finish();
  for (int i = 0; i < 256; ++i) expect(out[i] == (i < 128 ? 1 : 2), "thread %d: %d", i, out[i]);
}

}  // namespace nld::ptx_test
