// block_attention on Hopper's tensor cores: wgmma fed by the copy engine, for tiles of 64 and 128 packed rows.
//
// A CTA has a producer warpgroup and one consumer warpgroup per 64 rows. It works through items of the plan, one kv
// head at a time, as kernel_sm80.cuh does: the same plan, masks, partials and results; the grid is as many CTAs as the
// GPU holds, which go through the pairs (item, kv head) forth and back.
//
// Traffic: K and V of every tile of 128 keys that some row sees, 2 * 128 * head_dim * 2 bytes (e4m3: half, widened by
// the producer), once per row tile; q and out once; split items write (head_dim + 2) * 4 bytes a row instead.
//
// Why so. 128 rows do 128 multiplications per element of K and V; to keep up with 3 to 4.3 TB/s that is 384 to 550
// TFLOP/s, more than mma.sync reaches. The producer runs ahead through a ring of slots, over the ends of items too, so
// copies never wait for the softmax. Within a warpgroup the scores of tile i + 1 and the product with V of tile i run
// on the tensor cores while the softmax of i + 1 waits for the former only. Tiles of 16 rows stay with kernel_sm80: a
// wgmma has 64 rows, of which they would use a quarter.
#pragma once

#include "attention/item_view.cuh"
#include "attention/tile_loader_sm90.cuh"
#include "attention/tile_math_sm90.cuh"

namespace nld {

// Tiles of an item begin below this key; the producer and the consumers must agree.
__device__ __forceinline__ int32_t tiles_end(int32_t key_end) {
  return NLD_BUG(attention_sm90_lost_tail) ? key_end - kHopperKeys + 1 : key_end;
}

// Steps of an item, of which each fills a slot: K0, K1, V0, K2, V1, ..., in the order in which consumers need them.
template <class Shape>
class ItemProducer : private ItemView {
 public:
  __device__ __forceinline__ ItemProducer(const MmaParams& p, const PlanItem& item, int kv_head)
      : ItemView(p, item, kv_head) {}

  __device__ __forceinline__ void run(int32_t key_begin, HopperLoader<Shape>& loader) {
    NLD_DEVICE_CHECK(tile().key_end <= p_.op.max_pages * p_.op.page_size, "seq_lens fit the page table");
    read_tile<kHopperKeys>(key_begin);
    int32_t key = next_visible(key_begin), v_key = key_end_;
    loader.begin_item(tile().request, kv_head_, key_end_, heads_begin_);
    loader.look_up(key);
    while (key < tiles_end(key_end_)) {
      loader.advance();
      const int32_t next = next_visible(key + kHopperKeys);
      loader.look_up(next);
      loader.load(false, key);
      if (v_key < key_end_) loader.load(true, v_key);
      v_key = key;
      key = next;
    }
    loader.advance_v();
    if (v_key < key_end_) loader.load(true, v_key);
    if (in_cluster(p_.op)) {
      loader.finish();  // nobody runs ahead: partial results will lie in the ring
      meet_cluster_twice();
    }
  }
};

// One warpgroup's 64 rows of an item.
template <class T, class Shape>
class ItemConsumer : private ItemView {
 public:
  __device__ __forceinline__ ItemConsumer(const MmaParams& p, typename Shape::Smem* sm, const PlanItem& item,
                                          int kv_head)
      : ItemView(p, item, kv_head),
        sm_(sm),
        lane_(threadIdx.x % kWarpSize),
        warpgroup_(threadIdx.x / 128 - 1),
        warp_row_(threadIdx.x % 128 / kWarpSize * 16) {}

  __device__ __forceinline__ void run(int32_t key_begin, RingPlace<Shape::kSlots>& place) {
    load_q();
    read_tile<kHopperKeys>(key_begin);
    WarpgroupRows<T, Shape> rows;
    const int32_t first_key = next_visible(key_begin);
    if (first_key < tiles_end(key_end_)) work(first_key, place, rows);
    rows.finish_sum();
    warpgroup_sync();  // q has been read: out takes its place
    if (in_cluster(p_.op) && !NLD_BUG(cluster_parts_too_early)) {
      ptx::barrier_sync(1 + Shape::kConsumers, 128 * Shape::kConsumers);  // the ring has been read, and is empty
    }
    if (is_split()) {
      store_partial(rows);
    } else {
      store(rows);
    }
    if (in_cluster(p_.op)) ptx::fence_proxy_async();  // before the copy engine fills the ring again
    finish_item<T>(&sm_->parts, threadIdx.x / kWarpSize - 4, 4 * Shape::kConsumers);
  }

 private:
  __device__ __forceinline__ void warpgroup_sync() const {
    if (!NLD_BUG(attention_sm90_missing_barrier)) ptx::barrier_sync(1 + warpgroup_, 128);
  }
  __device__ __forceinline__ int tile_row(int row) const { return warpgroup_ * 64 + row; }

