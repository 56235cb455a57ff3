// The compute capability that launchers may count on, at most: lowered by tuning and tests, so that a Hopper GPU can be
// asked what it does with the kernels of older ones. One number in the library; 0: what the GPU has.
#pragma once

#include <atomic>

namespace nld {

inline std::atomic<int> max_capability{0};

}  // namespace nld
