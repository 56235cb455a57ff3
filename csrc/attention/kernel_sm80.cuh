// block_attention on tensor cores by mma.sync and cp.async, for every GPU from sm_80.
//
// A CTA works through items of the plan (a tile of 16, 64 or 128 packed rows, a range of keys), one kv head at a time;
// the grid is as many CTAs as the GPU holds, which go through the pairs (item, kv head) forth and back: heads of an
// item run side by side and share its pages in L2. Longest items come first, so the CTAs end together.
//
// Traffic: K and V of every tile that some row sees, 2 * 64 * head_dim * 2 bytes (e4m3: half), once per row tile, from
// the pages; q and out once; split items write (head_dim + 2) * 4 bytes a row instead. 128 rows do 128 multiplications
// per element of K and V read, 32 query tokens of a 4:1 model exactly.
//
// Why so. Q lives in registers: a warp reads each of K and V once per tile from shared memory, and nothing else. K and
// V are separate steps of one ring, so that while one is multiplied the next two or more are under way, and the
// smallest ring that does so (48 KiB) leaves room for two CTAs even in 100 KiB; one barrier per step serves both the
// arrival of a tile and the release of its predecessor's slot. Page numbers are looked up a tile ahead. The maximum
// rarely grows after the first tiles, so the products that would rescale the sums are mostly branched over. Masks only
// touch tiles at the edge of what rows see.
//
// By the machine code, not by a clock (no GPU has run this yet): head_dim 128 on sm_80, one warp and one tile (16 rows,
// 64 keys) are about 550 instructions, 128 HMMA, 64 LDSM and 34 MUFU among them; at an A100's rates the tensor cores
// and the reads of shared memory are both busy for 1024 of the cycles. Registers on sm_80, 16 / 64 / 128 rows: 120 /
// 150 / 151 (head_dim 64), 138 / 181 / 181 (96), 168 / 201 / 203 (128), no spills; up to 254 of 255 where there is room
// (sm_120). Tried and lost: three CTAs of 64 rows and head_dim 128 (168 registers) spill on every GPU; a loop over
// unaligned pages inside the kernel made it half as long again.
#pragma once

#include "attention/item_view.cuh"
#include "attention/tile_convert.cuh"
#include "attention/tile_math.cuh"

namespace nld {

// One item of the plan (tile of packed rows, range of keys) for one kv head, worked through by one CTA.
template <class T, class Shape>
class ItemWorker : private ItemView {
 public:
  __device__ __forceinline__ ItemWorker(const MmaParams& p, typename Shape::Smem* sm, const PlanItem& item, int kv_head)
      : ItemView(p, item, kv_head),
        sm_(sm),
        lane_(threadIdx.x % kWarpSize),
        warp_(threadIdx.x / kWarpSize),
        warp_row_(Shape::kSharesKeys ? 0 : warp_ * 16),
        warp_key_(Shape::kSharesKeys ? warp_ * Shape::kWarpKeys : 0) {}

  __device__ __forceinline__ void run(int32_t key_begin) {
    NLD_DEVICE_CHECK(tile().key_end <= p_.op.max_pages * p_.op.page_size, "seq_lens fit the page table");
    read_tile<kTileKeys>(key_begin);
    const int32_t first_key = next_visible(key_begin);
    TileLoader<Shape> loader(p_, tile().request, kv_head_, key_end_, heads_begin_);
    loader.look_up(first_key);
    WarpRows<T, Shape> rows;
    if (first_key < key_end_) work(first_key, loader, rows);
    rows.finish_sum();
    if (!NLD_BUG(attention_ring_in_use)) __syncthreads();  // the ring is free
    if constexpr (Shape::kSharesKeys) {
      merge_warps(rows);
    } else if (is_split()) {
      store_partial(rows);
    } else {
      store(rows);
    }
    finish_item<T>(&sm_->results.cluster, warp_, Shape::kWarps);
  }

