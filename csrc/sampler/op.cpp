// torch.ops.nld.commit_ and gumbel_noise_: schemas, checks, CPU and CUDA implementations.
#include <algorithm>
#include <memory>

#include "common/cpu_isa.h"
#include "common/stream.h"
#include "sampler/sampler.h"

namespace nld {
namespace {

using OptionalTensor = std::optional<Tensor>;

// Checks of one op's vectors; those that are not given fit.
struct Arguments {
  const char* op;
  const char* like_name;
  const Tensor& like;
  int64_t rows;

  void per_row(const char* name, const OptionalTensor& t, ScalarType type) const {
    const std::string what = std::string("rows of ") + like_name;
    if (t) check_vector(op, name, *t, rows, what.c_str(), type, like_name, like);
  }
  void per_request(const char* name, const OptionalTensor& t, int64_t batch, ScalarType type) const {
    if (t) check_vector(op, name, *t, batch, "batch of cu_seqlens", type, like_name, like);
  }
};

void check_purpose(const char* op, int64_t purpose) {
  if (purpose < 0 || purpose > 3)
    fail(op, ": purpose must be 0 (sample), 1 (draft), 2 (accept) or 3 (residual), got ", purpose);
}

// The arguments that say which rows are judged. `p.rows` is known.
void read_rows(CommitParams& p, const char* op, const char* like_name, const Tensor& like, const Tensor& block_tokens,
               const Tensor& is_masked, const Tensor& cu_seqlens, const Tensor& rule, int64_t mask_token_id,
               const OptionalTensor& is_fixed, const OptionalTensor& banned_token_ids) {
  const Arguments arguments = {op, like_name, like, p.rows};
  const auto [num_bounds] = shape<1>(op, "cu_seqlens", cu_seqlens);
  if (num_bounds < 1) fail(op, ": cu_seqlens must have batch + 1 elements, got none");
  p.batch = num_bounds - 1;
  check_vector(op, "cu_seqlens", cu_seqlens, p.batch + 1, "batch + 1", ScalarType::Int, like_name, like);
  arguments.per_row("block_tokens", block_tokens, ScalarType::Long);
  arguments.per_row("is_masked", is_masked, ScalarType::Bool);
  arguments.per_request("rule", rule, p.batch, ScalarType::Int);
  arguments.per_row("is_fixed", is_fixed, ScalarType::Bool);
  if (banned_token_ids) {
    const auto [num_banned] = shape<1>(op, "banned_token_ids", *banned_token_ids);
    check_vector(op, "banned_token_ids", *banned_token_ids, num_banned, "ids", ScalarType::Long, like_name, like);
    p.num_banned = num_banned;
  }
  p.block_tokens = ptr<int64_t>(block_tokens);
  p.is_masked = ptr<bool>(is_masked);
  p.cu_seqlens = ptr<int32_t>(cu_seqlens);
  p.rule = ptr<int32_t>(rule);
  p.mask_token_id = mask_token_id;
  p.is_fixed = ptr<bool>(is_fixed);
  p.banned = ptr<int64_t>(banned_token_ids);
  p.bans_mask_id = !banned_token_ids;
}

// What rows are scanned for. `p.batch` is known.
void read_logits(CommitParams& p, const char* op, const Tensor& logits, const OptionalTensor& temperature,
                 const OptionalTensor& seed, const OptionalTensor& positions, int64_t purpose) {
  const Arguments arguments = {op, "logits", logits, p.rows};
  p.dtype = float_dtype(op, "logits", logits);
  check_last_dim_dense(op, "logits", logits);
  arguments.per_request("temperature", temperature, p.batch, ScalarType::Float);
  arguments.per_request("seed", seed, p.batch, ScalarType::Long);
  arguments.per_row("positions", positions, ScalarType::Int);
  if (temperature && !seed) fail(op, ": seed must be given with temperature, got none");
  if (temperature && !positions) fail(op, ": positions must be given with temperature, got none");
  check_purpose(op, purpose);
  p.logits = logits.data_ptr();
  p.logits_row_stride = logits.stride(0);
  p.temperature = ptr<float>(temperature);
  p.seed = ptr<int64_t>(seed);
  p.positions = ptr<int32_t>(positions);
  p.purpose = static_cast<uint32_t>(purpose);
}

// What decides, and what is written. `p.batch` is known.
void read_decision(CommitParams& p, const char* op, const char* like_name, const Tensor& like, const Tensor& threshold,
                   const OptionalTensor& quota, const OptionalTensor& revise_threshold,
                   const OptionalTensor& eos_token_ids, const Tensor& candidates, const Tensor& confidence,
                   const Tensor& num_committed, const Tensor& num_remaining, const Tensor& done) {
  const Arguments arguments = {op, like_name, like, p.rows};
  arguments.per_request("threshold", threshold, p.batch, ScalarType::Float);
  arguments.per_request("quota", quota, p.batch, ScalarType::Int);
  arguments.per_request("revise_threshold", revise_threshold, p.batch, ScalarType::Float);
  if (eos_token_ids) {
    shape<2>(op, "eos_token_ids", *eos_token_ids);
    check_dtype(op, "eos_token_ids", *eos_token_ids, ScalarType::Long);
    check_size(op, "eos_token_ids", *eos_token_ids, 0, p.batch, "batch of cu_seqlens");
    check_contiguous(op, "eos_token_ids", *eos_token_ids);
    check_device(op, "eos_token_ids", *eos_token_ids, like_name, like);
    p.num_eos = eos_token_ids->size(1);
  }
  arguments.per_row("candidates", candidates, ScalarType::Long);
  arguments.per_row("confidence", confidence, ScalarType::Float);
  arguments.per_request("num_committed", num_committed, p.batch, ScalarType::Int);
  arguments.per_request("num_remaining", num_remaining, p.batch, ScalarType::Int);
  arguments.per_request("done", done, p.batch, ScalarType::Bool);
  p.threshold = ptr<float>(threshold);
  p.quota = ptr<int32_t>(quota);
  p.revise_threshold = ptr<float>(revise_threshold);
  p.eos = ptr<int64_t>(eos_token_ids);
  p.candidates = ptr<int64_t>(candidates);
  p.confidence = ptr<float>(confidence);
  p.num_committed = ptr<int32_t>(num_committed);
  p.num_remaining = ptr<int32_t>(num_remaining);
  p.done = ptr<bool>(done);
}

CommitParams commit_params(const Tensor& logits, const Tensor& block_tokens, const Tensor& is_masked,
                           const Tensor& cu_seqlens, const Tensor& rule, const Tensor& threshold, int64_t mask_token_id,
                           const OptionalTensor& quota, const OptionalTensor& revise_threshold,
                           const OptionalTensor& is_fixed, const OptionalTensor& banned_token_ids,
                           const OptionalTensor& eos_token_ids, const OptionalTensor& temperature,
                           const OptionalTensor& seed, const OptionalTensor& positions, int64_t purpose,
                           const Tensor& candidates, const Tensor& confidence, const Tensor& num_committed,
                           const Tensor& num_remaining, const Tensor& done, const OptionalTensor& tickets) {
  const char* op = "commit_";
  CommitParams p = {};
  const auto [rows, vocab] = shape<2>(op, "logits", logits);
  if (vocab < 1 || vocab > INT32_MAX)
    fail(op, ": logits must have 1 to 2^31 - 1 columns, got shape ", shape_text(logits));
  p.rows = rows;
  p.vocab = vocab;
  read_rows(p, op, "logits", logits, block_tokens, is_masked, cu_seqlens, rule, mask_token_id, is_fixed,
            banned_token_ids);
  read_logits(p, op, logits, temperature, seed, positions, purpose);
  read_decision(p, op, "logits", logits, threshold, quota, revise_threshold, eos_token_ids, candidates, confidence,
                num_committed, num_remaining, done);
  Arguments{op, "logits", logits, rows}.per_request("tickets", tickets, p.batch, ScalarType::Int);
  p.tickets = ptr<int32_t>(tickets);
  return p;
}

CommitParams commit_scan_params(const Tensor& logits, const Tensor& block_tokens, const Tensor& is_masked,
                                const Tensor& cu_seqlens, const Tensor& rule, int64_t first_token_id,
                                int64_t mask_token_id, const OptionalTensor& is_fixed,
                                const OptionalTensor& banned_token_ids, const OptionalTensor& temperature,
                                const OptionalTensor& seed, const OptionalTensor& positions, int64_t purpose) {
  const char* op = "commit_scan";
  CommitParams p = {};
  const auto [rows, shard] = shape<2>(op, "logits", logits);
  check_shard(op, first_token_id, shard);
  p.rows = rows;
  p.vocab = shard;
  p.first_token_id = first_token_id;
  read_rows(p, op, "logits", logits, block_tokens, is_masked, cu_seqlens, rule, mask_token_id, is_fixed,
            banned_token_ids);
  read_logits(p, op, logits, temperature, seed, positions, purpose);
  return p;
}

CommitParams commit_parts_params(const Tensor& parts, const Tensor& block_tokens, const Tensor& is_masked,
                                 const Tensor& cu_seqlens, const Tensor& rule, const Tensor& threshold, int64_t vocab,
                                 int64_t mask_token_id, const OptionalTensor& quota,
                                 const OptionalTensor& revise_threshold, const OptionalTensor& is_fixed,
                                 const OptionalTensor& banned_token_ids, const OptionalTensor& eos_token_ids,
                                 const Tensor& candidates, const Tensor& confidence, const Tensor& num_committed,
                                 const Tensor& num_remaining, const Tensor& done) {
  const char* op = "commit_parts_";
  CommitParams p = {};
  p.parts = row_parts(op, parts);
  p.rows = p.parts.rows;
  p.vocab = check_vocab(op, vocab);
  read_rows(p, op, "parts", parts, block_tokens, is_masked, cu_seqlens, rule, mask_token_id, is_fixed,
            banned_token_ids);
  read_decision(p, op, "parts", parts, threshold, quota, revise_threshold, eos_token_ids, candidates, confidence,
                num_committed, num_remaining, done);
  return p;
}

GumbelNoiseParams gumbel_noise_params(const Tensor& noise, const Tensor& seed, const Tensor& positions,
                                      int64_t purpose) {
  const char* op = "gumbel_noise_";
  const auto [rows, vocab] = shape<2>(op, "noise", noise);
  check_dtype(op, "noise", noise, ScalarType::Float);
  check_last_dim_dense(op, "noise", noise);
  check_vector(op, "seed", seed, rows, "rows of noise", ScalarType::Long, "noise", noise);
  check_vector(op, "positions", positions, rows, "rows of noise", ScalarType::Int, "noise", noise);
  check_purpose(op, purpose);
  return {.rows = rows,
          .vocab = vocab,
          .seed = ptr<int64_t>(seed),
          .positions = ptr<int32_t>(positions),
          .purpose = static_cast<uint32_t>(purpose),
          .noise = ptr<float>(noise),
          .noise_row_stride = noise.stride(0)};
}

#if !NLD_EMULATED
const SamplerCpu& cpu_kernels() {
#if defined(NLD_X86)
  return pick_isa(baseline::sampler_cpu, avx2::sampler_cpu, avx512::sampler_cpu);
#else
  return baseline::sampler_cpu;
#endif
}

void check_rules(const char* op, const CommitParams& p) {
  for (int64_t request = 0; request < p.batch; ++request) {
    if (p.rule[request] < 0 || p.rule[request] >= kNumCommitRules) {
      fail(op, ": rule must be a CommitRule (0 to ", kNumCommitRules - 1, "), got ", p.rule[request], " for request ",
           request);
    }
  }
}

// Without a list the mask id is banned. `p` refers to it from now on.
void ban_mask_id(CommitParams& p, const int64_t& mask_token_id) {
  if (!p.bans_mask_id) return;
  p.banned = &mask_token_id;
  p.num_banned = 1;
}

// Fills the parts of the rows that are judged.
void scan_rows(const CommitParams& params) {
  const SamplerCpu& cpu = cpu_kernels();
  CommitParams p = params;
  const std::unique_ptr<int32_t[]> indices(new int32_t[2 * p.rows]);
  p.judged_rows = indices.get();
  p.judged_requests = p.judged_rows + p.rows;
  const int64_t num_items = cpu.plan(p) * num_slices(p.vocab, cpu.slice_len);
  // About 32k logits a thread: below that, starting a second thread costs more than it saves.
  const int64_t item_len = p.vocab < cpu.slice_len ? 1 + p.vocab : cpu.slice_len;
  torch::stable::parallel_for(0, num_items, 1 + 32768 / item_len,
                              [&](int64_t begin, int64_t end) { cpu.scan(p, begin, end); });
}

void commit_rows(const CommitParams& params) {
  CommitParams p = params;
  const std::unique_ptr<float[]> entropy(new float[p.rows]());
  const std::unique_ptr<bool[]> commits(new bool[p.rows]);
  p.entropy = entropy.get();
  p.commits = commits.get();
  torch::stable::parallel_for(0, p.batch, 64, [&](int64_t begin, int64_t end) { cpu_kernels().commit(p, begin, end); });
}

// Needs no tickets: they stay as they are.
void commit_cpu(Tensor logits, Tensor block_tokens, Tensor is_masked, Tensor cu_seqlens, Tensor rule, Tensor threshold,
                int64_t mask_token_id, OptionalTensor quota, OptionalTensor revise_threshold, OptionalTensor is_fixed,
                OptionalTensor banned_token_ids, OptionalTensor eos_token_ids, OptionalTensor temperature,
                OptionalTensor seed, OptionalTensor positions, int64_t purpose, Tensor candidates, Tensor confidence,
                Tensor num_committed, Tensor num_remaining, Tensor done, OptionalTensor tickets) {
  CommitParams p =
      commit_params(logits, block_tokens, is_masked, cu_seqlens, rule, threshold, mask_token_id, quota,
                    revise_threshold, is_fixed, banned_token_ids, eos_token_ids, temperature, seed, positions, purpose,
                    candidates, confidence, num_committed, num_remaining, done, tickets);
  check_rules("commit_", p);
  ban_mask_id(p, mask_token_id);
  // Workspace: 32 bytes a slice and 13 bytes a row. Zeros: if cu_seqlens overlap, a row may be committed unscanned.
  const int64_t slices = num_slices(p.vocab, cpu_kernels().slice_len);
  const std::unique_ptr<SlicePart[]> parts(new SlicePart[p.rows * slices]());
  p.parts = {parts.get(), 1, p.rows, slices};
  scan_rows(p);
  commit_rows(p);
}

Tensor commit_scan_cpu(Tensor logits, Tensor block_tokens, Tensor is_masked, Tensor cu_seqlens, Tensor rule,
                       int64_t first_token_id, int64_t mask_token_id, OptionalTensor is_fixed,
                       OptionalTensor banned_token_ids, OptionalTensor temperature, OptionalTensor seed,
                       OptionalTensor positions, int64_t purpose, int64_t num_parts) {
  CommitParams p = commit_scan_params(logits, block_tokens, is_masked, cu_seqlens, rule, first_token_id, mask_token_id,
                                      is_fixed, banned_token_ids, temperature, seed, positions, purpose);
  check_rules("commit_scan", p);
  ban_mask_id(p, mask_token_id);
  const Tensor parts = new_parts("commit_scan", logits, num_parts);
  p.parts = {ptr<SlicePart>(parts), 1, p.rows, parts.size(1)};
  std::fill_n(p.parts.parts, p.rows * p.parts.num_parts, no_part());
  scan_rows(p);
  return parts;
}

void commit_parts_cpu(Tensor parts, Tensor block_tokens, Tensor is_masked, Tensor cu_seqlens, Tensor rule,
                      Tensor threshold, int64_t vocab, int64_t mask_token_id, OptionalTensor quota,
                      OptionalTensor revise_threshold, OptionalTensor is_fixed, OptionalTensor banned_token_ids,
                      OptionalTensor eos_token_ids, Tensor candidates, Tensor confidence, Tensor num_committed,
                      Tensor num_remaining, Tensor done) {
  CommitParams p = commit_parts_params(parts, block_tokens, is_masked, cu_seqlens, rule, threshold, vocab,
                                       mask_token_id, quota, revise_threshold, is_fixed, banned_token_ids,
                                       eos_token_ids, candidates, confidence, num_committed, num_remaining, done);
  check_rules("commit_parts_", p);
  ban_mask_id(p, mask_token_id);
  commit_rows(p);
}

void gumbel_noise_cpu(Tensor noise, Tensor seed, Tensor positions, int64_t purpose) {
  const GumbelNoiseParams p = gumbel_noise_params(noise, seed, positions, purpose);
  const SamplerCpu& cpu = cpu_kernels();
  torch::stable::parallel_for(0, p.rows, 1 + 16384 / (1 + p.vocab),
                              [&](int64_t begin, int64_t end) { cpu.gumbel_noise(p, begin, end); });
}
#endif

#if NLD_CUDA
// Scratch memory of a commit, behind `parts_bytes` of parts.
Tensor make_workspace(CommitParams& p, const Tensor& like, int64_t parts_bytes) {
  Tensor workspace = torch::stable::new_empty(like, {parts_bytes + 5 * p.rows}, ScalarType::Byte);
  p.entropy = reinterpret_cast<float*>(ptr<char>(workspace) + parts_bytes);
  p.commits = reinterpret_cast<bool*>(p.entropy + p.rows);
  return workspace;
}

void commit_cuda(Tensor logits, Tensor block_tokens, Tensor is_masked, Tensor cu_seqlens, Tensor rule, Tensor threshold,
                 int64_t mask_token_id, OptionalTensor quota, OptionalTensor revise_threshold, OptionalTensor is_fixed,
                 OptionalTensor banned_token_ids, OptionalTensor eos_token_ids, OptionalTensor temperature,
                 OptionalTensor seed, OptionalTensor positions, int64_t purpose, Tensor candidates, Tensor confidence,
                 Tensor num_committed, Tensor num_remaining, Tensor done, OptionalTensor tickets) {
  CommitParams p =
      commit_params(logits, block_tokens, is_masked, cu_seqlens, rule, threshold, mask_token_id, quota,
                    revise_threshold, is_fixed, banned_token_ids, eos_token_ids, temperature, seed, positions, purpose,
                    candidates, confidence, num_committed, num_remaining, done, tickets);
  const CudaScope scope(logits);
  const int64_t slices = commit_slices(p.vocab);
  const Tensor workspace = make_workspace(p, logits, p.rows * slices * static_cast<int64_t>(sizeof(SlicePart)));
  p.parts = {ptr<SlicePart>(workspace), 1, p.rows, slices};
  const Tensor own_tickets = tickets ? *tickets : torch::stable::new_zeros(logits, {p.batch}, ScalarType::Int);
  p.tickets = ptr<int32_t>(own_tickets);
  check_launch("commit_", launch_commit(p, scope.stream()));
}

Tensor commit_scan_cuda(Tensor logits, Tensor block_tokens, Tensor is_masked, Tensor cu_seqlens, Tensor rule,
                        int64_t first_token_id, int64_t mask_token_id, OptionalTensor is_fixed,
                        OptionalTensor banned_token_ids, OptionalTensor temperature, OptionalTensor seed,
                        OptionalTensor positions, int64_t purpose, int64_t num_parts) {
  CommitParams p = commit_scan_params(logits, block_tokens, is_masked, cu_seqlens, rule, first_token_id, mask_token_id,
                                      is_fixed, banned_token_ids, temperature, seed, positions, purpose);
  const CudaScope scope(logits);
  const Tensor parts = new_parts("commit_scan", logits, num_parts);
  p.parts = {ptr<SlicePart>(parts), 1, p.rows, parts.size(1)};
  check_launch("commit_scan", launch_commit_scan(p, scope.stream()));
  return parts;
}

void commit_parts_cuda(Tensor parts, Tensor block_tokens, Tensor is_masked, Tensor cu_seqlens, Tensor rule,
                       Tensor threshold, int64_t vocab, int64_t mask_token_id, OptionalTensor quota,
                       OptionalTensor revise_threshold, OptionalTensor is_fixed, OptionalTensor banned_token_ids,
                       OptionalTensor eos_token_ids, Tensor candidates, Tensor confidence, Tensor num_committed,
                       Tensor num_remaining, Tensor done) {
  CommitParams p = commit_parts_params(parts, block_tokens, is_masked, cu_seqlens, rule, threshold, vocab,
                                       mask_token_id, quota, revise_threshold, is_fixed, banned_token_ids,
                                       eos_token_ids, candidates, confidence, num_committed, num_remaining, done);
  const CudaScope scope(parts);
  const Tensor workspace = make_workspace(p, parts, 0);
  check_launch("commit_parts_", launch_commit_parts(p, scope.stream()));
}

void gumbel_noise_cuda(Tensor noise, Tensor seed, Tensor positions, int64_t purpose) {
  const GumbelNoiseParams p = gumbel_noise_params(noise, seed, positions, purpose);
  const CudaScope scope(noise);
  check_launch("gumbel_noise_", launch_gumbel_noise(p, scope.stream()));
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(NLD_NAMESPACE, m) {
  m.def(
      "commit_(Tensor logits, Tensor(a!) block_tokens, Tensor(b!) is_masked, Tensor cu_seqlens, Tensor rule, "
      "Tensor threshold, *, int mask_token_id, Tensor? quota=None, Tensor? revise_threshold=None, Tensor? "
      "is_fixed=None, "
      "Tensor? banned_token_ids=None, Tensor? eos_token_ids=None, Tensor? temperature=None, Tensor? seed=None, "
      "Tensor? positions=None, int purpose=0, Tensor(c!) candidates, Tensor(d!) confidence, Tensor(e!) num_committed, "
      "Tensor(f!) num_remaining, Tensor(g!) done, Tensor(h!)? tickets=None) -> ()");
  m.def(
      "commit_scan(Tensor logits, Tensor block_tokens, Tensor is_masked, Tensor cu_seqlens, Tensor rule, *, "
      "int first_token_id, int mask_token_id, Tensor? is_fixed=None, Tensor? banned_token_ids=None, "
      "Tensor? temperature=None, Tensor? seed=None, Tensor? positions=None, int purpose=0, int num_parts=0) -> Tensor");
  m.def(
      "commit_parts_(Tensor parts, Tensor(a!) block_tokens, Tensor(b!) is_masked, Tensor cu_seqlens, Tensor rule, "
      "Tensor threshold, *, int vocab, int mask_token_id, Tensor? quota=None, Tensor? revise_threshold=None, "
      "Tensor? is_fixed=None, Tensor? banned_token_ids=None, Tensor? eos_token_ids=None, Tensor(c!) candidates, "
      "Tensor(d!) confidence, Tensor(e!) num_committed, Tensor(f!) num_remaining, Tensor(g!) done) -> ()");
  m.def("gumbel_noise_(Tensor(a!) noise, Tensor seed, Tensor positions, int purpose=0) -> ()");
}

#if !NLD_EMULATED
STABLE_TORCH_LIBRARY_IMPL(nld, CPU, m) {
  m.impl("commit_", TORCH_BOX(&commit_cpu));
  m.impl("commit_scan", TORCH_BOX(&commit_scan_cpu));
  m.impl("commit_parts_", TORCH_BOX(&commit_parts_cpu));
  m.impl("gumbel_noise_", TORCH_BOX(&gumbel_noise_cpu));
}
#endif
#if NLD_CUDA
STABLE_TORCH_LIBRARY_IMPL(NLD_NAMESPACE, NLD_CUDA_KEY, m) {
  m.impl("commit_", TORCH_BOX(&commit_cuda));
  m.impl("commit_scan", TORCH_BOX(&commit_scan_cuda));
  m.impl("commit_parts_", TORCH_BOX(&commit_parts_cuda));
  m.impl("gumbel_noise_", TORCH_BOX(&gumbel_noise_cuda));
}
#endif

}  // namespace nld
