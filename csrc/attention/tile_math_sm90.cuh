// One warpgroup's share of a tile on Hopper: scores of 64 rows by wgmma, online softmax, and the product with V.
//
// Accumulators of wgmma: warp w of the warpgroup holds rows 16 * w ..., its lane l rows l / 4 and l / 4 + 8 of them
// (h = 0, 1 below) and of each 8 columns the two at l % 4 * 2: element 4 * j + 2 * h + e is column 8 * j + l % 4 * 2 +
// e. That is the operand layout of P too, so P never leaves the registers.
#pragma once

#include "attention/ring_sm90.cuh"

namespace nld {

template <class T, class Shape>
struct WarpgroupRows {
  static constexpr int kDim = Shape::kHeadDim, kScores = kHopperKeys / 2, kSteps = kHopperKeys / 16;
  float s[kScores];          // scores, then probabilities, of the tile at hand
  uint32_t p[kSteps][4];     // probabilities of the tile before, rounded to T: operands of the product with V
  float out[kDim / 2] = {};  // not yet divided by sum
  float max[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};  // `sum` of this lane's columns only

  // Starts s = q * k; both operands lie in shared memory, dims along the rows.
  __device__ __forceinline__ void start_scores(const uint4* q, const uint4* k) {
    const uint64_t a = ptx::wgmma_desc(q, 16, 1024, ptx::Swizzle::k128);
    const uint64_t b = ptx::wgmma_desc(k, 16, 1024, ptx::Swizzle::k128);
    ptx::wgmma_use(s);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step) {
      const int column = step / 4, bytes = step % 4 * 32;
      ptx::wgmma<T, kHopperKeys>(s, a + (column * 64 * 128 + bytes) / 16,
                                 b + (column * Shape::kColumnBytes + bytes) / 16, step > 0);
    }
    ptx::wgmma_commit();
  }

  // Starts out += p * v. V lies with its dims along the rows: its keys are the steps of k.
  __device__ __forceinline__ void start_out(const uint4* v) {
    const uint64_t b = ptx::wgmma_desc(v, Shape::kColumnBytes, 1024, ptx::Swizzle::k128);
    ptx::wgmma_use(out);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      ptx::wgmma_reg_a<T, kDim, true>(out, p[step], b + step * 16 * 128 / 16, true);
    }
    ptx::wgmma_commit();
  }

  // After the wait for the scores; for `out` (and p, which the product reads until then).
  __device__ __forceinline__ void take_scores() { ptx::wgmma_use(s); }
  __device__ __forceinline__ void take_out() {
    ptx::wgmma_use(out);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) ptx::wgmma_use(p[step]);
  }

  // Scores to probabilities, max and sum brought up to date. Returns in `shrink` what `out` is to be multiplied by.
  __device__ __forceinline__ void softmax(float scale_log2, float (&shrink)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = s[2 * h];
#pragma unroll
      for (int j = 0; j < kHopperKeys / 8; ++j) top = fmaxf(top, fmaxf(s[4 * j + 2 * h], s[4 * j + 2 * h + 1]));
      top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 2));
      const float now = fmaxf(max[h], top * scale_log2);
      const float base = now == -INFINITY ? 0.0f : now;  // nothing seen so far: every exp2 below must give 0, not NaN
      shrink[h] = ptx::exp2_approx(max[h] - base);
      max[h] = now;
      float total[2] = {0.0f, 0.0f};
#pragma unroll
      for (int j = 0; j < kHopperKeys / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[4 * j + 2 * h + e];
          x = ptx::exp2_approx(__fmaf_rn(x, scale_log2, -base));
          total[e] += x;
        }
      }
      sum[h] = __fmaf_rn(sum[h], shrink[h], total[0] + total[1]);
    }
  }

  __device__ __forceinline__ void round_probabilities() {
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) p[i / 4][i % 4] = ptx::pack<T>(s[2 * i], s[2 * i + 1]);
  }

  // The maximum rarely moves after the first tiles; a product with 1 changes no bit, so it may be left out.
  __device__ __forceinline__ void shrink_out(const float (&shrink)[2]) {
    if (__any_sync(kFullMask, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
      for (int i = 0; i < kDim / 2; ++i) out[i] *= shrink[i / 2 % 2];
    }
  }

  // The sum over all columns, in every lane of a row.
  __device__ __forceinline__ void finish_sum() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      sum[h] += __shfl_xor_sync(kFullMask, sum[h], 1);
      sum[h] += __shfl_xor_sync(kFullMask, sum[h], 2);
    }
  }
};

}  // namespace nld
