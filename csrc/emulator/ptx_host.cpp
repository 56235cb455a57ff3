// ptx_host.cpp - host twins of the warp-level matrix instructions.  Never built
// with -fsanitize=thread: reads are reported for the lane that named the row.
#include "emulator/ptx_host.h"

namespace ptx::host {

namespace {
struct LdArgs {
  uint32_t* r;
  const void* row;
  bool trans;
  emu::Loc loc;
};
struct MmaArgs {
  float* d;
  const uint32_t* a;
  uint32_t b0, b1;
};
}  // namespace

void ldmatrix_x4(uint32_t (&r)[4], const void* row, bool trans, emu::Loc loc) {
  if (reinterpret_cast<uintptr_t>(row) % 16) emu::fail("ldmatrix: row address not 16-byte aligned", loc);
  emu::note_read(row, 16, loc);
  LdArgs a{r, row, trans, loc};
  emu::warp_collective(
      0xffffffffu, trans ? "ldmatrix.trans" : "ldmatrix", &a,
      [](unsigned, void* const* p) {
        for (int m = 0; m < 4; ++m) {
          uint16_t x[8][8];
          for (int i = 0; i < 8; ++i) std::memcpy(x[i], static_cast<LdArgs*>(p[m * 8 + i])->row, 16);
          for (int l = 0; l < 32; ++l) {
            auto* a = static_cast<LdArgs*>(p[l]);
            const int i = l / 4, j = l % 4 * 2;
            a->r[m] = a->trans ? x[j][i] | uint32_t(x[j + 1][i]) << 16 : x[i][j] | uint32_t(x[i][j + 1]) << 16;
          }
        }
      },
      loc);
}

void mma_bf16_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, emu::Loc loc) {
  MmaArgs x{d, a, b0, b1};
  emu::warp_collective(
      0xffffffffu, "mma.m16n8k16", &x,
      [](unsigned, void* const* p) {
        auto lo = [](uint32_t u) { return __uint_as_float(u << 16); };
        auto hi = [](uint32_t u) { return __uint_as_float(u & 0xffff0000u); };
        float A[16][16], B[16][8], C[16][8];
        for (int l = 0; l < 32; ++l) {
          const auto* q = static_cast<MmaArgs*>(p[l]);
          const int g = l / 4, t = l % 4 * 2;
          for (int i = 0; i < 4; ++i) {  // a0 (g,t) a1 (g+8,t) a2 (g,t+8) a3 (g+8,t+8)
            A[g + i % 2 * 8][t + i / 2 * 8] = lo(q->a[i]);
            A[g + i % 2 * 8][t + i / 2 * 8 + 1] = hi(q->a[i]);
          }
          B[t][g] = lo(q->b0);
          B[t + 1][g] = hi(q->b0);
          B[t + 8][g] = lo(q->b1);
          B[t + 9][g] = hi(q->b1);
          for (int i = 0; i < 4; ++i) C[g + i / 2 * 8][t + i % 2] = q->d[i];
        }
        for (int i = 0; i < 16; ++i)
          for (int k = 0; k < 16; ++k)
            for (int j = 0; j < 8; ++j) C[i][j] += A[i][k] * B[k][j];
        for (int l = 0; l < 32; ++l) {
          auto* q = static_cast<MmaArgs*>(p[l]);
          const int g = l / 4, t = l % 4 * 2;
          for (int i = 0; i < 4; ++i) q->d[i] = C[g + i / 2 * 8][t + i % 2];
        }
      },
      loc);
}
}  // namespace ptx::host
