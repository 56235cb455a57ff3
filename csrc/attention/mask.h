// Which keys a query row may see, and in which order keys are read: the one definition that every attention kernel
// uses. Knows no torch, compiles with nvcc.
//
// Keys are numbered as they are read. Key j is token j of the sequence, except under QUADRATIC. There the current rows
// are groups: a head and its tail of block_len rows (the last group may be cut off), and the numbers are
//
//   cache: [0, heads_begin) | the heads of all groups: [heads_begin, tails_begin) | the tails: [tails_begin, seq_len)
//
// so that a row sees two ranges instead of one key in every block_len + 1. The order belongs to the request and not to
// a tile of its rows, so splits at absolute multiples stay absolute. Only who touches memory asks for token_of_key;
// views, plans, splits and masks speak of keys.
//
// Row i of a request with n rows and L = seq_len keys is token p = L - n + i. It sees the keys
//   [0, dense_end)  and  [group_begin, group_end),
// the latter, the tail of its own group, only under QUADRATIC and if it is no head. All ends are clamped to [0, L], so
// no kernel tests j < L again.
#pragma once

#include <cstdint>

#include "common/hd.h"

namespace nld {

enum class MaskMode : int32_t { kFull = 0, kCausal = 1, kBlockCausal = 2, kQuadratic = 3 };
constexpr int32_t kNumMaskModes = 4;

// The mask of one request.
struct RequestMask {
  MaskMode mode;
  int32_t seq_len, num_rows;
  int32_t block_len, block_phase;  // block_len is only read by kBlockCausal and kQuadratic
};

// The mask of request b, from any params struct with the per-request tensors.
template <class Params>
NLD_HD RequestMask request_mask(const Params& p, int64_t b) {
  return {static_cast<MaskMode>(p.mask_mode[b]), p.seq_lens[b], p.cu_seqlens_q[b + 1] - p.cu_seqlens_q[b],
          p.block_len != nullptr ? p.block_len[b] : 1, p.block_phase != nullptr ? p.block_phase[b] : 0};
}

NLD_HD int32_t clamp_key(int64_t key, int32_t seq_len) {
  return key < 0 ? 0 : key > seq_len ? seq_len : static_cast<int32_t>(key);
}

NLD_HD int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }

// ---- the order of keys ----

// heads_begin of requests whose keys are all in the order of their tokens.
constexpr int32_t kNoHeads = INT32_MAX;

// Below heads_begin a key is its token. Of a request with more rows than keys the first groups have no keys, or not
// all; the numbers of the others have no gaps.
struct KeyOrder {
  int32_t heads_begin, tails_begin;
  int32_t first_token;  // of the current rows; may be negative
  int32_t num_groups;
  uint32_t block_len;
};

// Divisions here and below are of 32 bits: a fifth of the instructions of 64.
NLD_HD KeyOrder key_order(const RequestMask& mask) {
  if (mask.mode != MaskMode::kQuadratic) return {kNoHeads, kNoHeads, 0, 0, 1};
  const uint32_t rows = static_cast<uint32_t>(mask.num_rows), len = static_cast<uint32_t>(mask.block_len) + 1;
  const int32_t first = mask.seq_len - mask.num_rows, groups = static_cast<int32_t>((rows + len - 1) / len);
  if (first >= 0) return {first, first + groups, first, groups, len - 1};
  const int32_t lost_heads = static_cast<int32_t>((static_cast<uint32_t>(-first) + len - 1) / len);
  return {0, groups - lost_heads, first, groups, len - 1};
}

// Number of a tail's row among those of all tails.
NLD_HD uint32_t tail_of_key(const KeyOrder& order, int32_t key) {
  return static_cast<uint32_t>(key - order.first_token - order.num_groups);
}

// The token whose K and V key number `key` is: it lies in entry token / page_size of the page table.
NLD_HD int32_t token_of_key(const KeyOrder& order, int32_t key) {
  if (key < order.heads_begin) return key;
  if (key < order.tails_begin) {
    const uint32_t group = static_cast<uint32_t>(key - order.tails_begin + order.num_groups);
    return order.first_token + static_cast<int32_t>(group * (order.block_len + 1));
  }
  const uint32_t tail = tail_of_key(order, key);
  return order.first_token + 1 + static_cast<int32_t>(tail + tail / order.block_len);
}

