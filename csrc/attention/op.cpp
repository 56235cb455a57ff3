// torch.ops.nld.block_attention and attention_plan: schemas, checks, the CPU's schedule, the choice of CUDA kernel.
#include <algorithm>
#include <atomic>
#include <vector>

#include "attention/attention.h"
#include "attention/plan_host.h"
#include "common/cpu_isa.h"
#include "common/stream.h"

namespace nld {
namespace {

constexpr const char* kOp = "block_attention";
constexpr const char* kPlanOp = "attention_plan";

KvPages pages(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

AttentionParams attention_params(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                 const Tensor& page_table, const Tensor& seq_lens, const Tensor& cu_seqlens_q,
                                 const Tensor& mask_mode, const std::optional<Tensor>& block_len,
                                 const std::optional<Tensor>& block_phase, std::optional<double> softmax_scale,
                                 double softcap, int64_t split_len, const std::optional<Tensor>& k_scale,
                                 const std::optional<Tensor>& v_scale, const Tensor& out, const Tensor& lse) {
  const auto [total_q, num_heads, head_dim] = shape<3>(kOp, "q", q);
  const auto [num_pages, page_size, num_kv_heads, cache_dim] = shape<4>(kOp, "k_cache", k_cache);
  const auto [batch] = shape<1>(kOp, "seq_lens", seq_lens);
  const auto [table_batch, max_pages] = shape<2>(kOp, "page_table", page_table);
  shape<4>(kOp, "v_cache", v_cache);
  shape<3>(kOp, "out", out);
  shape<2>(kOp, "lse", lse);
  const DType dtype = float_dtype(kOp, "q", q);

  if (head_dim < 1) fail(kOp, ": q must have a head_dim of at least 1, got shape ", shape_text(q));
  if (page_size < 1) fail(kOp, ": k_cache must have a page_size of at least 1, got shape ", shape_text(k_cache));
  check_size(kOp, "k_cache", k_cache, 3, head_dim, "head_dim of q");
  if (num_kv_heads < 1 || num_heads % num_kv_heads != 0) {
    fail(kOp, ": q must have a multiple of the ", num_kv_heads, " heads of k_cache, got ", num_heads);
  }
  for (int i = 0; i < 4; ++i) check_size(kOp, "v_cache", v_cache, i, k_cache.size(i), "as k_cache");
  const bool is_fp8 = is_fp8_cache(kOp, q, k_cache, v_cache, k_scale, v_scale, num_kv_heads);
  check_same_dtype(kOp, "out", out, "q", q);
  for (const auto& [name, t] : {std::pair{"k_cache", &k_cache}, {"v_cache", &v_cache}, {"out", &out}}) {
    check_device(kOp, name, *t, "q", q);
    check_last_dim_dense(kOp, name, *t);
  }
  check_last_dim_dense(kOp, "q", q);
  check_size(kOp, "page_table", page_table, 0, batch, "batch of seq_lens");
  check_dtype(kOp, "page_table", page_table, ScalarType::Int);
  check_device(kOp, "page_table", page_table, "q", q);
  check_last_dim_dense(kOp, "page_table", page_table);
  check_vector(kOp, "seq_lens", seq_lens, batch, "requests", ScalarType::Int, "q", q);
  check_vector(kOp, "cu_seqlens_q", cu_seqlens_q, batch + 1, "batch of seq_lens + 1", ScalarType::Int, "q", q);
  check_vector(kOp, "mask_mode", mask_mode, batch, "batch of seq_lens", ScalarType::Int, "q", q);
  if (block_len) check_vector(kOp, "block_len", *block_len, batch, "batch of seq_lens", ScalarType::Int, "q", q);
  if (block_phase) check_vector(kOp, "block_phase", *block_phase, batch, "batch of seq_lens", ScalarType::Int, "q", q);
  if (!(softcap >= 0)) fail(kOp, ": softcap must be >= 0 (0 = none), got ", softcap);
  if (split_len < 0) fail(kOp, ": split_len must be >= 0 (0 = the default), got ", split_len);
  for (int i = 0; i < 3; ++i) check_size(kOp, "out", out, i, q.size(i), "as q");
  check_dtype(kOp, "lse", lse, ScalarType::Float);
  check_device(kOp, "lse", lse, "q", q);
  check_size(kOp, "lse", lse, 0, num_heads, "heads of q");
  check_size(kOp, "lse", lse, 1, total_q, "rows of q");

  return {.dtype = dtype,
          .batch = batch,
          .total_q = total_q,
          .num_heads = num_heads,
          .num_kv_heads = num_kv_heads,
          .head_dim = head_dim,
          .num_pages = num_pages,
          .page_size = page_size,
          .max_pages = max_pages,
          .q = q.data_ptr(),
          .q_token_stride = q.stride(0),
          .q_head_stride = q.stride(1),
          .k = pages(k_cache),
          .v = pages(v_cache),
          .page_table = ptr<int32_t>(page_table),
          .page_table_stride = page_table.stride(0),
          .seq_lens = ptr<int32_t>(seq_lens),
          .cu_seqlens_q = ptr<int32_t>(cu_seqlens_q),
          .mask_mode = ptr<int32_t>(mask_mode),
          .block_len = ptr<int32_t>(block_len),
          .block_phase = ptr<int32_t>(block_phase),
          .softmax_scale = static_cast<float>(softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(head_dim)))),
          .softcap = static_cast<float>(softcap),
          .split_len = split_len,
          .out = out.data_ptr(),
          .out_token_stride = out.stride(0),
          .out_head_stride = out.stride(1),
          .lse = ptr<float>(lse),
          .lse_head_stride = lse.stride(0),
          .lse_token_stride = lse.stride(1),
          .is_fp8 = is_fp8,
          .k_scale = ptr<float>(k_scale),
          .v_scale = ptr<float>(v_scale)};
}

// ---- the plan ----

constexpr int64_t kMaxPlanned = INT32_MAX / 16;  // rows, requests and items: a plan's words are counted in int32

PlanShape plan_shape(const char* op, int64_t total_q, int64_t batch, int64_t heads_per_kv, int64_t split_len,
                     int64_t max_items) {
  const int32_t tile_rows = attention_tile_rows(total_q, batch, heads_per_kv, split_len);
  const int64_t max_tiles = attention_max_tiles(total_q, batch, heads_per_kv, tile_rows);
  if (max_items > kMaxPlanned) {
    fail(op, ": split_len must leave at most ", kMaxPlanned, " items, got ", split_len, ", which makes ", max_items);
  }
  return {static_cast<int32_t>(total_q),
          static_cast<int32_t>(batch),
          static_cast<int32_t>(heads_per_kv),
          static_cast<int32_t>(std::min<int64_t>(split_len, INT32_MAX)),
          tile_rows,
          static_cast<int32_t>(max_tiles),
          static_cast<int32_t>(max_items)};
}

// The shape of a plan that is yet to be made.
PlanShape new_plan_shape(const char* op, int64_t total_q, int64_t batch, int64_t num_heads, int64_t num_kv_heads,
                         int64_t max_seq_len, int64_t split_len, int64_t num_sms) {
  const int64_t heads_per_kv = num_heads / num_kv_heads;
  if (total_q > kMaxPlanned || total_q * heads_per_kv > kMaxPlanned) {
    fail(op, ": total_q must be at most ", kMaxPlanned, " / heads per kv head, got ", total_q);
  }
  const int32_t tile_rows = attention_tile_rows(total_q, batch, heads_per_kv, split_len);
  const int64_t max_tiles = attention_max_tiles(total_q, batch, heads_per_kv, tile_rows);
  const int64_t wave = attention_wave(tile_rows, num_kv_heads, num_sms);
  return plan_shape(op, total_q, batch, heads_per_kv, split_len,
                    attention_max_items(max_tiles, wave, max_seq_len, split_len));
}

// The shape of the plan a caller passes to block_attention.
PlanShape given_plan_shape(const AttentionParams& p, const Tensor& plan, const Tensor& q) {
  const auto [len] = shape<1>(kOp, "plan", plan);
  check_dtype(kOp, "plan", plan, ScalarType::Int);
  check_contiguous(kOp, "plan", plan);
  check_device(kOp, "plan", plan, "q", q);
  const PlanShape expected = plan_shape(kOp, p.total_q, p.batch, p.num_heads / p.num_kv_heads, p.split_len, 0);
  const int64_t max_items = plan_items_of_len(len, expected.max_tiles);
  if (max_items < 0 || reinterpret_cast<uintptr_t>(plan.data_ptr()) % 16 != 0) {
    fail(kOp, ": plan must be made by attention_plan for ", p.total_q, " rows, ", p.batch, " requests, ", p.num_heads,
         "/", p.num_kv_heads, " heads and split_len ", p.split_len, " (", attention_plan_len(expected.max_tiles, 0),
         " words and 4 an item), got ", len, " words");
  }
  return plan_shape(kOp, p.total_q, p.batch, p.num_heads / p.num_kv_heads, p.split_len, max_items);
}

AttentionPlanParams plan_params(const Tensor& seq_lens, const Tensor& cu_seqlens_q, const Tensor& mask_mode,
                                int64_t total_q, int64_t num_heads, int64_t num_kv_heads, int64_t max_seq_len,
                                const std::optional<Tensor>& block_len, const std::optional<Tensor>& block_phase,
                                int64_t split_len, int64_t num_sms, int64_t default_sms) {
  const char* op = kPlanOp;
  const auto [batch] = shape<1>(op, "seq_lens", seq_lens);
  check_vector(op, "seq_lens", seq_lens, batch, "requests", ScalarType::Int, "seq_lens", seq_lens);
  const char* what = "batch of seq_lens";
  check_vector(op, "cu_seqlens_q", cu_seqlens_q, batch + 1, "batch of seq_lens + 1", ScalarType::Int, "seq_lens",
               seq_lens);
  check_vector(op, "mask_mode", mask_mode, batch, what, ScalarType::Int, "seq_lens", seq_lens);
  if (block_len) check_vector(op, "block_len", *block_len, batch, what, ScalarType::Int, "seq_lens", seq_lens);
  if (block_phase) check_vector(op, "block_phase", *block_phase, batch, what, ScalarType::Int, "seq_lens", seq_lens);
  if (num_kv_heads < 1) fail(op, ": num_kv_heads must be >= 1, got ", num_kv_heads);
  if (num_heads < 0 || num_heads % num_kv_heads != 0) {
    fail(op, ": num_heads must be a multiple of num_kv_heads = ", num_kv_heads, ", got ", num_heads);
  }
  if (total_q < 0) fail(op, ": total_q must be >= 0, got ", total_q);
  if (max_seq_len < 0) fail(op, ": max_seq_len must be >= 0, got ", max_seq_len);
  if (split_len < 0) fail(op, ": split_len must be >= 0 (0 = chosen by the plan), got ", split_len);
  if (num_sms < 0 || num_sms > UINT16_MAX) {
    fail(op, ": num_sms must lie in [0, ", UINT16_MAX, "] (0 = those of the device), got ", num_sms);
  }
  if (num_sms == 0) num_sms = default_sms;
  return {new_plan_shape(op, total_q, batch, num_heads, num_kv_heads, max_seq_len, split_len, num_sms),
          ptr<int32_t>(seq_lens),
          ptr<int32_t>(cu_seqlens_q),
          ptr<int32_t>(mask_mode),
          ptr<int32_t>(block_len),
          ptr<int32_t>(block_phase),
          nullptr};
}

void set_plan(AttentionPlanParams& p, const Tensor& plan, const Tensor& like) {
  const int64_t len = attention_plan_len(p.shape.max_tiles, p.shape.max_items);
  check_vector(kPlanOp, "plan", plan, len, "attention_plan_len of the arguments", ScalarType::Int, "seq_lens", like);
  p.plan = ptr<int32_t>(plan);
  if (reinterpret_cast<uintptr_t>(p.plan) % 16 != 0) {
    fail(kPlanOp, ": plan must start at a multiple of 16 bytes, got address ", plan.data_ptr());
  }
}

#if !NLD_EMULATED
// ---- CPU ----

constexpr int64_t kDefaultSplitLen = 1024;

const AttentionCpu& cpu_kernels() {
#if defined(NLD_X86)
  return pick_isa(baseline::attention_cpu, avx2::attention_cpu, avx512::attention_cpu);
#else
  return baseline::attention_cpu;
#endif
}

// What depends on values. On the CPU the values are at hand and cheap to check; CUDA checks them in debug builds only.
template <class Params>
void check_rows(const char* op, const Params& p, int64_t b, int64_t total_q) {
  const int64_t begin = p.cu_seqlens_q[b], end = p.cu_seqlens_q[b + 1];
  if (begin < 0 || end < begin || end > total_q) {
    fail(op, ": cu_seqlens_q must grow from 0 to at most ", total_q, " (rows of q), got ", begin, ", ", end,
         " at request ", b);
  }
  if (end == begin) return;
  const int32_t mode = p.mask_mode[b];
  if (mode < 0 || mode >= kNumMaskModes) {
    fail(op, ": mask_mode must lie in [0, ", kNumMaskModes, "), got ", mode, " at request ", b);
  }
  if (mode == static_cast<int32_t>(MaskMode::kBlockCausal) || mode == static_cast<int32_t>(MaskMode::kQuadratic)) {
    if (p.block_len == nullptr) fail(op, ": block_len must be given for mask_mode ", mode, ", got None");
    if (p.block_len[b] < 1) fail(op, ": block_len must be >= 1, got ", p.block_len[b], " at request ", b);
  }
}

void check_plan_requests(const AttentionPlanParams& p) {
  for (int64_t b = 0; b < p.shape.batch; ++b) {
    check_rows(kPlanOp, p, b, p.shape.total_q);
    if (p.seq_lens[b] < 0) fail(kPlanOp, ": seq_lens must be >= 0, got ", p.seq_lens[b], " at request ", b);
  }
}

void check_requests(const AttentionParams& p) {
  for (int64_t b = 0; b < p.batch; ++b) {
    check_rows(kOp, p, b, p.total_q);
    if (p.cu_seqlens_q[b + 1] == p.cu_seqlens_q[b]) continue;
    const int64_t seq_len = p.seq_lens[b];
    if (seq_len < 0 || seq_len > p.max_pages * p.page_size) {
      fail(kOp, ": seq_lens must lie in [0, ", p.max_pages * p.page_size, "] (max_pages * page_size), got ", seq_len,
           " at request ", b);
    }
    const int32_t* table = p.page_table + b * p.page_table_stride;
    for (int64_t i = 0; i * p.page_size < seq_len; ++i) {
      if (table[i] < 0 || table[i] >= p.num_pages) {
        fail(kOp, ": page_table must hold pages in [0, ", p.num_pages, ") where in use, got ", table[i], " at request ",
             b, ", entry ", i);
      }
    }
  }
}

// Runs body(i, worker) for i in [0, count), handed out one by one: items differ in length, and threads in speed.
template <class Body>
void for_each_item(int64_t count, int64_t num_workers, const Body& body) {
  if (num_workers <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i, 0);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, num_workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t i = next++; i < count; i = next++) body(i, worker);
    }
  });
}

