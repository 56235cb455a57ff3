// Attention without tensor cores, for every dtype and head_dim up to kMaxSimtDim.
#pragma once

#include "attention/rows.cuh"
#include "common/ptx.cuh"

namespace nld {

constexpr int kSimtWarps = 4, kSimtThreads = kSimtWarps * kWarpSize, kSimtWarpRows = 4;
constexpr int kSimtRows = kSimtWarps * kSimtWarpRows;  // packed rows of one CTA
constexpr int kSimtKeys = kWarpSize;                   // keys in shared memory at a time: a lane each
static_assert(16 % kSimtRows == 0, "tiles are whole row groups");

// Shared memory, in floats: q [kSimtRows][pitch], k then v [kSimtKeys][pitch], p [kSimtRows][kSimtKeys]. An odd pitch
// lets the lanes of a warp read one dim of 32 keys from 32 banks.
NLD_HD int32_t simt_pitch(int64_t head_dim) { return static_cast<int32_t>(head_dim | 1); }
NLD_HD int32_t simt_smem_floats(int64_t head_dim) {
  return (kSimtRows + kSimtKeys) * simt_pitch(head_dim) + kSimtRows * kSimtKeys;
}

// Keys [key0, key0 + kSimtKeys) of one kv head into shared memory as float32; zeros from `end` on, where nothing is
// read.
template <class T>
__device__ __forceinline__ void load_keys(const AttentionCudaParams& p, const KvPages& pages, int32_t request,
                                          int32_t heads_begin, int32_t kv_head, int32_t key0, int32_t end, float* to) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, pitch = simt_pitch(p.head_dim);
  const int head_dim = static_cast<int>(p.head_dim);
  const int32_t* table = p.page_table + request * p.page_table_stride;
  for (int i = warp; i < kSimtKeys; i += kSimtWarps) {
    if (key0 + i < end) {
      const int32_t token = key_token(p, request, heads_begin, key0 + i);
      const int32_t index = token / static_cast<int32_t>(p.page_size);
      const int32_t offset = token % static_cast<int32_t>(p.page_size);
      const int64_t page = table[NLD_BUG(simt_wrong_page) && offset == 0 && index > 0 ? index - 1 : index];
      NLD_DEVICE_CHECK(page >= 0 && page < p.num_pages, "page indices in use lie in the cache");
      const int64_t place = page * pages.page_stride + offset * pages.token_stride + kv_head * pages.head_stride;
      if (p.is_fp8) {
        const e4m3* x = static_cast<const e4m3*>(pages.data) + place;
        for (int dim = lane; dim < head_dim; dim += kWarpSize) to[i * pitch + dim] = to_float(x[dim]);
      } else {
        const T* x = static_cast<const T*>(pages.data) + place;
        for (int dim = lane; dim < head_dim; dim += kWarpSize) to[i * pitch + dim] = to_float(x[dim]);
      }
    } else {
      for (int dim = lane; dim < head_dim; dim += kWarpSize) to[i * pitch + dim] = 0.0f;
    }
  }
}

