// Every choice that CUDA attention makes for speed and not for correctness, with its reason: rows of a tile, CTAs per
// SM, shared memory of a CTA, where keys are cut. Integers only, so that the device, the CPU and the Python reference
// choose alike, bit for bit. Knows no torch.
//
// Times are nanoseconds of one GPU (a Hopper, bfloat16, head_dim 128), but only their ratios choose. On an A100 or an
// RTX card memory and tensor cores are slower by about one factor, so one set serves all: by the time model
// (nld_cuda/bench/time_model.py), which runs real plans through a small machine, the cuts chosen here take 1 % longer
// than the best ones on average and 18 % at worst (one long request among short ones), the same on H100, H200, A100 and
// RTX 4090 (tests/test_heuristic.py). No GPU has been asked yet: `python -m nld_cuda.bench.tune` does, and fits.
#pragma once

#include <cstdint>

#include "common/hd.h"

namespace nld {

// ---- tiles ----

// Rows of a tile, by the average packed rows of a request: fewer rows waste less of the tensor cores, more rows share
// what is read of K and V. In 16-row tiles the warps of a CTA share the keys, which adds in another order than a warp
// that owns its rows, as with 64 and 128; with a fixed split_len no row may depend on the batch, so 16 is not used.
// Small batches would like 64 rows up to some 4k keys and 128 beyond (docs/tuning.md), but the context is not known
// here.
NLD_HD int32_t attention_tile_rows(int64_t total_q, int64_t batch, int64_t heads_per_kv, int64_t split_len) {
  const int64_t rows = batch > 0 ? (total_q * heads_per_kv + batch - 1) / batch : 0;
  if (rows > 64) return 128;
  return rows > 16 || split_len > 0 ? 64 : 16;
}

// CTAs of the attention kernels that one SM holds: what a full grid means when key ranges are split.
NLD_HD int32_t attention_ctas_per_sm(int32_t tile_rows) { return tile_rows == 128 ? 1 : 2; }

// Items that run side by side: what the plan fills where it chooses the splits.
NLD_HD int64_t attention_wave(int32_t tile_rows, int64_t num_kv_heads, int64_t num_sms) {
  const int64_t items = num_sms * attention_ctas_per_sm(tile_rows) / num_kv_heads;
  return items > 1 ? items : 1;
}

// K and V tiles of 64 keys in the ring of the mma.sync kernels. At most 48 KiB let two CTAs of 16 or 64 rows (three of
// head_dim 64) share an SM of 100 KiB (sm_86, 89, 120) with two tiles or more under way; 128 rows are one CTA per SM
// and have four.
constexpr int attention_ring_slots(int head_dim, int tile_rows) {
  return tile_rows == 128 ? 6 : head_dim <= 96 ? 4 : 3;
}

// CTAs per SM that the registers of the mma.sync kernels must allow: one more each would spill a few.
constexpr int attention_register_ctas(int head_dim, int tile_rows) {
  return tile_rows == 128 ? 1 : head_dim <= 64 ? 3 : 2;
}

// CTA c of n works on the pairs (item, kv head) c, 2n - 1 - c, 2n + c, 4n - 1 - c, ...: items come longest first, so
// going back after going forth lets the CTA with the longest of one round have the shortest of the next. By the time
// model within 2 % of taking the next free item (6 % in the worst batch), without a counter in memory that must be
// zero; c, n + c, 2n + c, ... took 20 % longer on a prompt of 2048. The steps between a CTA's pairs alternate:
NLD_HD int32_t attention_first_step(int32_t cta, int32_t num_ctas) { return 2 * (num_ctas - cta) - 1; }
NLD_HD int32_t attention_next_step(int32_t step, int32_t num_ctas) { return 2 * num_ctas - step; }

// Is K and V of most requests read by one tile of rows only? Then L2 need not keep it for another (Hopper). The next
// forward reads it again, but all layers later.
NLD_HD bool attention_reads_keys_once(int64_t total_q, int64_t batch, int64_t heads_per_kv, int32_t tile_rows) {
  return total_q * heads_per_kv <= batch * tile_rows;
}

// ---- where keys are cut ----

constexpr int32_t kPlanKeys = 64;         // splits that the plan chooses freely start at multiples of this
constexpr int32_t kPlanCandidates = 256;  // ways to cut that are compared where the plan chooses

NLD_HD int32_t plan_round_up(int64_t keys) {
  return static_cast<int32_t>((keys + kPlanKeys - 1) / kPlanKeys * kPlanKeys);
}

// The k-th way to cut, k in [1, kPlanCandidates]: the longest tile in k splits, the others in splits of that length.
NLD_HD int32_t plan_split_keys(int32_t longest, int32_t k) {
  const int32_t keys = plan_round_up((static_cast<int64_t>(longest) + k - 1) / k);
  return keys > kPlanKeys ? keys : kPlanKeys;
}
NLD_HD int64_t plan_num_splits(int32_t tile_keys, int32_t split_keys) {
  const int64_t splits = (static_cast<int64_t>(tile_keys) + split_keys - 1) / split_keys;
  return splits > 1 ? splits : 1;
}

// The constants of plan_cost. A key: its K and V for one kv head, 512 bytes.
constexpr int64_t kMemoryKeyNs = 20;    // at an SM's share of memory: 512 B / (3000 GB/s / 132) = 23 (H100), 16 (H200)
constexpr int64_t kItemNs = 2000;       // a CTA waits for plan, pages and first keys; and its epilogue
constexpr int64_t kPartialRowNs = 25;   // (head_dim + 2) floats written and read at an SM's share of L2, 42 GB/s
constexpr int64_t kMergeNs = 1000;      // partial results seen by who merges them, however few
constexpr int64_t kOverlapDivisor = 4;  // of the shorter of memory and arithmetic a quarter shows

// A key in a CTA that memory does not hold back. 128 rows: tensor cores, 25 by mma.sync and 15 by wgmma; fewer rows: 32
// KiB under way a microsecond.
NLD_HD int64_t attention_key_ns(int32_t tile_rows) { return tile_rows == 128 ? 20 : 16; }

// One way to cut a batch.
struct PlanCut {
  int32_t longest_item;  // keys
  int64_t num_tiles, num_items, total_keys;
};

// What it is expected to take, in nanoseconds without launches: the longer of
//   memory      all keys through all SMs' shares
//   arithmetic  the busiest CTA. Items of one length run in waves; items of many lengths, the longest first, end within
//               one of each other, about an average one
// and a part of the shorter, a beginning and an end a wave, and the partial results of split tiles through L2.
NLD_HD int64_t plan_cost(int32_t tile_rows, int64_t wave, const PlanCut& cut) {
  const int64_t cuts = cut.num_items - cut.num_tiles, ctas = attention_ctas_per_sm(tile_rows);
  const int64_t waves = (cut.num_items + wave - 1) / wave;
  const int64_t in_waves = waves * cut.longest_item;
  const int64_t packed = cut.total_keys / wave + cut.total_keys / (cut.num_items > 0 ? cut.num_items : 1);
  const int64_t fewest = in_waves < packed ? in_waves : packed;
  const int64_t keys = fewest > cut.longest_item ? fewest : cut.longest_item;
  const int64_t arithmetic = keys * attention_key_ns(tile_rows), memory = cut.total_keys * ctas * kMemoryKeyNs / wave;
  const int64_t longer = arithmetic > memory ? arithmetic : memory, shorter = arithmetic > memory ? memory : arithmetic;
  const int64_t partials = cuts > 0 ? kMergeNs + cuts * tile_rows * ctas * kPartialRowNs / wave : 0;
  return longer + shorter / kOverlapDivisor + waves * kItemNs + partials;
}

}  // namespace nld
