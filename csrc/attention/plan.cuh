// The plan of CUDA attention, built on the device.
#pragma once

#include "attention/plan.h"
#include "common/ptx.cuh"

namespace nld {

constexpr int kPlanThreads = kPlanBuckets, kPlanWarps = kPlanThreads / kWarpSize;

struct PlanSmem {
  int32_t warp_sums[kPlanWarps];
  int64_t warp_values[kPlanWarps];
  int32_t starts[kPlanThreads];  // first tile of each request of the chunk at hand; then keys of tiles
  int32_t bucket_ends[kPlanBuckets];
};

// Sum of the lower threads' values; `total` is the sum of all. Two barriers, so that it can be called again at once.
__device__ inline int32_t exclusive_sum(PlanSmem* sm, int32_t value, int32_t& total) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  int32_t sum = value;
#pragma unroll
  for (int delta = 1; delta < kWarpSize; delta *= 2) {
    const int32_t lower = __shfl_up_sync(kFullMask, sum, delta);
    if (lane >= delta) sum += lower;
  }
  if (lane == kWarpSize - 1) sm->warp_sums[warp] = sum;
  __syncthreads();
  int32_t before = 0;
  total = 0;
  for (int w = 0; w < kPlanWarps; ++w) {
    if (w < warp) before += sm->warp_sums[w];
    total += sm->warp_sums[w];
  }
  __syncthreads();
  return before + sum - value;
}

// The least value of the CTA, in every thread.
__device__ inline int64_t least_of_all(PlanSmem* sm, int64_t value) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
    const int64_t other = __shfl_xor_sync(kFullMask, value, mask);
    value = other < value ? other : value;
  }
  if (threadIdx.x % kWarpSize == 0) sm->warp_values[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  value = sm->warp_values[0];
  for (int w = 1; w < kPlanWarps; ++w) value = sm->warp_values[w] < value ? sm->warp_values[w] : value;
  __syncthreads();
  return value;
}

