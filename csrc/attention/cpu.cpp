// CPU code of block attention, compiled once per ISA. docs/attention.md explains the layout.
//
// Lanes are query rows: scores are kept transposed [key][row], the accumulator [dim][row], so that keys and values are
// broadcast as they lie in memory, softmax needs no horizontal step, and a row's arithmetic does not depend on its
// neighbours. A "word" is 32 bits: one float, or two bfloat16 that one instruction multiplies and adds.
#include <math.h>

#include "attention/attention.h"
#include "common/vec.h"

namespace nld::NLD_ISA {
namespace {

constexpr int kTileKeys = 128;               // keys gathered at a time
constexpr int kPanelVecs = 2;                // registers of rows in one micro-kernel
constexpr int kCols = kLanes == 16 ? 8 : 4;  // keys or dims in one micro-kernel
constexpr float kInf = __builtin_inff();

int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }
int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- the two ways to multiply words ----

struct DotF32 {
  typedef float Word;
  static constexpr int kPair = 1;  // elements of the summed dimension in a word
  static inline __attribute__((always_inline)) VecF multiply_add(VecF a, Word b, VecF c) { return fma(a, set1(b), c); }
};

#if defined(__AVX512BF16__)
struct DotBf16 {
  typedef uint32_t Word;
  static constexpr int kPair = 2;
  static inline __attribute__((always_inline)) VecF multiply_add(VecF a, Word b, VecF c) {
    return (VecF)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)_mm512_set1_epi32(static_cast<int>(b)));
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

// acc[col][row] += sum over steps of a[step][row] * b[step * b_step + col * b_col]; a holds kVecs registers per step.
template <class Dot, int kVecs>
NLD_INLINE void multiply(const float* a, const typename Dot::Word* b, int64_t num_steps, int64_t b_step, int64_t b_col,
                         VecF (&acc)[kCols][kVecs]) {
  for (int64_t step = 0; step < num_steps; ++step, a += kVecs * kLanes, b += b_step) {
    VecF row[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) row[v] = load(a + v * kLanes);
#pragma GCC unroll 16
    for (int col = 0; col < kCols; ++col) {
      const typename Dot::Word word = b[col * b_col];
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) acc[col][v] = Dot::multiply_add(row[v], word, acc[col][v]);
    }
  }
}

// ---- one work item's memory ----

// Sizes that follow from the arguments alone.
struct Shape {
  int64_t rows;       // rows of a tile, whole registers
  int64_t keys;       // keys of a tile, whole micro-kernels
  int64_t dims;       // head_dim, whole micro-kernels: a column of O, and the words of a value pair
  int64_t dim_words;  // words of one key
};

template <class Dot>
Shape shape_of(const AttentionParams& p, int64_t max_rows, int64_t max_keys) {
  return {round_up(max_rows, kLanes), round_up(max_keys < kTileKeys ? max_keys : kTileKeys, 16),
          round_up(p.head_dim, 16), (p.head_dim + Dot::kPair - 1) / Dot::kPair};
}

// Running result of a tile: row r has maximum m[r], sum l[r] and the unnormalised output o[panel][dim][row].
struct Accumulator {
  float *m, *l, *o;
};

Accumulator accumulator_at(float* memory, int64_t rows) { return {memory, memory + rows, memory + 2 * rows}; }
int64_t accumulator_floats(int64_t rows, int64_t dims) { return rows * (dims + 2); }

template <class Dot>
struct Scratch {
  typename Dot::Word *q, *k, *v;  // q: [panel][dim word][row], k: [key][dim word], v: [key / pair][dim]
  float* s;                       // [key][row] of one panel: scores, then probabilities
  int32_t* view;                  // RowView of each row, field by field: [4][rows]
  Accumulator split, total;

