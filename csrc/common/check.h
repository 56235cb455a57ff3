// Argument checks of the ops. Every message reads "<op>: <argument> must <rule>, got <value>".
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "common/dtype.h"
#include "common/slice_part.h"

namespace nld {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Args>
[[noreturn]] void fail(const Args&... args) {
  std::ostringstream message;
  (message << ... << args);
  throw std::runtime_error(message.str());
}

inline std::string shape_text(const Tensor& t) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << ']';
  return text.str();
}

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    default:
      return "an unsupported dtype";
  }
}

// Unpacks the shape of a tensor and checks its rank: auto [total_q, num_heads, head_dim] = shape<3>(op, "q", q);
template <int kRank>
std::array<int64_t, kRank> shape(const char* op, const char* name, const Tensor& t) {
  if (t.dim() != kRank) fail(op, ": ", name, " must have ", kRank, " dimensions, got shape ", shape_text(t));
  std::array<int64_t, kRank> sizes;
  for (int i = 0; i < kRank; ++i) sizes[i] = t.size(i);
  return sizes;
}

inline void check_size(const char* op, const char* name, const Tensor& t, int64_t dim, int64_t size, const char* what) {
  if (t.size(dim) != size) {
    fail(op, ": ", name, " must have size ", size, " (", what, ") in dimension ", dim, ", got shape ", shape_text(t));
  }
}

inline void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType type) {
  if (t.scalar_type() != type)
    fail(op, ": ", name, " must be ", dtype_name(type), ", got ", dtype_name(t.scalar_type()));
}

inline void check_same_dtype(const char* op, const char* name, const Tensor& t, const char* other_name,
                             const Tensor& other) {
  if (t.scalar_type() != other.scalar_type()) {
    fail(op, ": ", name, " must have the dtype of ", other_name, " (", dtype_name(other.scalar_type()), "), got ",
         dtype_name(t.scalar_type()));
  }
}

inline void check_device(const char* op, const char* name, const Tensor& t, const char* other_name,
                         const Tensor& other) {
  if (t.is_cuda() != other.is_cuda() || t.get_device_index() != other.get_device_index()) {
    fail(op, ": ", name, " must be on the device of ", other_name);
  }
}

// Kernels read rows with vector loads, so elements of the last dimension must lie side by side.
inline void check_last_dim_dense(const char* op, const char* name, const Tensor& t) {
  const int64_t last = t.dim() - 1;
  if (t.size(last) > 1 && t.stride(last) != 1) {
    fail(op, ": ", name, " must have stride 1 in its last dimension, got ", t.stride(last));
  }
}

inline void check_contiguous(const char* op, const char* name, const Tensor& t) {
  if (!t.is_contiguous())
    fail(op, ": ", name, " must be contiguous, got strides that are not, for shape ", shape_text(t));
}

// A dense vector of per-request or per-row values: [size] of one dtype on the device of `like`.
inline void check_vector(const char* op, const char* name, const Tensor& t, int64_t size, const char* what,
                         ScalarType type, const char* like_name, const Tensor& like) {
  shape<1>(op, name, t);
  check_dtype(op, name, t, type);
  check_size(op, name, t, 0, size, what);
  check_contiguous(op, name, t);
  check_device(op, name, t, like_name, like);
}

inline DType float_dtype(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kF32;
    case ScalarType::BFloat16:
      return DType::kBF16;
    case ScalarType::Half:
      return DType::kF16;
    default:
      fail(op, ": ", name, " must be float32, bfloat16 or float16, got ", dtype_name(t.scalar_type()));
  }
}