 private:
  __device__ __forceinline__ void team_sync() const {
    if (NLD_BUG(attention_missing_barrier)) return;
    if constexpr (Shape::kSharesKeys) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  // Each warp copies the 16 rows it will hold. Rows past the end of the tile are zero.
  __device__ __forceinline__ void copy_q(uint4* slots) const {
    constexpr int kRowsPerPass = kWarpSize / Shape::kLanesPerRow;
    const int chunk = lane_ % Shape::kLanesPerRow;
#pragma unroll
    for (int pass = 0; pass < 16 / kRowsPerPass; ++pass) {
      const int row = pass * kRowsPerPass + lane_ / Shape::kLanesPerRow, in_tile = warp_row_ + row;
      const uint16_t* source = static_cast<const uint16_t*>(p_.op.q);
      if (in_tile < tile().num_rows) {
        const RowPlace at = place(in_tile);
        source += at.token * p_.op.q_token_stride + at.head * p_.op.q_head_stride;
      }
      uint4* target = slots + Shape::at(warp_ * 16 + row, chunk);
#pragma unroll
      for (int i = 0; i < Shape::kChunks; i += Shape::kSwizzled) {
        ptx::cp_async(target + i, source + (chunk + i) * 8, in_tile < tile().num_rows ? 16 : 0);
      }
    }
  }

  __device__ __forceinline__ void work(int32_t first_key, TileLoader<Shape>& loader, WarpRows<T, Shape>& rows) {
    constexpr int kDepth = Shape::kDepth;
    constexpr int kAhead = (kDepth + 1) / 2;
    int32_t keys[kAhead];          // tiles under way, in order; from key_end_ on: none
    int32_t next_key = first_key;  // the tile after those
    const auto copy_next = [&](bool is_v, int slot) {
      if (!is_v) {
#pragma unroll
        for (int i = 1; i < kAhead; ++i) keys[i - 1] = keys[i];
        keys[kAhead - 1] = next_key;
        if (next_key < key_end_) {
          loader.advance();
          next_key = next_visible(next_key + kTileKeys);
          loader.look_up(next_key);
        }
      }
      if (keys[kAhead - 1] < key_end_) loader.copy(is_v, keys[kAhead - 1], Shape::ring_slot(sm_, slot));
      ptx::cp_async_commit();
    };
    int slot = 0;  // of this step's tile
    // One group of copies per step, empty ones at the end: the group that a step needs is always the kDepth'th last.
    // One barrier per step does for two: all have waited, and all have read the slot that is filled next. An e4m3 tile
    // is then converted, either the step's own, with one more barrier, or that of the next step.
    const auto begin_step = [&](bool copies_v, bool is_v) {
      const int free_slot = slot < Shape::kIdle ? slot + kDepth : slot - Shape::kIdle;
      if (NLD_BUG(attention_early_reuse)) copy_next(copies_v, free_slot);
      if (NLD_BUG(attention_wait_depth)) {
        ptx::cp_async_wait<kDepth - Shape::kEarly>();
      } else {
        ptx::cp_async_wait<kDepth - 1 - Shape::kEarly>();
      }
      team_sync();
      if (!NLD_BUG(attention_early_reuse)) copy_next(copies_v, free_slot);
      if constexpr (Shape::kEarly != 0) {
        const int next = slot + 1 == Shape::kRingSlots ? 0 : slot + 1;
        if (!is_v || keys[0] < key_end_) convert_tile<Shape>(Shape::ring_slot(sm_, next), sm_->slots[is_v ? 0 : 1]);
      } else if constexpr (Shape::kConverts) {
        convert_tile<Shape>(Shape::ring_slot(sm_, slot), sm_->slots[0]);
        if (!NLD_BUG(attention_fp8_no_barrier)) team_sync();
      }
    };
    const auto end_step = [&] { slot = slot + 1 == Shape::kRingSlots ? 0 : slot + 1; };
    const auto tile_slot = [&](bool is_v) -> const uint4* {
      return Shape::kConverts ? sm_->slots[is_v ? Shape::kEarly : 0] : sm_->slots[slot];
    };

    copy_q(sm_->slots[Shape::kQAt]);
    ptx::cp_async_commit();
#pragma unroll 1
    for (int step = 0; step < kDepth; ++step) copy_next(step % 2 != 0, step);

    // Meanwhile: what the warp's rows see. Ends grow with the row, so its first row has the lowest and its last one the
    // highest.
    const int32_t dense_end = row_view(request_mask(p_.op, tile().request), q_row(warp_row_ + lane_ % 16)).dense_end;
    const int32_t unmasked_end = min(key_end_, __shfl_sync(kFullMask, dense_end, 0));
    const int32_t last_end = __shfl_sync(kFullMask, dense_end, 15);
    const int32_t warp_end = has_groups() ? key_end_ : min(key_end_, last_end);

    ptx::cp_async_wait<kDepth>();
    __syncwarp();
    rows.load_q(sm_->slots[Shape::kQAt], warp_ * 16, p_.q_signs);
    float k_scale = 1.0f;
    if constexpr (Shape::kConverts) k_scale = key_scale(p_.op, kv_head_);
    if constexpr (Shape::kEarly != 0) {  // the first tile
      ptx::cp_async_wait<kDepth - 1>();
      team_sync();
      convert_tile<Shape>(Shape::ring_slot(sm_, 0), sm_->slots[0]);
    }

    const int32_t last_key = NLD_BUG(attention_lost_tail) ? key_end_ - kTileKeys + 1 : key_end_;
    while (keys[0] < last_key) {
      const int32_t my_key = keys[0] + warp_key_;
      begin_step(kDepth % 2 != 0, false);
      if (my_key < warp_end) {
        float s[Shape::kWarpKeys / 8][4] = {};
        rows.multiply_k(tile_slot(false), warp_key_, s);
        if (p_.op.softcap > 0.0f) cap_scores(s, k_scale);
        if (my_key + Shape::kWarpKeys > unmasked_end) hide_keys(s, dense_end, my_key);
        rows.softmax(s, Shape::kConverts ? score_scale(k_scale) : p_.scale_log2);
      }
      end_step();
      begin_step(kDepth % 2 == 0, true);
      if (my_key < warp_end) rows.multiply_v(tile_slot(true), warp_key_);
      end_step();
    }
  }

  __device__ __forceinline__ void cap_scores(float (&s)[Shape::kWarpKeys / 8][4], float k_scale) const {
#pragma unroll
    for (int j = 0; j < Shape::kWarpKeys / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        s[j][e] = cap_score(Shape::kConverts ? s[j][e] * k_scale : s[j][e]);
      }
    }
  }

