// gumbel_noise_: the noise that the draws of the other ops add, written down.
#pragma once

#include "common/ptx.cuh"
#include "sampler/sampler.h"

namespace nld {

constexpr int kNoiseThreads = 256;

// One thread per row and group of 4 ids, which share a Philox block. Traffic: the noise is written once.
static __global__ void __launch_bounds__(kNoiseThreads)
    gumbel_noise_kernel(const __grid_constant__ GumbelNoiseParams p) {
  const int64_t groups = (p.vocab + 3) / 4, item = static_cast<int64_t>(blockIdx.x) * kNoiseThreads + threadIdx.x;
  if (item >= p.rows * groups) return;
  const int64_t row = item / groups, group = item % groups;
  const NoiseKey key = {static_cast<uint64_t>(p.seed[row]), static_cast<uint32_t>(p.positions[row]), p.purpose};
  const Philox4 words = philox_words(key, static_cast<uint32_t>(group));
  float* noise = p.noise + row * p.noise_row_stride + 4 * group;
  const int64_t left = p.vocab - 4 * group;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < left) noise[i] = gumbel(words.word[i]);
  }
}

}  // namespace nld