// Whether the caches hold float8_e4m3fn, with the scales of their kv heads, rather than the dtype of q.
inline bool is_fp8_cache(const char* op, const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                         const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale,
                         int64_t num_kv_heads) {
  const bool is_fp8 = k_cache.scalar_type() == ScalarType::Float8_e4m3fn;
  if (!is_fp8 && k_cache.scalar_type() != q.scalar_type()) {
    fail(op, ": k_cache must have the dtype of q (", dtype_name(q.scalar_type()), ") or float8_e4m3fn, got ",
         dtype_name(k_cache.scalar_type()));
  }
  check_same_dtype(op, "v_cache", v_cache, "k_cache", k_cache);
  for (const auto& [name, scale] : {std::pair{"k_scale", &k_scale}, {"v_scale", &v_scale}}) {
    if (!*scale) continue;
    if (!is_fp8) {
      fail(op, ": ", name, " must be None unless the caches are float8_e4m3fn, got a tensor and ",
           dtype_name(k_cache.scalar_type()), " caches");
    }
    check_vector(op, name, **scale, num_kv_heads, "kv heads", ScalarType::Float, "q", q);
  }
  return is_fp8;
}

// On the CPU, where values are at hand. Null: all 1.
inline void check_scales(const char* op, const char* name, const float* scales, int64_t num_kv_heads) {
  for (int64_t i = 0; scales != nullptr && i < num_kv_heads; ++i) {
    if (!(scales[i] > 0.0f && scales[i] <= std::numeric_limits<float>::max())) {
      fail(op, ": ", name, " must be positive and finite, got ", scales[i], " for kv head ", i);
    }
  }
}

template <class T>
T* ptr(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}
template <class T>
T* ptr(const std::optional<Tensor>& t) {
  return t ? static_cast<T*>(t->data_ptr()) : nullptr;
}

// ---- tensors of SlicePart: what the scan of a shard returns, and the gathered parts of all shards ----

// Ids that a part stands for at most, on any device; the scan of the CPU takes more and leaves parts that say nothing.
constexpr int64_t kPartLen = 8192;

inline int64_t num_slices(int64_t vocab, int64_t slice_len) { return (vocab + slice_len - 1) / slice_len; }

inline void check_shard(const char* op, int64_t first_token_id, int64_t shard) {
  if (first_token_id < 0) fail(op, ": first_token_id must be at least 0, got ", first_token_id);
  if (first_token_id > INT32_MAX - shard) {
    fail(op, ": first_token_id + columns of logits must be below 2^31, got ", first_token_id, " + ", shard);
  }
}

inline int64_t check_vocab(const char* op, int64_t vocab) {
  if (vocab < 1 || vocab > INT32_MAX) fail(op, ": vocab must be 1 to 2^31 - 1, got ", vocab);
  return vocab;
}

// [rows, num_parts, 8] int32, not filled. num_parts 0: as few as the shard needs.
inline Tensor new_parts(const char* op, const Tensor& logits, int64_t num_parts) {
  const int64_t slices = num_slices(logits.size(1), kPartLen), needed = slices > 0 ? slices : 1;
  if (num_parts != 0 && num_parts < needed) {
    fail(op, ": num_parts must be 0 or at least ", needed, " (a part for each ", kPartLen, " columns of logits), got ",
         num_parts);
  }
  return torch::stable::new_empty(logits, {logits.size(0), num_parts != 0 ? num_parts : needed, kSlicePartWords},
                                  ScalarType::Int);
}

inline RowParts row_parts(const char* op, const Tensor& parts) {
  const auto [num_shards, rows, num_parts, words] = shape<4>(op, "parts", parts);
  check_dtype(op, "parts", parts, ScalarType::Int);
  if (num_shards < 1 || num_parts < 1 || words != kSlicePartWords) {
    fail(op, ": parts must be [num_shards, rows, num_parts, ", kSlicePartWords, "] with a shard and a part, got shape ",
         shape_text(parts));
  }
  check_contiguous(op, "parts", parts);
  if (reinterpret_cast<uintptr_t>(parts.data_ptr()) % alignof(SlicePart) != 0) {
    fail(op, ": parts must begin at a multiple of ", alignof(SlicePart), " bytes, got an address that is not");
  }
  return {ptr<SlicePart>(parts), num_shards, rows, num_parts};
}

}  // namespace nld
