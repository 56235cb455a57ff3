// How K and V come into the ring of the Hopper kernel: whole tiles by the copy engine, others row by row.
#pragma once

#include "attention/ring_sm90.cuh"
#include "attention/rows.cuh"
#include "attention/widen.cuh"

namespace nld {

// One warp of the producer warpgroup; it brings rows [32 * warp, 32 * warp + 32) of every tile, and its lane l knows
// the page of row 32 * warp + l.
//
// TMA: where a box of tokens lies in one page and starts at a multiple of 8 rows of a tile; a few instructions per
// tile, no registers, no address arithmetic. cp.async: pages of odd sizes, and the last tile of an item that ends
// inside it: keys from key_end on are not read (nor their page-table entries, which may be garbage), and their rows
// become zero, because 0 * NaN is not; and tiles that reach past heads_begin, whose keys are not in the order of their
// tokens (mask.h). Both land in the same swizzled rows and count on the same barrier: one arrival
// per warp. A warp's cp.async arrivals are told kLag steps later, when they have landed and a proxy fence has made
// them visible to wgmma; so kLag + 1 tiles are under way all the time. e4m3: always row by row, into a stage of codes;
// when they have landed, each lane converts what it brought into the swizzled rows, and then tells.
template <class Shape>
class HopperLoader {
 public:
  __device__ __forceinline__ HopperLoader(const HopperParams& p, typename Shape::Smem* sm)
      : p_(p), sm_(sm), lane_(threadIdx.x % kWarpSize), first_row_(threadIdx.x / kWarpSize % 4 * 32) {}

  __device__ __forceinline__ void begin_item(int request, int kv_head, int32_t key_end, int32_t heads_begin) {
    request_ = request;
    kv_head_ = kv_head;
    key_end_ = key_end;
    heads_begin_ = heads_begin;
  }

  // Starts to read the page numbers of the tile at `key`.
  __device__ __forceinline__ void look_up(int32_t key) {
    next_page_ = 0;
    const int32_t mine = key + first_row_ + lane_;
    if (mine < key_end_) {
      const uint32_t token = key_token(p_.mma.op, request_, heads_begin_, mine);
      const uint32_t entry = divide(token, p_.mma.page_size);
      const int32_t* pages = p_.mma.op.page_table + request_ * p_.mma.op.page_table_stride;
      next_page_ = pages[NLD_BUG(attention_sm90_wrong_page) && entry > 0 ? entry - 1 : entry];
    }
  }

  // Makes the tile that was looked up the one to load K of, and the one before the one to load V of.
  __device__ __forceinline__ void advance() {
    NLD_DEVICE_CHECK(next_page_ >= 0 && next_page_ < p_.mma.op.num_pages, "page indices in use lie in the cache");
    v_page_ = k_page_;
    k_page_ = next_page_;
  }
  // Before V of the last tile.
  __device__ __forceinline__ void advance_v() { v_page_ = k_page_; }

  // The tile at `key` into the next slot.
  __device__ __forceinline__ void load(bool is_v, int32_t key) {
    if constexpr (!Shape::kConverts) ptx::mbar_wait(&sm_->empty[now_.slot], now_.parity ^ 1);
    const bool is_whole = key + kHopperKeys <= min(key_end_, heads_begin_) || NLD_BUG(attention_sm90_dirty_tail);
    const bool gathers = Shape::kConverts || p_.box_rows == 0 || !is_whole;
    if constexpr (Shape::kConverts) {
      gather_codes(is_v, key);
    } else if (gathers) {
      gather(is_v, key);
    } else {
      copy_boxes(is_v, key);
    }
    ptx::cp_async_commit();  // a group for each step, so that the one to tell is always the kLag'th last
    now_.advance();
    gathered_ = gathered_ << 1 | static_cast<uint32_t>(gathers);
    ptx::cp_async_wait<Shape::kLag>();
    if (steps_ < Shape::kLag) {
      ++steps_;
    } else {
      tell(gathered_ >> Shape::kLag & 1);
    }
  }

  // At the end of all work: what is still under way.
  __device__ __forceinline__ void finish() {
    ptx::cp_async_wait<0>();
    for (; steps_ > 0; --steps_) tell(gathered_ >> (steps_ - 1) & 1);
  }

 private:
  // Step kLag before this one has landed.
  __device__ __forceinline__ void tell(uint32_t was_gathered) {
    if constexpr (Shape::kConverts) {
      ptx::mbar_wait(&sm_->empty[told_.slot], told_.parity ^ 1);
      convert();
    }
    if (was_gathered != 0) {
      if (!NLD_BUG(attention_sm90_no_proxy_fence)) ptx::fence_proxy_async();
      __syncwarp();
      if (lane_ == 0) ptx::mbar_arrive(&sm_->full[told_.slot]);
    }
    told_.advance();
  }

  __device__ __forceinline__ uint32_t place_in_page(uint32_t token) const {
    return remainder(token, divide(token, p_.mma.page_size), p_.mma.page_size);
  }

  // Of this lane's row in the pages of the head, in chunks. Worked out again for K and V: registers are scarce here.
  __device__ __forceinline__ uint32_t place_of_lane(bool is_v, int32_t key) const {
    const uint32_t in_page = place_in_page(key_token(p_.mma.op, request_, heads_begin_, key + first_row_ + lane_));
    return is_v ? v_page_ * p_.mma.v_page_chunks + in_page * p_.mma.v_token_chunks
                : k_page_ * p_.mma.k_page_chunks + in_page * p_.mma.k_token_chunks;
  }

