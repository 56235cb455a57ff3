// The sizes of clusters that cluster.h chooses, for 8 kv heads on an H100 (132 SMs in parts of 16 and 18), 4 query
// heads each.
#include "attention/cluster.h"

#include <cstdio>

namespace {

constexpr int64_t kKvHeads = 8, kHeadsPerKv = 4, kSms = 132;

int num_failures = 0;

struct Case {
  int64_t batch, rows, max_seq_len;
  int32_t largest;  // size of which the GPU can hold clusters
  int32_t wanted;
};

constexpr Case kCases[] = {
    // One block of 32 tokens: 8 pairs, all SMs.
    {1, 32, 1024, 16, 16},
    {1, 32, 32768, 16, 16},
    // Where clusters end at 8 half the SMs would be idle, which pays for short contexts only.
    {1, 32, 1024, 8, 8},
    {1, 32, 32768, 8, 1},
    // 512 keys: 8 CTAs of 64.
    {1, 32, 512, 16, 8},
    {1, 32, 64, 16, 1},
    // Two and four blocks: fewer CTAs each, so a long request beside short ones decides.
    {2, 32, 4096, 16, 8},
    {2, 32, 32768, 16, 1},
    {4, 32, 4096, 16, 4},
    {4, 32, 8192, 16, 1},
    // From some batch on nothing needs to be shared.
    {9, 32, 1024, 16, 1},
    {64, 32, 1024, 16, 1},
    // Single tokens: tiles of 16 rows, two CTAs an SM.
    {1, 1, 8192, 16, 16},
    {1, 1, 131072, 16, 1},
    {4, 1, 8192, 16, 8},
    // A prompt of 2048: 64 tiles.
    {1, 2048, 2048, 16, 1},
    {0, 0, 1024, 16, 1},
};

void check(const Case& c) {
  const int64_t total_q = c.batch * c.rows;
  const int32_t tile_rows = nld::attention_tile_rows(total_q, c.batch, kHeadsPerKv, 0);
  const int64_t max_tiles = nld::attention_max_tiles(total_q, c.batch, kHeadsPerKv, tile_rows);
  const int64_t wave = nld::attention_wave(tile_rows, kKvHeads, kSms);
  const int64_t max_items = nld::attention_max_items(max_tiles, wave, c.max_seq_len, 0);
  const nld::PlanShape shape = {
      static_cast<int32_t>(total_q),   static_cast<int32_t>(c.batch),  static_cast<int32_t>(kHeadsPerKv), 0, tile_rows,
      static_cast<int32_t>(max_tiles), static_cast<int32_t>(max_items)};
  const auto resident = [&](int32_t size) {
    return size > c.largest ? 0 : 128 * nld::attention_ctas_per_sm(tile_rows) / size;
  };
  const auto size_of = [&](const nld::PlanShape& of) {
    return nld::attention_cluster_size(of, kKvHeads, c.max_seq_len, kSms, resident);
  };
  if (const int32_t size = size_of(shape); size != c.wanted) {
    ++num_failures;
    std::printf("%d requests of %d rows, %d keys, clusters up to %d: %d, wanted %d\n", static_cast<int>(c.batch),
                static_cast<int>(c.rows), static_cast<int>(c.max_seq_len), c.largest, size, c.wanted);
  }
  nld::PlanShape cut_by_caller = shape;
  ++cut_by_caller.max_items;
  num_failures += size_of(cut_by_caller) != 1;
  nld::PlanShape fixed_splits = shape;
  fixed_splits.split_len = 64;
  num_failures += size_of(fixed_splits) != 1;
}

}  // namespace

int main() {
  for (const Case& c : kCases) check(c);
  std::printf("%d failures\n", num_failures);
  return num_failures != 0;
}
