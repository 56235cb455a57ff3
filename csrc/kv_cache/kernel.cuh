// rope_append_ and compact_ on CUDA.
#pragma once

#include "common/element.cuh"
#include "common/philox.h"
#include "kv_cache/kv_cache.h"
#include "kv_cache/rotation.h"

namespace nld {

constexpr int kRopeThreads = 128;

// How the heads of one token are cut into items, and items into CTAs. An item is what a thread moves: the same few
// elements of both rotated halves of a head, or of the part behind them.
struct RopeTiling {
  int heads, pairs, parts, items;  // q, k and v heads; items of the halves of a head, of a head, of a token
  int tokens;                      // whole tokens of a CTA ...
  int ctas_per_token;              // ... or, if one token is too much for a CTA, how many share it
  int table_len;                   // cosines of a CTA

  __host__ __device__ int smem_bytes() const {
    return 2 * table_len * static_cast<int>(sizeof(float)) + tokens * (2 * 8 + static_cast<int>(sizeof(float)));
  }
};

// kSize elements, in pieces of at most 16 bytes.
template <int kSize>
__device__ __forceinline__ void load_table(const float* table, float (&x)[kSize]) {
  constexpr int kPiece = kSize < 4 ? kSize : 4;
#pragma unroll
  for (int i = 0; i < kSize; i += kPiece) {
    const auto v = *reinterpret_cast<const Vec<float, kPiece>*>(table + i);
#pragma unroll
    for (int e = 0; e < kPiece; ++e) x[i + e] = v.at[e];
  }
}

// What an fp8 cache keeps of x.
template <int kSize>
__device__ __forceinline__ void store_divided(const float (&x)[kSize], float scale, e4m3* y) {
  Vec<e4m3, kSize> codes;
#pragma unroll
  for (int e = 0; e < kSize; ++e) codes.at[e] = e4m3_from_float(div_rn(x[e], scale));
  *reinterpret_cast<Vec<e4m3, kSize>*>(y) = codes;
}

// One CTA takes kItems * kRopeThreads items: some whole tokens, or a share of one (grid: token groups x shares). All
// its loads of q, k and v are issued first; the places, cosines and sines of its tokens are worked out, once per token,
// in their shadow: a step of a few tokens is over after two trips to memory. Traffic: rope_append_bytes(). q is read
// and written, k and v are read once and written once. Lost: one CTA per token (a queue of dependent loads; 3/4 of the
// threads idle where there are few heads).
template <class T, int kSize, int kItems>
__global__ void __launch_bounds__(kRopeThreads)
    rope_append_kernel(const __grid_constant__ RopeAppendParams p, const RopeTiling tiling) {
  using V = Vec<T, kSize>;
  NLD_DYNAMIC_SMEM(float, smem);
  // cos[table_len], sin[table_len], then per token: places of k and v in the caches (-1: not written), scale of q
  float* const cos_table = smem;
  float* const sin_table = smem + tiling.table_len;
  auto* const k_place = reinterpret_cast<int64_t*>(smem + 2 * tiling.table_len);
  int64_t* const v_place = k_place + tiling.tokens;
  auto* const q_scale = reinterpret_cast<float*>(v_place + tiling.tokens);

  const int num_freqs = static_cast<int>(p.num_freqs), num_heads = static_cast<int>(p.num_heads);
  const int num_kv_heads = static_cast<int>(p.num_kv_heads);
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * tiling.tokens;
  const int64_t tokens_left = p.total_tokens - first_token;
  const int tokens = tokens_left < tiling.tokens ? static_cast<int>(tokens_left) : tiling.tokens;
  const int num_items = tokens * tiling.items - (NLD_BUG(rope_lost_tail) ? 1 : 0);

  struct Item {
    V first, second;  // the halves; second stays unused behind them
    int token, head, at;
  } items[kItems];
#pragma unroll
  for (int n = 0; n < kItems; ++n) {
    Item& item = items[n];
    const int i = (static_cast<int>(blockIdx.y) * kItems + n) * kRopeThreads + static_cast<int>(threadIdx.x);
    item.token = i < num_items ? static_cast<int>(static_cast<unsigned>(i) / static_cast<unsigned>(tiling.items)) : -1;
    if (item.token < 0) continue;
    const unsigned in_token = i - item.token * tiling.items;
    item.head = static_cast<int>(in_token / static_cast<unsigned>(tiling.parts));
    const int part = static_cast<int>(in_token) - item.head * tiling.parts;
    item.at = part < tiling.pairs ? part * kSize : 2 * num_freqs + (part - tiling.pairs) * kSize;
    const int64_t token = first_token + item.token;
    const T* x;
    if (item.head < num_heads) {
      x = static_cast<const T*>(p.q) + token * p.q_token_stride + item.head * p.q_head_stride;
    } else if (item.head < num_heads + num_kv_heads) {
      x = static_cast<const T*>(p.k) + token * p.k_token_stride + (item.head - num_heads) * p.k_head_stride;
    } else {
      x = static_cast<const T*>(p.v) + token * p.v_token_stride +
          (item.head - num_heads - num_kv_heads) * p.v_head_stride;
    }
    item.first = *reinterpret_cast<const V*>(x + item.at);
    if (item.at < num_freqs) item.second = *reinterpret_cast<const V*>(x + num_freqs + item.at);
  }

  for (int i = threadIdx.x; i < tokens * num_freqs; i += kRopeThreads) {
    const int token = i / num_freqs, freq = i - token * num_freqs;
    // The angle is one float32 product, as the published model computes it.
    const Rotation r = rotation(mul_rn(p.inv_freq[freq], static_cast<float>(p.positions[first_token + token])));
    cos_table[i] = mul_rn(r.cos, p.attention_scaling);
    sin_table[i] = mul_rn(r.sin, p.attention_scaling);
  }
  for (int token = threadIdx.x; token < tokens; token += kRopeThreads) {
    const int32_t slot = p.slots[first_token + token], position = p.positions[first_token + token];
    const bool writes = slot >= 0 && slot < p.num_slots;
    // Slots are below 2^31: a longer page has them all.
    const uint32_t page_size = p.page_size < INT32_MAX ? static_cast<uint32_t>(p.page_size) : UINT32_MAX;
    const int64_t page = writes ? static_cast<uint32_t>(slot) / page_size : 0;
    const int64_t offset = slot - page * page_size, wrong = NLD_BUG(rope_wrong_page) && offset == 0 && page > 0 ? 1 : 0;
    k_place[token] = writes ? (page - wrong) * p.k_cache.page_stride + offset * p.k_cache.token_stride : -1;
    v_place[token] = writes ? page * p.v_cache.page_stride + offset * p.v_cache.token_stride : -1;
    q_scale[token] = query_scale(p, position);
  }
  if (!NLD_BUG(rope_no_barrier)) __syncthreads();

  const bool swapped = NLD_BUG(rope_wrong_half);
#pragma unroll
  for (int n = 0; n < kItems; ++n) {
    Item& item = items[n];
    if (item.token < 0) continue;
    const bool is_q = item.head < num_heads, is_v = item.head >= num_heads + num_kv_heads;
    const bool has_second = item.at < num_freqs;
    float first[kSize], second[kSize] = {};
#pragma unroll
    for (int e = 0; e < kSize; ++e) first[e] = to_float(item.first.at[e]);
    if (has_second) {
#pragma unroll
      for (int e = 0; e < kSize; ++e) second[e] = to_float(item.second.at[e]);
    }
    if (has_second && !is_v) {
      float c[kSize], s[kSize];
      load_table(cos_table + item.token * num_freqs + item.at, c);
      load_table(sin_table + item.token * num_freqs + item.at, s);
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        const float a = first[e], b = second[e], sine = swapped ? -s[e] : s[e];
        first[e] = add_rn(mul_rn(a, c[e]), -mul_rn(b, sine));
        second[e] = add_rn(mul_rn(b, c[e]), mul_rn(a, sine));
      }
    }
    const int64_t place = is_v ? v_place[item.token] : k_place[item.token];
    if (!is_q && place < 0) continue;
    const PagedCache& cache = is_v ? p.v_cache : p.k_cache;
    const int kv_head = item.head - num_heads - (is_v ? num_kv_heads : 0);
    const int64_t in_cache = place + kv_head * cache.head_stride;
    if (!is_q && p.is_fp8) {
      const float scale = scale_of_head(is_v ? p.v_scale : p.k_scale, NLD_BUG(rope_wrong_scale) ? 0 : kv_head);
      NLD_DEVICE_CHECK(scale > 0.0f && scale < INFINITY, "scales are positive and finite");
      e4m3* const y = static_cast<e4m3*>(cache.data) + in_cache + item.at;
      store_divided<kSize>(first, scale, y);
      if (has_second) store_divided<kSize>(second, scale, y + num_freqs);
      continue;
    }
    if (!is_v) {  // a value is moved as it is
      const float scale = is_q ? q_scale[item.token] : 1.0f;
#pragma unroll
      for (int e = 0; e < kSize; ++e) item.first.at[e] = from_float<T>(mul_rn(first[e], scale));
      if (has_second) {
#pragma unroll
        for (int e = 0; e < kSize; ++e) item.second.at[e] = from_float<T>(mul_rn(second[e], scale));
      }
    }
    T* y = static_cast<T*>(cache.data) + in_cache + item.at;
    if (is_q)
      y = static_cast<T*>(p.q) + (first_token + item.token) * p.q_token_stride + item.head * p.q_head_stride + item.at;
    *reinterpret_cast<V*>(y) = item.first;
    if (has_second) *reinterpret_cast<V*>(y + num_freqs) = item.second;
  }
}

