// The inner loops of block attention on a CPU: one tile of keys for one panel of rows. Part of cpu.cpp, per ISA.
//
// Lanes are query rows: scores are kept transposed [key][row], the accumulator [dim][row], so that keys and values are
// broadcast as they lie in memory, softmax needs no horizontal step, and a row's arithmetic does not depend on its
// neighbours. A "word" is 32 bits: one float, or two bfloat16 that one instruction multiplies and adds.
#pragma once

#include "attention/attention.h"
#include "common/vec.h"

namespace nld::NLD_ISA {
namespace {

constexpr int kTileKeys = 64;                // keys gathered at a time
constexpr int kPanelVecs = 2;                // registers of rows in one micro-kernel
constexpr int kCols = kLanes == 16 ? 8 : 4;  // keys or dims in one micro-kernel
constexpr float kInf = __builtin_inff();

NLD_INLINE int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }
NLD_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- the two ways to multiply words ----

// Half a register, for tiles of few rows: CPUs that split a 512-bit instruction in two run twice as many of these.
#if defined(__AVX512F__)
constexpr int kNarrowLanes = kLanes / 2;
typedef float VecNarrow __attribute__((vector_size(kNarrowLanes * 4)));
#else
constexpr int kNarrowLanes = 0;
typedef VecF VecNarrow;
#endif

struct DotF32 {
  typedef float Word;
  static constexpr int kPair = 1;  // elements of the summed dimension in a word
  static inline __attribute__((always_inline)) VecF multiply_add(VecF a, Word b, VecF c) { return fma(a, set1(b), c); }
#if defined(__AVX512F__)
  static inline __attribute__((always_inline)) VecNarrow multiply_add(VecNarrow a, Word b, VecNarrow c) {
    return (VecNarrow)_mm256_fmadd_ps((__m256)a, _mm256_set1_ps(b), (__m256)c);
  }
#endif
};

#if defined(__AVX512BF16__)
struct DotBf16 {
  typedef uint32_t Word;
  static constexpr int kPair = 2;
  static inline __attribute__((always_inline)) VecF multiply_add(VecF a, Word b, VecF c) {
    return (VecF)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)_mm512_set1_epi32(static_cast<int>(b)));
  }
  static inline __attribute__((always_inline)) VecNarrow multiply_add(VecNarrow a, Word b, VecNarrow c) {
    return (VecNarrow)_mm256_dpbf16_ps((__m256)c, (__m256bh)a, (__m256bh)_mm256_set1_epi32(static_cast<int>(b)));
  }
};
#endif

template <class T>
struct DotFor {
  typedef DotF32 Type;
};
#if defined(__AVX512BF16__)
template <>
struct DotFor<bf16> {
  typedef DotBf16 Type;
};
#endif

// acc[col][row] += sum over steps of a[step][row] * b[step * b_step + col * b_col]; a holds kVecs registers per step,
// of which Vec (VecF, or VecNarrow with kVecs 1) is used.
template <class Dot, class Vec, int kVecs>
NLD_INLINE void multiply(const float* a, const typename Dot::Word* b, int64_t num_steps, int64_t b_step, int64_t b_col,
                         Vec (&acc)[kCols][kVecs]) {
  for (int64_t step = 0; step < num_steps; ++step, a += kVecs * kLanes, b += b_step) {
    Vec row[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) memcpy(&row[v], a + v * kLanes, sizeof(Vec));
#pragma GCC unroll 16
    for (int col = 0; col < kCols; ++col) {
      const typename Dot::Word word = b[col * b_col];
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) acc[col][v] = Dot::multiply_add(row[v], word, acc[col][v]);
    }
  }
}

// Between a register and its first half, the other half zero. Through memory, the half store would stall the full load.
template <class Vec>
NLD_INLINE Vec first_lanes(VecF x) {
  return x;
}
NLD_INLINE VecF all_lanes(VecF x) { return x; }
#if defined(__AVX512F__)
template <>
inline __attribute__((always_inline)) VecNarrow first_lanes<VecNarrow>(VecF x) {
  return (VecNarrow)_mm512_castps512_ps256((__m512)x);
}
NLD_INLINE VecF all_lanes(VecNarrow x) { return (VecF)_mm512_zextps256_ps512((__m256)x); }
#endif

// ---- memory of one tile ----

// Sizes that follow from the arguments alone.
struct Shape {
  int64_t rows;       // rows of a tile, whole registers
  int64_t keys;       // keys of a tile, whole micro-kernels
  int64_t dims;       // head_dim, whole micro-kernels: a column of O, and the words of a value pair
  int64_t dim_words;  // words of one key
};

// Running result of a tile: row r has maximum m[r], sum l[r] and the unnormalised output o[panel][dim][row].
struct Accumulator {
  float *m, *l, *o;
};

// What panel_tile works on. q: [panel][dim word][row], k: [key][dim word], v: [key / pair][dim].
template <class Dot>
struct TileBuffers {
  typename Dot::Word *q, *k, *v;
  float* s;       // [key][row] of one panel: scores, then probabilities
  int32_t* view;  // RowView of each row, field by field: [3][rows]
  Accumulator split;
};