struct Schedule {
  std::vector<AttentionItem> items;
  int64_t max_rows = 0, max_keys = 0, num_splits = 0;
  double work = 0;  // (row, key) pairs
};

Schedule make_schedule(const AttentionParams& p) {
  Schedule schedule;
  const int64_t heads_per_kv = p.num_heads / p.num_kv_heads;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t num_rows = (p.cu_seqlens_q[b + 1] - p.cu_seqlens_q[b]) * heads_per_kv;
    const int64_t num_tiles = (num_rows + kAttentionTileRows - 1) / kAttentionTileRows;
    schedule.max_keys = std::max<int64_t>(schedule.max_keys, p.seq_lens[b]);
    // Later tiles see more keys under the causal modes: longest first.
    for (int64_t tile = num_tiles - 1; tile >= 0; --tile) {
      const int64_t begin = tile * kAttentionTileRows, rows = std::min(kAttentionTileRows, num_rows - begin);
      schedule.max_rows = std::max(schedule.max_rows, rows);
      const TileKeys keys = tile_keys(request_mask(p, b), static_cast<int32_t>(begin / heads_per_kv),
                                      static_cast<int32_t>((begin + rows - 1) / heads_per_kv));
      const int64_t num_splits = (keys.key_end + p.split_len - 1) / p.split_len;
      for (int64_t head = 0; head < p.num_kv_heads; ++head) {
        schedule.items.push_back({b, head, begin, rows, num_splits});
      }
      schedule.num_splits += num_splits * p.num_kv_heads;
      schedule.work += static_cast<double>(rows) * (keys.key_end - (keys.hole_end - keys.hole_begin)) * p.num_kv_heads;
    }
  }
  return schedule;
}