  // Codes of the tile at `key` into the next stage; a lane brings what it will convert.
  __device__ __forceinline__ void gather_codes(bool is_v, int32_t key) {
    constexpr int kRowChunks = Shape::kHeadDim / 16, kRows = kWarpSize / kRowChunks;  // of a pass
    const KvPages& cache = is_v ? p_.mma.op.v : p_.mma.op.k;
    const uint4* const head =
        reinterpret_cast<const uint4*>(static_cast<const e4m3*>(cache.data) + kv_head_ * cache.head_stride) +
        lane_ % kRowChunks;
    const uint32_t my_place = place_of_lane(is_v, key);
#pragma unroll
    for (int pass = 0; pass < kRowChunks; ++pass) {
      const int row = pass * kRows + lane_ / kRowChunks;
      const uint4* const source = head + __shfl_sync(kFullMask, my_place, row);
      ptx::cp_async(&sm_->codes[coded_.slot][first_row_ * kRowChunks + pass * kWarpSize + lane_], source,
                    key + first_row_ + row < key_end_ ? 16 : 0);
    }
    coded_.advance();
  }

  // The oldest stage into the slot that is told next. Lanes of the second half of a row write their second chunk first,
  // so that eight lanes fall on all banks.
  __device__ __forceinline__ void convert() {
    constexpr int kRowChunks = Shape::kHeadDim / 16, kRows = kWarpSize / kRowChunks;
    const int chunk = lane_ % kRowChunks, column = chunk / 4, in_column = chunk % 4 * 2;
    const int first = chunk >= 4 ? 1 : 0;
#pragma unroll 1
    for (int pass = 0; pass < kRowChunks; ++pass) {
      uint4 left, right;
      widen_chunk(sm_->codes[converted_.slot][first_row_ * kRowChunks + pass * kWarpSize + lane_], left, right);
      uint4* const target = sm_->slots[told_.slot][column];
      const int row = first_row_ + pass * kRows + lane_ / kRowChunks;
      target[Shape::at(row, in_column + first)] = first != 0 ? right : left;
      target[Shape::at(row, in_column + 1 - first)] = first != 0 ? left : right;
    }
    converted_.advance();
  }

  __device__ __forceinline__ void copy_boxes(bool is_v, int32_t key) const {
    uint64_t* const full = &sm_->full[now_.slot];
    const int box = p_.box_rows;
    const int rows = box <= 32 ? 32 : first_row_ % box == 0 ? box : 0;  // that this warp asks for
    if (lane_ == 0) {
      if (rows > 0) {
        ptx::mbar_arrive_expect_tx(full, rows * 128 * Shape::kColumns);
      } else {
        ptx::mbar_arrive(full);
      }
    }
    __syncwarp();
    const int row = first_row_ + lane_;
    if (row % box == 0) {
      const uint32_t in_page = place_in_page(key + row);
#pragma unroll
      for (int column = 0; column < Shape::kColumns; ++column) {
        const int at[4] = {column * 64, static_cast<int>(in_page), kv_head_, is_v ? v_page_ : k_page_};
        ptx::tma_load<4>(&sm_->slots[now_.slot][column][row * 8], is_v ? &p_.v_map : &p_.k_map, at, full, p_.keep);
      }
    }
    __syncwarp();
  }

  __device__ __forceinline__ void gather(bool is_v, int32_t key) const {
    const KvPages& cache = is_v ? p_.mma.op.v : p_.mma.op.k;
    const int chunk = lane_ % 8;  // eight lanes copy 128 bytes of a row
    const uint4* const head =
        reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(cache.data) + kv_head_ * cache.head_stride) + chunk;
    const uint32_t my_place = place_of_lane(is_v, key);
#pragma unroll
    for (int pass = 0; pass < 8; ++pass) {
      const int row = pass * 4 + lane_ / 8;
      const uint4* const source = head + __shfl_sync(kFullMask, my_place, row);
      uint4* const target = &sm_->slots[now_.slot][0][Shape::at(first_row_ + row, chunk)];
      const int bytes = key + first_row_ + row < key_end_ ? 16 : 0;
#pragma unroll
      for (int column = 0; column < Shape::kColumns; ++column) {
        if ((column + 1) * 64 <= Shape::kHeadDim || column * 8 + chunk < Shape::kHeadDim / 8) {
          ptx::cp_async(target + column * Shape::kColumnChunks, source + column * 8, bytes);
        }
      }
    }
  }

  const HopperParams& p_;
  typename Shape::Smem* const sm_;
  const int lane_, first_row_;
  int request_ = 0, kv_head_ = 0;
  int32_t key_end_ = 0, heads_begin_ = 0;
  int32_t next_page_ = 0, k_page_ = 0, v_page_ = 0;  // where this lane's row lies, in three tiles
  RingPlace<Shape::kSlots> now_, told_;
  RingPlace<Shape::Stage::kStages> coded_, converted_;  // of codes: the next to bring, and to convert
  uint32_t gathered_ = 0;                               // bit i: whether the i'th last step was gathered
  int steps_ = 0;                                       // not told yet, at most kLag
};

}  // namespace nld
