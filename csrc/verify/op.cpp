// torch.ops.nld.verify_: schema, checks, CPU implementation.
#include <algorithm>
#include <atomic>
#include <string>
#include <vector>

#include "common/cpu_isa.h"
#include "common/stream.h"
#include "verify/accept.h"
#include "verify/verify.h"

namespace nld {
namespace {

using OptionalTensor = std::optional<Tensor>;

void check_together(const char* op, const char* name, bool given, const char* needed_for, bool needed) {
  if (needed && !given) fail(op, ": ", name, " must be given with ", needed_for, ", got None");
}

// Checks of one op's vectors; those that are not given fit.
struct Arguments {
  const char* op;
  const char* like_name;
  const Tensor& like;
  int64_t batch;

  void per_request(const char* name, const OptionalTensor& t, ScalarType type) const {
    if (t) check_vector(op, name, *t, batch, "batch of verify_mode", type, like_name, like);
  }
};

// The arguments that say which rows are judged, and how. `p.rows` is known.
void read_requests(VerifyParams& p, const char* op, const char* like_name, const Tensor& like, const Tensor& cu_seqlens,
                   const Tensor& verify_mode, const Tensor& done, const OptionalTensor& positions,
                   const OptionalTensor& banned_token_ids) {
  p.batch = shape<1>(op, "verify_mode", verify_mode)[0];
  const Arguments arguments = {op, like_name, like, p.batch};
  check_vector(op, "cu_seqlens", cu_seqlens, p.batch + 1, "batch of verify_mode + 1", ScalarType::Int, like_name, like);
  arguments.per_request("verify_mode", verify_mode, ScalarType::Int);
  arguments.per_request("done", done, ScalarType::Bool);
  const std::string rows = std::string("rows of ") + like_name;
  if (positions) check_vector(op, "positions", *positions, p.rows, rows.c_str(), ScalarType::Int, like_name, like);
  if (banned_token_ids) {
    const auto [num_banned] = shape<1>(op, "banned_token_ids", *banned_token_ids);
    check_vector(op, "banned_token_ids", *banned_token_ids, num_banned, "ids", ScalarType::Long, like_name, like);
    p.num_banned = num_banned;
  }
  p.cu_seqlens = ptr<int32_t>(cu_seqlens);
  p.mode = ptr<int32_t>(verify_mode);
  p.done = ptr<bool>(done);
  p.positions = ptr<int32_t>(positions);
  p.banned_token_ids = ptr<int64_t>(banned_token_ids);
}

// What rows are scanned for. `p.batch` is known.
void read_logits(VerifyParams& p, const char* op, const Tensor& logits, const OptionalTensor& temperature,
                 const OptionalTensor& seed, bool has_positions) {
  const Arguments arguments = {op, "logits", logits, p.batch};
  p.dtype = float_dtype(op, "logits", logits);
  check_last_dim_dense(op, "logits", logits);
  arguments.per_request("temperature", temperature, ScalarType::Float);
  arguments.per_request("seed", seed, ScalarType::Long);
  check_together(op, "positions", has_positions, "temperature", temperature.has_value());
  check_together(op, "seed", seed.has_value(), "temperature", temperature.has_value());
  p.logits = logits.data_ptr();
  p.logits_stride = logits.stride(0);
  p.temperature = ptr<float>(temperature);
  p.seed = ptr<int64_t>(seed);
}

// The tokens that are judged, and all that is written. `p.batch` is known.
void read_outputs(VerifyParams& p, const char* op, const char* like_name, const Tensor& like,
                  const Tensor& block_tokens, const Tensor& out_tokens, const Tensor& out_lens,
                  const Tensor& max_out_lens, const Tensor& next_tokens, const Tensor& seq_lens,
                  const OptionalTensor& eos_token_ids, const OptionalTensor& force_positions,
                  const OptionalTensor& force_tokens, const Tensor& num_emitted, const Tensor& num_accepted) {
  const Arguments arguments = {op, like_name, like, p.batch};
  const std::string rows = std::string("rows of ") + like_name;
  check_vector(op, "block_tokens", block_tokens, p.rows, rows.c_str(), ScalarType::Long, like_name, like);
  const auto [capacity_batch, capacity] = shape<2>(op, "out_tokens", out_tokens);
  check_size(op, "out_tokens", out_tokens, 0, p.batch, "batch of verify_mode");
  check_dtype(op, "out_tokens", out_tokens, ScalarType::Long);
  check_last_dim_dense(op, "out_tokens", out_tokens);
  check_device(op, "out_tokens", out_tokens, like_name, like);
  arguments.per_request("out_lens", out_lens, ScalarType::Int);
  arguments.per_request("max_out_lens", max_out_lens, ScalarType::Int);
  arguments.per_request("next_tokens", next_tokens, ScalarType::Long);
  arguments.per_request("seq_lens", seq_lens, ScalarType::Int);
  if (eos_token_ids) {
    shape<2>(op, "eos_token_ids", *eos_token_ids);
    check_dtype(op, "eos_token_ids", *eos_token_ids, ScalarType::Long);
    check_size(op, "eos_token_ids", *eos_token_ids, 0, p.batch, "batch of verify_mode");
    check_contiguous(op, "eos_token_ids", *eos_token_ids);
    check_device(op, "eos_token_ids", *eos_token_ids, like_name, like);
    p.num_eos = eos_token_ids->size(1);
  }
  arguments.per_request("force_positions", force_positions, ScalarType::Int);
  arguments.per_request("force_tokens", force_tokens, ScalarType::Long);
  arguments.per_request("num_emitted", num_emitted, ScalarType::Int);
  arguments.per_request("num_accepted", num_accepted, ScalarType::Int);
  check_together(op, "positions", p.positions != nullptr, "force_positions", force_positions.has_value());
  check_together(op, "force_tokens", force_tokens.has_value(), "force_positions", force_positions.has_value());
  check_together(op, "force_positions", force_positions.has_value(), "force_tokens", force_tokens.has_value());
  p.capacity = capacity;
  p.block_tokens = ptr<int64_t>(block_tokens);
  p.eos_token_ids = ptr<int64_t>(eos_token_ids);
  p.force_positions = ptr<int32_t>(force_positions);
  p.force_tokens = ptr<int64_t>(force_tokens);
  p.out_tokens = ptr<int64_t>(out_tokens);
  p.out_tokens_stride = out_tokens.stride(0);
  p.out_lens = ptr<int32_t>(out_lens);
  p.max_out_lens = ptr<int32_t>(max_out_lens);
  p.next_tokens = ptr<int64_t>(next_tokens);
  p.seq_lens = ptr<int32_t>(seq_lens);
  p.num_emitted = ptr<int32_t>(num_emitted);
  p.num_accepted = ptr<int32_t>(num_accepted);
}

VerifyParams verify_params(const Tensor& logits, const Tensor& block_tokens, const Tensor& cu_seqlens,
                           const Tensor& verify_mode, const Tensor& out_tokens, const Tensor& out_lens,
                           const Tensor& max_out_lens, const Tensor& next_tokens, const Tensor& seq_lens,
                           const Tensor& done, const OptionalTensor& positions, const OptionalTensor& temperature,
                           const OptionalTensor& seed, const OptionalTensor& draft_probs,
                           const OptionalTensor& eos_token_ids, const OptionalTensor& banned_token_ids,
                           const OptionalTensor& force_positions, const OptionalTensor& force_tokens,
                           const Tensor& num_emitted, const Tensor& num_accepted, const OptionalTensor& tickets) {
  const char* op = "verify_";
  VerifyParams p = {};
  const auto [rows, vocab] = shape<2>(op, "logits", logits);
  if (vocab < 1) fail(op, ": logits must have at least one column, got shape ", shape_text(logits));
  p.rows = rows;
  p.vocab = vocab;
  read_requests(p, op, "logits", logits, cu_seqlens, verify_mode, done, positions, banned_token_ids);
  read_logits(p, op, logits, temperature, seed, positions.has_value());
  read_outputs(p, op, "logits", logits, block_tokens, out_tokens, out_lens, max_out_lens, next_tokens, seq_lens,
               eos_token_ids, force_positions, force_tokens, num_emitted, num_accepted);
  if (draft_probs) {
    shape<2>(op, "draft_probs", *draft_probs);
    check_dtype(op, "draft_probs", *draft_probs, ScalarType::Float);
    check_size(op, "draft_probs", *draft_probs, 0, rows, "rows of logits");
    check_size(op, "draft_probs", *draft_probs, 1, vocab, "vocab of logits");
    check_last_dim_dense(op, "draft_probs", *draft_probs);
    check_device(op, "draft_probs", *draft_probs, "logits", logits);
    p.draft_probs = ptr<float>(draft_probs);
    p.draft_probs_stride = draft_probs->stride(0);
  }
  Arguments{op, "logits", logits, p.batch}.per_request("tickets", tickets, ScalarType::Int);
  p.tickets = ptr<int32_t>(tickets);
  return p;
}

VerifyParams verify_scan_params(const Tensor& logits, const Tensor& cu_seqlens, const Tensor& verify_mode,
                                const Tensor& done, int64_t first_token_id, const OptionalTensor& positions,
                                const OptionalTensor& temperature, const OptionalTensor& seed,
                                const OptionalTensor& banned_token_ids) {
  const char* op = "verify_scan";
  VerifyParams p = {};
  const auto [rows, shard] = shape<2>(op, "logits", logits);
  check_shard(op, first_token_id, shard);
  p.rows = rows;
  p.vocab = shard;
  p.first_token_id = first_token_id;
  read_requests(p, op, "logits", logits, cu_seqlens, verify_mode, done, positions, banned_token_ids);
  read_logits(p, op, logits, temperature, seed, positions.has_value());
  return p;
}

VerifyParams verify_parts_params(const Tensor& parts, const Tensor& block_tokens, const Tensor& cu_seqlens,
                                 const Tensor& verify_mode, const Tensor& out_tokens, const Tensor& out_lens,
                                 const Tensor& max_out_lens, const Tensor& next_tokens, const Tensor& seq_lens,
                                 const Tensor& done, int64_t vocab, const OptionalTensor& positions,
                                 const OptionalTensor& eos_token_ids, const OptionalTensor& banned_token_ids,
                                 const OptionalTensor& force_positions, const OptionalTensor& force_tokens,
                                 const Tensor& num_emitted, const Tensor& num_accepted) {
  const char* op = "verify_parts_";
  VerifyParams p = {};
  p.shards = row_parts(op, parts);
  p.rows = p.shards.rows;
  p.vocab = check_vocab(op, vocab);
  read_requests(p, op, "parts", parts, cu_seqlens, verify_mode, done, positions, banned_token_ids);
  read_outputs(p, op, "parts", parts, block_tokens, out_tokens, out_lens, max_out_lens, next_tokens, seq_lens,
               eos_token_ids, force_positions, force_tokens, num_emitted, num_accepted);
  return p;
}

#if !NLD_EMULATED
const VerifyCpu& cpu_kernels() {
#if defined(NLD_X86)
  return pick_isa(baseline::verify_cpu, avx2::verify_cpu, avx512::verify_cpu);
#else
  return baseline::verify_cpu;
#endif
}

// One row whose verdict the walk may need.
struct RowTask {
  int64_t request, row;
  int64_t index;  // of the row in its request
  bool is_last;
};

// Rows to judge, first rows of all requests first: the walks then end before much was read beyond their ends. Forced
// rows get their verdict here; rows after one that cannot be accepted are left out.
std::vector<RowTask> list_rows(const VerifyParams& p, std::vector<int64_t>& verdicts) {
  std::vector<RowTask> tasks;
  std::vector<VerifyRows> open(p.batch);
  int64_t longest = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    open[b] = verify_rows(p, b);
    longest = std::max(longest, open[b].count);
  }
  for (int64_t i = 0; i < longest; ++i) {
    for (int64_t b = 0; b < p.batch; ++b) {
      if (i >= open[b].count) continue;
      const int64_t row = open[b].begin + i;
      const bool is_last = i + 1 == open[b].count;
      if (!is_last && verify_mode(p, b) == VerifyMode::kCommit) continue;
      if (!is_forced(p, b, open[b].begin, i)) {
        tasks.push_back({b, row, i, is_last});
      } else if (!is_last && p.block_tokens[row + 1] == p.force_tokens[b]) {
        verdicts[row] = kAccepted;
      } else {
        verdicts[row] = p.force_tokens[b];
        open[b].count = 0;
      }
    }
  }
  return tasks;
}

// Calls fn(i) for i in 0 .. count on several threads, each taking the next i when it is free.
template <class Fn>
void for_each_dynamic(int64_t count, double us_each, const Fn& fn) {
  constexpr double kUsPerThread = 50;  // below that, waking a thread costs more than it saves
  const auto wanted = static_cast<int64_t>(1 + count * us_each / kUsPerThread);
  const int64_t threads = std::min<int64_t>({wanted, count, torch::stable::get_num_threads()});
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) fn(i);
  });
}

