// Where elements live in registers and in shared memory, written from the tables of the PTX manual and independent of
// the wrappers and their twins. ptx_cute.cpp compares every function here with CuTe's own layouts.
#pragma once

#include <cstdint>

namespace nld::layouts {

struct At {
  int row, col;
};

// mma.m16n8k16: element e (0 = low half) of register r of a lane. A is 16 x 16 (row, k); B is (k, column); C and D.
constexpr At mma_a(int lane, int r, int e) { return {lane / 4 + (r & 1) * 8, lane % 4 * 2 + (r >> 1) * 8 + e}; }
constexpr At mma_b(int lane, int r, int e) { return {lane % 4 * 2 + r * 8 + e, lane / 4}; }
constexpr At mma_c(int lane, int i) { return {lane / 4 + (i >> 1) * 8, lane % 4 * 2 + (i & 1)}; }

// ldmatrix: element e of the register that a lane gets of an 8 x 8 matrix: row and column of the matrix as stored.
constexpr At ldmatrix(int lane, int e, bool trans) {
  return trans ? At{lane % 4 * 2 + e, lane / 4} : At{lane / 4, lane % 4 * 2 + e};
}

// wgmma.m64nNk16: accumulator i of a thread of the warpgroup; A in registers as four mma_a fragments, 16 rows a warp.
constexpr At wgmma_c(int thread, int i) {
  const int warp = thread / 32, lane = thread % 32;
  return {warp * 16 + lane / 4 + (i >> 1 & 1) * 8, (i >> 2) * 8 + lane % 4 * 2 + (i & 1)};
}
constexpr At wgmma_a(int thread, int r, int e) {
  const At at = mma_a(thread % 32, r, e);
  return {thread / 32 * 16 + at.row, at.col};
}

// Shared-memory swizzle with a span of 32, 64 or 128 bytes (0: none): bits 4.. of an address are xored with bits 7...
constexpr uint32_t swizzle(uint32_t address, int span) {
  const uint32_t mask = span == 128 ? 7 : span == 64 ? 3 : span == 32 ? 1 : 0;
  return address ^ ((address >> 7 & mask) << 4);
}

// Byte offset of 16-bit element (mn, k) of a wgmma operand tile in shared memory, before the swizzle: `mn` is the row
// of A or the column of B. Rows of `span` bytes (16 without a swizzle) and 8 of them make the smallest piece. K-major
// (k contiguous): pieces along mn lie `stride` bytes apart, along k `leading` bytes (only without a swizzle: a swizzled
// tile is at most one span wide in k).
constexpr uint32_t wgmma_k_major(int mn, int k, int span, int leading, int stride) {
  const int width = span == 0 ? 8 : span / 2;  // elements of k in a piece
  return static_cast<uint32_t>(mn / 8 * stride + mn % 8 * width * 2 + k / width * leading + k % width * 2);
}
// MN-major (mn contiguous). Swizzled: pieces along mn lie `leading` bytes apart, along k `stride`. Without: the other
// way.
constexpr uint32_t wgmma_mn_major(int mn, int k, int span, int leading, int stride) {
  const int width = span == 0 ? 8 : span / 2;  // elements of mn in a piece
  const int along_mn = span == 0 ? stride : leading, along_k = span == 0 ? leading : stride;
  return static_cast<uint32_t>(mn / width * along_mn + mn % width * 2 + k / 8 * along_k + k % 8 * width * 2);
}

}  // namespace nld::layouts
