#include <cmath>
#include <cstring>

#include "api.h"
#include "row_ops.h"
#include "row_sharing.h"

namespace expertfleet {
namespace {

// The gate's answer for one row; `logits` becomes the softmax. Of equal probabilities the lower id
// comes first. With a NaN among the logits every weight is NaN and the ids are still distinct.
void choose_experts(float* logits, int64_t num_experts, int64_t count, int64_t* ids,
                    float* weights) {
  float largest = logits[0], total = 0.0f, chosen_total = 0.0f;
  for (int64_t i = 1; i < num_experts; ++i) largest = logits[i] > largest ? logits[i] : largest;
  for (int64_t i = 0; i < num_experts; ++i) {
    logits[i] = std::exp(logits[i] - largest);
    total += logits[i];
  }
  for (int64_t i = 0; i < num_experts; ++i) logits[i] /= total;
  for (int64_t k = 0; k < count; ++k) {
    int64_t best = -1;
    for (int64_t i = 0; i < num_experts; ++i) {
      bool is_taken = false;
      for (int64_t earlier = 0; earlier < k; ++earlier) is_taken |= ids[earlier] == i;
      if (!is_taken && (best < 0 || logits[i] > logits[best])) best = i;
    }
    ids[k] = best;
    weights[k] = logits[best];
    chosen_total += logits[best];
  }
  for (int64_t k = 0; k < count; ++k) weights[k] /= chosen_total;
}

}  // namespace
}  // namespace expertfleet

extern "C" {
#pragma GCC visibility push(default)
// x [num_rows, size], weight [num_experts, size] -> ids and weights [num_rows, count], best first.
// `scratch` is [num_rows, num_experts].
void ef_topk_gate(const char* x, const char* weight, float* scratch, int64_t* ids, float* weights,
                  int64_t num_rows, int64_t size, int64_t num_experts, int64_t count,
                  int32_t element) {
  using namespace expertfleet;
  const RowOps& ops = row_ops(static_cast<Element>(element), active_isa());
  const int64_t row_bytes = size * (element == static_cast<int32_t>(Element::float32) ? 4 : 2);
  for_each_row(num_rows, num_experts * size, [&](int64_t row) {
    float* logits = scratch + row * num_experts;
    ops.gate_logits(x + row * row_bytes, weight, num_experts, size, logits);
    choose_experts(logits, num_experts, count, ids + row * count, weights + row * count);
  });
}
#pragma GCC visibility pop
}