double slice_us(const VerifyParams& p, const VerifyCpu& cpu) {
  return std::min(p.vocab, cpu.slice_len) * (p.temperature != nullptr ? 5e-4 : 1e-4);
}

// Walks along the verdicts of each request and emits.
void emit_all(const VerifyParams& p, const std::vector<int64_t>& verdicts) {
  for (int64_t b = 0; b < p.batch; ++b) {
    p.num_emitted[b] = p.num_accepted[b] = 0;
    const VerifyRows rows = verify_rows(p, b);
    if (rows.count == 0) continue;
    const bool accepts_all = verify_mode(p, b) == VerifyMode::kCommit;
    int64_t accepted = 0;
    while (accepted < rows.count - 1 && (accepts_all || verdicts[rows.begin + accepted] == kAccepted)) ++accepted;
    emit<OneLane>(p, b, rows, accepted, verdicts[rows.begin + accepted]);
  }
}

// Workspace: a RowPart (24 bytes) per row and slice of the vocabulary, as much again per request that draws from a
// residual, and 48 bytes per row.
void verify_rows_cpu(const VerifyParams& p) {
  const VerifyCpu& cpu = cpu_kernels();
  std::vector<int64_t> verdicts(p.rows, kAccepted);
  const std::vector<RowTask> tasks = list_rows(p, verdicts);
  const int64_t slices = num_slices(p.vocab, cpu.slice_len);
  std::vector<RowPart> parts(tasks.size() * slices);
  std::vector<std::atomic<int64_t>> slices_done(tasks.size()), num_open(p.batch);
  for (auto& rows : num_open) rows = INT64_MAX;  // rows of the request that its walk may still reach
  for_each_dynamic(tasks.size() * slices, slice_us(p, cpu), [&](int64_t item) {
    const int64_t task_idx = item / slices, slice = item % slices;
    const RowTask& task = tasks[task_idx];
    if (task.index >= num_open[task.request]) return;
    RowPart* row_parts = &parts[task_idx * slices];
    cpu.scan_slice(p, task.request, task.row, task.is_last, slice, row_parts[slice]);
    if (++slices_done[task_idx] < slices) return;
    const int64_t verdict = verdicts[task.row] = cpu.judge(p, task.request, task.row, task.is_last, row_parts, slices);
    if (verdict == kAccepted) return;
    int64_t seen = num_open[task.request];
    while (seen > task.index + 1 && !num_open[task.request].compare_exchange_weak(seen, task.index + 1)) {
    }
  });

  // Bonus tokens that are drawn from what the draft distribution left over, at the row where the walk ended.
  std::vector<int64_t> residuals;
  for (size_t i = 0; i < tasks.size(); ++i) {
    if (verdicts[tasks[i].row] == kResidual && num_open[tasks[i].request] == tasks[i].index + 1) residuals.push_back(i);
  }
  std::vector<RowPart> residual_parts(residuals.size() * slices);
  for_each_dynamic(residuals.size() * slices, slice_us(p, cpu), [&](int64_t item) {
    const RowTask& task = tasks[residuals[item / slices]];
    cpu.residual_slice(p, task.request, task.row, &parts[residuals[item / slices] * slices], item % slices,
                       residual_parts[item]);
  });
  for (size_t i = 0; i < residuals.size(); ++i) {
    const RowTask& task = tasks[residuals[i]];
    verdicts[task.row] = cpu.pick_residual(p, task.request, task.row, &residual_parts[i * slices]);
  }
  emit_all(p, verdicts);
}