  static int64_t floats(const Shape& shape) {
    return 16 + shape.rows * (round_up(shape.dim_words, 16) + 4) +
           shape.keys * (round_up(shape.dim_words, 16) + shape.dims) + shape.keys * kPanelVecs * kLanes +
           2 * accumulator_floats(shape.rows, shape.dims);
  }
  Scratch(const Shape& shape, float* memory) {
    typedef typename Dot::Word Word;
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory);
    memory += (64 - address % 64) % 64 / 4;
    q = reinterpret_cast<Word*>(memory);
    k = reinterpret_cast<Word*>(memory += shape.rows * round_up(shape.dim_words, 16));
    v = reinterpret_cast<Word*>(memory += shape.keys * round_up(shape.dim_words, 16));
    s = memory += shape.keys * shape.dims;
    view = reinterpret_cast<int32_t*>(memory += shape.keys * kPanelVecs * kLanes);
    split = accumulator_at(memory += 4 * shape.rows, shape.rows);
    total = accumulator_at(memory + accumulator_floats(shape.rows, shape.dims), shape.rows);
  }
};

// ---- gather: queries, keys and values into words ----

template <class T>
const T* query_row(const AttentionParams& p, const AttentionItem& item, int64_t r) {
  const int64_t heads_per_kv = p.num_heads / p.num_kv_heads, row = item.row_begin + r;
  return static_cast<const T*>(p.q) + (p.cu_seqlens_q[item.request] + row / heads_per_kv) * p.q_token_stride +
         (item.kv_head * heads_per_kv + row % heads_per_kv) * p.q_head_stride;
}

// The word at `dim_word` of a row of head_dim elements.
NLD_INLINE float word_at(const float* x, int64_t i, int64_t) { return x[i]; }
NLD_INLINE float word_at(const f16* x, int64_t i, int64_t) { return to_float(x[i]); }
#if defined(__AVX512BF16__)
NLD_INLINE uint32_t word_at(const bf16* x, int64_t i, int64_t head_dim) {
  return x[2 * i].bits | (2 * i + 1 < head_dim ? static_cast<uint32_t>(x[2 * i + 1].bits) << 16 : 0u);
}
#else
NLD_INLINE float word_at(const bf16* x, int64_t i, int64_t) { return to_float(x[i]); }
#endif

template <class T, class Dot>
void gather_queries(const AttentionParams& p, const AttentionItem& item, const Shape& shape, Scratch<Dot>& scratch) {
  const int64_t rows = round_up(item.num_rows, kLanes);
  for (int64_t row0 = 0; row0 < rows; row0 += kPanelVecs * kLanes) {
    const int64_t width = min64(kPanelVecs * kLanes, rows - row0);
    typename Dot::Word* panel = scratch.q + row0 * shape.dim_words;
    for (int64_t r = 0; r < width; ++r) {
      const T* x = row0 + r < item.num_rows ? query_row<T>(p, item, row0 + r) : nullptr;
      for (int64_t i = 0; i < shape.dim_words; ++i) {
        panel[i * width + r] = x != nullptr ? word_at(x, i, p.head_dim) : typename Dot::Word(0);
      }
    }
  }
}

NLD_INLINE void copy_floats(const float* x, float* y, int64_t n) { memcpy(y, x, n * sizeof(float)); }
template <class T>
NLD_INLINE void copy_floats(const T* x, float* y, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, load(x + i));
  for (; i < n; ++i) y[i] = to_float(x[i]);
}

template <class T>
NLD_INLINE void gather_key(const T* x, float* y, int64_t head_dim) {
  copy_floats(x, y, head_dim);
}

// Values of one pair of keys; x1 is null for the key past the end.
template <class T>
NLD_INLINE void gather_value(const T* x0, const T*, float* y, int64_t head_dim, int64_t dims) {
  copy_floats(x0, y, head_dim);
  for (int64_t i = head_dim; i < dims; ++i) y[i] = 0.0f;
}

#if defined(__AVX512BF16__)
NLD_INLINE void gather_key(const bf16* x, uint32_t* y, int64_t head_dim) {
  if (head_dim % 2 != 0) y[head_dim / 2] = x[head_dim - 1].bits;
  memcpy(y, x, head_dim / 2 * sizeof(uint32_t));
}
NLD_INLINE void gather_value(const bf16* x0, const bf16* x1, uint32_t* y, int64_t head_dim, int64_t dims) {
  int64_t i = 0;
  for (; i + 16 <= head_dim; i += 16) {
    VecU16 low, high = {};
    memcpy(&low, x0 + i, sizeof(low));
    if (x1 != nullptr) memcpy(&high, x1 + i, sizeof(high));
    const VecU pair = __builtin_convertvector(low, VecU) | (__builtin_convertvector(high, VecU) << 16);
    memcpy(y + i, &pair, sizeof(pair));
  }
  for (; i < head_dim; ++i) y[i] = x0[i].bits | (x1 != nullptr ? static_cast<uint32_t>(x1[i].bits) << 16 : 0u);
  for (; i < dims; ++i) y[i] = 0;
}
#endif

