#include "api.h"
#include "row_ops.h"
#include "row_sharing.h"

extern "C" {
#pragma GCC visibility push(default)
// x, update (or null), sum (unused without an update) and normed are [num_rows, size].
void ef_add_rms_norm(const char* x, const char* update, const char* weight, char* sum, char* normed,
                     int64_t num_rows, int64_t size, float eps, int32_t element) {
  using namespace expertfleet;
  const RowOps& ops = row_ops(static_cast<Element>(element), active_isa());
  const int64_t row_bytes = size * (element == static_cast<int32_t>(Element::float32) ? 4 : 2);
  for_each_row(num_rows, 3 * size, [&](int64_t row) {
    const int64_t at = row * row_bytes;
    ops.add_rms_norm(x + at, update ? update + at : nullptr, weight, eps, size,
                     sum ? sum + at : nullptr, normed + at);
  });
}
#pragma GCC visibility pop
}