// Steps through the keys and values of one kv head of a request in their order, page by page; strides in bytes.
struct KvWalker {
  const char *k_base, *v_base, *k = nullptr, *v = nullptr;
  const int32_t* table;
  const KeyOrder order;
  int64_t page_size, k_page, k_token, v_page, v_token;
  int64_t key = 0, offset = 0, end = 0;  // the next key, where in its page, and up to which key the next ones follow

  KvWalker(const AttentionParams& p, const AttentionItem& item, int64_t element_bytes)
      : k_base(static_cast<const char*>(p.k.data) + item.kv_head * p.k.head_stride * element_bytes),
        v_base(static_cast<const char*>(p.v.data) + item.kv_head * p.v.head_stride * element_bytes),
        table(p.page_table + item.request * p.page_table_stride),
        order(key_order(request_mask(p, item.request))),
        page_size(min64(p.page_size, INT32_MAX)),  // no token lies further
        k_page(p.k.page_stride * element_bytes),
        k_token(p.k.token_stride * element_bytes),
        v_page(p.v.page_stride * element_bytes),
        v_token(p.v.token_stride * element_bytes) {}
  void seek(int64_t to) {
    const uint32_t token = token_of_key(order, static_cast<int32_t>(to));
    const int64_t page = token / static_cast<uint32_t>(page_size);  // 32 bits: heads and tails seek often
    key = to;
    offset = token - page * page_size;
    end = min64(key + page_size - offset, key_run_end(order, static_cast<int32_t>(to)));
    k = k_base + table[page] * k_page;
    v = v_base + table[page] * v_page;
  }
  // Opens a page only when one of its keys is asked for: entries past the last one may hold anything.
  __attribute__((always_inline)) void next(const char*& key_row, const char*& value_row) {
    if (key == end) seek(key);
    key_row = k + offset * k_token;
    value_row = v + offset * v_token;
    ++offset;
    ++key;
  }
};

// Brings the next tile towards the cache while this one is computed: a few keys per micro-kernel. Rows of one kv head
// lie a token stride apart, often on another memory page each, so the hardware does not foresee them.
struct Prefetcher {
  KvWalker walker;
  int64_t row_bytes, remaining = 0, keys_per_step = 0;

  void start(int64_t key0, int64_t num_keys, int64_t num_steps) {
    remaining = num_keys;
    if (num_keys <= 0) return;
    walker.seek(key0);
    keys_per_step = (num_keys + num_steps - 1) / num_steps;
  }
  __attribute__((always_inline)) void step() {
    for (int64_t n = keys_per_step; n > 0 && remaining > 0; --n, --remaining) {
      const char *k, *v;
      walker.next(k, v);
      for (int64_t at = 0; at < row_bytes; at += 64) {
        __builtin_prefetch(k + at, 0, 2);
        __builtin_prefetch(v + at, 0, 2);
      }
    }
  }
};

// ---- scores ----

// s = scale * q k for all keys of the tile. kPlain: no mask and no cap, so the maxima are taken on the way.
template <class Dot, class Vec, int kVecs, bool kPlain>
NLD_INLINE void score_tile(const TileBuffers<Dot>& buffers, const float* q, int64_t dim_words, int64_t num_keys,
                           float scale, Prefetcher& prefetcher, VecF (&m)[kVecs]) {
  const typename Dot::Word* k = buffers.k;
  float* s = buffers.s;
  for (int64_t key = 0; key < num_keys; key += kCols, k += kCols * dim_words, s += kCols * kVecs * kLanes) {
    prefetcher.step();
    Vec acc[kCols][kVecs] = {};
    multiply<Dot>(q, k, dim_words, 1, dim_words, acc);
#pragma GCC unroll 16
    for (int col = 0; col < kCols; ++col) {
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) {
        const VecF score = all_lanes(acc[col][v]) * scale;
        store(s + (col * kVecs + v) * kLanes, score);
        if (kPlain) m[v] = score > m[v] ? score : m[v];
      }
    }
  }
}

template <int kVecs>
NLD_INLINE void cap_scores(float softcap, float* s, int64_t num_keys) {
  for (int64_t i = 0; i < num_keys * kVecs; ++i) store(s + i * kLanes, softcap * tanh(load(s + i * kLanes) / softcap));
}

// Scores of keys a row does not see become -inf.
template <int kVecs>
NLD_INLINE void mask_scores(const int32_t* view, int64_t view_stride, int64_t key0, int64_t num_keys, float* s) {
  VecI dense_end[kVecs], group_begin[kVecs], group_end[kVecs];
  for (int v = 0; v < kVecs; ++v) {
    memcpy(&dense_end[v], view + v * kLanes, sizeof(VecI));
    memcpy(&group_begin[v], view + view_stride + v * kLanes, sizeof(VecI));
    memcpy(&group_end[v], view + 2 * view_stride + v * kLanes, sizeof(VecI));
  }
  for (int64_t i = 0; i < num_keys; ++i) {
    const int32_t key = static_cast<int32_t>(key0 + i);
    for (int v = 0; v < kVecs; ++v) {
      float* at = s + (i * kVecs + v) * kLanes;
      const VecI visible = (dense_end[v] > key) | ((group_begin[v] <= key) & (group_end[v] > key));
      store(at, visible ? load(at) : set1(-kInf));
    }
  }
}

