// One item of the plan for one kv head, as the tensor-core kernels see it: which tiles of keys it works through, what
// its rows see, and where they lie in q, out, lse and the partials.
#pragma once

#include "attention/cluster_merge.cuh"
#include "attention/mma_params.h"

namespace nld {

// What is rarely needed (the tile, the mask) is read again rather than held: registers limit the CTAs of an SM.
class ItemView {
 public:
  __device__ __forceinline__ ItemView(const MmaParams& p, const PlanItem& item, int kv_head)
      : p_(p), tile_index_(item.tile), split_(item.split), kv_head_(kv_head), key_end_(item.key_end) {}

  // Before next_visible and seen_word, for a walk in steps of kKeys from `key_begin` on.
  template <int kKeys>
  __device__ __forceinline__ void read_tile(int32_t key_begin) {
    heads_begin_ = tile().heads_begin;
    hole_ = whole_steps(tile().hole_begin, tile().hole_end, key_begin, kKeys);
    if (NLD_BUG(attention_hole_end) && hole_.end > hole_.begin) hole_.end += kKeys;
  }

  __device__ __forceinline__ Plan plan() const { return plan_view(p_.op.plan, p_.op.plan_shape.max_tiles); }
  __device__ __forceinline__ const PlanTile& tile() const { return plan().tiles[tile_index_]; }

  // Query row of packed row `row` of the tile; rows past its end are copies of its last.
  __device__ __forceinline__ int32_t q_row(int row) const {
    return static_cast<int32_t>(divide(tile().row_begin + min(row, tile().num_rows - 1), p_.heads_per_kv));
  }

  // The first step from `key` on in which a row sees a key. Only groups leave holes: the plan has cut off the ends.
  __device__ __forceinline__ int32_t next_visible(int32_t key) const { return after_hole(hole_, key); }

  // Are there keys in the item from which on rows see their groups, and token_of_key must be asked?
  __device__ __forceinline__ bool has_groups() const { return heads_begin_ < key_end_; }

  // The keys of [key, key + 64) (only the first kKeys are asked for) that row `row` sees, of which `dense_end` is
  // known; a bit each, so that all mask modes cost one test per score.
  template <int kKeys>
  __device__ __forceinline__ uint64_t seen_word(int row, int32_t dense_end, int32_t key) const {
    uint64_t seen = bits_below(dense_end + NLD_BUG(attention_mask_edge) - key);
    if (key + kKeys > heads_begin_) {
      RequestMask mask = request_mask(p_.op, tile().request);
      mask.mode = MaskMode::kQuadratic;  // spares the other modes' code
      RowView view = row_view(mask, q_row(row));
      if (NLD_BUG(attention_group_edge) && view.group_end > 0) --view.group_begin;
      seen |= visible_bits(view, key);
    }
    return seen & bits_below(key_end_ - key);
  }

  // cap * tanh(score / cap) by one exp2 and one division: the error is a few ulp of cap.
  __device__ __forceinline__ float cap_score(float score) const {
    return p_.cap_log2 - __fdividef(2.0f * p_.cap_log2, 1.0f + ptx::exp2_approx(score * p_.cap_slope));
  }

  // What the scores of an fp8 cache still need behind the cap, if there is one; > 0, because the -inf of a hidden key
  // times 0 is NaN.
  __device__ __forceinline__ float score_scale(float k_scale) const {
    return p_.op.softcap > 0.0f ? p_.scale_log2 : fmaxf(p_.scale_log2 * k_scale, 1e-37f);
  }

  __device__ __forceinline__ RowPlace place(int row) const {
    const uint32_t packed = tile().row_begin + row, q = divide(packed, p_.heads_per_kv);
    const uint32_t head = kv_head_ * p_.heads_per_kv.divisor + remainder(packed, q, p_.heads_per_kv);
    return {static_cast<int64_t>(p_.op.cu_seqlens_q[tile().request]) + q, static_cast<int64_t>(head)};
  }
  // Are the tile's other keys worked through by others?
  __device__ __forceinline__ bool is_split() const { return in_cluster(p_.op) || tile().num_splits > 1; }

  // Where the row's partial result goes: `parts` of the own shared memory where the cluster merges, else the workspace.
  template <class Parts>
  __device__ __forceinline__ PartialRow partial(Parts* parts, int row) const {
    if (in_cluster(p_.op)) return parts->row(row);
    const int64_t at = partial_row(p_.op, tile().first_slot + split_, kv_head_, row);
    return {p_.op.partial_o + at * Parts::kHeadDim, p_.op.partial_m + at, p_.op.partial_l + at};
  }

  // After the partial results of an item: where the cluster merges, it does so now. The parts are free afterwards.
  // By warp `warp` of `warps`; the CTA's other warps call meet_cluster_twice.
  template <class T, class Parts>
  __device__ __forceinline__ void finish_item(Parts* parts, int warp, int warps) const {
    if (!in_cluster(p_.op)) return;
    meet_before_merge();
    merge_in_cluster<T>(p_.op, tile(), kv_head_, parts, warp, warps);
    meet_after_merge();
  }

  __device__ __forceinline__ void store_lse(int row, float max, float sum) const {
    const RowPlace at = place(row);
    p_.op.lse[at.head * p_.op.lse_head_stride + at.token * p_.op.lse_token_stride] = row_lse(max, sum);
  }

  // Eight elements of a row of out.
  __device__ __forceinline__ void store_chunk(int row, int chunk, const uint4& value) const {
    const RowPlace at = place(row);
    uint16_t* target = static_cast<uint16_t*>(p_.op.out) + at.token * p_.op.out_token_stride +
                       at.head * p_.op.out_head_stride + chunk * 8;
    if (p_.out_aligned) {
      *reinterpret_cast<uint4*>(target) = value;
    } else {
      const uint32_t words[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
      for (int i = 0; i < 8; ++i) target[i] = static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16));
    }
  }

 protected:
  const MmaParams& p_;
  const int tile_index_, split_, kv_head_;
  const int32_t key_end_;
  int32_t heads_begin_;  // from here on rows see their groups, and keys are not in the order of their tokens
  KeyRange hole_;        // steps in which no row sees a key
};

}  // namespace nld
