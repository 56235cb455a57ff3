// Host twins of the warp-level matrix instructions. Never built with -fsanitize=thread: reads are reported for the lane
// that named the row.
#include "emulator/ptx_host.h"

namespace nld::ptx::host {

namespace {

struct LdmatrixArgs {
  uint32_t* r;
  const void* row;
  int num_matrices;
  bool trans;
};
struct MmaArgs {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
  bool is_bf16;
};

float to_float(uint32_t bits, bool is_bf16) {  // of the low 16 bits
  const auto half = static_cast<uint16_t>(bits);
  return is_bf16 ? __bfloat162float(__nv_bfloat16(__nv_bfloat16_raw{half})) : __half2float(__half(__half_raw{half}));
}

}  // namespace

void ldmatrix(uint32_t* r, int num_matrices, const void* row, bool trans, emu::Loc loc) {
  if (static_cast<int>(emu::t_cur->lane) < 8 * num_matrices) {
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emu::fail("ldmatrix: row address not 16-byte aligned", loc);
    emu::note_read(row, 16, loc);
  }
  LdmatrixArgs args{r, row, num_matrices, trans};
  emu::warp_collective(
      0xffffffffu, trans ? "ldmatrix.trans" : "ldmatrix", &args,
      [](unsigned, void* const* p) {
        const int num_matrices = static_cast<LdmatrixArgs*>(p[0])->num_matrices;
        for (int m = 0; m < num_matrices; ++m) {
          uint16_t x[8][8];
          for (int i = 0; i < 8; ++i) std::memcpy(x[i], static_cast<LdmatrixArgs*>(p[m * 8 + i])->row, 16);
          for (int lane = 0; lane < 32; ++lane) {
            auto* a = static_cast<LdmatrixArgs*>(p[lane]);
            const int i = lane / 4, j = lane % 4 * 2;
            const uint32_t lo = a->trans ? x[j][i] : x[i][j], hi = a->trans ? x[j + 1][i] : x[i][j + 1];
            a->r[m] = lo | hi << 16;
          }
        }
      },
      loc);
}

void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool is_bf16, emu::Loc loc) {
  MmaArgs args{d, a, {b0, b1}, is_bf16};
  emu::warp_collective(
      0xffffffffu, is_bf16 ? "mma.m16n8k16.bf16" : "mma.m16n8k16.f16", &args,
      [](unsigned, void* const* p) {
        const bool is_bf16 = static_cast<MmaArgs*>(p[0])->is_bf16;
        float A[16][16], B[16][8], C[16][8];
        for (int lane = 0; lane < 32; ++lane) {
          const auto* q = static_cast<MmaArgs*>(p[lane]);
          const int g = lane / 4, t = lane % 4 * 2;
          for (int i = 0; i < 4; ++i) {
            const int row = g + i % 2 * 8, k = t + i / 2 * 8;
            A[row][k] = to_float(q->a[i], is_bf16);
            A[row][k + 1] = to_float(q->a[i] >> 16, is_bf16);
            C[g + i / 2 * 8][t + i % 2] = q->d[i];
          }
          for (int i = 0; i < 2; ++i) {
            B[t + i * 8][g] = to_float(q->b[i], is_bf16);
            B[t + i * 8 + 1][g] = to_float(q->b[i] >> 16, is_bf16);
          }
        }
        for (int i = 0; i < 16; ++i)
          for (int k = 0; k < 16; ++k)
            for (int j = 0; j < 8; ++j) C[i][j] += A[i][k] * B[k][j];
        for (int lane = 0; lane < 32; ++lane) {
          auto* q = static_cast<MmaArgs*>(p[lane]);
          const int g = lane / 4, t = lane % 4 * 2;
          for (int i = 0; i < 4; ++i) q->d[i] = C[g + i / 2 * 8][t + i % 2];
        }
      },
      loc);
}

// The same lane every time, but not always the one that kernels hope for.
bool elect_one(emu::Loc loc) {
  emu::warp_collective(0xffffffffu, "elect.sync", nullptr, nullptr, loc);
  const emu::Options& o = emu::options();
  const unsigned lane = o.order == emu::Order::Forward   ? 0
                        : o.order == emu::Order::Reverse ? 31
                                                         : unsigned(o.seed % 32);
  return emu::t_cur->lane == lane;
}

void set_registers(int count, emu::Loc loc) {
  emu::warpgroup_collective(
      "setmaxnreg", &count,
      [](unsigned, void* const* p) {
        for (int t = 1; t < 128; ++t) {
          if (*static_cast<int*>(p[t]) != *static_cast<int*>(p[0])) {
            emu::fail("setmaxnreg: the warps of a warpgroup ask for different numbers", emu::Loc::current());
          }
        }
      },
      loc);
}

}  // namespace nld::ptx::host