void attend_cpu(const AttentionParams& p, const Tensor& like) {
  check_requests(p);
  const AttentionCpu& cpu = cpu_kernels();
  const int64_t first = p.batch > 0 ? p.cu_seqlens_q[0] : 0, last = p.batch > 0 ? p.cu_seqlens_q[p.batch] : 0;
  cpu.clear(p, 0, first);
  cpu.clear(p, last, p.total_q);
  const Schedule schedule = make_schedule(p);
  const std::vector<AttentionItem>& items = schedule.items;
  const int64_t count = static_cast<int64_t>(items.size());
  if (count == 0) return;

  // Waking a thread costs some microseconds; below about a million multiply-adds it does not pay.
  const bool small = schedule.work * static_cast<double>(p.head_dim) < 1e6;
  const int64_t num_threads = small ? 1 : torch::stable::get_num_threads();
  // Few items: hand out their splits one by one and merge afterwards. Both ways do the same arithmetic.
  const bool by_split = num_threads > 1 && count < 4 * num_threads && schedule.num_splits > count;
  const int64_t num_workers = std::min(num_threads, by_split ? schedule.num_splits : count);
  const int64_t scratch_floats = cpu.scratch_floats(p, schedule.max_rows, schedule.max_keys);
  const int64_t partial_floats = by_split ? cpu.partial_floats(p, schedule.max_rows) : 0;
  const Tensor workspace = torch::stable::new_empty(
      like, {num_workers * scratch_floats + schedule.num_splits * partial_floats}, ScalarType::Float);
  float* scratch = ptr<float>(workspace);
  if (!by_split) {
    for_each_item(count, num_workers,
                  [&](int64_t i, int64_t worker) { cpu.attend(p, items[i], scratch + worker * scratch_floats); });
    return;
  }
  float* partials = scratch + num_workers * scratch_floats;
  struct Split {
    int64_t item, split;
  };
  std::vector<Split> splits;
  std::vector<int64_t> first_split;
  for (int64_t i = 0; i < count; ++i) {
    first_split.push_back(static_cast<int64_t>(splits.size()));
    for (int64_t split = 0; split < items[i].num_splits; ++split) splits.push_back({i, split});
  }
  for_each_item(static_cast<int64_t>(splits.size()), num_workers, [&](int64_t i, int64_t worker) {
    cpu.attend_split(p, items[splits[i].item], splits[i].split, scratch + worker * scratch_floats,
                     partials + i * partial_floats);
  });
  for_each_item(count, num_workers, [&](int64_t i, int64_t worker) {
    cpu.merge(p, items[i], partials + first_split[i] * partial_floats, partial_floats,
              scratch + worker * scratch_floats);
  });
}

