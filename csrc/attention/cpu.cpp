// CPU code of block attention, compiled once per ISA: gathering, tiles of rows, splits. docs/attention.md has the
// picture.
#include <math.h>

#include "attention/cpu_tile.h"

namespace nld::NLD_ISA {
namespace {

// ---- one work item's memory ----

template <class Dot>
Shape shape_of(const AttentionParams& p, int64_t max_rows, int64_t max_keys) {
  return {round_up(max_rows, kLanes), round_up(max_keys < kTileKeys ? max_keys : kTileKeys, 16),
          round_up(p.head_dim, 16), (p.head_dim + Dot::kPair - 1) / Dot::kPair};
}

Accumulator accumulator_at(float* memory, int64_t rows) { return {memory, memory + rows, memory + 2 * rows}; }
int64_t accumulator_floats(int64_t rows, int64_t dims) { return rows * (dims + 2); }

template <class Dot>
struct Scratch : TileBuffers<Dot> {
  Accumulator total;

  static int64_t floats(const Shape& shape) {
    return 16 + shape.rows * (round_up(shape.dim_words, 16) + 3) +
           shape.keys * (round_up(shape.dim_words, 16) + shape.dims) + shape.keys * kPanelVecs * kLanes +
           2 * accumulator_floats(shape.rows, shape.dims);
  }
  Scratch(const Shape& shape, float* memory) {
    typedef typename Dot::Word Word;
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory);
    memory += (64 - address % 64) % 64 / 4;
    this->q = reinterpret_cast<Word*>(memory);
    this->k = reinterpret_cast<Word*>(memory += shape.rows * round_up(shape.dim_words, 16));
    this->v = reinterpret_cast<Word*>(memory += shape.keys * round_up(shape.dim_words, 16));
    this->s = memory += shape.keys * shape.dims;
    this->view = reinterpret_cast<int32_t*>(memory += shape.keys * kPanelVecs * kLanes);
    this->split = accumulator_at(memory += 3 * shape.rows, shape.rows);
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
  int64_t i = 0;
  for (; i + 2 * kLanes <= head_dim; i += 2 * kLanes) {
    VecU words;
    memcpy(&words, x + i, sizeof(words));
    memcpy(y + i / 2, &words, sizeof(words));
  }
  for (; i < head_dim; i += 2) y[i / 2] = word_at(x, i / 2, head_dim);
}
NLD_INLINE void gather_value(const bf16* x0, const bf16* x1, uint32_t* y, int64_t head_dim, int64_t dims) {
  int64_t i = 0;
  for (; i + 16 <= head_dim; i += 16) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x0 + i)));
    __m512i high = _mm512_setzero_si512();
    if (x1 != nullptr) high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x1 + i)));
    _mm512_storeu_si512(y + i, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
  for (; i < head_dim; ++i) y[i] = x0[i].bits | (x1 != nullptr ? static_cast<uint32_t>(x1[i].bits) << 16 : 0u);
  for (; i < dims; ++i) y[i] = 0;
}

// The 128 magnitudes of e4m3 in bfloat16.
struct E4m3Magnitudes {
  alignas(64) uint16_t bf16[128];
};
constexpr E4m3Magnitudes e4m3_magnitudes() {
  E4m3Magnitudes table = {};
  for (int code = 8; code < 127; ++code) table.bf16[code] = static_cast<uint16_t>((code << 4) + (kE4m3Rebias >> 16));
  table.bf16[127] = 0x7fc0;
  constexpr uint16_t kSubnormals[8] = {0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60};  // n * 2^-9
  for (int code = 0; code < 8; ++code) table.bf16[code] = kSubnormals[code];
  return table;
}
alignas(64) constexpr E4m3Magnitudes kMagnitudes = e4m3_magnitudes();

// 32 codes to bfloat16 by look-up: half the instructions of load(const e4m3*), and nothing to convert afterwards.
NLD_INLINE __m512i bf16_of(__m256i codes) {
  const __m512i code = _mm512_cvtepu8_epi16(codes);
  const auto table = [](int i) __attribute__((always_inline)) { return _mm512_load_si512(kMagnitudes.bf16 + 32 * i); };
  const __m512i low = _mm512_permutex2var_epi16(table(0), code, table(1));
  const __m512i high = _mm512_permutex2var_epi16(table(2), code, table(3));
  const __mmask32 is_high = _mm512_test_epi16_mask(code, _mm512_set1_epi16(0x40));
  const __m512i sign = _mm512_slli_epi16(_mm512_and_si512(code, _mm512_set1_epi16(0x80)), 8);
  return _mm512_or_si512(_mm512_mask_mov_epi16(low, is_high, high), sign);
}
NLD_INLINE uint32_t bf16_of(e4m3 x) {
  return kMagnitudes.bf16[x.bits & 0x7f] | static_cast<uint32_t>(x.bits & 0x80) << 8;
}

