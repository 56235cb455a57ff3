// Q, K and V on their way to shared memory: the shape of the ring, its swizzle, and who copies what.
#pragma once

#include <type_traits>

#include "attention/cluster_merge.cuh"
#include "attention/heuristic.h"
#include "attention/mma_params.h"

namespace nld {

constexpr int kTileKeys = 64;  // keys of a K or V tile

// Everything that follows from head_dim and the rows of a tile. Tiles of 64 and 128 rows: each warp has its own 16 rows
// and reads all keys; the CTA copies together. Tiles of 16 rows: every warp has all rows and its own 16 of the 64 keys,
// copies them itself and meets the other warps only at the end. Kv is what the caches hold: the 16-bit type of q, or
// e4m3.
template <int kHeadDim_, int kTileRows_, class Kv>
struct TileShape {
  static constexpr int kHeadDim = kHeadDim_, kTileRows = kTileRows_;
  static constexpr bool kConverts = sizeof(Kv) == 1;
  static constexpr bool kSharesKeys = kTileRows == 16;
  static constexpr int kWarps = kTileRows == 128 ? 8 : 4, kThreads = kWarps * kWarpSize;
  static constexpr int kWarpKeys = kSharesKeys ? kTileKeys / kWarps : kTileKeys;
  static constexpr int kChunks = kHeadDim / 8;  // 16-byte chunks of a row

  static constexpr int kMinCtas = attention_register_ctas(kHeadDim, kTileRows);

  // The ring holds K and V tiles in turns, as they lie in the caches. In front of it, where the caches are e4m3: tiles
  // of 16-bit elements, which the matrix instructions read. One where another CTA of the SM works while this one
  // converts; of the lonely CTA of 128 rows two, so that warps convert the next tile while others multiply.
  static constexpr int kSlotChunks = kTileKeys * kChunks, kSlotBytes = kSlotChunks * 16;
  static constexpr int kSlots = attention_ring_slots(kHeadDim, kTileRows);
  static constexpr int kTiles = !kConverts ? 0 : kTileRows == 128 ? 2 : 1;
  static constexpr int kCopyChunks = kHeadDim * static_cast<int>(sizeof(Kv)) / 16;  // 16-byte chunks of a copied row
  static constexpr int kRingSlots = (kSlots - kTiles) * 2 / static_cast<int>(sizeof(Kv));
  static constexpr int kEarly = kTiles == 2 ? 1 : 0;  // tiles that are converted a step before they are multiplied
  // Q passes through the slots that the first copies leave free, or those of converted tiles, into registers.
  static constexpr int kQSlots = kTileRows == 128 ? 2 : 1;
  static constexpr int kIdle = !kConverts ? kQSlots : 1 - kEarly;  // slots of tiles that are not under way
  static constexpr int kDepth = kRingSlots - kIdle;                // tiles under way
  static constexpr int kQAt = kConverts ? 0 : kDepth;

  // Neighbouring lanes share a row: of Q and of 16-bit tiles, ...
  static constexpr int kLanesPerRow = kChunks % 8 == 0 ? 8 : 4;
  // ... and where K and V are copied, by the warp its own keys, or by the CTA all of them.
  static constexpr int kTeam = kSharesKeys ? kWarpSize : kThreads;
  static constexpr int kCopyLanes = kCopyChunks % 8 == 0 ? 8 : 4;
  static constexpr int kRowsPerPass = kTeam / kCopyLanes;
  static constexpr int kPasses = kWarpKeys / kRowsPerPass;
  static_assert(kHeadDim % 32 == 0 && kHeadDim <= 128 && kPasses >= 1 && kPasses <= kCopyLanes && kDepth >= 2);
  static_assert(kCopyChunks % kCopyLanes == 0);

  // The warps' results of a 16-row tile on their way to each other; 8 more floats a row avoid bank conflicts.
  struct Parts {
    float out[kWarps][16][kHeadDim + 8];
    float max[kWarps][16], sum[kWarps][16];
  };
  // Where the ring was: results on their way to the other CTAs of a cluster, in 16-row tiles behind the warps'.
  struct RowsOfWarps {
    ClusterParts<kHeadDim, kTileRows> cluster;
  };
  struct KeysOfWarps {
    Parts warps;
    ClusterParts<kHeadDim, kTileRows> cluster;
  };
  union Smem {
    uint4 slots[kSlots][kSlotChunks];
    std::conditional_t<kSharesKeys, KeysOfWarps, RowsOfWarps> results;
  };
  static_assert(sizeof(Smem) == sizeof(uint4) * kSlots * kSlotChunks, "nothing is larger than the ring");
  static_assert(sizeof(Smem) <= 99 * 1024);