struct HostPlanner {
  explicit HostPlanner(const Tensor&) {}
  int32_t num_sms() const { return kHostSms; }
  void build(const AttentionPlanParams& p) const {
    check_plan_requests(p);
    build_attention_plan(p);
  }
};

void block_attention_out_cpu(Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor seq_lens,
                             Tensor cu_seqlens_q, Tensor mask_mode, std::optional<Tensor> block_len,
                             std::optional<Tensor> block_phase, std::optional<double> softmax_scale, double softcap,
                             int64_t split_len, std::optional<Tensor> plan, std::optional<Tensor> k_scale,
                             std::optional<Tensor> v_scale, Tensor out, Tensor lse) {
  AttentionParams p = attention_params(q, k_cache, v_cache, page_table, seq_lens, cu_seqlens_q, mask_mode, block_len,
                                       block_phase, softmax_scale, softcap, split_len, k_scale, v_scale, out, lse);
  check_scales(kOp, "k_scale", p.k_scale, p.num_kv_heads);
  check_scales(kOp, "v_scale", p.v_scale, p.num_kv_heads);
  if (plan) given_plan_shape(p, *plan, q);
  if (p.split_len == 0) p.split_len = kDefaultSplitLen;
  attend_cpu(p, q);
}
#endif

#if NLD_CUDA
// ---- CUDA ----

