// How a product of many rows and panels is split into chunks for the pool.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

#include "matrix.h"
#include "pool.h"

namespace expertfleet {

// Rows that a panel is multiplied by at once: their products stay in the second-level cache.
constexpr int64_t kTileRows = 96;

inline size_t value_bytes(Activation type) { return type == Activation::float32 ? 4 : 2; }

// body(first, last) for runs of [0, count): about 16 for every thread, so that none waits long for
// the last one.
inline void parallel_runs(int64_t count, const std::function<void(int64_t, int64_t)>& body) {
  const int64_t run = std::max<int64_t>(1, count / (16 * num_threads()));
  parallel_for((count + run - 1) / run, [&](int64_t chunk) {
    body(chunk * run, std::min(count, (chunk + 1) * run));
  });
}

// body(row) for each row; on the calling thread alone where that is too little to share.
inline void parallel_rows(int64_t count, size_t row_bytes,
                          const std::function<void(int64_t)>& body) {
  constexpr int64_t kWorthSharing = 256 << 10;
  const int64_t rows = std::max<int64_t>(1, kWorthSharing / static_cast<int64_t>(row_bytes));
  parallel_for((count + rows - 1) / rows, [&](int64_t chunk) {
    const int64_t last = std::min(count, (chunk + 1) * rows);
    for (int64_t row = chunk * rows; row < last; ++row) body(row);
  });
}

}  // namespace expertfleet
