// ptx_host.hpp - host twins of the warp-level matrix instructions.
#pragma once
#include "emulator/emulator.h"

namespace ptx::host {
void ldmatrix_x4(uint32_t (&r)[4], const void* row, bool trans, emu::Loc loc);
void mma_bf16_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, emu::Loc loc);
}  // namespace ptx::host
