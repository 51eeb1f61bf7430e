// The likeliest token of each row of logits, and whether a row is finite, in one pass.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "row_sharing.h"

namespace expertfleet {
namespace {

constexpr int64_t kBlock = 256;
constexpr int kWays = 16;
constexpr uint32_t kExponent = 0x7f80'0000u;

// The largest of up to kBlock values; NaN is passed over, and noted in `is_finite` as infinity is.
float largest_of(const float* values, int64_t count, uint8_t& is_finite) {
  float padded[kBlock];
  if (count < kBlock) {
    std::fill(padded, padded + kBlock, values[0]);
    std::memcpy(padded, values, static_cast<size_t>(count) * sizeof(float));
    values = padded;
  }
  float largest[kWays];
  uint32_t bad[kWays] = {};
  std::memcpy(largest, values, sizeof largest);
  for (int64_t at = 0; at < kBlock; at += kWays) {
    for (int way = 0; way < kWays; ++way) {
      const float value = values[at + way];
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof bits);
      largest[way] = value > largest[way] ? value : largest[way];
      bad[way] |= (bits & kExponent) == kExponent;
    }
  }
  for (int way = 1; way < kWays; ++way) {
    largest[0] = largest[way] > largest[0] ? largest[way] : largest[0];
    bad[0] |= bad[way];
  }
  is_finite &= bad[0] == 0;
  return largest[0];
}

// Of equals the first; any index of a row that is not finite.
int64_t likeliest_of(const float* row, int64_t size, uint8_t& is_finite) {
  int64_t best_block = 0;
  is_finite = 1;
  float best = largest_of(row, std::min(kBlock, size), is_finite);
  for (int64_t block = kBlock; block < size; block += kBlock) {
    const float largest = largest_of(row + block, std::min(kBlock, size - block), is_finite);
    if (largest > best) {
      best = largest;
      best_block = block;
    }
  }
  const float* const stop = row + std::min(size, best_block + kBlock);
  const float* const found = std::find(row + best_block, stop, best);
  return found == stop ? 0 : found - row;
}

}  // namespace
}  // namespace expertfleet

extern "C" {
#pragma GCC visibility push(default)
// logits [num_rows, size] -> token_ids and is_finite [num_rows].
void ef_greedy_tokens(const float* logits, int64_t num_rows, int64_t size, int64_t* token_ids,
                      uint8_t* is_finite) {
  using namespace expertfleet;
  for_each_row(num_rows, size, [&](int64_t row) {
    token_ids[row] = likeliest_of(logits + row * size, size, is_finite[row]);
  });
}
#pragma GCC visibility pop
}