// The last of starts[0 .. count) that is at most `index`; skips empty ranges.
template <class Start>
__device__ inline int32_t find_range(int32_t count, int32_t index, const Start& start) {
  int32_t low = 0, high = count;  // start(low) <= index < start(high)
  while (high - low > 1) {
    const int32_t middle = (low + high) / 2;
    if (start(middle) <= index) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// One CTA, one launch, any batch: tiles of all requests; their splits; items sorted longest first by one stable
// counting sort. Once per step and reused by all layers, so latency matters and traffic (a few KB) does not: no second
// launch, no global scratch, threads over tiles (not requests), because one long prompt may own a thousand.
__global__ void __launch_bounds__(kPlanThreads, 1)
    attention_plan_kernel(const __grid_constant__ AttentionPlanParams p) {
  NLD_DYNAMIC_SMEM(PlanSmem, sm);
  if (!NLD_BUG(plan_no_wait)) ptx::wait_for_previous_kernel();
  ptx::allow_next_kernel();
  const PlanShape& shape = p.shape;
  const PlanArrays plan = plan_arrays(p.plan, shape.max_tiles);
  const int32_t tid = static_cast<int32_t>(threadIdx.x);

  // 1. Tiles and their key ranges.
  int32_t num_tiles = 0, longest_tile = 0;
  for (int32_t first = 0; first < shape.batch; first += kPlanThreads) {
    const int32_t request = first + tid, count = min(kPlanThreads, shape.batch - first);
    int32_t mine = 0, chunk_tiles;
    if (request < shape.batch) {
      mine = plan_request_tiles(p, request);
      NLD_DEVICE_CHECK(p.cu_seqlens_q[request] >= 0 && p.cu_seqlens_q[request] <= p.cu_seqlens_q[request + 1] &&
                           p.cu_seqlens_q[request + 1] <= shape.total_q,
                       "cu_seqlens_q grows from 0 to at most total_q");
      NLD_DEVICE_CHECK(p.seq_lens[request] >= 0, "seq_lens are not negative");
      NLD_DEVICE_CHECK(mine == 0 || (p.mask_mode[request] >= 0 && p.mask_mode[request] < kNumMaskModes),
                       "mask_mode is a MaskMode");
      NLD_DEVICE_CHECK(mine == 0 || p.mask_mode[request] < static_cast<int32_t>(MaskMode::kBlockCausal) ||
                           (p.block_len != nullptr && p.block_len[request] >= 1),
                       "block_len is at least 1 where the mode needs it");
    }
    sm->starts[tid] = exclusive_sum(sm, mine, chunk_tiles);
    __syncthreads();
    for (int32_t i = tid; i < chunk_tiles && num_tiles + i < shape.max_tiles; i += kPlanThreads) {
      const int32_t owner = find_range(count, i, [&](int32_t r) { return sm->starts[r]; });
      const PlanTile tile = plan_tile(p, first + owner, i - sm->starts[owner]);
      plan.tiles[num_tiles + i] = tile;
      longest_tile = max(longest_tile, plan_tile_keys(shape, tile));
    }
    __syncthreads();  // before starts change
    num_tiles = min(num_tiles + chunk_tiles, shape.max_tiles);
  }
  longest_tile = static_cast<int32_t>(-least_of_all(sm, -longest_tile));  // and the tiles are visible to all threads

  // 2. Where the plan chooses: each thread works out what one way to cut costs.
  int32_t split_keys = 0;
  if (shape.split_len == 0) {
    static_assert(kPlanCandidates == kPlanThreads);
    const int32_t mine = plan_split_keys(longest_tile, tid + 1);
    int64_t items = 0, keys = 0;
    for (int32_t first = 0; first < num_tiles; first += kPlanThreads) {
      const int32_t count = min(kPlanThreads, num_tiles - first);
      if (tid < count) sm->starts[tid] = plan_tile_keys(shape, plan.tiles[first + tid]);
      __syncthreads();
      for (int32_t i = 0; i < count; ++i) {
        keys += sm->starts[i];
        items += plan_num_splits(sm->starts[i], mine);
      }
      __syncthreads();
    }
    const int64_t cost = plan_cut_cost(shape, longest_tile, mine, keys, num_tiles, items);
    const int64_t least = least_of_all(sm, cost);
    const int64_t first = least_of_all(sm, cost == least ? tid : kPlanThreads);  // the fewest splits of equal cost
    split_keys = plan_split_keys(longest_tile, static_cast<int32_t>(first) + 1);
  }

  // 3. Splits, slots and unsorted item numbers.
  int32_t num_items = 0, num_slots = 0, num_split_tiles = 0, longest = 0;
  for (int32_t first = 0; first < num_tiles; first += kPlanThreads) {
    const int32_t index = first + tid;
    PlanTile tile = {};
    if (index < num_tiles) {
      tile = plan.tiles[index];
      plan_split_tile(shape, split_keys, tile);
      longest = max(longest, plan_item_keys(shape, tile, 0));
      longest = max(longest, plan_item_keys(shape, tile, tile.num_splits - 1));
    }
    const int32_t slots = tile.num_splits > 1 ? tile.num_splits : 0;
    int32_t items_here, slots_here, split_here;
    const int32_t item = num_items + exclusive_sum(sm, tile.num_splits, items_here);
    const int32_t slot = num_slots + exclusive_sum(sm, slots, slots_here);
    const int32_t split_tile = num_split_tiles + exclusive_sum(sm, slots > 0, split_here);
    if (index < num_tiles) {
      tile.first_item = item;
      tile.first_slot = slots > 0 ? slot : -1;
      plan.tiles[index] = tile;
      if (slots > 0) plan.split_tiles[split_tile] = index;
    }
    num_items += items_here;
    num_slots += slots_here;
    num_split_tiles += split_here;
  }
  NLD_DEVICE_CHECK(num_items <= shape.max_items && num_slots <= attention_max_slots(shape.max_tiles, shape.max_items),
                   "items and slots fit the plan");
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) longest = max(longest, __shfl_xor_sync(kFullMask, longest, mask));
  if (tid % kWarpSize == 0) sm->warp_sums[tid / kWarpSize] = longest;
  sm->bucket_ends[tid] = 0;
  __syncthreads();
  for (int w = 0; w < kPlanWarps; ++w) longest = max(longest, sm->warp_sums[w]);

  // 4. Counting sort of the items by length. A thread finds its item's tile by first_item; nothing is kept in between.
  const auto tile_of = [&](int32_t i) {
    return find_range(num_tiles, i, [&](int32_t t) { return plan.tiles[t].first_item; });
  };
  const auto bucket_of = [&](const PlanTile& tile, int32_t i) {
    return plan_bucket(plan_item_keys(shape, tile, i - tile.first_item), longest);
  };
  for (int32_t i = tid; i < num_items; i += kPlanThreads) {
    atomicAdd(&sm->bucket_ends[bucket_of(plan.tiles[tile_of(i)], i)], 1);
  }
  __syncthreads();
  int32_t total;
  const int32_t bucket_begin = exclusive_sum(sm, sm->bucket_ends[tid], total);
  sm->bucket_ends[tid] = bucket_begin;  // grows to its end as items are placed
  __syncthreads();
  for (int32_t first = 0; first < num_items; first += kPlanThreads) {
    PlanItem item = {};
    int32_t bucket = -1;
    if (first + tid < num_items) {
      const int32_t index = tile_of(first + tid);
      const PlanTile tile = plan.tiles[index];
      item = plan_item(shape, tile, index, first + tid - tile.first_item);
      bucket = bucket_of(tile, first + tid);
    }
    // Warps take turns in order, and lanes rank among their equals: stable.
    const unsigned equals = __match_any_sync(kFullMask, bucket);
    const int rank = __popc(equals & ((1u << tid % kWarpSize) - 1));
    for (int warp = 0; warp < kPlanWarps; ++warp) {
      if (warp == tid / kWarpSize && bucket >= 0) {
        plan.items[sm->bucket_ends[bucket] + rank] = item;
      }
      __syncthreads();
      if (warp == tid / kWarpSize && bucket >= 0 && rank == 0) sm->bucket_ends[bucket] += __popc(equals);
      if (!NLD_BUG(plan_no_barrier)) __syncthreads();
    }
  }
  if (tid == 0) {
    *plan.header = {kPlanVersion, shape.batch, shape.total_q,   shape.heads_per_kv, shape.tile_rows, shape.split_len,
                    num_tiles,    num_items,   num_split_tiles, num_slots,          longest,         0};
  }
}

}  // namespace nld
