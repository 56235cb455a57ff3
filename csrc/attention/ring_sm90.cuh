// The Hopper attention kernel's shared memory: the shape of a CTA, and the ring through which keys and values come.
#pragma once

#include <type_traits>

#include "attention/cluster_merge.cuh"
#include "attention/mma_params.h"
#include "common/ptx_wgmma.cuh"

namespace nld {

// What the kernel gets: the op's arguments, and how the copy engine finds boxes of pages.
struct HopperParams {
  MmaParams mma;
  ptx::TensorMap k_map, v_map;  // [page][kv head][token][dim], boxes of box_rows tokens x 64 dims
  int box_rows;                 // tokens of a page that one copy brings, a multiple of 8; 0: no maps, gather each row
  ptx::L2Keep keep;
};

// Instances: launch_sm90_<dtype>_<head_dim>.cu, and of fp8 caches (Kv = e4m3) launch_sm90_fp8_<head_dim>.cu.
template <class T, int kHeadDim, class Kv = T>
LaunchError launch_wgmma(const HopperParams&, void* stream);
// Clusters of `size` CTAs that the current GPU holds at once; 0: it has none.
template <class T, int kHeadDim, class Kv = T>
int wgmma_resident_clusters(int tile_rows, int size);

constexpr int kHopperKeys = 128;  // keys of a K or V tile

// Everything that follows from head_dim and the rows of a tile. A consumer warpgroup has 64 rows and reads all keys;
// the four warps of the producer warpgroup each bring 32 keys of a tile, and convert them where the caches hold e4m3
// (Kv).
template <int kHeadDim_, int kTileRows_, class Kv>
struct HopperShape {
  static constexpr int kHeadDim = kHeadDim_, kTileRows = kTileRows_;
  static constexpr bool kConverts = sizeof(Kv) == 1;
  static constexpr int kConsumers = kTileRows / 64, kThreads = 128 * (kConsumers + 1);
  static constexpr int kMinCtas = kTileRows == 128 ? 1 : 2;
  static constexpr int kProducerRegisters = kTileRows == 128 ? 56 : 40;
  static constexpr int kConsumerRegisters = kTileRows == 128 ? 224 : 216;
  static_assert((kProducerRegisters + kConsumers * kConsumerRegisters) * 128 * kMinCtas <= 65536);

  // A tile lies in shared memory as columns of 64 dims: rows of 128 bytes, their 16-byte chunks swizzled as TMA and
  // wgmma do it.
  static constexpr int kColumns = (kHeadDim + 63) / 64, kColumnChunks = kHopperKeys * 8;
  static constexpr int kColumnBytes = kColumnChunks * 16, kSlotBytes = kColumns * kColumnBytes;
  // As many slots as fit: 224 of 227 KiB with one CTA, 112 each with two; of 32 KiB (head_dim above 64) and 16 KiB.
  // Codes on their way take the place of two of six, and one of three.
  static constexpr int kSlots =
      (kTileRows == 128 ? (kConverts ? 4 : 6) : (kConverts ? 2 : 3)) * (kColumns == 1 ? 2 : 1);
  // Steps for which gathered rows are under way before their arrival is told. More than kSlots - 2 would wait for a
  // slot that consumers free only after a step that has not been told.
  static constexpr int kLag = kSlots > 3 ? 2 : 1;
  static_assert(kHeadDim % 32 == 0 && kHeadDim <= 128 && (kConverts || kLag <= kSlots - 2));

  // Codes as they lie in the cache, of as many tiles as are under way and the one that is converted. They wait for no
  // slot: one is needed when they become 16-bit elements, which is when their arrival is told.
  struct Codes {
    static constexpr int kStages = kLag + 1, kRowChunks = kHeadDim / 16;
    uint4 codes[kStages][kHopperKeys * kRowChunks];
  };
  struct NoCodes {
    static constexpr int kStages = 1;
  };
  typedef std::conditional_t<kConverts, Codes, NoCodes> Stage;

  struct Smem : Stage {
    union {
      uint4 slots[kSlots][kColumns][kColumnChunks];
      ClusterParts<kHeadDim, kTileRows> parts;  // while the cluster merges; the ring is empty then
    };
    uint4 q[kConsumers][kColumns][64 * 8];  // then the rows of out on their way
    uint64_t full[kSlots], empty[kSlots];
  };
  static_assert(sizeof(Smem) <= (kMinCtas == 1 ? 227 : 113) * 1024);

  // Where chunk c (of 8) of a row of a column lies.
  static __device__ __forceinline__ int at(int row, int chunk) { return row * 8 + (chunk ^ (row & 7)); }
};

// A step's slot, and the parity of its phase: every slot's barriers count the ring's turns.
template <int kSlots>
struct RingPlace {
  int slot = 0, parity = 0;
  __device__ __forceinline__ void advance() {
    if (++slot == kSlots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

}  // namespace nld