// Walks the rows of one kv head of a request through its page table.
template <class T>
struct KvReader {
  const T *k, *v;
  const int32_t* table;
  int64_t page_size, k_page, k_token, v_page, v_token;

  KvReader(const AttentionParams& p, const AttentionItem& item)
      : k(static_cast<const T*>(p.k.data) + item.kv_head * p.k.head_stride),
        v(static_cast<const T*>(p.v.data) + item.kv_head * p.v.head_stride),
        table(p.page_table + item.request * p.page_table_stride),
        page_size(p.page_size),
        k_page(p.k.page_stride),
        k_token(p.k.token_stride),
        v_page(p.v.page_stride),
        v_token(p.v.token_stride) {}
  __attribute__((always_inline)) const T* key(int64_t i) const {
    return k + table[i / page_size] * k_page + i % page_size * k_token;
  }
  __attribute__((always_inline)) const T* value(int64_t i) const {
    return v + table[i / page_size] * v_page + i % page_size * v_token;
  }
};

// Keys [key0, key0 + num_keys) of the request; nothing past them is read, so garbage beyond seq_len stays unseen.
template <class T, class Dot>
void gather_tile(const KvReader<T>& reader, int64_t key0, int64_t num_keys, int64_t head_dim, const Shape& shape,
                 Scratch<Dot>& scratch) {
  for (int64_t i = 0; i < num_keys; ++i) gather_key(reader.key(key0 + i), scratch.k + i * shape.dim_words, head_dim);
  for (int64_t i = 0; i < num_keys; i += Dot::kPair) {
    const T* second = Dot::kPair == 2 && i + 1 < num_keys ? reader.value(key0 + i + 1) : nullptr;
    gather_value(reader.value(key0 + i), second, scratch.v + i / Dot::kPair * shape.dims, head_dim, shape.dims);
  }
}

// ---- one tile of keys for one panel of rows ----

// Scales, caps and masks scores in place, returns the new maxima.
template <int kVecs>
NLD_INLINE void mask_scores(const AttentionParams& p, const RequestMask& mask, const int32_t* view, int64_t view_stride,
                            int64_t key0, int64_t num_keys, bool masked, float* s, VecF (&m)[kVecs]) {
  const bool quadratic = mask.mode == MaskMode::kQuadratic;
  VecI dense_end[kVecs], head_end[kVecs], group_begin[kVecs], group_end[kVecs];
  for (int v = 0; v < kVecs; ++v) {
    memcpy(&dense_end[v], view + v * kLanes, sizeof(VecI));
    memcpy(&head_end[v], view + view_stride + v * kLanes, sizeof(VecI));
    memcpy(&group_begin[v], view + 2 * view_stride + v * kLanes, sizeof(VecI));
    memcpy(&group_end[v], view + 3 * view_stride + v * kLanes, sizeof(VecI));
  }
  for (int64_t i = 0; i < num_keys; ++i) {
    const int32_t key = static_cast<int32_t>(key0 + i);
    const bool head = quadratic && is_group_head(mask, key);
    for (int v = 0; v < kVecs; ++v) {
      float* at = s + (i * kVecs + v) * kLanes;
      VecF score = load(at) * p.softmax_scale;
      if (p.softcap > 0) score = p.softcap * tanh(score / p.softcap);
      if (masked) {
        VecI visible = dense_end[v] > key;
        if (quadratic) {
          visible |= (group_begin[v] <= key) & (group_end[v] > key);
          if (head) visible |= head_end[v] > key;
        }
        score = visible ? score : set1(-kInf);
      }
      store(at, score);
      m[v] = score > m[v] ? score : m[v];
    }
  }
}

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