constexpr int kCompactThreads = 128;
constexpr int kCompactEntries = 64;  // entries whose places are worked out at once
constexpr int kCompactAhead = 8;     // entries of a thread in flight

struct CompactSmem {
  int64_t from[kCompactEntries], to[kCompactEntries];  // bytes from the start of the layer; from -1: stays
};

// One CTA per (request, layer, k or v): the places of 64 entries at a time, one thread each, then every thread moves
// its own columns (16 bytes of an entry, where that fits) of all of them, eight loads in flight. Traffic:
// compact_bytes(): an entry that moves is read once and written once. In place and still safe to load ahead: entry i
// goes to base + i and comes from src[i] >= base + i, strictly rising, so a store never hits the source of a later
// entry; and where it hits that of an earlier one, that was loaded before, by the same thread, because a column has one
// thread.
template <class T>
__global__ void __launch_bounds__(kCompactThreads) compact_kernel(const __grid_constant__ CompactParams p) {
  NLD_DYNAMIC_SMEM(CompactSmem, sm);
  const int64_t request = blockIdx.x;
  const bool is_v = blockIdx.z == 1;
  const PagedCache& cache = is_v ? p.v_cache : p.k_cache;
  const int scale = static_cast<int>(p.element_size);  // strides count elements, T may hold several
  char* const data = static_cast<char*>(cache.data) + blockIdx.y * (is_v ? p.v_layer_stride : p.k_layer_stride) * scale;
  const int32_t* const pages = p.page_table + request * p.page_table_stride;
  const int32_t* const src_offsets = p.src_offsets + request * p.max_kept;
  const int64_t base = p.base_lens[request], num_places = p.max_pages * p.page_size;
  const auto place = [&](int64_t index) -> int64_t {  // -1 where the table has no page for it
    if (index < 0 || index >= num_places) return -1;
    // An index is the sum of two int32: it fits 32 unsigned bits, as does what is left of page_size.
    const uint32_t page_size = p.page_size < INT32_MAX ? static_cast<uint32_t>(p.page_size) : UINT32_MAX;
    const uint32_t entry = static_cast<uint32_t>(index) / page_size;
    const int32_t page = pages[entry];
    if (page < 0 || page >= p.num_pages) return -1;
    return (page * cache.page_stride + (index - static_cast<int64_t>(entry) * page_size) * cache.token_stride) * scale;
  };
  const int num_kept = static_cast<int>(p.num_kept[request] < p.max_kept ? p.num_kept[request] : p.max_kept);
  const int per_head = static_cast<int>(p.head_dim) * scale / static_cast<int>(sizeof(T));
  const int columns = static_cast<int>(p.num_kv_heads) * per_head;

  for (int first = 0; first < num_kept; first += kCompactEntries) {
    const int entries = num_kept - first < kCompactEntries ? num_kept - first : kCompactEntries;
    if (first > 0) __syncthreads();  // the last ones were read
    for (int i = threadIdx.x; i < entries; i += kCompactThreads) {
      const int32_t offset = src_offsets[first + i];
      NLD_DEVICE_CHECK(offset >= first + i, "an entry is never moved up");
      NLD_DEVICE_CHECK(first + i == 0 || offset > src_offsets[first + i - 1], "src_offsets rise along a request");
      const bool moves = offset != first + i;
      const int64_t to = moves ? place(base + first + i + (NLD_BUG(compact_wrong_place) ? 1 : 0)) : -1;
      sm->to[i] = to;
      sm->from[i] = to < 0 ? -1 : place(base + offset);
    }
    if (!NLD_BUG(compact_no_barrier)) __syncthreads();
    const int end = entries - (NLD_BUG(compact_lost_tail) ? entries % kCompactAhead : 0);
    for (int column = threadIdx.x; column < columns; column += kCompactThreads) {
      const int head = static_cast<int>(static_cast<unsigned>(column) / static_cast<unsigned>(per_head));
      char* const column_data = data + head * cache.head_stride * scale + (column - head * per_head) * sizeof(T);
      for (int i = 0; i < end; i += kCompactAhead) {
        T moved[kCompactAhead];
#pragma unroll
        for (int j = 0; j < kCompactAhead; ++j) {
          if (i + j < end && sm->from[i + j] >= 0) moved[j] = *reinterpret_cast<T*>(column_data + sm->from[i + j]);
        }
#pragma unroll
        for (int j = 0; j < kCompactAhead; ++j) {
          if (i + j < end && sm->from[i + j] >= 0) *reinterpret_cast<T*>(column_data + sm->to[i + j]) = moved[j];
        }
      }
    }
  }
}

}  // namespace nld