  // On edge tiles: scores of keys that a row does not see become -inf. A row's 64 keys are one word of bits, worked out
  // by the lane that stands for the row (`dense_end` is its own), so that all mask modes cost one test per element.
  __device__ __forceinline__ void hide_keys(float (&s)[Shape::kWarpKeys / 8][4], int32_t dense_end, int32_t key) const {
    const uint64_t seen = seen_word<Shape::kWarpKeys>(warp_row_ + lane_ % 16, dense_end, key);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint64_t bits = __shfl_sync(kFullMask, seen, lane_ / 4 + 8 * h) >> (lane_ % 4 * 2);
      const uint32_t low = static_cast<uint32_t>(bits), high = static_cast<uint32_t>(bits >> 32);
#pragma unroll
      for (int j = 0; j < Shape::kWarpKeys / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (!((j < 4 ? low : high) >> (j % 4 * 8 + e) & 1)) s[j][2 * h + e] = -INFINITY;
        }
      }
    }
  }

  // Through shared memory, so that a row leaves in 16-byte pieces. A warp only touches its own rows there.
  __device__ __forceinline__ void store(const WarpRows<T, Shape>& rows) const {
    uint4* stage = sm_->slots[0];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = warp_row_ + lane_ / 4 + 8 * h;
      const float scale = row_scale(p_.op, kv_head_, rows.sum[h]);
      if (lane_ % 4 == 0 && row < tile().num_rows) store_lse(row, rows.max[h], rows.sum[h]);
#pragma unroll
      for (int j = 0; j < Shape::kChunks; ++j) {
        reinterpret_cast<uint32_t*>(stage + Shape::at(row, j))[lane_ % 4] =
            ptx::pack<T>(rows.out[j][2 * h] * scale, rows.out[j][2 * h + 1] * scale);
      }
    }
    __syncwarp();
#pragma unroll 4
    for (int i = lane_; i < 16 * Shape::kChunks; i += kWarpSize) {
      const int row = warp_row_ + i / Shape::kChunks, chunk = i % Shape::kChunks;
      if (row < tile().num_rows) store_chunk(row, chunk, stage[Shape::at(row, chunk)]);
    }
    __syncthreads();  // before the next item fills the ring
  }

  __device__ __forceinline__ void store_partial(const WarpRows<T, Shape>& rows) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = warp_row_ + lane_ / 4 + 8 * h;
      if (row >= tile().num_rows) continue;
      const PartialRow to = partial(&sm_->results.cluster, row);
      if (lane_ % 4 == 0) {
        *to.max = rows.max[h];
        *to.sum = rows.sum[h];
      }
      float* out = to.out + lane_ % 4 * 2;
