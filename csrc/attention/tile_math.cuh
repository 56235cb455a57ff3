// One warp's share of a tile: scores of 16 rows, online softmax, and the product with V, in registers.
//
// Fragments of mma.m16n8k16: lane l holds rows l / 4 and l / 4 + 8 (index h = 0, 1 below) and of each 8 columns the two
// at l % 4 * 2. The accumulator layout of S is the operand layout of P, so P never leaves the registers.
#pragma once

#include "attention/tile_loader.cuh"

namespace nld {

// The state of a warp's 16 rows. Scores are kept in units of log2: exp2 needs no multiplication then.
template <class T, class Shape>
struct WarpRows {
  static constexpr int kKeys = Shape::kWarpKeys, kDim = Shape::kHeadDim;
  uint32_t q[kDim / 16][4];
  uint32_t p[kKeys / 16][4];                                     // probabilities of the tile, rounded to T
  float out[kDim / 8][4] = {};                                   // not yet divided by sum
  float max[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};  // `sum` of this lane's columns only

  // Q of the warp from rows [first_row, first_row + 16) of `slot`.
  __device__ __forceinline__ void load_q(const uint4* slot, int first_row, uint32_t flip_signs) {
    const int lane = threadIdx.x % kWarpSize, position = Shape::at(first_row + lane % 16, lane / 16);
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      ptx::ldmatrix_x4(q[k], slot + Shape::step(position, 2 * k));
#pragma unroll
      for (int i = 0; i < 4; ++i) q[k][i] ^= flip_signs;
    }
  }

  // s = q * k for the keys in rows [first_key, first_key + kKeys) of the slot.
  __device__ __forceinline__ void multiply_k(const uint4* slot, int first_key, float (&s)[kKeys / 8][4]) const {
    const int lane = threadIdx.x % kWarpSize;
    const int position = Shape::at(first_key + lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        uint32_t b[4];  // keys 0..7 of the 16: dims 0..7, 8..15; then keys 8..15
        ptx::ldmatrix_x4(b, slot + Shape::step(position, 2 * k) + n * 16 * Shape::kChunks);
        if (NLD_BUG(attention_swapped_fragment)) {
          const uint32_t b1 = b[1];
          b[1] = b[2];
          b[2] = b1;
        }
        ptx::mma_m16n8k16<T>(s[2 * n], q[k], b[0], b[1]);
        ptx::mma_m16n8k16<T>(s[2 * n + 1], q[k], b[2], b[3]);
      }
    }
  }

  // out += p * v.
  __device__ __forceinline__ void multiply_v(const uint4* slot, int first_key) {
    const int lane = threadIdx.x % kWarpSize, position = Shape::at(first_key + lane % 16, lane / 16);
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
#pragma unroll
      for (int n = 0; n < kDim / 16; ++n) {
        uint32_t b[4];  // dims 0..7 of the 16: keys 0..7, 8..15; then dims 8..15
        ptx::ldmatrix_x4<true>(b, slot + Shape::step(position, 2 * n) + k * 16 * Shape::kChunks);
        ptx::mma_m16n8k16<T>(out[2 * n], p[k], b[0], b[1]);
        ptx::mma_m16n8k16<T>(out[2 * n + 1], p[k], b[2], b[3]);
      }
    }
  }

  // Scores to probabilities: s becomes p, and max, sum and out are brought to the new maximum.
  __device__ __forceinline__ void softmax(float (&s)[kKeys / 8][4], float scale_log2) {
    float shrink[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = s[0][2 * h];
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) top = fmaxf(top, fmaxf(s[j][2 * h], s[j][2 * h + 1]));
      top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 2));
      const float now = fmaxf(max[h], top * scale_log2);
      const float base = now == -INFINITY ? 0.0f : now;  // nothing seen so far: every exp2 below must give 0, not NaN
      shrink[h] = ptx::exp2_approx(max[h] - base);
      max[h] = now;
      float total = 0.0f;
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
        for (int e = 2 * h; e < 2 * h + 2; ++e) {
          s[j][e] = ptx::exp2_approx(__fmaf_rn(s[j][e], scale_log2, -base));
          total += s[j][e];
        }
      }
      sum[h] = __fmaf_rn(sum[h], shrink[h], total);
    }
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      p[k][0] = ptx::pack<T>(s[2 * k][0], s[2 * k][1]);
      p[k][1] = ptx::pack<T>(s[2 * k][2], s[2 * k][3]);
      p[k][2] = ptx::pack<T>(s[2 * k + 1][0], s[2 * k + 1][1]);
      p[k][3] = ptx::pack<T>(s[2 * k + 1][2], s[2 * k + 1][3]);
    }
    // The maximum rarely moves after the first tiles; a product with 1 changes no bit, so it may be left out.
    if (__any_sync(kFullMask, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
      for (int j = 0; j < kDim / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) out[j][e] *= shrink[e / 2];
      }
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