NLD_INLINE void gather_key(const e4m3* x, uint32_t* y, int64_t head_dim) {
  int64_t i = 0;
  for (; i + 32 <= head_dim; i += 32) {
    _mm512_storeu_si512(y + i / 2, bf16_of(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i))));
  }
  for (; i < head_dim; i += 2) y[i / 2] = bf16_of(x[i]) | (i + 1 < head_dim ? bf16_of(x[i + 1]) << 16 : 0u);
}
NLD_INLINE void gather_value(const e4m3* x0, const e4m3* x1, uint32_t* y, int64_t head_dim, int64_t dims) {
  int64_t i = 0;
  for (; i + 16 <= head_dim; i += 16) {
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x0 + i));
    __m128i high = _mm_setzero_si128();
    if (x1 != nullptr) high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x1 + i));
    const __m256i pairs = _mm256_set_m128i(_mm_unpackhi_epi8(low, high), _mm_unpacklo_epi8(low, high));
    _mm512_storeu_si512(y + i, bf16_of(pairs));
  }
  for (; i < head_dim; ++i) y[i] = bf16_of(x0[i]) | (x1 != nullptr ? bf16_of(x1[i]) << 16 : 0u);
  for (; i < dims; ++i) y[i] = 0;
}
#endif

// The next num_keys keys of the request; nothing past them is read, so garbage beyond seq_len stays unseen.
template <class Kv, class Dot>
void gather_tile(KvWalker& walker, int64_t num_keys, int64_t head_dim, const Shape& shape,
                 const TileBuffers<Dot>& buffers) {
  const int64_t dim_words = shape.dim_words, dims = shape.dims;
  typename Dot::Word *k = buffers.k, *v = buffers.v;
  for (int64_t i = 0; i < num_keys; i += Dot::kPair, v += dims) {
    const char *key, *value[2] = {nullptr, nullptr};
#pragma GCC unroll 2
    for (int half = 0; half < Dot::kPair; ++half) {
      if (i + half >= num_keys) break;
      walker.next(key, value[half]);
      gather_key(reinterpret_cast<const Kv*>(key), k, head_dim);
      k += dim_words;
    }
    gather_value(reinterpret_cast<const Kv*>(value[0]), reinterpret_cast<const Kv*>(value[1]), v, head_dim, dims);
  }
}

// ---- a tile of rows ----

template <class Dot>
void set_views(const RequestMask& mask, const AttentionParams& p, const AttentionItem& item, const Shape& shape,
               const Scratch<Dot>& scratch) {
  const int64_t heads_per_kv = p.num_heads / p.num_kv_heads;
  for (int64_t r = 0; r < round_up(item.num_rows, kLanes); ++r) {
    RowView view = {0, 0, 0};
    if (r < item.num_rows) view = row_view(mask, static_cast<int32_t>((item.row_begin + r) / heads_per_kv));
    scratch.view[r] = view.dense_end;
    scratch.view[shape.rows + r] = view.group_begin;
    scratch.view[2 * shape.rows + r] = view.group_end;
  }
}

void clear(const Accumulator& acc, int64_t rows, int64_t dims) {
  for (int64_t r = 0; r < rows; ++r) acc.m[r] = -kInf;
  memset(acc.l, 0, rows * sizeof(float));
  memset(acc.o, 0, rows * dims * sizeof(float));
}

