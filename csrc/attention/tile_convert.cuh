// e4m3 tiles on their way from the ring to the 16-bit tile that the matrix instructions read.
#pragma once

#include "attention/tile_loader.cuh"
#include "attention/widen.cuh"

namespace nld {

// The tile `raw`, as the loader laid it down, into `tile`, as multiply_k and multiply_v read it. Every thread of the
// team takes 16 codes at a time, those that it copied itself; of the two chunks they become, lanes of the second half
// of a row write the second one first, so that eight lanes fall on all banks.
template <class Shape>
__device__ __forceinline__ void convert_tile(const uint4* raw, uint4* tile) {
  constexpr int kRowChunks = Shape::kCopyChunks;
  const int member = Shape::kSharesKeys ? threadIdx.x % kWarpSize : threadIdx.x;
  const int first_row = Shape::kSharesKeys ? threadIdx.x / kWarpSize * Shape::kWarpKeys : 0;
#pragma unroll
  for (int i = 0; i < Shape::kWarpKeys * kRowChunks / Shape::kTeam; ++i) {
    const int at = i * Shape::kTeam + member, row = first_row + at / kRowChunks, chunk = at % kRowChunks;
    uint4 left, right;
    widen_chunk(raw[Shape::copy_at(row, chunk)], left, right);
    const bool swaps = chunk >= 4;
    tile[Shape::at(row, 2 * chunk + (swaps ? 1 : 0))] = swaps ? right : left;
    tile[Shape::at(row, 2 * chunk + (swaps ? 0 : 1))] = swaps ? left : right;
  }
}

}  // namespace nld