struct AttentionKernel {
  AttentionLauncher* launch;
  int32_t (*cluster_size)(const AttentionCudaParams&);  // null: the kernel knows no clusters
};

// The CUDA kernel for these arguments on the current device.
AttentionKernel pick_attention_kernel(const AttentionParams& p, int32_t tile_rows) {
  if (attention_wgmma_takes(p, tile_rows)) return {launch_attention_wgmma, attention_wgmma_cluster_size};
  if (attention_mma_takes(p)) return {launch_attention_mma, attention_mma_cluster_size};
  if (p.head_dim <= kMaxSimtDim) return {launch_attention_simt, nullptr};
  fail(kOp, ": q must have a head_dim of at most ", kMaxSimtDim, " on CUDA, got ", p.head_dim,
       " (tensor cores: bfloat16 and float16 with 64, 96, 128; all dtypes up to ", kMaxSimtDim, ")");
}

struct CudaPlanner {
  explicit CudaPlanner(const Tensor& like) : scope(like) {}
  int32_t num_sms() const { return device_sms(); }
  void build(const AttentionPlanParams& p) const { check_launch(kPlanOp, launch_attention_plan(p, scope.stream())); }

  CudaScope scope;  // first: the SMs are those of the tensors' device
};

void block_attention_out_cuda(Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor seq_lens,
                              Tensor cu_seqlens_q, Tensor mask_mode, std::optional<Tensor> block_len,
                              std::optional<Tensor> block_phase, std::optional<double> softmax_scale, double softcap,
                              int64_t split_len, std::optional<Tensor> plan, std::optional<Tensor> k_scale,
                              std::optional<Tensor> v_scale, Tensor out, Tensor lse) {
  const AttentionParams base =
      attention_params(q, k_cache, v_cache, page_table, seq_lens, cu_seqlens_q, mask_mode, block_len, block_phase,
                       softmax_scale, softcap, split_len, k_scale, v_scale, out, lse);
  const CudaScope scope(q);
  AttentionCudaParams p = {base, {}, nullptr, nullptr, nullptr, nullptr, device_sms(), 1};
  if (plan) {
    p.plan_shape = given_plan_shape(base, *plan, q);
  } else {
    p.plan_shape = new_plan_shape(kOp, base.total_q, base.batch, base.num_heads, base.num_kv_heads,
                                  base.max_pages * base.page_size, base.split_len, p.num_sms);
  }
  const PlanShape& shape = p.plan_shape;
  const AttentionKernel kernel = pick_attention_kernel(base, shape.tile_rows);
  if (base.total_q == 0 || base.num_heads == 0) return;
  std::optional<Tensor> own_plan, workspace;  // live until the launches are queued; the allocator knows the stream
  if (!plan && shape.max_tiles > 0) {
    own_plan = torch::stable::new_empty(q, {attention_plan_len(shape.max_tiles, shape.max_items)}, ScalarType::Int);
    check_launch(kOp, launch_attention_plan({shape, base.seq_lens, base.cu_seqlens_q, base.mask_mode, base.block_len,
                                             base.block_phase, ptr<int32_t>(own_plan)},
                                            scope.stream()));
  }
  p.plan = ptr<int32_t>(plan ? plan : own_plan);
  if (kernel.cluster_size != nullptr) p.cluster_size = kernel.cluster_size(p);
  const int64_t slots = p.cluster_size > 1 ? 0 : attention_max_slots(shape.max_tiles, shape.max_items);
  if (slots > 0) {
    const int64_t rows = slots * base.num_kv_heads * shape.tile_rows;
    workspace = torch::stable::new_empty(q, {rows * (base.head_dim + 2)}, ScalarType::Float);
    p.partial_o = ptr<float>(workspace);
    p.partial_m = p.partial_o + rows * base.head_dim;
    p.partial_l = p.partial_m + rows;
  }
  if (shape.max_tiles > 0) check_launch(kOp, kernel.launch(p, scope.stream()));
  if (slots > 0 || shape.max_tiles == 0) check_launch(kOp, launch_attention_combine(p, scope.stream()));
}
#endif