// One split of the keys into scratch.split, from scratch.q and scratch.view. Kv is what the caches hold.
template <class Kv, class Dot>
void run_split(const AttentionParams& p, const AttentionItem& item, int64_t split, const Shape& shape,
               Scratch<Dot>& scratch) {
  constexpr int64_t kPanelRows = kPanelVecs * kLanes;
  const RequestMask mask = request_mask(p, item.request);
  const float scale = p.softmax_scale * scale_of_head(p.k_scale, item.kv_head);
  const int64_t rows = round_up(item.num_rows, kLanes), num_panels = (rows + kPanelRows - 1) / kPanelRows;
  clear(scratch.split, rows, shape.dims);
  const int64_t heads_per_kv = p.num_heads / p.num_kv_heads;
  const auto keys_of = [&](int64_t row0, int64_t num_rows) {
    return tile_keys(mask, static_cast<int32_t>((item.row_begin + row0) / heads_per_kv),
                     static_cast<int32_t>((item.row_begin + row0 + num_rows - 1) / heads_per_kv));
  };
  const TileKeys item_keys = keys_of(0, item.num_rows);
  const int64_t begin = split * p.split_len, last = min64(item_keys.key_end, begin + p.split_len);
  if (begin >= last) return;
  const KeyRange hole = whole_steps(item_keys.hole_begin, item_keys.hole_end, static_cast<int32_t>(begin), kTileKeys);
  const int64_t first = begin == hole.begin ? hole.end : begin;
  if (first >= last) return;
  TileKeys panel_keys[kAttentionTileRows / kPanelRows + 1];
  for (int64_t row0 = 0; row0 < rows; row0 += kPanelRows) {
    panel_keys[row0 / kPanelRows] = keys_of(row0, min64(kPanelRows, item.num_rows - row0));
  }
  KvWalker walker(p, item, sizeof(Kv));
  Prefetcher prefetcher{walker, p.head_dim * static_cast<int64_t>(sizeof(Kv))};
  for (int64_t key0 = first, next; key0 < last; key0 = next) {
    const int64_t num_keys = min64(kTileKeys, last - key0);
    next = key0 + num_keys == hole.begin ? hole.end : key0 + num_keys;
    if (key0 != walker.key || key0 == first) walker.seek(key0);
    gather_tile<Kv, Dot>(walker, num_keys, p.head_dim, shape, scratch);
    prefetcher.start(next, min64(kTileKeys, item_keys.key_end - next), num_panels * (kTileKeys + shape.dims) / kCols);
    for (int64_t row0 = 0; row0 < rows; row0 += kPanelRows) {
      const TileKeys& seen = panel_keys[row0 / kPanelRows];
      if (seen.key_end <= key0 || (seen.hole_begin <= key0 && key0 + num_keys <= seen.hole_end)) continue;
      // Keys past the last visible one would add exact zeros.
      const int64_t visible_keys = min64(num_keys, seen.key_end - key0);
      const bool masked = scratch.view[row0] < key0 + visible_keys;  // dense_end of the panel's first row, the lowest
      if (rows - row0 >= kPanelRows) {
        panel_tile<Dot, VecF, kPanelVecs>(p, scale, shape, scratch, row0, key0, visible_keys, masked, prefetcher);
      } else if (item.num_rows <= kNarrowLanes) {
        panel_tile<Dot, VecNarrow, 1>(p, scale, shape, scratch, row0, key0, visible_keys, masked, prefetcher);
      } else {
        panel_tile<Dot, VecF, 1>(p, scale, shape, scratch, row0, key0, visible_keys, masked, prefetcher);
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

// The only place where the scale of V is applied.
template <class T>
void write_rows(const AttentionParams& p, const AttentionItem& item, const Accumulator& total, int64_t dims) {
  const int64_t heads_per_kv = p.num_heads / p.num_kv_heads, rows = round_up(item.num_rows, kLanes);
  const float v_scale = scale_of_head(p.v_scale, item.kv_head);
  for (int64_t r = 0; r < item.num_rows; ++r) {
    const int64_t row0 = r / (kPanelVecs * kLanes) * (kPanelVecs * kLanes);
    const int64_t width = min64(kPanelVecs * kLanes, rows - row0);
    const float* o = total.o + row0 * dims + (r - row0);
    const int64_t row = item.row_begin + r, head = item.kv_head * heads_per_kv + row % heads_per_kv;
    const int64_t token = p.cu_seqlens_q[item.request] + row / heads_per_kv;
    T* out = static_cast<T*>(p.out) + token * p.out_token_stride + head * p.out_head_stride;
    const float l = total.l[r];
    const bool seen = total.m[r] != -kInf;
    for (int64_t dim = 0; dim < p.head_dim; ++dim) from_float(seen ? o[dim * width] / l * v_scale : 0.0f, out[dim]);
    p.lse[head * p.lse_head_stride + token * p.lse_token_stride] = seen ? total.m[r] + logf(l) : -kInf;
  }
}

// ---- entry points for one element type of q and out, and one of the caches ----

template <class T, class Kv = T>
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
      run_split<Kv, Dot>(p, item, split, s, scratch);
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
    run_split<Kv, Dot>(p, item, split, s, scratch);
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

#define NLD_BY_DTYPE(call)                                               \
  switch (p.dtype) {                                                     \
    case DType::kF32:                                                    \
      return p.is_fp8 ? Kernel<float, e4m3>::call : Kernel<float>::call; \
    case DType::kBF16:                                                   \
      return p.is_fp8 ? Kernel<bf16, e4m3>::call : Kernel<bf16>::call;   \
    case DType::kF16:                                                    \
      return p.is_fp8 ? Kernel<f16, e4m3>::call : Kernel<f16>::call;     \
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
