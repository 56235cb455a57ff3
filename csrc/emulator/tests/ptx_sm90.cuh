// Tests of common/ptx_sm90.cuh: mbarriers, bulk and tensor copies, clusters.
#pragma once

#include <cstring>

#include "common/ptx_sm90.cuh"
#include "common/tensor_map.h"
#include "emulator/tests/harness.cuh"
#include "emulator/tests/layouts.h"

namespace nld::ptx_test {

// ---- mbarrier -----------------------------------------------------------------------------------------------------

struct MbarSmem {
  uint64_t full, empty;
  int value[64];
};
// One warp writes, two warps read, for some rounds. `full` counts 32 arrivals, `empty` 64. kPoll: wait with
// mbar_try_wait.
template <bool kPoll>
__global__ void mbar_kernel(int num_rounds, int* out) {
  NLD_DYNAMIC_SMEM(MbarSmem, sm);
  const int i = threadIdx.x;
  const auto wait = [&](uint64_t* bar, int parity) {
    if constexpr (kPoll) {
      while (!ptx::mbar_try_wait(bar, parity)) {
      }
    } else {
      ptx::mbar_wait(bar, parity);
    }
  };
  if (i == 0) {
    ptx::mbar_init(&sm->full, 32);
    ptx::mbar_init(&sm->empty, 64);
    ptx::mbar_init_fence();
  }
  __syncthreads();
  for (int round = 0; round < num_rounds; ++round) {
    const int parity = round % 2;
    if (i < 32) {
      wait(&sm->empty, parity ^ 1);  // a fresh barrier lets the first round through
      sm->value[i] = round * 64 + i;
      sm->value[32 + i] = round * 64 + 32 + i;
      ptx::mbar_arrive(&sm->full);
    } else {
      wait(&sm->full, parity);
      out[round * 64 + i - 32] = sm->value[95 - i];
      ptx::mbar_arrive(&sm->empty);
    }
  }
  __syncthreads();
  if (i == 0) {
    ptx::mbar_inval(&sm->full);
    ptx::mbar_inval(&sm->empty);
    sm->full = 1;  // ordinary memory again
  }
}
template <bool kPoll>
void test_mbar() {
  const int num_rounds = 7;
  Array<int> out(num_rounds * 64, -1);
  NLD_LAUNCH(mbar_kernel<kPoll>, 1, 96, sizeof(MbarSmem), nullptr, num_rounds, out.data());
  finish();
  for (int i = 0; i < num_rounds * 64; ++i) {
    expect(out[i] == i / 64 * 64 + 63 - i % 64, "round %d, element %d: %d", i / 64, i % 64, out[i]);
  }
}

// ---- bulk copies and transaction counts ---------------------------------------------------------------------------

struct BulkSmem {
  alignas(16) unsigned char data[4][1024];
  uint64_t bar[4];
};
// Copies of several sizes, two to a barrier. Stage s expects its bytes with the arrival (even s) or ahead of it (odd
// s).
__global__ void bulk_kernel(const unsigned char* src, unsigned char* out) {
  NLD_DYNAMIC_SMEM(BulkSmem, sm);
  const int i = threadIdx.x;
  if (i == 0) {
    for (int s = 0; s < 4; ++s) ptx::mbar_init(&sm->bar[s], 1);
    ptx::mbar_init_fence();
  }
  __syncthreads();
  if (i == 0) {
    for (int s = 0; s < 4; ++s) {
      const int first = 16 * (s + 1), second = 1024 - first;
      if (s % 2 == 0) {
        ptx::mbar_arrive_expect_tx(&sm->bar[s], 1024);
      } else {
        ptx::mbar_expect_tx(&sm->bar[s], 1024);
      }
      ptx::bulk_load(sm->data[s], src + s * 1024, first, &sm->bar[s]);
      ptx::bulk_load(sm->data[s] + first, src + s * 1024 + first, second, &sm->bar[s]);
      if (s % 2 == 1) ptx::mbar_arrive(&sm->bar[s]);
    }
  }
  for (int s = 3; s >= 0; --s) {
    ptx::mbar_wait(&sm->bar[s], 0);
    for (int b = i; b < 1024; b += 64) out[s * 1024 + b] = sm->data[s][1023 - b];
  }
}
inline void test_bulk() {
  Array<unsigned char> src(4096), out(4096);
  for (int i = 0; i < 4096; ++i) src[i] = static_cast<unsigned char>(i * 37 + i / 256);
  NLD_LAUNCH(bulk_kernel, 1, 64, sizeof(BulkSmem), nullptr, src.data(), out.data());
  finish();
  for (int i = 0; i < 4096; ++i) {
    const int from = i / 1024 * 1024 + 1023 - i % 1024;
    expect(out[i] == src[from], "byte %d: %d, want %d", i, out[i], src[from]);
  }
}

// ---- tensor copies ------------------------------------------------------------------------------------------------

struct TmaSmem {
  alignas(1024) unsigned char tile[8192];
  uint64_t bar;
};
// Twice the same box into the same place, so that the barrier sees two phases; then the raw bytes of the tile.
template <int kRank>
__global__ void tma_kernel(const __grid_constant__ ptx::TensorMap map, const int* at, int num_bytes,
                           unsigned char* out) {
  NLD_DYNAMIC_SMEM(TmaSmem, sm);
  const int i = threadIdx.x;
  if (i == 0) {
    ptx::prefetch_tensor_map(&map);
    ptx::mbar_init(&sm->bar, 1);
    ptx::mbar_init_fence();
  }
  __syncthreads();
  int corner[kRank];
  for (int d = 0; d < kRank; ++d) corner[d] = at[d];
  for (int phase = 0; phase < 2; ++phase) {
    if (i == 0) {
      ptx::mbar_arrive_expect_tx(&sm->bar, num_bytes);
      ptx::tma_load<kRank>(sm->tile, &map, corner, &sm->bar, kRank % 2 == 0 ? ptx::L2Keep::kLeast : ptx::L2Keep::kMost);
    }
    ptx::mbar_wait(&sm->bar, phase);
    for (int b = i; b < num_bytes; b += 64) out[b] = sm->tile[b];
    __syncthreads();
  }
}

template <int kRank>
void run_tma(const ptx::TensorMap& map, Array<int>& at, int num_bytes, Array<unsigned char>& out) {
  NLD_LAUNCH(tma_kernel<kRank>, 1, 64, sizeof(TmaSmem), nullptr, map, at.data(), num_bytes, out.data());
  finish();
}

// Boxes of a 2-byte or 4-byte tensor with gaps between its rows, inside it and over every edge.
template <int kRank>
void test_tma_box(DType dtype, ptx::Swizzle swizzle) {
  const int size = dtype == DType::kF32 ? 4 : 2, span = static_cast<int>(swizzle);
  TensorMapSpec spec{nullptr, dtype, kRank, {}, {}, {}, swizzle};
  int64_t stride = 1;
  int num_boxed = 1;
  for (int d = 0; d < kRank; ++d) {
    spec.box[d] = d == 0 ? (span ? span : 48) / size : kRank <= 2 ? 11 : 3;
    spec.dims[d] = d == 0 ? spec.box[0] + 13 : spec.box[d] + 2 + d;
    spec.strides[d] = stride;
    stride = d == 0 ? (spec.dims[0] * size + 15) / 16 * 16 / size + 16 / size : stride * (spec.dims[d] + 1);
    num_boxed *= spec.box[d];
  }
  Array<uint32_t> memory(static_cast<size_t>(stride) * size / 4 + 4);
  for (size_t i = 0; i < memory.size(); ++i) memory[i] = static_cast<uint32_t>(i * 2654435761u + 12345);
  spec.data = memory.data();
  const auto* source = reinterpret_cast<const unsigned char*>(memory.host());
  ptx::TensorMap map;
  if (LaunchError error = make_tensor_map(&map, spec)) throw Failure(error);
  for (int trial = 0; trial < 5; ++trial) {
    Array<int> at(5);
    for (int d = 0; d < kRank; ++d) {  // inside, over the low edges, over the high edges, mixed, far outside
      const int low = -spec.box[d] / 2, high = static_cast<int>(spec.dims[d]) - spec.box[d] / 2;
      at[d] = trial == 0 ? 1 : trial == 1 ? low : trial == 2 ? high : trial == 3 ? (d % 2 ? low : high) : 100000;
    }
    const int num_bytes = num_boxed * size;
    Array<unsigned char> out(static_cast<size_t>(num_bytes), 0xee);
    run_tma<kRank>(map, at, num_bytes, out);
    for (int i = 0; i < num_boxed; ++i) {
      bool inside = true;
      int64_t from = 0;
      for (int d = 0, rest = i; d < kRank; rest /= spec.box[d++]) {
        const int64_t x = at[d] + rest % spec.box[d];
        inside &= x >= 0 && x < spec.dims[d];
        from += x * spec.strides[d];
      }
      const unsigned char zero[4] = {};
      const unsigned char* want = inside ? source + from * size : zero;
      const uint32_t where =
          layouts::swizzle(static_cast<uint32_t>(i * size), span);  // the tile starts at a multiple of 1024
      expect(std::memcmp(out.host() + where, want, static_cast<size_t>(size)) == 0,
             "rank %d, span %d, trial %d: element %d of the box", kRank, span, trial, i);
    }
  }
}
inline void test_tma_refusals() {
  Array<uint32_t> memory(4096);
  const auto refused = [&](const char* what, auto change) {
    TensorMapSpec spec{memory.data(), DType::kBF16, 2, {64, 16}, {1, 64}, {32, 8}, ptx::Swizzle::k64};
    change(spec);
    ptx::TensorMap map;
    expect(make_tensor_map(&map, spec) != nullptr, "a tensor map must be refused: %s", what);
  };
  refused("address", [](TensorMapSpec& s) { s.data = static_cast<const char*>(s.data) + 8; });
  refused("rank", [](TensorMapSpec& s) { s.rank = 6; });
  refused("stride of 2 bytes more", [](TensorMapSpec& s) { s.strides[1] = 65; });
  refused("box of 257", [](TensorMapSpec& s) { s.box[1] = 257; });
  refused("empty dimension", [](TensorMapSpec& s) { s.dims[1] = 0; });
  refused("row wider than the swizzle", [](TensorMapSpec& s) { s.box[0] = 64; });
  refused("row of 6 bytes", [](TensorMapSpec& s) { s.box[0] = 3, s.swizzle = ptx::Swizzle::kNone; });
}
inline void test_tma() {
  test_tma_refusals();
  test_tma_box<1>(DType::kBF16, ptx::Swizzle::kNone);
  test_tma_box<2>(DType::kF16, ptx::Swizzle::kNone);
  test_tma_box<2>(DType::kBF16, ptx::Swizzle::k32);
  test_tma_box<2>(DType::kBF16, ptx::Swizzle::k64);
  test_tma_box<2>(DType::kBF16, ptx::Swizzle::k128);
  test_tma_box<2>(DType::kF32, ptx::Swizzle::k128);
  test_tma_box<3>(DType::kBF16, ptx::Swizzle::k128);
  test_tma_box<3>(DType::kF32, ptx::Swizzle::kNone);
  test_tma_box<4>(DType::kBF16, ptx::Swizzle::k64);
  test_tma_box<5>(DType::kBF16, ptx::Swizzle::k32);
}

// ---- clusters -----------------------------------------------------------------------------------------------------

struct ClusterSmem {
  uint32_t mine[32], from_others[4];
  uint64_t bar, mail_bar;
  uint32_t message;
  uint4 mail[4];
};
// Every CTA publishes 32 words, reads those of its right neighbour in three ways, writes a word into every CTA of the
// cluster, passes a message to the left under an mbarrier, and sends 16 bytes to every CTA.
__global__ void cluster_kernel(int* ranks, uint32_t* out) {
  NLD_DYNAMIC_SMEM(ClusterSmem, sm);
  const int i = threadIdx.x, rank = ptx::cluster_rank(), size = ptx::cluster_size();
  const int right = (rank + 1) % size, left = (rank + size - 1) % size;
  const uint32_t seed = blockIdx.x * 1000;
  if (i == 0) {
    ranks[blockIdx.x] = rank * 100 + size;
    ptx::mbar_init(&sm->bar, 1);
    ptx::mbar_init(&sm->mail_bar, 1);
    ptx::mbar_init_fence();
  }
  ptx::cluster_arrive_relaxed();  // all have started; says nothing about what they wrote
  ptx::cluster_wait();
  sm->mine[i] = seed + i;
  ptx::cluster_arrive();
  const uint32_t own = seed + i;  // work that needs nobody
  ptx::cluster_wait();
  uint32_t* row = out + blockIdx.x * 32 * 4;
  row[i] = ptx::load_from_rank(&sm->mine[31 - i], right);
  row[32 + i] = *ptx::map_to_rank(&sm->mine[i], right) + own;
  if (i < size) ptx::store_to_rank(&sm->from_others[rank], seed + 7, i);
  if (i == 0) {
    *ptx::map_to_rank(&sm->message, left) = seed + 9;
    ptx::mbar_arrive_remote(&sm->bar, left);
  }
  ptx::mbar_wait<ptx::Scope::kCluster>(&sm->bar, 0);
  row[64 + i] = sm->message;
  if (i == 0) ptx::mbar_arrive_expect_tx(&sm->mail_bar, 16 * size);
  if (i < size)
    ptx::store_async_to_rank(&sm->mail[rank], make_uint4(seed, seed + 1, seed + 2, seed + 3), &sm->mail_bar, i);
  ptx::mbar_wait<ptx::Scope::kCluster>(&sm->mail_bar, 0);
  if (i < 4 * size) row[112 + i] = reinterpret_cast<const uint32_t*>(sm->mail)[i];
  ptx::cluster_sync();
  if (i < size) row[96 + i] = sm->from_others[i];
}
inline void test_cluster() {
  for (const int size : {1, 2, 4}) {
    const int num_ctas = 3 * size;
    Array<int> ranks(static_cast<size_t>(num_ctas), -1);
    Array<uint32_t> out(static_cast<size_t>(num_ctas) * 128);
    const LaunchShape shape{dim3(static_cast<unsigned>(num_ctas)), 32, sizeof(ClusterSmem),
                            static_cast<unsigned>(size)};
    NLD_LAUNCH_SHAPED(cluster_kernel, shape, nullptr, ranks.data(), out.data());
    finish();
    for (int cta = 0; cta < num_ctas; ++cta) {
      const int first = cta / size * size, right = first + (cta + 1) % size, rank = cta - first;
      expect(ranks[cta] == rank * 100 + size, "CTA %d: rank and size %d", cta, ranks[cta]);
      const auto row = [&](int k) { return static_cast<int>(out[cta * 128 + k]); };
      for (int i = 0; i < 32; ++i) {
        expect(row(i) == right * 1000 + 31 - i, "size %d, CTA %d: loaded %d", size, cta, row(i));
        expect(row(32 + i) == right * 1000 + i + cta * 1000 + i, "size %d, CTA %d: mapped %d", size, cta, row(32 + i));
        expect(row(64 + i) == right * 1000 + 9, "size %d, CTA %d: message %d", size, cta, row(64 + i));
      }
      for (int i = 0; i < size; ++i) {
        expect(row(96 + i) == (first + i) * 1000 + 7, "size %d, CTA %d: stored %d", size, cta, row(96 + i));
        for (int w = 0; w < 4; ++w)
          expect(row(112 + 4 * i + w) == (first + i) * 1000 + w, "size %d, CTA %d: sent %d", size, cta,
                 row(112 + 4 * i + w));
      }
    }
  }
}

// ---- elect.sync ---------------------------------------------------------------------------------------------------

__global__ void elect_kernel(int* elected) {
  for (int round = 0; round < 3; ++round) elected[round * 64 + threadIdx.x] = ptx::elect_one() ? 1 : 0;
}
inline void test_elect() {
  Array<int> elected(3 * 64, -1);
  NLD_LAUNCH(elect_kernel, 1, 64, 0, nullptr, elected.data());
  finish();
  for (int round = 0; round < 3; ++round)
    for (int warp = 0; warp < 2; ++warp) {
      int count = 0;
      for (int i = warp * 32; i < warp * 32 + 32; ++i) {
        count += elected[round * 64 + i];
        expect(elected[round * 64 + i] == elected[i], "the same lane must be elected every time");
      }
      expect(count == 1, "warp %d elected %d lanes", warp, count);
    }
}

}  // namespace nld::ptx_test
