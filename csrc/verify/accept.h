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
  for (int64_t j = 1; j <= i; ++j) {
    if (p.block_tokens[begin + j] == p.force_tokens[request]) return false;
  }
  return true;
}

NLD_HD bool is_eos(const VerifyParams& p, int64_t request, int64_t token) {
  for (int64_t i = 0; i < p.num_eos; ++i) {
    const int64_t eos = p.eos_token_ids[request * p.num_eos + i];
    if (eos >= 0 && eos == token) return true;
  }
  return false;
}

// Drafts accepted: the leading rows whose verdict is kAccepted; under kCommit all of them.
NLD_HD int64_t count_accepted(const VerifyParams& p, int64_t request, VerifyRows rows, const int64_t* verdicts) {
  if (verify_mode(p, request) == VerifyMode::kCommit) return rows.count - 1;
  int64_t accepted = 0;
  while (accepted < rows.count - 1 && verdicts[rows.begin + accepted] == kAccepted) ++accepted;
  return accepted;
}

// Appends accepted drafts and bonus to the output, with the cuts, and moves the request's state on.
NLD_HD void emit(const VerifyParams& p, int64_t request, const int64_t* verdicts) {
  p.num_emitted[request] = p.num_accepted[request] = 0;
  const VerifyRows rows = verify_rows(p, request);
  if (rows.count == 0) return;
  const bool commit = verify_mode(p, request) == VerifyMode::kCommit;
  const int64_t accepted = count_accepted(p, request, rows, verdicts);
  const int64_t limit = p.max_out_lens[request] < p.capacity ? p.max_out_lens[request] : p.capacity;
  const int64_t length = p.out_lens[request];
  int64_t* out = p.out_tokens + request * p.out_tokens_stride;
  int32_t force_place = p.force_positions != nullptr ? p.force_positions[request] : -1;
  // The seed is emitted already; only a finished diffusion block may bring in one that ends the request.
  bool ended = commit && is_eos(p, request, p.block_tokens[rows.begin]);
  int64_t emitted = 0;
  while (emitted <= accepted && !ended && length + emitted < limit) {
    const bool is_bonus = emitted == accepted;
    const int64_t token = is_bonus ? verdicts[rows.begin + accepted] : p.block_tokens[rows.begin + emitted + 1];
    if (force_place >= 0 && token == p.force_tokens[request] && p.positions[rows.begin + emitted] + 1 <= force_place) {
      force_place = -1;
    }
    out[length + emitted] = token;
    p.next_tokens[request] = token;
    ended = is_eos(p, request, token) && !(is_bonus && commit);
    ++emitted;
  }
  if (p.force_positions != nullptr) p.force_positions[request] = force_place;
  if (ended || length + emitted >= limit) p.done[request] = true;
  p.out_lens[request] = static_cast<int32_t>(length + emitted);
  p.seq_lens[request] -= static_cast<int32_t>(rows.count - emitted);
  p.num_emitted[request] = static_cast<int32_t>(emitted);
  p.num_accepted[request] = static_cast<int32_t>(accepted);
}

}  // namespace nld