// One CTA: 16 packed rows of one item, for one kv head; grid (items, kv heads, row groups of a tile). A warp owns 4
// rows: scores with a lane per key, then the product with V with a lane per dim (kDims of them), online softmax in
// between. Traffic: K and V once per 16 rows, so tile_rows / 16 times per item, the repeats from L2. This is the slow
// path (float32, odd head_dims): simple, exact float32, no row's arithmetic depends on another row. K and V share a
// buffer so that head_dim 512 fits 99 KB; 16 rows rather than 32 keep the accumulators in registers there.
template <class T, int kDims>
__global__ void __launch_bounds__(kSimtThreads) attention_simt_kernel(const __grid_constant__ AttentionCudaParams p) {
  NLD_DYNAMIC_SMEM(float, smem);
  if (!NLD_BUG(simt_no_wait)) ptx::wait_for_previous_kernel();
  ptx::allow_next_kernel();
  clear_rows<T>(p, owned_rows(p), threadIdx.x / kWarpSize, kSimtWarps);
  const Plan plan = plan_view(p.plan, p.plan_shape.max_tiles);
  NLD_DEVICE_CHECK(plan_fits(*plan.header, p.plan_shape), "the plan was made for these sizes");
  const int32_t item_index = static_cast<int32_t>(blockIdx.x), kv_head = static_cast<int32_t>(blockIdx.y);
  if (item_index >= plan.header->num_items) return;
  const PlanItem item = plan.items[item_index];
  const PlanTile tile = plan.tiles[item.tile];
  const int32_t group_begin = static_cast<int32_t>(blockIdx.z) * kSimtRows;
  if (group_begin >= tile.num_rows) return;

  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, pitch = simt_pitch(p.head_dim);
  const int head_dim = static_cast<int>(p.head_dim);
  float* const q = smem;
  float* const kv = q + kSimtRows * pitch;
  float* const probabilities = kv + kSimtKeys * pitch + warp * kSimtWarpRows * kSimtKeys;

  const RequestMask mask = request_mask(p, tile.request);
  NLD_DEVICE_CHECK(tile.key_end <= p.max_pages * p.page_size, "seq_lens fit the page table");
  const int32_t heads_per_kv = p.plan_shape.heads_per_kv;
  const int32_t group_rows = min(kSimtRows, tile.num_rows - group_begin);
  const int32_t first_row = (tile.row_begin + group_begin) / heads_per_kv;
  const int32_t last_row = (tile.row_begin + group_begin + group_rows - 1) / heads_per_kv;
  const TileKeys seen_keys = tile_keys(mask, first_row, last_row);  // by these rows, of which the tile may have more
  const KeyRange hole = whole_steps(seen_keys.hole_begin, seen_keys.hole_end, item.key_begin, kSimtKeys);
  int32_t end = min(item.key_end, seen_keys.key_end);
  if (NLD_BUG(simt_lost_tail)) end = end / kSimtKeys * kSimtKeys;

  const float scale = p.softmax_scale * key_scale(p, kv_head);
  RowView view[kSimtWarpRows];
  float m[kSimtWarpRows], l[kSimtWarpRows], o[kSimtWarpRows][kDims];  // l: this lane's share
#pragma unroll
  for (int i = 0; i < kSimtWarpRows; ++i) {
    const int32_t r = warp * kSimtWarpRows + i;
    view[i] = {0, 0, 0};
    m[i] = -INFINITY;
    l[i] = 0.0f;
#pragma unroll
    for (int d = 0; d < kDims; ++d) o[i][d] = 0.0f;
    if (r < group_rows) {
      const int32_t row = tile.row_begin + group_begin + r;
      view[i] = row_view(mask, row / heads_per_kv);
      const RowPlace place = row_place(p, tile.request, row, kv_head);
      const T* x = static_cast<const T*>(p.q) + place.token * p.q_token_stride + place.head * p.q_head_stride;
      for (int dim = lane; dim < head_dim; dim += kWarpSize) q[r * pitch + dim] = to_float(x[dim]);
    } else {
      for (int dim = lane; dim < head_dim; dim += kWarpSize) q[r * pitch + dim] = 0.0f;
    }
  }

  const int32_t first_key = after_hole(hole, item.key_begin);
  for (int32_t key0 = first_key; key0 < end; key0 = after_hole(hole, key0 + kSimtKeys)) {
    if (!NLD_BUG(simt_no_barrier)) __syncthreads();  // the values before are used up
    load_keys<T>(p, p.k, tile.request, tile.heads_begin, kv_head, key0, end, kv);
    __syncthreads();
    const int32_t key = key0 + lane;
    float s[kSimtWarpRows] = {};
    const float* k_row = kv + lane * pitch;
    const float* q_rows = q + warp * kSimtWarpRows * pitch;
    for (int dim = 0; dim < head_dim; ++dim) {
      const float k = k_row[dim];
#pragma unroll
      for (int i = 0; i < kSimtWarpRows; ++i) s[i] = __fmaf_rn(q_rows[i * pitch + dim], k, s[i]);
    }
#pragma unroll
    for (int i = 0; i < kSimtWarpRows; ++i) {
      s[i] *= scale;
      if (p.softcap > 0.0f) s[i] = p.softcap * tanhf(s[i] / p.softcap);
      const int32_t dense_end =
          NLD_BUG(simt_mask_edge) && view[i].dense_end < end ? view[i].dense_end + 1 : view[i].dense_end;
      const bool seen = key < dense_end || (key >= view[i].group_begin && key < view[i].group_end);
      // `end` may be that of the split: later keys have been loaded by nobody.
      s[i] = seen && key < end ? s[i] : -INFINITY;
      float m_new = s[i];
#pragma unroll
      for (int x = kWarpSize / 2; x > 0; x /= 2) m_new = fmaxf(m_new, __shfl_xor_sync(kFullMask, m_new, x));
      m_new = fmaxf(m[i], m_new);
      const float safe = m_new == -INFINITY ? 0.0f : m_new;  // nothing seen yet: exp(-inf - 0) = 0 and no NaN
      const float decay = expf(m[i] - safe), probability = expf(s[i] - safe);
      m[i] = m_new;
      l[i] = l[i] * decay + probability;
      probabilities[i * kSimtKeys + lane] = probability;
#pragma unroll
      for (int d = 0; d < kDims; ++d) o[i][d] *= decay;
    }
    __syncthreads();  // K is used up
    load_keys<T>(p, p.v, tile.request, tile.heads_begin, kv_head, key0, end, kv);
    __syncthreads();
    for (int j = 0; j < kSimtKeys; ++j) {
      float probability[kSimtWarpRows];
#pragma unroll
      for (int i = 0; i < kSimtWarpRows; ++i) probability[i] = probabilities[i * kSimtKeys + j];
#pragma unroll
      for (int d = 0; d < kDims; ++d) {
        const int dim = d * kWarpSize + lane;
        if (dim >= head_dim) continue;
        const float v = kv[j * pitch + dim];
#pragma unroll
        for (int i = 0; i < kSimtWarpRows; ++i) {
          // A NaN of a key that a row does not see must not reach it through 0 * NaN.
          o[i][d] = probability[i] == 0.0f ? o[i][d] : __fmaf_rn(probability[i], v, o[i][d]);
        }
      }
    }
  }

#pragma unroll
  for (int i = 0; i < kSimtWarpRows; ++i) {
    const int32_t r = warp * kSimtWarpRows + i;
#pragma unroll
    for (int x = kWarpSize / 2; x > 0; x /= 2) l[i] += __shfl_xor_sync(kFullMask, l[i], x);
    if (r >= group_rows) continue;  // uniform in the warp; no barrier follows
    if (tile.num_splits == 1) {
      const RowPlace place = row_place(p, tile.request, tile.row_begin + group_begin + r, kv_head);
      T* out = static_cast<T*>(p.out) + place.token * p.out_token_stride + place.head * p.out_head_stride;
      const float out_scale = row_scale(p, kv_head, l[i]);
#pragma unroll
      for (int d = 0; d < kDims; ++d) {
        const int dim = d * kWarpSize + lane;
        if (dim < head_dim) out[dim] = from_float<T>(o[i][d] * out_scale);
      }
      if (lane == 0) {
        p.lse[place.head * p.lse_head_stride + place.token * p.lse_token_stride] = row_lse(m[i] * kLog2e, l[i]);
      }
    } else {
      const int64_t at = partial_row(p, tile.first_slot + item.split, kv_head, group_begin + r);
#pragma unroll
      for (int d = 0; d < kDims; ++d) {
        const int dim = d * kWarpSize + lane;
        if (dim < head_dim) p.partial_o[at * head_dim + dim] = o[i][d];
      }
      if (lane == 0) {
        p.partial_m[at] = m[i] * kLog2e;
        p.partial_l[at] = l[i];
      }
    }
  }
}

}  // namespace nld
