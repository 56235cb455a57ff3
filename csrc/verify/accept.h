// What follows once every row has its verdict: accept, emit, cut, roll back. One request at a time, on CPU and GPU
// alike.
#pragma once

#include <cstdint>

#include "common/philox.h"
#include "verify/verify.h"

namespace nld {

// Verdict of a row: kAccepted (the draft after it stands), kResidual (rejected, bonus still to be drawn from the
// residual), or the bonus token that ends the walk if it comes this far. Rows that cannot be reached stay undefined.
constexpr int64_t kAccepted = INT64_MIN;
constexpr int64_t kResidual = INT64_MIN + 1;

// Rows of one request; empty where nothing is to be done.
struct VerifyRows {
  int64_t begin, count;
};

NLD_HD VerifyRows verify_rows(const VerifyParams& p, int64_t request) {
  if (p.done[request]) return {0, 0};
  const int64_t begin = p.cu_seqlens[request], end = p.cu_seqlens[request + 1];
  if (begin < 0 || end > p.rows || end <= begin) return {0, 0};
  return {begin, end - begin};
}

// Factor on the logits of a request's draws; 0: every draw is an argmax.
NLD_HD float draw_scale(const VerifyParams& p, int64_t request) {
  return p.temperature != nullptr ? inverse_temperature(p.temperature[request]) : 0.0f;
}

// The mode a request's rows are judged by: without a temperature every draw is an argmax.
NLD_HD VerifyMode verify_mode(const VerifyParams& p, int64_t request) {
  const auto mode = static_cast<VerifyMode>(p.mode[request]);
  if (mode == VerifyMode::kCommit) return mode;
  const bool known = mode == VerifyMode::kSampled || mode == VerifyMode::kRejection;
  return known && draw_scale(p, request) > 0.0f ? mode : VerifyMode::kGreedy;
}

// Is the target after row `begin + i` the forced token? A draft before that place which is the forced token lifts the
// force: if row i is reached at all, the drafts up to it were emitted, so the question needs no other row's verdict.
NLD_HD bool is_forced(const VerifyParams& p, int64_t request, int64_t begin, int64_t i) {
  if (p.force_positions == nullptr) return false;
  const int32_t place = p.force_positions[request];
  if (place < 0 || p.positions[begin + i] + 1 != place) return false;
  NLD_ROLLED for (int64_t j = 1; j <= i; ++j) {
    if (p.block_tokens[begin + j] == p.force_tokens[request]) return false;
  }
  return true;
}

NLD_HD bool is_eos(const VerifyParams& p, int64_t request, int64_t token) {
  NLD_ROLLED for (int64_t i = 0; i < p.num_eos; ++i) {
    const int64_t eos = p.eos_token_ids[request * p.num_eos + i];
    if (eos >= 0 && eos == token) return true;
  }
  return false;
}

// The lanes that emit a request's tokens together: one on the CPU, a warp on CUDA (kernel.cuh).
struct OneLane {
  static constexpr int kCount = 1;
  NLD_HD int index() { return 0; }
  NLD_HD int first(bool holds) { return holds ? 0 : kCount; }  // lowest lane where it holds, else kCount
  NLD_HD void sync() {}                                        // what lanes read and wrote before comes first
};

// Appends accepted drafts and bonus to the output, with the cuts, and moves the request's state on.
NLD_HD_CALLS_ARGUMENT
template <class Lanes>
NLD_HD void emit(const VerifyParams& p, int64_t request, VerifyRows rows, int64_t accepted, int64_t bonus) {
  const bool commit = verify_mode(p, request) == VerifyMode::kCommit;
  const int64_t limit = p.max_out_lens[request] < p.capacity ? p.max_out_lens[request] : p.capacity;
  const int64_t length = p.out_lens[request];
  const int32_t force_place = p.force_positions != nullptr ? p.force_positions[request] : -1;
  int64_t* out = p.out_tokens + request * p.out_tokens_stride;
  // The seed is emitted already; only a finished diffusion block may bring in one that ends the request.
  bool ended = commit && is_eos(p, request, p.block_tokens[rows.begin]);
  bool lifts_force = false;
  int64_t num_emitted = ended ? 0 : limit - length;  // so far: the room there is
  if (num_emitted > accepted + 1) num_emitted = accepted + 1;
  if (num_emitted < 0) num_emitted = 0;
  NLD_ROLLED for (int64_t i = 0; i < num_emitted; i += Lanes::kCount) {
    const int64_t mine = i + Lanes::index();
    const bool is_bonus = mine == accepted;
    int64_t token = bonus;
    if (mine < accepted) token = p.block_tokens[rows.begin + mine + 1];
    const int eos = Lanes::first(mine < num_emitted && is_eos(p, request, token) && !(is_bonus && commit));
    if (eos < Lanes::kCount) {
      ended = true;
      num_emitted = i + eos + 1;
    }
    const bool is_emitted = mine < num_emitted;
    if (is_emitted) out[length + mine] = token;
    if (mine == num_emitted - 1) p.next_tokens[request] = token;
    const bool lifts = is_emitted && force_place >= 0 && token == p.force_tokens[request] &&
                       p.positions[rows.begin + mine] + 1 <= force_place;
    if (Lanes::first(lifts) < Lanes::kCount) lifts_force = true;
  }
  Lanes::sync();  // every lane has read the state that the first one changes
  if (Lanes::index() != 0) return;
  if (lifts_force) p.force_positions[request] = -1;
  if (ended || length + num_emitted >= limit) p.done[request] = true;
  p.out_lens[request] = static_cast<int32_t>(length + num_emitted);
  p.seq_lens[request] -= static_cast<int32_t>(rows.count - num_emitted);
  p.num_emitted[request] = static_cast<int32_t>(num_emitted);
  p.num_accepted[request] = static_cast<int32_t>(accepted);
}

}  // namespace nld
