// The experts of a MoE layer over frames of rows.
#pragma once

#include <cstdint>

#include "matrix.h"

namespace expertfleet {

// Of one format.
struct Expert {
  Matrix gate;
  Matrix up;
  Matrix down;
};

// hidden_states and output have rows of hidden_size values, contiguous. Assignment i is of row
// token_rows[i] (null: i) with weight topk_weights[i] (null: 1). Combined, the output has a row per
// token, which results are added to; else one per assignment.
struct MoeFrame {
  const uint8_t* hidden_states;
  int64_t num_tokens;
  const int64_t* token_rows;
  const float* topk_weights;
  uint8_t* output;
  int64_t is_combined;
};

// Assignments start .. start + count of a frame, all of one expert.
struct MoePart {
  const Expert* expert;
  int64_t frame;
  int64_t start;
  int64_t count;
};

// Computes the outputs of all frames; the parts in ascending expert id. All experts have the same
// shapes, and every token row is one of its frame's.
void moe_forward(const MoeFrame* frames, const MoePart* parts, int64_t num_parts,
                 Activation type);

}  // namespace expertfleet