  // Each warp brings its 16 rows, through registers: signs may flip on the way. Rows past the end of the tile are zero.
  __device__ __forceinline__ void load_q() const {
    const int chunk = lane_ % 8;
    uint4 part[4][Shape::kColumns];
#pragma unroll
    for (int pass = 0; pass < 4; ++pass) {
      const int row = tile_row(warp_row_ + pass * 4 + lane_ / 8);
      const uint4* source = nullptr;
      if (row < tile().num_rows) {
        const RowPlace at = place(row);
        source = reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(p_.op.q) +
                                                at.token * p_.op.q_token_stride + at.head * p_.op.q_head_stride) +
                 chunk;
      }
#pragma unroll
      for (int column = 0; column < Shape::kColumns; ++column) {
        part[pass][column] = make_uint4(0, 0, 0, 0);
        if (source != nullptr && column * 8 + chunk < Shape::kHeadDim / 8) part[pass][column] = source[column * 8];
      }
    }
#pragma unroll
    for (int pass = 0; pass < 4; ++pass) {
#pragma unroll
      for (int column = 0; column < Shape::kColumns; ++column) {
        uint4& x = part[pass][column];
        x = make_uint4(x.x ^ p_.q_signs, x.y ^ p_.q_signs, x.z ^ p_.q_signs, x.w ^ p_.q_signs);
        sm_->q[warpgroup_][column][Shape::at(warp_row_ + pass * 4 + lane_ / 8, chunk)] = x;
      }
    }
    ptx::fence_proxy_async();
    warpgroup_sync();
  }

  __device__ __forceinline__ const uint4* wait_for(const RingPlace<Shape::kSlots>& at) const {
    ptx::mbar_wait(&sm_->full[at.slot], NLD_BUG(attention_sm90_wrong_phase) ? at.parity ^ 1 : at.parity);
    return sm_->slots[at.slot][0];
  }
  __device__ __forceinline__ void release(const RingPlace<Shape::kSlots>& at) const {
    __syncwarp();
    if (lane_ == 0) ptx::mbar_arrive(&sm_->empty[at.slot]);
  }

  __device__ __forceinline__ void work(int32_t key, RingPlace<Shape::kSlots>& place, WarpgroupRows<T, Shape>& rows) {
    // What the warp's rows see, each told by the lane that stands for it. Ends grow with the row.
    const int32_t dense_end =
        row_view(request_mask(p_.op, tile().request), q_row(tile_row(warp_row_ + lane_ % 16))).dense_end;
    const int32_t unmasked_end = min(key_end_, __shfl_sync(kFullMask, dense_end, 0));
    float k_scale = 1.0f;
    if constexpr (Shape::kConverts) k_scale = key_scale(p_.op, kv_head_);
    const auto scores_to_probabilities = [&](float (&shrink)[2]) {
      if (p_.op.softcap > 0.0f) {
#pragma unroll
        for (int i = 0; i < rows.kScores; ++i)
          rows.s[i] = cap_score(Shape::kConverts ? rows.s[i] * k_scale : rows.s[i]);
      }
      if (key + kHopperKeys > unmasked_end) hide_keys(rows.s, dense_end, key);
      rows.softmax(Shape::kConverts ? score_scale(k_scale) : p_.scale_log2, shrink);
    };
    const uint4* const q = sm_->q[warpgroup_][0];
    float shrink[2];

    rows.start_scores(q, wait_for(place));
    ptx::wgmma_wait<0>();
    rows.take_scores();
    release(place);
    scores_to_probabilities(shrink);
    key = next_visible(key + kHopperKeys);
    // The loop begins behind a softmax: its branch back is what keeps ptxas from moving the wait for the product with V
    // in front of the exponentials, which are to run beside that product.
    RingPlace<Shape::kSlots> v_place = place;  // of the tile before
    bool has_v = false;
    place.advance();
#pragma unroll 1
    for (;;) {
      ptx::wgmma_wait<0>();
      rows.take_out();
      if (has_v) release(v_place);
      rows.shrink_out(shrink);
      rows.round_probabilities();
      if (key >= tiles_end(key_end_)) break;
      const RingPlace<Shape::kSlots> k_place = place;
      rows.start_scores(q, wait_for(k_place));
      place.advance();
      v_place = place;
      has_v = true;
      rows.start_out(wait_for(v_place));
      place.advance();
      if (NLD_BUG(attention_sm90_early_release)) release(k_place);
      ptx::wgmma_wait<1>();
      rows.take_scores();
      if (!NLD_BUG(attention_sm90_early_release)) release(k_place);
      scores_to_probabilities(shrink);
      rows.take_scores();
      key = next_visible(key + kHopperKeys);
    }
    rows.start_out(wait_for(place));
    ptx::wgmma_wait<0>();
    rows.take_out();
    release(place);
    place.advance();
  }