template <class Dot, int kVecs>
void panel_tile(const AttentionParams& p, const RequestMask& mask, const Shape& shape, const Scratch<Dot>& scratch,
                int64_t row0, int64_t key0, int64_t num_keys, bool masked) {
  constexpr int kWidth = kVecs * kLanes;
  const float* q = reinterpret_cast<const float*>(scratch.q + row0 * shape.dim_words);
  for (int64_t key = 0; key < num_keys; key += kCols) {
    VecF acc[kCols][kVecs] = {};
    multiply<Dot, kVecs>(q, scratch.k + key * shape.dim_words, shape.dim_words, 1, shape.dim_words, acc);
#pragma GCC unroll 16
    for (int col = 0; col < kCols; ++col) {
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) store(scratch.s + (key + col) * kWidth + v * kLanes, acc[col][v]);
    }
  }

  VecF m[kVecs], l[kVecs], m_old[kVecs], decay[kVecs];
  for (int v = 0; v < kVecs; ++v) {
    m[v] = m_old[v] = load(scratch.split.m + row0 + v * kLanes);
    l[v] = load(scratch.split.l + row0 + v * kLanes);
  }
  mask_scores<kVecs>(p, mask, scratch.view + row0, shape.rows, key0, num_keys, masked, scratch.s, m);
  for (int v = 0; v < kVecs; ++v) {
    store(scratch.split.m + row0 + v * kLanes, m[v]);
    m[v] = m[v] == -kInf ? VecF{} : m[v];  // a row that has seen nothing: exp(-inf - 0) = 0 and no NaN
    decay[v] = exp(m_old[v] - m[v]);
    l[v] *= decay[v];
  }
  exponentiate<kVecs>(Dot(), scratch.s, num_keys, m, l);
  for (int v = 0; v < kVecs; ++v) store(scratch.split.l + row0 + v * kLanes, l[v]);

  float* o = scratch.split.o + row0 * shape.dims;
  const int64_t num_steps = (num_keys + Dot::kPair - 1) / Dot::kPair;
  for (int64_t dim = 0; dim < shape.dims; dim += kCols) {
    VecF acc[kCols][kVecs];
#pragma GCC unroll 16
    for (int col = 0; col < kCols; ++col) {
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) acc[col][v] = load(o + (dim + col) * kWidth + v * kLanes) * decay[v];
    }
    multiply<Dot, kVecs>(scratch.s, scratch.v + dim, num_steps, shape.dims, 1, acc);
#pragma GCC unroll 16
    for (int col = 0; col < kCols; ++col) {
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) store(o + (dim + col) * kWidth + v * kLanes, acc[col][v]);
    }
  }
}

// ---- a tile of rows ----

template <class Dot>
void set_views(const RequestMask& mask, const AttentionParams& p, const AttentionItem& item, const Shape& shape,
               const Scratch<Dot>& scratch) {
  const int64_t heads_per_kv = p.num_heads / p.num_kv_heads;
  for (int64_t r = 0; r < round_up(item.num_rows, kLanes); ++r) {
    RowView view = {0, 0, 0, 0};
    if (r < item.num_rows) view = row_view(mask, static_cast<int32_t>((item.row_begin + r) / heads_per_kv));
    scratch.view[r] = view.dense_end;
    scratch.view[shape.rows + r] = view.head_end;
    scratch.view[2 * shape.rows + r] = view.group_begin;
    scratch.view[3 * shape.rows + r] = view.group_end;
  }
}

void clear(const Accumulator& acc, int64_t rows, int64_t dims) {
  for (int64_t r = 0; r < rows; ++r) acc.m[r] = -kInf;
  memset(acc.l, 0, rows * sizeof(float));
  memset(acc.o, 0, rows * dims * sizeof(float));
}