void verify_cpu(Tensor logits, Tensor block_tokens, Tensor cu_seqlens, Tensor verify_mode, Tensor out_tokens,
                Tensor out_lens, Tensor max_out_lens, Tensor next_tokens, Tensor seq_lens, Tensor done,
                OptionalTensor positions, OptionalTensor temperature, OptionalTensor seed, OptionalTensor draft_probs,
                OptionalTensor eos_token_ids, OptionalTensor banned_token_ids, OptionalTensor force_positions,
                OptionalTensor force_tokens, Tensor num_emitted, Tensor num_accepted, OptionalTensor tickets) {
  verify_rows_cpu(verify_params(logits, block_tokens, cu_seqlens, verify_mode, out_tokens, out_lens, max_out_lens,
                                next_tokens, seq_lens, done, positions, temperature, seed, draft_probs, eos_token_ids,
                                banned_token_ids, force_positions, force_tokens, num_emitted, num_accepted, tickets));
}

// REJECTION weighs a draft against the whole row before it knows what to draw.
void check_no_rejection(const char* op, const VerifyParams& p) {
  for (int64_t b = 0; b < p.batch; ++b) {
    if (static_cast<VerifyMode>(p.mode[b]) != VerifyMode::kRejection) continue;
    fail(op, ": verify_mode must be GREEDY, SAMPLED or COMMIT where the vocabulary is sharded, got REJECTION for ",
         "request ", b, ": gather its logits and call verify_");
  }
}

