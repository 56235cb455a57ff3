// torch.ops.nld.commit_ and gumbel_noise_: schemas, checks, CPU and CUDA implementations.
#include <memory>

#include "common/cpu_isa.h"
#include "common/stream.h"
#include "sampler/sampler.h"

namespace nld {
namespace {

using OptionalTensor = std::optional<Tensor>;

void check_optional_vector(const char* op, const char* name, const OptionalTensor& t, int64_t size, const char* what,
                           ScalarType type, const Tensor& like) {
  if (t) check_vector(op, name, *t, size, what, type, "logits", like);
}

void check_purpose(const char* op, int64_t purpose) {
  if (purpose < 0 || purpose > 3)
    fail(op, ": purpose must be 0 (sample), 1 (draft), 2 (accept) or 3 (residual), got ", purpose);
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
  const auto [rows, vocab] = shape<2>(op, "logits", logits);
  const DType dtype = float_dtype(op, "logits", logits);
  if (vocab < 1 || vocab > INT32_MAX)
    fail(op, ": logits must have 1 to 2^31 - 1 columns, got shape ", shape_text(logits));
  check_last_dim_dense(op, "logits", logits);
  const auto [num_bounds] = shape<1>(op, "cu_seqlens", cu_seqlens);
  if (num_bounds < 1) fail(op, ": cu_seqlens must have batch + 1 elements, got none");
  const int64_t batch = num_bounds - 1;
  check_vector(op, "cu_seqlens", cu_seqlens, batch + 1, "batch + 1", ScalarType::Int, "logits", logits);
  check_vector(op, "block_tokens", block_tokens, rows, "rows of logits", ScalarType::Long, "logits", logits);
  check_vector(op, "is_masked", is_masked, rows, "rows of logits", ScalarType::Bool, "logits", logits);
  check_vector(op, "rule", rule, batch, "batch of cu_seqlens", ScalarType::Int, "logits", logits);
  check_vector(op, "threshold", threshold, batch, "batch of cu_seqlens", ScalarType::Float, "logits", logits);
  check_optional_vector(op, "quota", quota, batch, "batch of cu_seqlens", ScalarType::Int, logits);
  check_optional_vector(op, "revise_threshold", revise_threshold, batch, "batch of cu_seqlens", ScalarType::Float,
                        logits);
  check_optional_vector(op, "is_fixed", is_fixed, rows, "rows of logits", ScalarType::Bool, logits);
  if (banned_token_ids) {
    const auto [num_banned] = shape<1>(op, "banned_token_ids", *banned_token_ids);
    check_vector(op, "banned_token_ids", *banned_token_ids, num_banned, "ids", ScalarType::Long, "logits", logits);
  }
  if (eos_token_ids) {
    shape<2>(op, "eos_token_ids", *eos_token_ids);
    check_dtype(op, "eos_token_ids", *eos_token_ids, ScalarType::Long);
    check_size(op, "eos_token_ids", *eos_token_ids, 0, batch, "batch of cu_seqlens");
    check_contiguous(op, "eos_token_ids", *eos_token_ids);
    check_device(op, "eos_token_ids", *eos_token_ids, "logits", logits);
  }
  check_optional_vector(op, "temperature", temperature, batch, "batch of cu_seqlens", ScalarType::Float, logits);
  check_optional_vector(op, "seed", seed, batch, "batch of cu_seqlens", ScalarType::Long, logits);
  check_optional_vector(op, "positions", positions, rows, "rows of logits", ScalarType::Int, logits);
  if (temperature && !seed) fail(op, ": seed must be given with temperature, got none");
  if (temperature && !positions) fail(op, ": positions must be given with temperature, got none");
  check_purpose(op, purpose);
  check_vector(op, "candidates", candidates, rows, "rows of logits", ScalarType::Long, "logits", logits);
  check_vector(op, "confidence", confidence, rows, "rows of logits", ScalarType::Float, "logits", logits);
  check_vector(op, "num_committed", num_committed, batch, "batch of cu_seqlens", ScalarType::Int, "logits", logits);
  check_vector(op, "num_remaining", num_remaining, batch, "batch of cu_seqlens", ScalarType::Int, "logits", logits);
  check_vector(op, "done", done, batch, "batch of cu_seqlens", ScalarType::Bool, "logits", logits);
  check_optional_vector(op, "tickets", tickets, batch, "batch of cu_seqlens", ScalarType::Int, logits);
  CommitParams p = {};
  p.dtype = dtype;
  p.rows = rows;
  p.vocab = vocab;
  p.batch = batch;
  p.logits = logits.data_ptr();
  p.logits_row_stride = logits.stride(0);
  p.block_tokens = ptr<int64_t>(block_tokens);
  p.is_masked = ptr<bool>(is_masked);
  p.cu_seqlens = ptr<int32_t>(cu_seqlens);
  p.rule = ptr<int32_t>(rule);
  p.threshold = ptr<float>(threshold);
  p.mask_token_id = mask_token_id;
  p.quota = ptr<int32_t>(quota);
  p.revise_threshold = ptr<float>(revise_threshold);
  p.is_fixed = ptr<bool>(is_fixed);
  p.banned = ptr<int64_t>(banned_token_ids);
  p.bans_mask_id = !banned_token_ids;
  p.num_banned = banned_token_ids ? banned_token_ids->size(0) : 0;
  p.eos = ptr<int64_t>(eos_token_ids);
  p.num_eos = eos_token_ids ? eos_token_ids->size(1) : 0;
  p.temperature = ptr<float>(temperature);
  p.seed = ptr<int64_t>(seed);
  p.positions = ptr<int32_t>(positions);
  p.purpose = static_cast<uint32_t>(purpose);
  p.candidates = ptr<int64_t>(candidates);
  p.confidence = ptr<float>(confidence);
  p.num_committed = ptr<int32_t>(num_committed);
  p.num_remaining = ptr<int32_t>(num_remaining);
  p.done = ptr<bool>(done);
  p.tickets = ptr<int32_t>(tickets);
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
  for (int64_t request = 0; request < p.batch; ++request) {
    if (p.rule[request] < 0 || p.rule[request] >= kNumCommitRules) {
      fail("commit_: rule must be a CommitRule (0 to ", kNumCommitRules - 1, "), got ", p.rule[request],
           " for request ", request);
    }
  }
  if (!banned_token_ids) {
    p.banned = &mask_token_id;
    p.num_banned = 1;
  }
  const SamplerCpu& cpu = cpu_kernels();
  // Workspace: 20 bytes a slice and 13 bytes a row.
  p.num_slices = (p.vocab + cpu.slice_len - 1) / cpu.slice_len;
  const std::unique_ptr<CommitPart[]> parts(new CommitPart[p.rows * p.num_slices]);
  const std::unique_ptr<int32_t[]> indices(new int32_t[2 * p.rows + p.batch + 1]);
  const std::unique_ptr<float[]> entropy(new float[p.rows]());
  const std::unique_ptr<bool[]> commits(new bool[p.rows]);
  p.parts = parts.get();
  p.judged_rows = indices.get();
  p.judged_requests = p.judged_rows + p.rows;
  p.first_judged = p.judged_requests + p.rows;
  p.entropy = entropy.get();
  p.commits = commits.get();

  const int64_t num_items = cpu.plan(p) * p.num_slices;
  // About 32k logits a thread: below that, starting a second thread costs more than it saves.
  const int64_t item_len = p.vocab < cpu.slice_len ? p.vocab : cpu.slice_len;
  torch::stable::parallel_for(0, num_items, 1 + 32768 / item_len,
                              [&](int64_t begin, int64_t end) { cpu.scan(p, begin, end); });
  torch::stable::parallel_for(0, p.batch, 64, [&](int64_t begin, int64_t end) { cpu.commit(p, begin, end); });
}

void gumbel_noise_cpu(Tensor noise, Tensor seed, Tensor positions, int64_t purpose) {
  const GumbelNoiseParams p = gumbel_noise_params(noise, seed, positions, purpose);
  const SamplerCpu& cpu = cpu_kernels();
  torch::stable::parallel_for(0, p.rows, 1 + 16384 / (1 + p.vocab),
                              [&](int64_t begin, int64_t end) { cpu.gumbel_noise(p, begin, end); });
}
#endif

#if NLD_CUDA
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
  const Tensor workspace =
      torch::stable::new_empty(logits, {commit_workspace_bytes(p.rows, p.vocab)}, ScalarType::Byte);
  const Tensor own_tickets = tickets ? *tickets : torch::stable::new_zeros(logits, {p.batch}, ScalarType::Int);
  p.workspace = workspace.data_ptr();
  p.tickets = ptr<int32_t>(own_tickets);
  check_launch("commit_", launch_commit(p, scope.stream()));
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
  m.def("gumbel_noise_(Tensor(a!) noise, Tensor seed, Tensor positions, int purpose=0) -> ()");
}

#if !NLD_EMULATED
STABLE_TORCH_LIBRARY_IMPL(nld, CPU, m) {
  m.impl("commit_", TORCH_BOX(&commit_cpu));
  m.impl("gumbel_noise_", TORCH_BOX(&gumbel_noise_cpu));
}
#endif
#if NLD_CUDA
STABLE_TORCH_LIBRARY_IMPL(NLD_NAMESPACE, NLD_CUDA_KEY, m) {
  m.impl("commit_", TORCH_BOX(&commit_cuda));
  m.impl("gumbel_noise_", TORCH_BOX(&gumbel_noise_cuda));
}
#endif

}  // namespace nld
