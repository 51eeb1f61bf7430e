// What happens to a panel's float32 products before they are stored: activation, rounding, weights.
#pragma once

#include <cstdint>

#include "isa.h"
#include "matrix.h"

namespace expertfleet {

// Where row r of a panel goes: to values + r * stride (in values), `width` <= kPanel of it.
struct PanelTarget {
  void* values;
  int64_t stride;
  int64_t width;
  Activation type;
};

// A row of a MoE layer: where its weighted result is stored, or added.
struct MoeRow {
  const uint8_t* hidden_states;
  uint8_t* output;
  float weight;
  bool is_added;
};

struct ElementwiseKernels {
  // Rounded products; with `silu`, silu of them before the rounding.
  void (*store)(const float* products, int64_t count, bool silu, const PanelTarget& target);
  // round(round(silu(gate)) * round(up)), round being that of the target's type.
  void (*swiglu)(const float* gate, const float* up, int64_t count, const PanelTarget& target);
  // round(round(product) * weight) of every row, to columns first_column.. of its output, where
  // it is stored, or added and the sum rounded.
  void (*combine)(const float* products, const MoeRow* rows, int64_t count, int64_t first_column,
                  int64_t width, Activation type);
};

const ElementwiseKernels& elementwise_kernels(Isa isa);

extern const ElementwiseKernels kElementwisePortable;
extern const ElementwiseKernels kElementwiseAvx2;
extern const ElementwiseKernels kElementwiseAvx512;

}  // namespace expertfleet