// Keys from `key` up to here are tokens in a row.
NLD_HD int32_t key_run_end(const KeyOrder& order, int32_t key) {
  if (key < order.heads_begin) return order.heads_begin;
  if (key < order.tails_begin) return key + 1;
  return key + static_cast<int32_t>(order.block_len - tail_of_key(order, key) % order.block_len);
}

// ---- what rows see ----

struct RowView {
  int32_t dense_end;  // never falls from one row to the next
  int32_t group_begin, group_end;
};

NLD_HD RowView row_view(const RequestMask& mask, int32_t row) {
  const int64_t p = static_cast<int64_t>(mask.seq_len) - mask.num_rows + row;
  switch (mask.mode) {
    case MaskMode::kFull:
      return {mask.seq_len, 0, 0};
    case MaskMode::kCausal:
      return {clamp_key(p + 1, mask.seq_len), 0, 0};
    case MaskMode::kBlockCausal: {
      const int64_t end = (floor_div(p + mask.block_phase, mask.block_len) + 1) * mask.block_len - mask.block_phase;
      return {clamp_key(end, mask.seq_len), 0, 0};
    }
    case MaskMode::kQuadratic: {
      const KeyOrder order = key_order(mask);
      const uint32_t len = order.block_len + 1, group = static_cast<uint32_t>(row) / len;
      const int64_t heads_end = static_cast<int64_t>(order.tails_begin) - order.num_groups + group + 1;
      RowView view = {clamp_key(heads_end, mask.seq_len), 0, 0};
      if (static_cast<uint32_t>(row) % len != 0) {
        const int64_t begin =
            static_cast<int64_t>(order.first_token) + order.num_groups + group * static_cast<int64_t>(order.block_len);
        view.group_begin = clamp_key(begin > order.tails_begin ? begin : order.tails_begin, mask.seq_len);
        view.group_end = clamp_key(begin + order.block_len, mask.seq_len);
        if (view.group_end <= view.group_begin) view.group_begin = view.group_end = 0;
      }
      return view;
    }
  }
  return {0, 0, 0};
}

// What the rows of a tile see together: [0, hole_begin) and [hole_end, key_end). Without a hole, as under all modes but
// QUADRATIC, the three are equal.
struct TileKeys {
  int32_t hole_begin, hole_end, key_end;
};

NLD_HD TileKeys tile_keys(const RequestMask& mask, int32_t first_row, int32_t last_row) {
  const RowView last = row_view(mask, last_row);
  const TileKeys dense = {last.dense_end, last.dense_end, last.dense_end};
  if (mask.mode != MaskMode::kQuadratic) return dense;
  // A head sees no tail; its neighbours do, and block_len is at least 1.
  RowView from = row_view(mask, first_row), to = last;
  if (from.group_end == 0 && first_row < last_row) from = row_view(mask, first_row + 1);
  if (to.group_end == 0 && first_row < last_row) to = row_view(mask, last_row - 1);
  if (to.group_end == 0) return dense;
  if (from.group_end == 0) from.group_begin = key_order(mask).tails_begin;  // groups whose keys are lost
  if (from.group_begin <= last.dense_end) return {to.group_end, to.group_end, to.group_end};
  return {last.dense_end, from.group_begin, to.group_end};
}

struct KeyRange {
  int32_t begin, end;
};

// Who walks through keys in steps from `origin` on leaves out the whole steps inside a hole: at `begin` it goes on at
// `end`. Where there is none the two are equal.
NLD_HD KeyRange whole_steps(int32_t hole_begin, int32_t hole_end, int32_t origin, int32_t step) {
  if (hole_end - hole_begin < step || hole_end <= origin) return {origin, origin};
  const int32_t before = hole_begin > origin ? (hole_begin - origin - 1) / step + 1 : 0;  // steps
  const int32_t after = (hole_end - origin) / step;
  return after > before ? KeyRange{origin + before * step, origin + after * step} : KeyRange{origin, origin};
}
NLD_HD int32_t after_hole(const KeyRange& hole, int32_t key) { return key == hole.begin ? hole.end : key; }

NLD_HD uint64_t bits_below(int32_t count) {
  return count <= 0 ? 0 : count >= 64 ? ~static_cast<uint64_t>(0) : (static_cast<uint64_t>(1) << count) - 1;
}

// The keys of [key_begin, key_begin + 64) that a row sees, bit i for key_begin + i.
NLD_HD uint64_t visible_bits(const RowView& view, int32_t key_begin) {
  return bits_below(view.dense_end - key_begin) |
         (bits_below(view.group_end - key_begin) & ~bits_below(view.group_begin - key_begin));
}

}  // namespace nld