  // On edge tiles: scores of keys that a row does not see become -inf.
  __device__ __forceinline__ void hide_keys(float (&s)[kHopperKeys / 2], int32_t dense_end, int32_t key) const {
#pragma unroll
    for (int word = 0; word < kHopperKeys / 64; ++word) {
      const uint64_t seen = seen_word<64>(tile_row(warp_row_ + lane_ % 16), dense_end, key + 64 * word);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint64_t bits = __shfl_sync(kFullMask, seen, lane_ / 4 + 8 * h) >> (lane_ % 4 * 2);
        const uint32_t low = static_cast<uint32_t>(bits), high = static_cast<uint32_t>(bits >> 32);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if (!((j < 4 ? low : high) >> (j % 4 * 8 + e) & 1)) s[32 * word + 4 * j + 2 * h + e] = -INFINITY;
          }
        }
      }
    }
  }

  // Through shared memory, so that a row leaves in 16-byte pieces. A warp only touches its own rows there.
  __device__ __forceinline__ void store(const WarpgroupRows<T, Shape>& rows) const {
    constexpr int kChunks = Shape::kHeadDim / 8;
    uint4* const stage = sm_->q[warpgroup_][0];
    const auto at = [&](int row, int chunk) { return chunk / 8 * 64 * 8 + Shape::at(row, chunk % 8); };
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = warp_row_ + lane_ / 4 + 8 * h;
      const float scale = row_scale(p_.op, kv_head_, rows.sum[h]);
      if (lane_ % 4 == 0 && tile_row(row) < tile().num_rows) store_lse(tile_row(row), rows.max[h], rows.sum[h]);
#pragma unroll
      for (int j = 0; j < kChunks; ++j) {
        reinterpret_cast<uint32_t*>(stage + at(row, j))[lane_ % 4] =
            ptx::pack<T>(rows.out[4 * j + 2 * h] * scale, rows.out[4 * j + 2 * h + 1] * scale);
      }
    }
    __syncwarp();
#pragma unroll 4
    for (int i = lane_; i < 16 * kChunks; i += kWarpSize) {
      const int row = warp_row_ + i / kChunks, chunk = i % kChunks;
      if (tile_row(row) < tile().num_rows) store_chunk(tile_row(row), chunk, stage[at(row, chunk)]);
    }
    __syncwarp();  // before the warp's next q
  }

  __device__ __forceinline__ void store_partial(const WarpgroupRows<T, Shape>& rows) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = tile_row(warp_row_ + lane_ / 4 + 8 * h);
      if (row >= tile().num_rows) continue;
      const PartialRow to = partial(&sm_->parts, row);
      if (lane_ % 4 == 0) {
        *to.max = rows.max[h];
        *to.sum = rows.sum[h];
      }
      float* out = to.out + lane_ % 4 * 2;
#pragma unroll
      for (int j = 0; j < Shape::kHeadDim / 8; ++j) {  // the four lanes of a row fill a sector of 32 bytes
        *reinterpret_cast<float2*>(out + 8 * j) = make_float2(rows.out[4 * j + 2 * h], rows.out[4 * j + 2 * h + 1]);
      }
    }
  }

  typename Shape::Smem* const sm_;
  const int lane_, warpgroup_, warp_row_;  // warp_row_: of the warpgroup's 64
};

template <class T, int kHeadDim, int kTileRows, class Kv>
__global__ void __launch_bounds__(HopperShape<kHeadDim, kTileRows, Kv>::kThreads,
                                  HopperShape<kHeadDim, kTileRows, Kv>::kMinCtas)
    attention_wgmma_kernel(const __grid_constant__ HopperParams p) {
  if constexpr (ptx::kHasWgmma) {
    typedef HopperShape<kHeadDim, kTileRows, Kv> Shape;
    NLD_DYNAMIC_SMEM(typename Shape::Smem, sm);
    if (threadIdx.x == 0) {
      if (p.box_rows > 0) {
        ptx::prefetch_tensor_map(&p.k_map);
        ptx::prefetch_tensor_map(&p.v_map);
      }
#pragma unroll 1
      for (int slot = 0; slot < Shape::kSlots; ++slot) {
        ptx::mbar_init(&sm->full[slot], 4);                       // the producer's warps
        ptx::mbar_init(&sm->empty[slot], 4 * Shape::kConsumers);  // the consumers' warps
      }
      ptx::mbar_init_fence();
    }
    __syncthreads();
    if (!NLD_BUG(attention_sm90_no_wait)) ptx::wait_for_previous_kernel();
    ptx::allow_next_kernel();
    if (threadIdx.x < 128) {
      ptx::give_up_registers<Shape::kProducerRegisters>();
      HopperLoader<Shape> loader(p, sm);
      for_each_item(p.mma.op, [&](const PlanItem& item, int kv_head) {
        ItemProducer<Shape>(p.mma, item, kv_head).run(item.key_begin, loader);
      });
      loader.finish();
    } else {
      ptx::ask_for_registers<Shape::kConsumerRegisters>();
      // While the first keys are on their way.
      clear_rows<T>(p.mma.op, owned_rows(p.mma.op), threadIdx.x / kWarpSize - 4, 4 * Shape::kConsumers);
      RingPlace<Shape::kSlots> place;
      for_each_item(p.mma.op, [&](const PlanItem& item, int kv_head) {
        ItemConsumer<T, Shape>(p.mma, sm, item, kv_head).run(item.key_begin, place);
      });
    }
  }
}

}  // namespace nld
