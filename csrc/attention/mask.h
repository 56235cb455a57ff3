// Which keys a query row may see: the one definition that every attention kernel uses. Knows no torch, compiles with
// nvcc.
//
// Row i of a request with n rows and L = seq_len keys sits at key index p = L - n + i. What it sees is
//   [0, dense_end)  and the group heads in [0, head_end)  and [group_begin, group_end),
// the last two only under QUADRATIC. All ends are clamped to [0, L], so no kernel tests j < L again.
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

// What one row sees.
struct RowView {
  int32_t dense_end, head_end, group_begin, group_end;
};

NLD_HD int32_t clamp_key(int64_t key, int32_t seq_len) {
  return key < 0 ? 0 : key > seq_len ? seq_len : static_cast<int32_t>(key);
}

NLD_HD int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }

// Rows of a group: a head and its masks. Divisions by it are of 32 bits, a fifth of the instructions of 64.
NLD_HD uint32_t group_len(const RequestMask& mask) { return static_cast<uint32_t>(mask.block_len) + 1; }

NLD_HD RowView row_view(const RequestMask& mask, int32_t row) {
  const int64_t first = static_cast<int64_t>(mask.seq_len) - mask.num_rows, p = first + row;
  int64_t dense = 0, head = 0, group_begin = 0, group_end = 0;
  switch (mask.mode) {
    case MaskMode::kFull:
      dense = mask.seq_len;
      break;
    case MaskMode::kCausal:
      dense = p + 1;
      break;
    case MaskMode::kBlockCausal:
      dense = (floor_div(p + mask.block_phase, mask.block_len) + 1) * mask.block_len - mask.block_phase;
      break;
    case MaskMode::kQuadratic: {
      const uint32_t len = group_len(mask), r = static_cast<uint32_t>(row), in_group = r % len;
      dense = first;
      head = p + 1;
      if (in_group != 0) {
        group_begin = first + (r - in_group);
        group_end = group_begin + len;
      }
      break;
    }
  }
  return {clamp_key(dense, mask.seq_len), clamp_key(head, mask.seq_len), clamp_key(group_begin, mask.seq_len),
          clamp_key(group_end, mask.seq_len)};
}

// Is key j the head of a group of current rows? Only asked under kQuadratic.
NLD_HD bool is_group_head(const RequestMask& mask, int32_t key) {
  const int64_t row = static_cast<int64_t>(key) - (static_cast<int64_t>(mask.seq_len) - mask.num_rows);
  return row >= 0 && static_cast<uint32_t>(row) % group_len(mask) == 0;
}

// One past the last key the row can see; 0 when it sees none.
NLD_HD int32_t view_end(const RowView& view) {
  const int32_t end = view.dense_end > view.head_end ? view.dense_end : view.head_end;
  return view.group_end > view.group_begin && view.group_end > end ? view.group_end : end;
}

// May any of the rows [row_begin, row_end) see any of the keys [key_begin, key_end)? Never false where one does, and
// true for nothing only inside a group of the rows: kernels skip whole tiles of keys by it. `last` is the view of the
// last row.
NLD_HD bool tile_is_seen(const RequestMask& mask, int32_t row_begin, int32_t row_end, const RowView& last,
                         int32_t key_begin, int32_t key_end) {
  if (key_begin < last.dense_end) return true;  // dense_end does not fall from one row to the next
  if (mask.mode != MaskMode::kQuadratic) return false;
  const int64_t first = static_cast<int64_t>(mask.seq_len) - mask.num_rows;
  const uint32_t len = group_len(mask), last_row = static_cast<uint32_t>(row_end - 1);
  const int64_t groups_begin = first + row_begin - static_cast<uint32_t>(row_begin) % len;
  const int64_t groups_end = first + (last_row - last_row % len) + len;
  if (key_begin < groups_end && key_end > groups_begin) return true;
  const uint32_t offset = key_begin > first ? static_cast<uint32_t>(key_begin - first) : 0, in_group = offset % len;
  const int64_t head = first + offset + (in_group == 0 ? 0 : len - in_group);  // the first one not before key_begin
  return head < key_end && head < last.head_end;
}

NLD_HD uint64_t bits_below(int32_t count) {
  return count <= 0 ? 0 : count >= 64 ? ~static_cast<uint64_t>(0) : (static_cast<uint64_t>(1) << count) - 1;
}

// The keys of [key_begin, key_begin + 64) that a row sees, bit i for key_begin + i. `heads`: which of them are group
// heads (is_group_head; 0 in the other modes).
NLD_HD uint64_t visible_bits(const RowView& view, uint64_t heads, int32_t key_begin) {
  return bits_below(view.dense_end - key_begin) | (heads & bits_below(view.head_end - key_begin)) |
         (bits_below(view.group_end - key_begin) & ~bits_below(view.group_begin - key_begin));
}

}  // namespace nld