Tensor verify_scan_cpu(Tensor logits, Tensor cu_seqlens, Tensor verify_mode, Tensor done, int64_t first_token_id,
                       OptionalTensor positions, OptionalTensor temperature, OptionalTensor seed,
                       OptionalTensor banned_token_ids, int64_t num_parts) {
  VerifyParams p = verify_scan_params(logits, cu_seqlens, verify_mode, done, first_token_id, positions, temperature,
                                      seed, banned_token_ids);
  check_no_rejection("verify_scan", p);
  const Tensor parts = new_parts("verify_scan", logits, num_parts);
  p.shards = {ptr<SlicePart>(parts), 1, p.rows, parts.size(1)};
  std::fill_n(p.shards.parts, p.rows * p.shards.num_parts, no_part());
  const VerifyCpu& cpu = cpu_kernels();
  std::vector<std::pair<int64_t, int64_t>> rows;  // request, row
  for (int64_t b = 0; b < p.batch; ++b) {
    const VerifyRows own = verify_rows(p, b);
    const bool last_only = static_cast<VerifyMode>(p.mode[b]) == VerifyMode::kCommit && own.count > 0;
    for (int64_t i = last_only ? own.count - 1 : 0; i < own.count; ++i) rows.emplace_back(b, own.begin + i);
  }
  const int64_t slices = num_slices(p.vocab, cpu.slice_len);
  for_each_dynamic(rows.size() * slices, slice_us(p, cpu), [&](int64_t item) {
    const auto [request, row] = rows[item / slices];
    cpu.scan_shard_slice(p, request, row, item % slices);
  });
  return parts;
}