// One split of the keys into scratch.split, from scratch.q and scratch.view.
template <class T, class Dot>
void run_split(const AttentionParams& p, const AttentionItem& item, int64_t split, const Shape& shape,
               Scratch<Dot>& scratch) {
  const RequestMask mask = request_mask(p, item.request);
  const KvReader<T> reader(p, item);
  const int64_t rows = round_up(item.num_rows, kLanes);
  clear(scratch.split, rows, shape.dims);
  // Ends over each panel: keys everybody sees, keys anybody sees.
  int64_t dense_end[kAttentionTileRows / kLanes + 1], any_end[kAttentionTileRows / kLanes + 1];
  int64_t last = 0;
  for (int64_t row0 = 0, panel = 0; row0 < rows; row0 += kPanelVecs * kLanes, ++panel) {
    dense_end[panel] = mask.seq_len;
    any_end[panel] = 0;
    for (int64_t r = row0; r < min64(row0 + kPanelVecs * kLanes, item.num_rows); ++r) {
      const RowView view = {scratch.view[r], scratch.view[shape.rows + r], scratch.view[2 * shape.rows + r],
                            scratch.view[3 * shape.rows + r]};
      const int64_t end = view_end(view);
      if (view.dense_end < dense_end[panel]) dense_end[panel] = view.dense_end;
      if (end > any_end[panel]) any_end[panel] = end;
    }
    if (any_end[panel] > last) last = any_end[panel];
  }
  last = min64(last, (split + 1) * p.split_len);
  for (int64_t key0 = split * p.split_len; key0 < last; key0 += kTileKeys) {
    const int64_t num_keys = min64(kTileKeys, last - key0);
    gather_tile<T, Dot>(reader, key0, num_keys, p.head_dim, shape, scratch);
    for (int64_t row0 = 0, panel = 0; row0 < rows; row0 += kPanelVecs * kLanes, ++panel) {
      if (any_end[panel] <= key0) continue;
      const bool masked = dense_end[panel] < key0 + num_keys;
      if (rows - row0 >= kPanelVecs * kLanes) {
        panel_tile<Dot, kPanelVecs>(p, mask, shape, scratch, row0, key0, num_keys, masked);
      } else {
        panel_tile<Dot, 1>(p, mask, shape, scratch, row0, key0, num_keys, masked);
      }
    }
  }
}

// total += part, row by row.
void fold(const Accumulator& total, const Accumulator& part, int64_t rows, int64_t dims) {
  for (int64_t row0 = 0; row0 < rows; row0 += kPanelVecs * kLanes) {
    const int64_t width = min64(kPanelVecs * kLanes, rows - row0);
    for (int64_t r = row0; r < row0 + width; r += kLanes) {
      const VecF m0 = load(total.m + r), m1 = load(part.m + r);
      const VecF m = m0 > m1 ? m0 : m1;
      const VecF safe = m == -kInf ? VecF{} : m;
      const VecF w0 = exp(m0 - safe), w1 = exp(m1 - safe);
      store(total.m + r, m);
      store(total.l + r, load(total.l + r) * w0 + load(part.l + r) * w1);
      for (int64_t dim = 0; dim < dims; ++dim) {
        const int64_t at = row0 * dims + dim * width + (r - row0);
        store(total.o + at, load(total.o + at) * w0 + load(part.o + at) * w1);
      }
    }
  }
}

template <class T>
void write_rows(const AttentionParams& p, const AttentionItem& item, const Accumulator& total, int64_t dims) {
  const int64_t heads_per_kv = p.num_heads / p.num_kv_heads, rows = round_up(item.num_rows, kLanes);
  for (int64_t r = 0; r < item.num_rows; ++r) {
    const int64_t row0 = r / (kPanelVecs * kLanes) * (kPanelVecs * kLanes);
    const int64_t width = min64(kPanelVecs * kLanes, rows - row0);
    const float* o = total.o + row0 * dims + (r - row0);
    const int64_t row = item.row_begin + r, head = item.kv_head * heads_per_kv + row % heads_per_kv;
    const int64_t token = p.cu_seqlens_q[item.request] + row / heads_per_kv;
    T* out = static_cast<T*>(p.out) + token * p.out_token_stride + head * p.out_head_stride;
    const float l = total.l[r];
    const bool seen = total.m[r] != -kInf;
    for (int64_t dim = 0; dim < p.head_dim; ++dim) from_float(seen ? o[dim * width] / l : 0.0f, out[dim]);
    p.lse[head * p.lse_head_stride + token * p.lse_token_stride] = seen ? total.m[r] + logf(l) : -kInf;
  }
}

// ---- entry points for one element type ----

template <class T>
struct Kernel {
  typedef typename DotFor<T>::Type Dot;

