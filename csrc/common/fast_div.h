// Division of a key or row index by a number that is known before the launch: two multiplications instead of about
// thirty instructions.
#pragma once

#include <cstdint>

#include "common/hd.h"

namespace nld {

// n / divisor for 0 <= n < 2^31 and 1 <= divisor < 2^31. With 2^shift >= divisor and multiplier = ceil(2^(31 + shift) /
// divisor) the error of n * multiplier / 2^(31 + shift) stays below 1 / divisor, so its floor is exact.
struct FastDiv {
  uint32_t divisor, multiplier, shift;
};

NLD_HD FastDiv fast_div(int64_t divisor) {
  uint32_t shift = 0;
  while ((static_cast<int64_t>(1) << shift) < divisor) ++shift;
  const uint64_t d = static_cast<uint64_t>(divisor);
  return {static_cast<uint32_t>(divisor), static_cast<uint32_t>(((1ull << (31 + shift)) + d - 1) / d), shift};
}

NLD_HD uint32_t divide(uint32_t n, const FastDiv& by) {
  return static_cast<uint32_t>((static_cast<uint64_t>(2 * n) * by.multiplier) >> 32) >> by.shift;
}

NLD_HD uint32_t remainder(uint32_t n, uint32_t quotient, const FastDiv& by) { return n - quotient * by.divisor; }

}  // namespace nld
