// Element types of the kernels, without torch.
#pragma once

#include <cstdint>

namespace nld {

enum class DType : int { kF32 = 0, kBF16 = 1, kF16 = 2 };

// Storage only: load, convert to float, compute, convert back.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
struct e4m3 {  // of caches only, beside a DType: common/fp8.h
  uint8_t bits;
};

}  // namespace nld
