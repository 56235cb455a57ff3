// Exhaustive checks of mask.h against the rule for one row and one token, and of fast_div.h against the division
// operator.
#include "attention/mask.h"

#include <cstdio>
#include <initializer_list>

#include "common/fast_div.h"

namespace {

int num_failures = 0;
#define CHECK(condition, ...)                                                   \
  do {                                                                          \
    if (!(condition) && ++num_failures <= 10) {                                 \
      std::printf("%s:%d: %s does not hold: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                                 \
      std::printf("\n");                                                        \
    }                                                                           \
  } while (false)

// The rule of docs/design.md, for one row and one token.
bool rule(const nld::RequestMask& mask, int row, int token) {
  const int first = mask.seq_len - mask.num_rows, p = first + row, len = mask.block_len + 1, current = token - first;
  switch (mask.mode) {
    case nld::MaskMode::kFull:
      return true;
    case nld::MaskMode::kCausal:
      return token <= p;
    case nld::MaskMode::kBlockCausal:
      return nld::floor_div(token + mask.block_phase, mask.block_len) <=
             nld::floor_div(p + mask.block_phase, mask.block_len);
    case nld::MaskMode::kQuadratic:
      return current < 0 || (current % len == 0 && current <= row) || (row % len != 0 && current / len == row / len);
  }
  return false;
}

bool row_sees(const nld::RowView& view, int key) {
  return key < view.dense_end || (key >= view.group_begin && key < view.group_end);
}

// Every token has one key, and a row sees its tokens and no others.
void check_order(const nld::RequestMask& mask, int token_of[]) {
  const nld::KeyOrder order = nld::key_order(mask);
  bool met[256] = {};
  for (int key = 0; key < mask.seq_len; ++key) {
    const int token = token_of[key] = nld::token_of_key(order, key);
    const bool fresh = token >= 0 && token < mask.seq_len && !met[token];
    CHECK(fresh, "mode %d, %d keys, %d rows, block %d: key %d is token %d", static_cast<int>(mask.mode), mask.seq_len,
          mask.num_rows, mask.block_len, key, token);
    if (fresh) met[token] = true;
    CHECK(mask.mode == nld::MaskMode::kQuadratic || token == key, "key %d is token %d", key, token);
  }
  for (int key = 0; key < mask.seq_len; ++key) {
    const int end = nld::key_run_end(order, key);
    CHECK(end > key, "the run of key %d ends at %d", key, end);
    for (int next = key + 1; next < end && next < mask.seq_len; ++next) {
      CHECK(token_of[next] == token_of[key] + next - key, "%d keys, %d rows, block %d: run of key %d to %d",
            mask.seq_len, mask.num_rows, mask.block_len, key, end);
    }
  }
}

void check_mask(const nld::RequestMask& mask) {
  int token_of[256];
  check_order(mask, token_of);
  const int mode = static_cast<int>(mask.mode), limit = mask.seq_len + 3;
  for (int row = 0; row < mask.num_rows; ++row) {
    const nld::RowView view = nld::row_view(mask, row);
    for (int key = 0; key < limit; ++key) {
      const bool expected = key < mask.seq_len && rule(mask, row, token_of[key]);
      CHECK(row_sees(view, key) == expected, "mode %d, %d keys, %d rows, block %d phase %d, row %d, key %d", mode,
            mask.seq_len, mask.num_rows, mask.block_len, mask.block_phase, row, key);
    }
    for (int begin = 0; begin < limit; begin += 3) {
      uint64_t expected = 0;
      for (int i = 0; i < 64; ++i) expected |= static_cast<uint64_t>(row_sees(view, begin + i)) << i;
      CHECK(nld::visible_bits(view, begin) == expected, "mode %d row %d key %d", mode, row, begin);
    }
  }
  for (int first = 0; first < mask.num_rows; ++first) {
    for (int last = first; last < mask.num_rows; ++last) {
      const nld::TileKeys keys = nld::tile_keys(mask, first, last);
      CHECK(keys.hole_begin <= keys.hole_end && keys.hole_end <= keys.key_end, "mode %d", mode);
      for (int key = 0; key < limit; ++key) {
        bool visible = false;
        for (int row = first; row <= last; ++row) visible |= row_sees(nld::row_view(mask, row), key);
        const bool inside = key < keys.key_end && !(key >= keys.hole_begin && key < keys.hole_end);
        CHECK(visible == inside, "mode %d, %d keys, %d rows, block %d phase %d, rows %d..%d, key %d", mode,
              mask.seq_len, mask.num_rows, mask.block_len, mask.block_phase, first, last, key);
      }
    }
  }
}

// A walk in steps from `origin` meets every step that touches a key outside of the hole, and no other before its end.
void check_walks() {
  for (int hole_begin = 0; hole_begin < 30; ++hole_begin) {
    for (int hole_end = hole_begin; hole_end < 40; ++hole_end) {
      for (int origin = 0; origin < 45; origin += 3) {
        for (int step = 1; step < 9; step += 2) {
          const nld::KeyRange hole = nld::whole_steps(hole_begin, hole_end, origin, step);
          int at = nld::after_hole(hole, origin);
          for (int key = origin; key < 60; key += step) {
            const bool whole_in_hole = key >= hole_begin && key + step <= hole_end;
            CHECK((at == key) == !whole_in_hole, "hole %d..%d, steps of %d from %d: %d", hole_begin, hole_end, step,
                  origin, key);
            if (at == key) at = nld::after_hole(hole, key + step);
          }
        }
      }
    }
  }
  const nld::KeyRange far = nld::whole_steps(INT32_MAX, INT32_MAX, 64, 64);
  CHECK(far.begin == far.end, "%d..%d", far.begin, far.end);
}

void check_fast_div() {
  for (int64_t shift = 0; shift < 31; ++shift) {
    for (int64_t d = (1ll << shift) - 2; d <= (1ll << shift) + 2; ++d) {
      if (d < 1 || d > INT32_MAX) continue;
      const nld::FastDiv by = nld::fast_div(d);
      const auto check = [&](int64_t n) {
        if (n < 0 || n > INT32_MAX) return;
        const uint32_t q = nld::divide(static_cast<uint32_t>(n), by);
        CHECK(q == n / d && nld::remainder(static_cast<uint32_t>(n), q, by) == n % d, "%lld / %lld",
              static_cast<long long>(n), static_cast<long long>(d));
      };
      for (int64_t n = 0; n < 300; ++n) {
        check(n);
        check(INT32_MAX - n);
        for (int64_t e = -1; e <= 1; ++e) {
          check(n * d + e);
          check(INT32_MAX / d * d - n * d + e);
        }
      }
    }
  }
}

}  // namespace

int main() {
  for (int seq_len = 0; seq_len <= 13; ++seq_len) {
    for (int num_rows = 1; num_rows <= 14; num_rows += num_rows < 6 ? 1 : 4) {
      for (int mode = 0; mode < nld::kNumMaskModes; ++mode) {
        const bool has_blocks = mode >= 2;
        for (int block_len = 1; block_len <= (has_blocks ? 4 : 1); ++block_len) {
          for (int phase = mode == 2 ? -5 : 0; phase <= (mode == 2 ? 5 : 0); ++phase) {
            check_mask({static_cast<nld::MaskMode>(mode), seq_len, num_rows, block_len, phase});
          }
        }
      }
    }
  }
  for (const int seq_len : {63, 64, 65, 130}) {  // words of bits with both ends cut
    check_mask({nld::MaskMode::kQuadratic, seq_len, 9, 3, 0});
    check_mask({nld::MaskMode::kBlockCausal, seq_len, 9, 4, 1});
  }
  for (const int num_rows : {99, 132, 140}) check_mask({nld::MaskMode::kQuadratic, 131, num_rows, 32, 0});
  check_walks();
  check_fast_div();
  std::printf("%d failures\n", num_failures);
  return num_failures == 0 ? 0 : 1;
}