void verify_parts_cpu(Tensor parts, Tensor block_tokens, Tensor cu_seqlens, Tensor verify_mode, Tensor out_tokens,
                      Tensor out_lens, Tensor max_out_lens, Tensor next_tokens, Tensor seq_lens, Tensor done,
                      int64_t vocab, OptionalTensor positions, OptionalTensor eos_token_ids,
                      OptionalTensor banned_token_ids, OptionalTensor force_positions, OptionalTensor force_tokens,
                      Tensor num_emitted, Tensor num_accepted) {
  const VerifyParams p = verify_parts_params(
      parts, block_tokens, cu_seqlens, verify_mode, out_tokens, out_lens, max_out_lens, next_tokens, seq_lens, done,
      vocab, positions, eos_token_ids, banned_token_ids, force_positions, force_tokens, num_emitted, num_accepted);
  check_no_rejection("verify_parts_", p);
  std::vector<int64_t> verdicts(p.rows, kAccepted);
  for (const RowTask& task : list_rows(p, verdicts)) {
    SlicePart best = no_part();
    for (int64_t i = 0; i < parts_of_row(p.shards); ++i) {
      const SlicePart& part = *part_at(p.shards, task.row, i);
      if (part.value > best.value) best = part;
    }
    const RowPart row = {best.value, best.id, best.max, best.sum};
    verdicts[task.row] = cpu_kernels().judge(p, task.request, task.row, task.is_last, &row, 1);
  }
  emit_all(p, verdicts);
}
#endif