// Planner: HostPlanner or CudaPlanner.
template <class Planner>
void attention_plan_out(Tensor seq_lens, Tensor cu_seqlens_q, Tensor mask_mode, int64_t total_q, int64_t num_heads,
                        int64_t num_kv_heads, int64_t max_seq_len, std::optional<Tensor> block_len,
                        std::optional<Tensor> block_phase, int64_t split_len, int64_t num_sms, Tensor plan) {
  const Planner planner(seq_lens);
  AttentionPlanParams p = plan_params(seq_lens, cu_seqlens_q, mask_mode, total_q, num_heads, num_kv_heads, max_seq_len,
                                      block_len, block_phase, split_len, num_sms, planner.num_sms());
  set_plan(p, plan, seq_lens);
  planner.build(p);
}

template <class Planner>
Tensor attention_plan(Tensor seq_lens, Tensor cu_seqlens_q, Tensor mask_mode, int64_t total_q, int64_t num_heads,
                      int64_t num_kv_heads, int64_t max_seq_len, std::optional<Tensor> block_len,
                      std::optional<Tensor> block_phase, int64_t split_len, int64_t num_sms) {
  const Planner planner(seq_lens);
  AttentionPlanParams p = plan_params(seq_lens, cu_seqlens_q, mask_mode, total_q, num_heads, num_kv_heads, max_seq_len,
                                      block_len, block_phase, split_len, num_sms, planner.num_sms());
  const Tensor plan =
      torch::stable::new_zeros(seq_lens, {attention_plan_len(p.shape.max_tiles, p.shape.max_items)}, ScalarType::Int);
  set_plan(p, plan, seq_lens);
  planner.build(p);
  return plan;
}

