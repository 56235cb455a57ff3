// torch.ops.nld.rope_append_ and compact_: schemas, checks, CPU and CUDA implementations.
#include "common/cpu_isa.h"
#include "common/stream.h"
#include "kv_cache/kv_cache.h"

namespace nld {
namespace {

// k/v cache -> pointer and strides; `first` is the dimension of the pages (1 where layers come first).
PagedCache paged_cache(const Tensor& t, int first) {
  return {t.data_ptr(), t.stride(first), t.stride(first + 1), t.stride(first + 2)};
}

void check_cache_pair(const char* op, const Tensor& k_cache, const Tensor& v_cache, int64_t page_size) {
  if (page_size < 1) fail(op, ": k_cache must have pages of at least one token, got shape ", shape_text(k_cache));
  if (shape_text(k_cache) != shape_text(v_cache)) {
    fail(op, ": v_cache must have the shape of k_cache ", shape_text(k_cache), ", got ", shape_text(v_cache));
  }
  check_device(op, "v_cache", v_cache, "k_cache", k_cache);
  check_last_dim_dense(op, "k_cache", k_cache);
  check_last_dim_dense(op, "v_cache", v_cache);
}

int64_t element_size(const char* op, const char* name, const Tensor& cache) {
  switch (cache.scalar_type()) {
    case ScalarType::Float:
      return 4;
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return 2;
    case ScalarType::Float8_e4m3fn:
      return 1;
    default:
      fail(op, ": ", name, " must be float32, bfloat16, float16 or float8_e4m3fn, got ",
           dtype_name(cache.scalar_type()));
  }
}

RopeAppendParams rope_append_params(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_cache,
                                    const Tensor& v_cache, const Tensor& positions, const Tensor& slot_mapping,
                                    const Tensor& inv_freq, double attention_scaling, double query_scale_beta,
                                    int64_t query_scale_len, const std::optional<Tensor>& k_scale,
                                    const std::optional<Tensor>& v_scale) {
  const char* op = "rope_append_";
  const auto [total_tokens, num_heads, head_dim] = shape<3>(op, "q", q);
  const auto [k_tokens, num_kv_heads, k_dim] = shape<3>(op, "k", k);
  const auto [num_pages, page_size, cache_heads, cache_dim] = shape<4>(op, "k_cache", k_cache);
  shape<3>(op, "v", v);
  check_size(op, "k", k, 0, total_tokens, "tokens of q");
  check_size(op, "k", k, 2, head_dim, "head_dim of q");
  for (int i = 0; i < 3; ++i) check_size(op, "v", v, i, k.size(i), "as k");
  check_size(op, "k_cache", k_cache, 2, num_kv_heads, "num_kv_heads of k");
  check_size(op, "k_cache", k_cache, 3, head_dim, "head_dim of q");
  check_cache_pair(op, k_cache, v_cache, page_size);
  for (const auto& [name, t] : {std::pair{"k", &k}, {"v", &v}}) {
    check_same_dtype(op, name, *t, "q", q);
    check_device(op, name, *t, "q", q);
  }
  check_device(op, "k_cache", k_cache, "q", q);
  const DType dtype = float_dtype(op, "q", q);
  const bool is_fp8 = is_fp8_cache(op, q, k_cache, v_cache, k_scale, v_scale, num_kv_heads);
  check_last_dim_dense(op, "q", q);
  check_last_dim_dense(op, "k", k);
  check_last_dim_dense(op, "v", v);
  check_vector(op, "positions", positions, total_tokens, "tokens of q", ScalarType::Int, "q", q);
  check_vector(op, "slot_mapping", slot_mapping, total_tokens, "tokens of q", ScalarType::Int, "q", q);
  const auto [num_freqs] = shape<1>(op, "inv_freq", inv_freq);
  check_vector(op, "inv_freq", inv_freq, num_freqs, "frequencies", ScalarType::Float, "q", q);
  if (2 * num_freqs > head_dim || num_freqs > 256) {
    fail(op, ": inv_freq must have at most head_dim / 2 = ", head_dim / 2, " (and at most 256) elements, got ",
         num_freqs);
  }
  if (query_scale_len < 0) fail(op, ": query_scale_len must be >= 0 (0 = no query scale), got ", query_scale_len);
  return {.dtype = dtype,
          .total_tokens = total_tokens,
          .num_heads = num_heads,
          .num_kv_heads = num_kv_heads,
          .head_dim = head_dim,
          .page_size = page_size,
          .num_slots = num_pages * page_size,
          .q = q.data_ptr(),
          .q_token_stride = q.stride(0),
          .q_head_stride = q.stride(1),
          .k = k.data_ptr(),
          .k_token_stride = k.stride(0),
          .k_head_stride = k.stride(1),
          .v = v.data_ptr(),
          .v_token_stride = v.stride(0),
          .v_head_stride = v.stride(1),
          .k_cache = paged_cache(k_cache, 0),
          .v_cache = paged_cache(v_cache, 0),
          .positions = ptr<int32_t>(positions),
          .slots = ptr<int32_t>(slot_mapping),
          .inv_freq = ptr<float>(inv_freq),
          .num_freqs = num_freqs,
          .attention_scaling = static_cast<float>(attention_scaling),
          .query_scale_beta = static_cast<float>(query_scale_beta),
          .query_scale_len = query_scale_len,
          .is_fp8 = is_fp8,
          .k_scale = ptr<float>(k_scale),
          .v_scale = ptr<float>(v_scale)};
}

CompactParams compact_params(const Tensor& k_cache, const Tensor& v_cache, const Tensor& page_table,
                             const Tensor& base_lens, const Tensor& src_offsets, const Tensor& num_kept) {
  const char* op = "compact_";
  const auto [num_layers, num_pages, page_size, num_kv_heads, head_dim] = shape<5>(op, "k_cache", k_cache);
  const auto [batch, max_kept] = shape<2>(op, "src_offsets", src_offsets);
  const auto [table_batch, max_pages] = shape<2>(op, "page_table", page_table);
  check_cache_pair(op, k_cache, v_cache, page_size);
  check_same_dtype(op, "v_cache", v_cache, "k_cache", k_cache);
  check_size(op, "page_table", page_table, 0, batch, "batch of src_offsets");
  check_dtype(op, "page_table", page_table, ScalarType::Int);
  check_dtype(op, "src_offsets", src_offsets, ScalarType::Int);
  check_device(op, "page_table", page_table, "k_cache", k_cache);
  check_device(op, "src_offsets", src_offsets, "k_cache", k_cache);
  check_last_dim_dense(op, "page_table", page_table);
  check_contiguous(op, "src_offsets", src_offsets);
  check_vector(op, "base_lens", base_lens, batch, "batch of src_offsets", ScalarType::Int, "k_cache", k_cache);
  check_vector(op, "num_kept", num_kept, batch, "batch of src_offsets", ScalarType::Int, "k_cache", k_cache);
  return {.element_size = element_size(op, "k_cache", k_cache),
          .batch = batch,
          .max_kept = max_kept,
          .max_pages = max_pages,
          .num_layers = num_layers,
          .num_pages = num_pages,
          .num_kv_heads = num_kv_heads,
          .head_dim = head_dim,
          .page_size = page_size,
          .k_cache = paged_cache(k_cache, 1),
          .v_cache = paged_cache(v_cache, 1),
          .k_layer_stride = k_cache.stride(0),
          .v_layer_stride = v_cache.stride(0),
          .page_table = ptr<int32_t>(page_table),
          .page_table_stride = page_table.stride(0),
          .base_lens = ptr<int32_t>(base_lens),
          .src_offsets = ptr<int32_t>(src_offsets),
          .num_kept = ptr<int32_t>(num_kept)};
}

#if !NLD_EMULATED
const KvCacheCpu& cpu_kernels() {
#if defined(NLD_X86)
  return pick_isa(baseline::kv_cache_cpu, avx2::kv_cache_cpu, avx512::kv_cache_cpu);
#else
  return baseline::kv_cache_cpu;
#endif
}

void rope_append_cpu(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor positions,
                     Tensor slot_mapping, Tensor inv_freq, double attention_scaling, double query_scale_beta,
                     int64_t query_scale_len, std::optional<Tensor> k_scale, std::optional<Tensor> v_scale) {
  const RopeAppendParams p = rope_append_params(q, k, v, k_cache, v_cache, positions, slot_mapping, inv_freq,
                                                attention_scaling, query_scale_beta, query_scale_len, k_scale, v_scale);
  check_scales("rope_append_", "k_scale", p.k_scale, p.num_kv_heads);
  check_scales("rope_append_", "v_scale", p.v_scale, p.num_kv_heads);
  const KvCacheCpu& cpu = cpu_kernels();
  // About 64k elements a thread: below that, starting a second thread costs more than it saves.
  const int64_t per_token = (p.num_heads + 2 * p.num_kv_heads) * p.head_dim;
  const int64_t grain = per_token > 0 ? 1 + 65536 / per_token : 1;
  torch::stable::parallel_for(0, p.total_tokens, grain,
                              [&](int64_t begin, int64_t end) { cpu.rope_append(p, begin, end); });
}

void compact_cpu(Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor base_lens, Tensor src_offsets,
                 Tensor num_kept) {
  const CompactParams p = compact_params(k_cache, v_cache, page_table, base_lens, src_offsets, num_kept);
  const KvCacheCpu& cpu = cpu_kernels();
  torch::stable::parallel_for(0, p.num_layers * p.batch, 4,
                              [&](int64_t begin, int64_t end) { cpu.compact(p, begin, end); });
}
#endif

#if NLD_CUDA
void rope_append_cuda(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor positions,
                      Tensor slot_mapping, Tensor inv_freq, double attention_scaling, double query_scale_beta,
                      int64_t query_scale_len, std::optional<Tensor> k_scale, std::optional<Tensor> v_scale) {
  const RopeAppendParams p = rope_append_params(q, k, v, k_cache, v_cache, positions, slot_mapping, inv_freq,
                                                attention_scaling, query_scale_beta, query_scale_len, k_scale, v_scale);
  const CudaScope scope(q);
  check_launch("rope_append_", launch_rope_append(p, scope.stream()));
}

void compact_cuda(Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor base_lens, Tensor src_offsets,
                  Tensor num_kept) {
  const CompactParams p = compact_params(k_cache, v_cache, page_table, base_lens, src_offsets, num_kept);
  const CudaScope scope(k_cache);
  check_launch("compact_", launch_compact(p, scope.stream()));
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(NLD_NAMESPACE, m) {
  m.def(
      "rope_append_(Tensor(a!) q, Tensor k, Tensor v, Tensor(b!) k_cache, Tensor(c!) v_cache, Tensor positions, "
      "Tensor slot_mapping, Tensor inv_freq, *, float attention_scaling=1.0, float query_scale_beta=0.0, "
      "int query_scale_len=0, Tensor? k_scale=None, Tensor? v_scale=None) -> ()");
  m.def(
      "compact_(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor page_table, Tensor base_lens, Tensor src_offsets, "
      "Tensor num_kept) -> ()");
}

#if !NLD_EMULATED
STABLE_TORCH_LIBRARY_IMPL(nld, CPU, m) {
  m.impl("rope_append_", TORCH_BOX(&rope_append_cpu));
  m.impl("compact_", TORCH_BOX(&compact_cpu));
}
#endif
#if NLD_CUDA
STABLE_TORCH_LIBRARY_IMPL(NLD_NAMESPACE, NLD_CUDA_KEY, m) {
  m.impl("rope_append_", TORCH_BOX(&rope_append_cuda));
  m.impl("compact_", TORCH_BOX(&compact_cuda));
}
#endif

}  // namespace nld
