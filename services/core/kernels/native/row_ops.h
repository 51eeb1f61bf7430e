// What is done to one row of activations at a time between the large products: the seam between
// sharing out the rows (norm.cpp, rotary.cpp, gate.cpp) and the arithmetic (row_ops_kernel.h, one
// copy per instruction set). Rows are float32 or bf16 (see Element).
#pragma once

#include <cstdint>

#include "attention.h"
#include "isa.h"

namespace expertfleet {

struct RowOps {
  // sum = x + update, rounded (`update` may be null: sum is not written); then
  // normed = round(round(sum / rms(sum)) * weight), all [size].
  void (*add_rms_norm)(const void* x, const void* update, const void* weight, float eps,
                       int64_t size, void* sum, void* normed);
  // Rotates `count` adjacent heads in place, each product and the sum rounded; `cosines` and
  // `sines` are [head_dim], the first half of the sines negated. head_dim is a multiple of 8.
  void (*rotate)(void* heads, int64_t count, int64_t head_dim, const void* cosines,
                 const void* sines);
  // logits[e] = row e of weight [num_experts, size] times x, rounded to the element type.
  void (*gate_logits)(const void* x, const void* weight, int64_t num_experts, int64_t size,
                      float* logits);
};

const RowOps& row_ops(Element element, Isa isa);

// Defined by one file each.
const RowOps& portable_row_ops(Element element);
const RowOps& avx2_row_ops(Element element);
const RowOps& avx512_row_ops(Element element);

}  // namespace expertfleet