  // Where chunk c of a row lies: eight rows of an ldmatrix then fall on different banks. Rows of 96 elements start in
  // alternating halves of the 128 bytes that all banks span, so two bits are enough there.
  static constexpr int kSwizzled = kLanesPerRow;
  static __device__ __forceinline__ int at(int row, int chunk) {
    return row * kChunks + (chunk ^ (kSwizzled == 8 ? row & 7 : row >> 1 & 3));
  }
  // Where it is copied to: codes wait in the order of the cache, 16 for each thread to convert.
  static __device__ __forceinline__ int copy_at(int row, int chunk) {
    return kConverts ? row * kCopyChunks + chunk : at(row, chunk);
  }
  static __device__ __forceinline__ uint4* ring_slot(Smem* sm, int slot) {
    return sm->slots[kTiles] + slot * kTileKeys * kCopyChunks;
  }
  // at(row, chunk + even) from at(row, chunk), for chunk 0 or 1: one instruction, mostly shared between steps.
  static __device__ __forceinline__ int step(int position, int even) {
    return (position ^ even % kSwizzled) + even / kSwizzled * kSwizzled;
  }
};

// Copies the K and V tiles of one item. While a tile is being requested, the page numbers of the next one are being
// read: each lane looks up one row, the lanes that share a row get its place by shuffle. Keys from key_end on are not
// read (nor their page-table entries, which may be garbage); their rows are zero, because 0 * NaN is not. From
// heads_begin on, keys are not in the order of their tokens (mask.h).
template <class Shape>
class TileLoader {
 public:
  __device__ __forceinline__ TileLoader(const MmaParams& p, int request, int kv_head, int32_t key_end,
                                        int32_t heads_begin)
      : p_(p), request_(request), kv_head_(kv_head), key_end_(key_end), heads_begin_(heads_begin) {
    const int member = Shape::kSharesKeys ? threadIdx.x % kWarpSize : threadIdx.x;
    chunk_ = member % Shape::kCopyLanes;
    row_ = member / Shape::kCopyLanes + (Shape::kSharesKeys ? threadIdx.x / kWarpSize * Shape::kWarpKeys : 0);
  }

  // Starts to read the page numbers of the tile at `key`.
  __device__ __forceinline__ void look_up(int32_t key) {
    next_page_ = 0;
    const int32_t mine = key + my_row();
    if (mine < key_end_) {
      const uint32_t token = key_token(p_.op, request_, heads_begin_, mine), entry = divide(token, p_.page_size);
      const int32_t* pages = p_.op.page_table + request_ * p_.op.page_table_stride;
      next_page_ = pages[NLD_BUG(attention_wrong_page) && entry > 0 ? entry - 1 : entry];
      next_in_page_ = remainder(token, entry, p_.page_size);
    }
  }

  // Makes the tile that was looked up the one to copy.
  __device__ __forceinline__ void advance() {
    NLD_DEVICE_CHECK(next_page_ >= 0 && next_page_ < p_.op.num_pages, "page indices in use lie in the cache");
    page_ = next_page_;
    in_page_ = next_in_page_;
  }

  // The tile, at `key`, into a slot.
  __device__ __forceinline__ void copy(bool is_v, int32_t key, uint4* slot) const {
    const KvPages& cache = is_v ? p_.op.v : p_.op.k;
    const char* head = static_cast<const char*>(cache.data) + kv_head_ * cache.head_stride * (Shape::kConverts ? 1 : 2);
    const uint32_t my_place = is_v ? page_ * p_.v_page_chunks + in_page_ * p_.v_token_chunks
                                   : page_ * p_.k_page_chunks + in_page_ * p_.k_token_chunks;
    const int first_lane = threadIdx.x % kWarpSize - chunk_;
#pragma unroll
    for (int pass = 0; pass < Shape::kPasses; ++pass) {
      const uint32_t place = __shfl_sync(kFullMask, my_place, first_lane + pass) + chunk_;
      const int row = row_ + pass * Shape::kRowsPerPass;
      const uint4* source = reinterpret_cast<const uint4*>(head) + place;
      uint4* target = slot + Shape::copy_at(row, chunk_);
      const int bytes = key + row < key_end_ ? 16 : 0;
#pragma unroll
      for (int i = 0; i < Shape::kCopyChunks; i += Shape::kCopyLanes) ptx::cp_async(target + i, source + i, bytes);
    }
  }

 private:
  // The row this lane looks up, one of those its group of lanes copies.
  __device__ __forceinline__ int my_row() const { return row_ + chunk_ % Shape::kPasses * Shape::kRowsPerPass; }

  const MmaParams& p_;
  int request_, kv_head_;
  int32_t key_end_, heads_begin_;
  int32_t page_ = 0, next_page_ = 0;  // where my_row lies in the tile to copy and in the one after
  uint32_t in_page_ = 0, next_in_page_ = 0;
  int chunk_, row_;
};

}  // namespace nld