#pragma unroll
      for (int j = 0; j < Shape::kChunks; ++j) {  // the four lanes of a row fill a sector of 32 bytes
        *reinterpret_cast<float2*>(out + 8 * j) = make_float2(rows.out[j][2 * h], rows.out[j][2 * h + 1]);
      }
    }
  }

  // 16-row tiles: the warps' results for the same rows, added in the order of the warps.
  __device__ __forceinline__ void merge_warps(const WarpRows<T, Shape>& rows) const {
    typename Shape::Parts& parts = sm_->results.warps;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = lane_ / 4 + 8 * h;
      if (lane_ % 4 == 0) {
        parts.max[warp_][row] = rows.max[h];
        parts.sum[warp_][row] = rows.sum[h];
      }
#pragma unroll
      for (int j = 0; j < Shape::kChunks; ++j) {
        *reinterpret_cast<float2*>(&parts.out[warp_][row][8 * j + lane_ % 4 * 2]) =
            make_float2(rows.out[j][2 * h], rows.out[j][2 * h + 1]);
      }
    }
    if (!NLD_BUG(attention_merge_early)) __syncthreads();
    for (int i = threadIdx.x; i < tile().num_rows * Shape::kChunks; i += Shape::kThreads) {
      const int row = i / Shape::kChunks, chunk = i % Shape::kChunks;
      float max = -INFINITY, sum = 0.0f, out[8] = {};
      for (int w = 0; w < Shape::kWarps; ++w) max = fmaxf(max, parts.max[w][row]);
      const float base = max == -INFINITY ? 0.0f : max;
      for (int w = 0; w < Shape::kWarps; ++w) {
        const float weight = ptx::exp2_approx(parts.max[w][row] - base);
        sum = __fmaf_rn(weight, parts.sum[w][row], sum);
#pragma unroll
        for (int e = 0; e < 8; ++e) out[e] = __fmaf_rn(weight, parts.out[w][row][chunk * 8 + e], out[e]);
      }
      if (is_split()) {
        const PartialRow to = partial(&sm_->results.cluster, row);
        float4* target = reinterpret_cast<float4*>(to.out + chunk * 8);
        target[0] = make_float4(out[0], out[1], out[2], out[3]);
        target[1] = make_float4(out[4], out[5], out[6], out[7]);
        if (chunk == 0) {
          *to.max = max;
          *to.sum = sum;
        }
      } else {
        const float scale = row_scale(p_.op, kv_head_, sum);
        if (chunk == 0) store_lse(row, max, sum);
        const auto pair = [&](int e) { return ptx::pack<T>(out[e] * scale, out[e + 1] * scale); };
        store_chunk(row, chunk, make_uint4(pair(0), pair(2), pair(4), pair(6)));
      }
    }
    __syncthreads();  // before the next item fills the ring
  }

  typename Shape::Smem* sm_;
  const int lane_, warp_;
  const int warp_row_, warp_key_;  // first row of the tile, and first key of each 64, of this warp
};

template <class T, int kHeadDim, int kTileRows, class Kv>
__global__ void __launch_bounds__(TileShape<kHeadDim, kTileRows, Kv>::kThreads,
                                  TileShape<kHeadDim, kTileRows, Kv>::kMinCtas)
    attention_mma_kernel(const __grid_constant__ MmaParams p) {
  typedef TileShape<kHeadDim, kTileRows, Kv> Shape;
  NLD_DYNAMIC_SMEM(typename Shape::Smem, sm);
  if (!NLD_BUG(attention_no_wait)) ptx::wait_for_previous_kernel();
  ptx::allow_next_kernel();
  const int32_t owned = owned_rows(p.op);  // read here, where nobody waits for it
  for_each_item(
      p.op, [&](const PlanItem& item, int kv_head) { ItemWorker<T, Shape>(p, sm, item, kv_head).run(item.key_begin); });
  clear_rows<T>(p.op, owned, threadIdx.x / kWarpSize, Shape::kWarps);
}

}  // namespace nld
