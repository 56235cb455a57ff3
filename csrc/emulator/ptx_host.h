// Host twins of the warp-level matrix instructions.
#pragma once

#include <cmath>
#include <limits>

#include "emulator/emulator.h"

namespace nld::ptx::host {

void ldmatrix(uint32_t* r, int num_matrices, const void* row, bool trans, emu::Loc loc);
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool is_bf16, emu::Loc loc);

bool elect_one(emu::Loc loc);
void set_registers(int count, emu::Loc loc);  // setmaxnreg: of the whole warpgroup at once

// .ftz: denormals become zeros of their sign.
inline float flush(float x) { return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x; }

}  // namespace nld::ptx::host