// ---- softmax ----

// Probabilities of a panel as words: f32 in place, or pairs of keys rounded to bfloat16.
template <int kVecs>
NLD_INLINE void exponentiate(DotF32, float* s, int64_t num_keys, const VecF (&m)[kVecs], VecF (&l)[kVecs]) {
  for (int64_t i = 0; i < num_keys; ++i) {
    for (int v = 0; v < kVecs; ++v) {
      float* at = s + (i * kVecs + v) * kLanes;
      const VecF probability = exp(load(at) - m[v]);
      l[v] += probability;
      store(at, probability);
    }
  }
}
#if defined(__AVX512BF16__)
template <int kVecs>
NLD_INLINE void exponentiate(DotBf16, float* s, int64_t num_keys, const VecF (&m)[kVecs], VecF (&l)[kVecs]) {
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                              6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  for (int64_t i = 0; i < num_keys; i += 2) {
    for (int v = 0; v < kVecs; ++v) {
      const VecF first = exp(load(s + (i * kVecs + v) * kLanes) - m[v]);
      VecF second = {};
      if (i + 1 < num_keys) second = exp(load(s + ((i + 1) * kVecs + v) * kLanes) - m[v]);
      l[v] += first;
      l[v] += second;
      const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
      // Row i / 2 of pairs lies at or before the scores just read.
      store(s + (i / 2 * kVecs + v) * kLanes, (VecF)_mm512_permutexvar_epi16(interleave, halves));
    }
  }
}
#endif

// ---- all of it for one panel: online softmax over the tile, added to the running result of its rows ----

template <class Dot, class Vec, int kVecs>
void panel_tile(const AttentionParams& p, float scale, const Shape& shape, const TileBuffers<Dot>& buffers,
                int64_t row0, int64_t key0, int64_t num_keys, bool masked, Prefetcher& prefetcher) {
  constexpr int kWidth = kVecs * kLanes;
  const float* q = reinterpret_cast<const float*>(buffers.q + row0 * shape.dim_words);
  const Accumulator acc_rows = buffers.split;
  VecF m[kVecs], l[kVecs], m_old[kVecs], decay[kVecs];
  for (int v = 0; v < kVecs; ++v) {
    m[v] = m_old[v] = load(acc_rows.m + row0 + v * kLanes);
    l[v] = load(acc_rows.l + row0 + v * kLanes);
  }
  if (!masked && p.softcap == 0 && num_keys % kCols == 0) {
    score_tile<Dot, Vec, kVecs, true>(buffers, q, shape.dim_words, num_keys, scale, prefetcher, m);
  } else {
    score_tile<Dot, Vec, kVecs, false>(buffers, q, shape.dim_words, num_keys, scale, prefetcher, m);
    if (p.softcap > 0) cap_scores<kVecs>(p.softcap, buffers.s, num_keys);
    if (masked) mask_scores<kVecs>(buffers.view + row0, shape.rows, key0, num_keys, buffers.s);
    for (int64_t i = 0; i < num_keys; ++i) {
      for (int v = 0; v < kVecs; ++v) {
        const VecF score = load(buffers.s + (i * kVecs + v) * kLanes);
        m[v] = score > m[v] ? score : m[v];
      }
    }
  }
  for (int v = 0; v < kVecs; ++v) {
    store(acc_rows.m + row0 + v * kLanes, m[v]);
    m[v] = m[v] == -kInf ? VecF{} : m[v];  // a row that has seen nothing: exp(-inf - 0) = 0 and no NaN
    decay[v] = exp(m_old[v] - m[v]);
    l[v] *= decay[v];
  }
  exponentiate<kVecs>(Dot(), buffers.s, num_keys, m, l);
  for (int v = 0; v < kVecs; ++v) store(acc_rows.l + row0 + v * kLanes, l[v]);

  float* o = acc_rows.o + row0 * shape.dims;
  const typename Dot::Word* values = buffers.v;
  const int64_t num_steps = (num_keys + Dot::kPair - 1) / Dot::kPair, dims = shape.dims;
  for (int64_t dim = 0; dim < dims; dim += kCols, o += kCols * kWidth) {
    prefetcher.step();
    Vec acc[kCols][kVecs];
#pragma GCC unroll 16
    for (int col = 0; col < kCols; ++col) {
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) {
        acc[col][v] = first_lanes<Vec>(load(o + col * kWidth + v * kLanes) * decay[v]);
      }
    }
    multiply<Dot>(buffers.s, values + dim, num_steps, dims, 1, acc);
#pragma GCC unroll 16
    for (int col = 0; col < kCols; ++col) {
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) store(o + col * kWidth + v * kLanes, all_lanes(acc[col][v]));
    }
  }
}

}  // namespace
}  // namespace nld::NLD_ISA