#if NLD_CUDA
// Workspace: 16 bytes a row and slice of the vocabulary, 16 a request where drafts come with probabilities.
void verify_cuda(Tensor logits, Tensor block_tokens, Tensor cu_seqlens, Tensor verify_mode, Tensor out_tokens,
                 Tensor out_lens, Tensor max_out_lens, Tensor next_tokens, Tensor seq_lens, Tensor done,
                 OptionalTensor positions, OptionalTensor temperature, OptionalTensor seed, OptionalTensor draft_probs,
                 OptionalTensor eos_token_ids, OptionalTensor banned_token_ids, OptionalTensor force_positions,
                 OptionalTensor force_tokens, Tensor num_emitted, Tensor num_accepted, OptionalTensor tickets) {
  VerifyParams p = verify_params(logits, block_tokens, cu_seqlens, verify_mode, out_tokens, out_lens, max_out_lens,
                                 next_tokens, seq_lens, done, positions, temperature, seed, draft_probs, eos_token_ids,
                                 banned_token_ids, force_positions, force_tokens, num_emitted, num_accepted, tickets);
  if (p.batch == 0) return;
  const CudaScope scope(logits);
  const bool weighs_drafts = draft_probs && temperature;
  const int64_t part_bytes = p.rows * verify_slices(p.vocab) * static_cast<int64_t>(sizeof(VerifyPart));
  const int64_t task_bytes = weighs_drafts ? p.batch * static_cast<int64_t>(sizeof(ResidualTask)) : 0;
  const Tensor workspace = torch::stable::new_empty(logits, {part_bytes + task_bytes}, ScalarType::Byte);
  p.parts = static_cast<VerifyPart*>(workspace.data_ptr());
  p.verdicts = static_cast<RowVerdict*>(workspace.data_ptr());
  if (weighs_drafts) p.residual = reinterpret_cast<ResidualTask*>(ptr<char>(workspace) + part_bytes);
  std::optional<Tensor> own_tickets;
  if (!tickets) {
    own_tickets = torch::stable::new_zeros(logits, {p.batch}, ScalarType::Int);
    p.tickets = ptr<int32_t>(own_tickets);
  }
  check_launch("verify_", launch_verify(p, scope.stream()));
}

Tensor verify_scan_cuda(Tensor logits, Tensor cu_seqlens, Tensor verify_mode, Tensor done, int64_t first_token_id,
                        OptionalTensor positions, OptionalTensor temperature, OptionalTensor seed,
                        OptionalTensor banned_token_ids, int64_t num_parts) {
  VerifyParams p = verify_scan_params(logits, cu_seqlens, verify_mode, done, first_token_id, positions, temperature,
                                      seed, banned_token_ids);
  const CudaScope scope(logits);
  const Tensor parts = new_parts("verify_scan", logits, num_parts);
  p.shards = {ptr<SlicePart>(parts), 1, p.rows, parts.size(1)};
  check_launch("verify_scan", launch_verify_scan(p, scope.stream()));
  return parts;
}

