// CPU code of the cache writes, compiled once per ISA.
#include <string.h>

#include "common/vec.h"
#include "kv_cache/kv_cache.h"
#include "kv_cache/rotation.h"

namespace nld::NLD_ISA {
namespace {

constexpr int kMaxFreqs = 256;  // op.cpp refuses larger heads

typedef double VecD __attribute__((vector_size(kLanes * 8)));
typedef int64_t VecL __attribute__((vector_size(kLanes * 8)));

// Cosine and sine of any float32 angle, error about 1e-7. The quadrant is taken off in double: angles are positions, up
// to hundreds of thousands of radians, and float32 has no digits left there.
NLD_INLINE void sincos(VecF angle, VecF& cosine, VecF& sine) {
  constexpr double kTwoOverPi = 0.63661977236758134, kHalfPi = 1.57079632679489662;
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer held in the low bits
  const VecD wide = __builtin_convertvector(angle, VecD);
  const VecD rounded = wide * kTwoOverPi + kRound;
  const VecI quadrant = __builtin_convertvector((VecL)rounded, VecI);
  const VecF r = __builtin_convertvector(wide - (rounded - kRound) * kHalfPi, VecF);  // in [-pi/4, pi/4]
  const VecF r2 = r * r;
  VecF s = fma(r2, set1(-1.9515295891e-4f), set1(8.3321608736e-3f));
  s = fma(fma(s, r2, set1(-1.6666654611e-1f)), r2 * r, r);
  VecF c = fma(r2, set1(2.443315711809948e-5f), set1(-1.388731625493765e-3f));
  c = fma(fma(c, r2, set1(4.166664568298827e-2f)), r2 * r2, fma(r2, set1(-0.5f), set1(1.0f)));
  const VecI odd = (quadrant & 1) == 1;
  cosine = as_float(as_int(odd ? s : c) ^ (((quadrant + 1) & 2) << 30));
  sine = as_float(as_int(odd ? c : s) ^ ((quadrant & 2) << 30));
}

// Factors of one token, [num_freqs] each. The angle is one float32 product, as the published model computes it.
NLD_INLINE void rotation(const RopeAppendParams& p, float position, float* cos, float* sin) {
  for (int64_t i = 0; i < p.num_freqs; i += kLanes) {
    const int n = p.num_freqs - i < kLanes ? static_cast<int>(p.num_freqs - i) : kLanes;
    VecF c, s;
    sincos((n == kLanes ? load(p.inv_freq + i) : load_partial(p.inv_freq + i, n, 0.0f)) * position, c, s);
    store(cos + i, c * p.attention_scaling);  // whole registers: the arrays have room for them
    store(sin + i, s * p.attention_scaling);
  }
}

// What is done to each element of a head on its way: queries are multiplied, what an fp8 cache keeps is divided.
struct Times {
  float factor;
  template <class V>
  inline __attribute__((always_inline)) V operator()(V x) const {
    return x * factor;
  }
};
struct Over {
  float divisor;
  template <class V>
  inline __attribute__((always_inline)) V operator()(V x) const {
    return x / divisor;
  }
};

// y[0..n) = first half, y[n..2n) = second half of the rotated part of one head; `scale` is applied to all of the head.
template <class T, class Y, class Scale>
void rotate_head(const T* x, Y* y, const float* cos, const float* sin, int64_t num_freqs, int64_t head_dim,
                 Scale scale) {
  int64_t i = 0;
  for (; i + kLanes <= num_freqs; i += kLanes) {
    const VecF first = load(x + i), second = load(x + num_freqs + i), c = load(cos + i), s = load(sin + i);
    store(y + i, scale(first * c - second * s));
    store(y + num_freqs + i, scale(second * c + first * s));
  }
  for (; i < num_freqs; ++i) {
    const float first = to_float(x[i]), second = to_float(x[num_freqs + i]);
    from_float(scale(first * cos[i] - second * sin[i]), y[i]);
    from_float(scale(second * cos[i] + first * sin[i]), y[num_freqs + i]);
  }
  for (i = 2 * num_freqs; i + kLanes <= head_dim; i += kLanes) store(y + i, scale(load(x + i)));
  for (; i < head_dim; ++i) from_float(scale(to_float(x[i])), y[i]);
}

template <class T>
T* cache_row(const PagedCache& cache, int64_t slot, int64_t page_size, int64_t head) {
  return static_cast<T*>(cache.data) + (slot / page_size) * cache.page_stride +
         (slot % page_size) * cache.token_stride + head * cache.head_stride;
}

template <class T>
void rope_append_tokens(const RopeAppendParams& p, int64_t token_begin, int64_t token_end) {
  float cos[kMaxFreqs], sin[kMaxFreqs];
  for (int64_t token = token_begin; token < token_end; ++token) {
    rotation(p, static_cast<float>(p.positions[token]), cos, sin);
    const float q_scale = query_scale(p, p.positions[token]);
    T* q = static_cast<T*>(p.q) + token * p.q_token_stride;
    for (int64_t head = 0; head < p.num_heads; ++head, q += p.q_head_stride) {
      rotate_head(q, q, cos, sin, p.num_freqs, p.head_dim, Times{q_scale});
    }
    const int64_t slot = p.slots[token];
    if (slot < 0 || slot >= p.num_slots) continue;
    const T* k = static_cast<const T*>(p.k) + token * p.k_token_stride;
    const T* v = static_cast<const T*>(p.v) + token * p.v_token_stride;
    for (int64_t head = 0; head < p.num_kv_heads; ++head, k += p.k_head_stride, v += p.v_head_stride) {
      if (p.is_fp8) {
        const Over k_scale{scale_of_head(p.k_scale, head)}, v_scale{scale_of_head(p.v_scale, head)};
        rotate_head(k, cache_row<e4m3>(p.k_cache, slot, p.page_size, head), cos, sin, p.num_freqs, p.head_dim, k_scale);
        rotate_head(v, cache_row<e4m3>(p.v_cache, slot, p.page_size, head), cos, sin, 0, p.head_dim, v_scale);
        continue;
      }
      rotate_head(k, cache_row<T>(p.k_cache, slot, p.page_size, head), cos, sin, p.num_freqs, p.head_dim, Times{1.0f});
      memcpy(cache_row<T>(p.v_cache, slot, p.page_size, head), v, p.head_dim * sizeof(T));
    }
  }
}

void rope_append(const RopeAppendParams& p, int64_t token_begin, int64_t token_end) {
  switch (p.dtype) {
    case DType::kF32:
      return rope_append_tokens<float>(p, token_begin, token_end);
    case DType::kBF16:
      return rope_append_tokens<bf16>(p, token_begin, token_end);
    case DType::kF16:
      return rope_append_tokens<f16>(p, token_begin, token_end);
  }
}

// Moves only need bytes. A source never lies before its destination and both grow, so ascending order is safe in place.
void compact_one(const CompactParams& p, const PagedCache& cache, int64_t layer_stride, int64_t layer,
                 int64_t request) {
  const int32_t* pages = p.page_table + request * p.page_table_stride;
  char* layer_data = static_cast<char*>(cache.data) + layer * layer_stride * p.element_size;
  const auto entry = [&](int64_t index) -> char* {  // null where the table has no page for it
    const int64_t page = index / p.page_size;
    if (index < 0 || page >= p.max_pages || pages[page] < 0 || pages[page] >= p.num_pages) return nullptr;
    return layer_data + (pages[page] * cache.page_stride + (index % p.page_size) * cache.token_stride) * p.element_size;
  };
  const int64_t base = p.base_lens[request], head_bytes = cache.head_stride * p.element_size;
  const int64_t num_kept = p.num_kept[request] < p.max_kept ? p.num_kept[request] : p.max_kept;
  for (int64_t i = 0; i < num_kept; ++i) {
    const int64_t src = base + p.src_offsets[request * p.max_kept + i], dst = base + i;
    if (src == dst) continue;
    const char* from = entry(src);
    char* to = entry(dst);
    if (from == nullptr || to == nullptr) continue;
    for (int64_t head = 0; head < p.num_kv_heads; ++head) {
      memcpy(to + head * head_bytes, from + head * head_bytes, p.head_dim * p.element_size);
    }
  }
}

void compact(const CompactParams& p, int64_t item_begin, int64_t item_end) {
  for (int64_t item = item_begin; item < item_end; ++item) {
    const int64_t layer = item / p.batch, request = item % p.batch;
    compact_one(p, p.k_cache, p.k_layer_stride, layer, request);
    compact_one(p, p.v_cache, p.v_layer_stride, layer, request);
  }
}

}  // namespace

extern const KvCacheCpu kv_cache_cpu = {rope_append, compact};

}  // namespace nld::NLD_ISA