// The overload that makes its outputs; kOut is the one that takes them.
template <auto kOut>
std::tuple<Tensor, Tensor> block_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor seq_lens,
                                           Tensor cu_seqlens_q, Tensor mask_mode, std::optional<Tensor> block_len,
                                           std::optional<Tensor> block_phase, std::optional<double> softmax_scale,
                                           double softcap, int64_t split_len, std::optional<Tensor> plan,
                                           std::optional<Tensor> k_scale, std::optional<Tensor> v_scale) {
  const auto [total_q, num_heads, head_dim] = shape<3>(kOp, "q", q);
  const Tensor out = torch::stable::new_empty(q, {total_q, num_heads, head_dim});
  const Tensor lse = torch::stable::new_empty(q, {num_heads, total_q}, ScalarType::Float);
  kOut(q, k_cache, v_cache, page_table, seq_lens, cu_seqlens_q, mask_mode, block_len, block_phase, softmax_scale,
       softcap, split_len, plan, k_scale, v_scale, out, lse);
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(NLD_NAMESPACE, m) {
  m.def(
      "attention_plan(Tensor seq_lens, Tensor cu_seqlens_q, Tensor mask_mode, *, int total_q, int num_heads, "
      "int num_kv_heads, int max_seq_len, Tensor? block_len=None, Tensor? block_phase=None, int split_len=0, "
      "int num_sms=0) -> Tensor");
  m.def(
      "attention_plan.out(Tensor seq_lens, Tensor cu_seqlens_q, Tensor mask_mode, *, int total_q, int num_heads, "
      "int num_kv_heads, int max_seq_len, Tensor? block_len=None, Tensor? block_phase=None, int split_len=0, "
      "int num_sms=0, Tensor(a!) plan) -> ()");
  m.def(
      "block_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor seq_lens, "
      "Tensor cu_seqlens_q, Tensor mask_mode, *, Tensor? block_len=None, Tensor? block_phase=None, "
      "float? softmax_scale=None, float softcap=0.0, int split_len=0, Tensor? plan=None, "
      "Tensor? k_scale=None, Tensor? v_scale=None) -> (Tensor out, Tensor lse)");
  m.def(
      "block_attention.out(Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor seq_lens, "
      "Tensor cu_seqlens_q, Tensor mask_mode, *, Tensor? block_len=None, Tensor? block_phase=None, "
      "float? softmax_scale=None, float softcap=0.0, int split_len=0, Tensor? plan=None, "
      "Tensor? k_scale=None, Tensor? v_scale=None, Tensor(a!) out, Tensor(b!) lse) -> ()");
}

#if !NLD_EMULATED
STABLE_TORCH_LIBRARY_IMPL(nld, CPU, m) {
  m.impl("attention_plan", TORCH_BOX(&attention_plan<HostPlanner>));
  m.impl("attention_plan.out", TORCH_BOX(&attention_plan_out<HostPlanner>));
  m.impl("block_attention", TORCH_BOX(&block_attention<block_attention_out_cpu>));
  m.impl("block_attention.out", TORCH_BOX(&block_attention_out_cpu));
}
#endif
#if NLD_CUDA
STABLE_TORCH_LIBRARY_IMPL(NLD_NAMESPACE, NLD_CUDA_KEY, m) {
  m.impl("attention_plan", TORCH_BOX(&attention_plan<CudaPlanner>));
  m.impl("attention_plan.out", TORCH_BOX(&attention_plan_out<CudaPlanner>));
  m.impl("block_attention", TORCH_BOX(&block_attention<block_attention_out_cuda>));
  m.impl("block_attention.out", TORCH_BOX(&block_attention_out_cuda));
}
#endif

}  // namespace nld