  static Shape shape(const AttentionParams& p, const AttentionItem& item) {
    return shape_of<Dot>(p, item.num_rows, p.seq_lens[item.request]);
  }
  static void attend(const AttentionParams& p, const AttentionItem& item, float* memory) {
    const Shape s = shape(p, item);
    Scratch<Dot> scratch(s, memory);
    gather_queries<T, Dot>(p, item, s, scratch);
    set_views<Dot>(request_mask(p, item.request), p, item, s, scratch);
    clear(scratch.total, s.rows, s.dims);
    for (int64_t split = 0; split < item.num_splits; ++split) {
      run_split<T, Dot>(p, item, split, s, scratch);
      fold(scratch.total, scratch.split, s.rows, s.dims);
    }
    write_rows<T>(p, item, scratch.total, s.dims);
  }
  static void attend_split(const AttentionParams& p, const AttentionItem& item, int64_t split, float* memory,
                           float* partial) {
    const Shape s = shape(p, item);
    Scratch<Dot> scratch(s, memory);
    scratch.split = accumulator_at(partial, s.rows);
    gather_queries<T, Dot>(p, item, s, scratch);
    set_views<Dot>(request_mask(p, item.request), p, item, s, scratch);
    run_split<T, Dot>(p, item, split, s, scratch);
  }
  static void merge(const AttentionParams& p, const AttentionItem& item, const float* partials, int64_t partial_stride,
                    float* memory) {
    const Shape s = shape(p, item);
    const Scratch<Dot> scratch(s, memory);
    clear(scratch.total, s.rows, s.dims);
    for (int64_t split = 0; split < item.num_splits; ++split) {
      fold(scratch.total, accumulator_at(const_cast<float*>(partials) + split * partial_stride, s.rows), s.rows,
           s.dims);
    }
    write_rows<T>(p, item, scratch.total, s.dims);
  }
  static int64_t scratch_floats(const AttentionParams& p, int64_t max_rows, int64_t max_keys) {
    return Scratch<Dot>::floats(shape_of<Dot>(p, max_rows, max_keys));
  }
  static int64_t partial_floats(const AttentionParams& p, int64_t num_rows) {
    const Shape s = shape_of<Dot>(p, num_rows, 0);
    return accumulator_floats(s.rows, s.dims);
  }
  static void clear_tokens(const AttentionParams& p, int64_t token_begin, int64_t token_end) {
    for (int64_t token = token_begin; token < token_end; ++token) {
      for (int64_t head = 0; head < p.num_heads; ++head) {
        T* out = static_cast<T*>(p.out) + token * p.out_token_stride + head * p.out_head_stride;
        memset(out, 0, p.head_dim * sizeof(T));
        p.lse[head * p.lse_head_stride + token * p.lse_token_stride] = -kInf;
      }
    }
  }
};

#define NLD_BY_DTYPE(call)        \
  switch (p.dtype) {              \
    case DType::kF32:             \
      return Kernel<float>::call; \
    case DType::kBF16:            \
      return Kernel<bf16>::call;  \
    case DType::kF16:             \
      return Kernel<f16>::call;   \
  }

int64_t scratch_floats(const AttentionParams& p, int64_t max_rows, int64_t max_keys) {
  NLD_BY_DTYPE(scratch_floats(p, max_rows, max_keys))
  return 0;
}
int64_t partial_floats(const AttentionParams& p, int64_t num_rows) {
  NLD_BY_DTYPE(partial_floats(p, num_rows))
  return 0;
}
void attend(const AttentionParams& p, const AttentionItem& item, float* scratch) {
  NLD_BY_DTYPE(attend(p, item, scratch))
}
void attend_split(const AttentionParams& p, const AttentionItem& item, int64_t split, float* scratch, float* partial) {
  NLD_BY_DTYPE(attend_split(p, item, split, scratch, partial))
}
void merge(const AttentionParams& p, const AttentionItem& item, const float* partials, int64_t partial_stride,
           float* scratch) {
  NLD_BY_DTYPE(merge(p, item, partials, partial_stride, scratch))
}
void clear_tokens(const AttentionParams& p, int64_t token_begin, int64_t token_end) {
  NLD_BY_DTYPE(clear_tokens(p, token_begin, token_end))
}

}  // namespace

extern const AttentionCpu attention_cpu = {scratch_floats, partial_floats, attend, attend_split, merge, clear_tokens};

}  // namespace nld::NLD_ISA
