// Compares layouts.h, the oracle of the wrapper tests, with the layout tables of CuTe (headers of the PyPI package
// nvidia-cutlass). Built by tests/test_ptx.py with the C++ compiler; runs anywhere.
#include <cuda_runtime.h>

#include <cstdio>
#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

#include "emulator/tests/layouts.h"

using namespace cute;
namespace mine = nld::layouts;
using Half = cute::bfloat16_t;

static int num_failed = 0;
static void report(const char* name, int num_wrong) {
  std::printf("%s %s (%d differ)\n", num_wrong == 0 ? "ok" : "FAIL", name, num_wrong);
  num_failed += num_wrong != 0;
}

// CuTe numbers the elements of a matrix column by column.
static int index(mine::At at, int rows) { return at.row + rows * at.col; }

template <class Op>
static void compare_mma(const char* name) {
  using T = MMA_Traits<Op>;
  int wrong = 0;
  for (int lane = 0; lane < 32; ++lane) {
    for (int v = 0; v < 8; ++v)
      wrong += int(typename T::ALayout{}(lane, v)) != index(mine::mma_a(lane, v / 2, v % 2), 16);
    for (int v = 0; v < 4; ++v) {
      const mine::At b = mine::mma_b(lane, v / 2, v % 2);
      wrong += int(typename T::BLayout{}(lane, v)) != b.col + 8 * b.row;
      wrong += int(typename T::CLayout{}(lane, v)) != index(mine::mma_c(lane, v), 16);
    }
  }
  report(name, wrong);
}

// CuTe counts bits of the matrices, one row of 128 bits after the other.
template <class Op, int kMatrices>
static void compare_ldmatrix(const char* name, bool trans) {
  auto layout = typename Copy_Traits<Op>::DstLayout{};
  int wrong = 0;
  for (int lane = 0; lane < 32; ++lane)
    for (int r = 0; r < kMatrices; ++r)
      for (int e = 0; e < 2; ++e)
        for (int bit = 0; bit < 16; ++bit) {
          const mine::At at = mine::ldmatrix(lane, e, trans);
          wrong += int(layout(lane, r * 32 + e * 16 + bit)) != r * 1024 + at.row * 128 + at.col * 16 + bit;
        }
  report(name, wrong);
}

template <int kN>
static void compare_wgmma_c(const char* name) {
  auto layout = SM90::GMMA::CLayout_64xN<kN>{};
  int wrong = 0;
  for (int thread = 0; thread < 128; ++thread)
    for (int i = 0; i < kN / 2; ++i) wrong += int(layout(thread, i)) != index(mine::wgmma_c(thread, i), 64);
  report(name, wrong);
}

static void compare_wgmma_a() {
  auto layout = SM90::GMMA::ALayout_64x16{};
  int wrong = 0;
  for (int thread = 0; thread < 128; ++thread)
    for (int v = 0; v < 8; ++v) wrong += int(layout(thread, v)) != index(mine::wgmma_a(thread, v / 2, v % 2), 64);
  report("wgmma A in registers", wrong);
}

// A whole tile as CuTe lays it out, against our formula with the leading and stride fields of the descriptor that CuTe
// makes for its first 16 elements of k.
template <SM90::GMMA::Major kMajor, class Atom, int kMn, int kK>
static void compare_tile(const char* name, Atom atom, int span) {
  alignas(1024) static Half memory[kMn * kK];
  auto layout = tile_to_shape(atom, Shape<Int<kMn>, Int<kK>>{});
  auto tensor = make_tensor(make_smem_ptr(memory), layout);
  auto first = local_tile(tensor, Shape<Int<kMn>, Int<16>>{}, make_coord(0, 0));
  const auto desc = SM90::GMMA::make_gmma_desc<kMajor>(first);
  const int leading = int(desc.bitfield.leading_byte_offset_) * 16,
            stride = int(desc.bitfield.stride_byte_offset_) * 16;
  auto offsets = as_position_independent_swizzle_layout(layout);
  int wrong = 0;
  for (int mn = 0; mn < kMn; ++mn)
    for (int k = 0; k < 16; ++k) {
      const uint32_t at = kMajor == SM90::GMMA::Major::K ? mine::wgmma_k_major(mn, k, span, leading, stride)
                                                         : mine::wgmma_mn_major(mn, k, span, leading, stride);
      wrong += int(mine::swizzle(at, span)) != int(offsets(mn, k)) * 2;
    }
  const int code = span == 128 ? 1 : span == 64 ? 2 : span == 32 ? 3 : 0;
  wrong += int(desc.bitfield.layout_type_) != code;
  report(name, wrong);
}

int main() {
  using namespace SM90::GMMA;
  compare_mma<SM80_16x8x16_F32BF16BF16F32_TN>("mma bf16");
  compare_mma<SM80_16x8x16_F32F16F16F32_TN>("mma f16");
  compare_ldmatrix<SM75_U32x1_LDSM_N, 1>("ldmatrix x1", false);
  compare_ldmatrix<SM75_U32x2_LDSM_N, 2>("ldmatrix x2", false);
  compare_ldmatrix<SM75_U32x4_LDSM_N, 4>("ldmatrix x4", false);
  compare_ldmatrix<SM75_U16x2_LDSM_T, 1>("ldmatrix x1 trans", true);
  compare_ldmatrix<SM75_U16x4_LDSM_T, 2>("ldmatrix x2 trans", true);
  compare_ldmatrix<SM75_U16x8_LDSM_T, 4>("ldmatrix x4 trans", true);
  compare_wgmma_c<8>("wgmma accumulator n8");
  compare_wgmma_c<16>("wgmma accumulator n16");
  compare_wgmma_c<32>("wgmma accumulator n32");
  compare_wgmma_c<64>("wgmma accumulator n64");
  compare_wgmma_c<96>("wgmma accumulator n96");
  compare_wgmma_c<128>("wgmma accumulator n128");
  compare_wgmma_c<192>("wgmma accumulator n192");
  compare_wgmma_c<256>("wgmma accumulator n256");
  compare_wgmma_a();
  compare_tile<Major::K, Layout_K_INTER_Atom<Half>, 64, 32>("K-major tile, no swizzle", {}, 0);
  compare_tile<Major::K, Layout_K_SW32_Atom<Half>, 64, 16>("K-major tile, 32-byte swizzle", {}, 32);
  compare_tile<Major::K, Layout_K_SW64_Atom<Half>, 64, 32>("K-major tile, 64-byte swizzle", {}, 64);
  compare_tile<Major::K, Layout_K_SW128_Atom<Half>, 64, 64>("K-major tile, 128-byte swizzle", {}, 128);
  compare_tile<Major::K, Layout_K_SW128_Atom<Half>, 128, 128>("K-major tile of 128, 128-byte swizzle", {}, 128);
  compare_tile<Major::MN, Layout_MN_INTER_Atom<Half>, 64, 32>("MN-major tile, no swizzle", {}, 0);
  compare_tile<Major::MN, Layout_MN_SW32_Atom<Half>, 64, 32>("MN-major tile, 32-byte swizzle", {}, 32);
  compare_tile<Major::MN, Layout_MN_SW64_Atom<Half>, 64, 32>("MN-major tile, 64-byte swizzle", {}, 64);
  compare_tile<Major::MN, Layout_MN_SW128_Atom<Half>, 64, 32>("MN-major tile, 128-byte swizzle", {}, 128);
  compare_tile<Major::MN, Layout_MN_SW128_Atom<Half>, 256, 64>("MN-major tile of 256, 128-byte swizzle", {}, 128);
  return num_failed;
}
