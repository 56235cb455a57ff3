// Exhaustive checks of what mask.h says of tiles against what it says of single keys, and of fast_div.h against the
// division operator.
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

bool row_sees(const nld::RequestMask& mask, int row, int key) {
  const nld::RowView view = nld::row_view(mask, row);
  return key < view.dense_end || (key < view.head_end && nld::is_group_head(mask, key)) ||
         (key >= view.group_begin && key < view.group_end);
}

void check_mask(const nld::RequestMask& mask) {
  const int limit = mask.seq_len + 3;
  for (int first = 0; first < mask.num_rows; ++first) {
    for (int last = first; last < mask.num_rows; ++last) {
      const nld::RowView last_view = nld::row_view(mask, last);
      for (int begin = 0; begin < limit; ++begin) {
        bool visible = false;  // grows with `end`
        for (int end = begin; end < limit; ++end) {
          for (int row = first; end > begin && row <= last; ++row) visible |= row_sees(mask, row, end - 1);
          const bool seen = nld::tile_is_seen(mask, first, last + 1, last_view, begin, end);
          // May be true for nothing where the tile lies in the group of the rows.
          const bool may_differ = mask.mode == nld::MaskMode::kQuadratic || end == begin;
          CHECK(may_differ ? seen || !visible : seen == visible,
                "mode %d, %d keys, %d rows, block %d phase %d, rows %d..%d, keys %d..%d", static_cast<int>(mask.mode),
                mask.seq_len, mask.num_rows, mask.block_len, mask.block_phase, first, last, begin, end);
        }
      }
    }
  }
  for (int row = 0; row < mask.num_rows; ++row) {
    for (int begin = 0; begin < limit; begin += 3) {
      uint64_t heads = 0, expected = 0;
      for (int i = 0; i < 64; ++i) {
        if (mask.mode == nld::MaskMode::kQuadratic && nld::is_group_head(mask, begin + i)) heads |= 1ull << i;
        if (row_sees(mask, row, begin + i)) expected |= 1ull << i;
      }
      CHECK(nld::visible_bits(nld::row_view(mask, row), heads, begin) == expected, "mode %d row %d key %d",
            static_cast<int>(mask.mode), row, begin);
    }
  }
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
  check_fast_div();
  std::printf("%d failures\n", num_failures);
  return num_failures == 0 ? 0 : 1;
}
