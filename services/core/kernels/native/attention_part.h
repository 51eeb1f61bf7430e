// What of a decoder layer comes before its experts.
#pragma once

#include <cstdint>

#include "attention_step.h"
#include "matrix.h"

// `AttentionPartStruct` in kernels/attention_part.py mirrors it.
extern "C" struct ef_attention_part {
  // [hidden_size]
  const char* input_norm;
  const char* post_attention_norm;
  const expertfleet::Matrix* qkv_proj;
  const expertfleet::Matrix* o_proj;
  // [num_experts, hidden_size]; null for a dense layer.
  const char* gate;
  int64_t num_experts;
  int64_t num_experts_per_tok;
  float eps;
};

extern "C" {
#pragma GCC visibility push(default)
// x += update (which may be null); x += o_proj(attention(norm(x))); normed = norm(x); topk_ids and
// topk_weights [tokens, num_experts_per_tok] are the gate's. x, update and normed are
// [tokens, hidden_size]. `scratch` holds, by token, num_experts floats and qkv outputs + o_proj inputs
// + hidden_size elements.
void ef_attention_part_forward(const ef_attention_part* part, const ef_attention_step* step, char* x,
                               const char* update, char* keys, char* values, char* normed,
                               char* scratch, int64_t* topk_ids, float* topk_weights);
#pragma GCC visibility pop
}
