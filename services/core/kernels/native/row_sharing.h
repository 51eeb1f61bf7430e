// Rows shared out over the pool, where there is enough to do.
#pragma once

#include <algorithm>
#include <cstdint>

#include "pool.h"

namespace expertfleet {

// Calls body(row) for each row; `row_work` is about the number of elements that a row touches.
template <class Body>
void for_each_row(int64_t num_rows, int64_t row_work, const Body& body) {
  constexpr int64_t kWorthSharing = 1 << 15;
  const int64_t rows_at_once = std::max<int64_t>(1, kWorthSharing / std::max<int64_t>(1, row_work));
  const int64_t num_chunks = (num_rows + rows_at_once - 1) / rows_at_once;
  parallel_for(num_chunks, [&](int64_t chunk) {
    const int64_t end = std::min(num_rows, (chunk + 1) * rows_at_once);
    for (int64_t row = chunk * rows_at_once; row < end; ++row) body(row);
  });
}

}  // namespace expertfleet