void verify_parts_cuda(Tensor parts, Tensor block_tokens, Tensor cu_seqlens, Tensor verify_mode, Tensor out_tokens,
                       Tensor out_lens, Tensor max_out_lens, Tensor next_tokens, Tensor seq_lens, Tensor done,
                       int64_t vocab, OptionalTensor positions, OptionalTensor eos_token_ids,
                       OptionalTensor banned_token_ids, OptionalTensor force_positions, OptionalTensor force_tokens,
                       Tensor num_emitted, Tensor num_accepted) {
  const VerifyParams p = verify_parts_params(
      parts, block_tokens, cu_seqlens, verify_mode, out_tokens, out_lens, max_out_lens, next_tokens, seq_lens, done,
      vocab, positions, eos_token_ids, banned_token_ids, force_positions, force_tokens, num_emitted, num_accepted);
  const CudaScope scope(parts);
  check_launch("verify_parts_", launch_verify_parts(p, scope.stream()));
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(NLD_NAMESPACE, m) {
  // Not "mode": torch's own machinery (auto_functionalized) has a parameter of that name in the way.
  m.def(
      "verify_(Tensor logits, Tensor block_tokens, Tensor cu_seqlens, Tensor verify_mode, Tensor(a!) out_tokens, "
      "Tensor(b!) out_lens, Tensor max_out_lens, Tensor(c!) next_tokens, Tensor(d!) seq_lens, Tensor(e!) done, *, "
      "Tensor? positions=None, Tensor? temperature=None, Tensor? seed=None, Tensor? draft_probs=None, "
      "Tensor? eos_token_ids=None, Tensor? banned_token_ids=None, Tensor(f!)? force_positions=None, "
      "Tensor? force_tokens=None, Tensor(g!) num_emitted, Tensor(h!) num_accepted, Tensor(i!)? tickets=None) -> ()");
  m.def(
      "verify_scan(Tensor logits, Tensor cu_seqlens, Tensor verify_mode, Tensor done, *, int first_token_id, "
      "Tensor? positions=None, Tensor? temperature=None, Tensor? seed=None, Tensor? banned_token_ids=None, "
      "int num_parts=0) -> Tensor");
  m.def(
      "verify_parts_(Tensor parts, Tensor block_tokens, Tensor cu_seqlens, Tensor verify_mode, Tensor(a!) out_tokens, "
      "Tensor(b!) out_lens, Tensor max_out_lens, Tensor(c!) next_tokens, Tensor(d!) seq_lens, Tensor(e!) done, *, "
      "int vocab, Tensor? positions=None, Tensor? eos_token_ids=None, Tensor? banned_token_ids=None, "
      "Tensor(f!)? force_positions=None, Tensor? force_tokens=None, Tensor(g!) num_emitted, "
      "Tensor(h!) num_accepted) -> ()");
}

#if !NLD_EMULATED
STABLE_TORCH_LIBRARY_IMPL(nld, CPU, m) {
  m.impl("verify_", TORCH_BOX(&verify_cpu));
  m.impl("verify_scan", TORCH_BOX(&verify_scan_cpu));
  m.impl("verify_parts_", TORCH_BOX(&verify_parts_cpu));
}
#endif
#if NLD_CUDA
STABLE_TORCH_LIBRARY_IMPL(NLD_NAMESPACE, NLD_CUDA_KEY, m) {
  m.impl("verify_", TORCH_BOX(&verify_cuda));
  m.impl("verify_scan", TORCH_BOX(&verify_scan_cuda));
  m.impl("verify_parts_", TORCH_BOX(&verify_parts_cuda));
}
#endif

}  // namespace nld
