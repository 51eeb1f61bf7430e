// What all layers of one step share; `StepArguments` in kernels/attention.py mirrors it.
//
// qkv is [tokens, query heads + 2 * key-value heads, head_dim]: queries, keys, values. The cache of
// a layer is keys and values, each [slots, key-value heads, head_dim]; a slot is
// block * block_size + offset.
#pragma once

#include <cstdint>

extern "C" struct ef_attention_step {
  int64_t num_tokens;
  int64_t num_seqs;
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t block_size;
  int64_t table_width;
  // Keys that a query sees, itself included; 0: all.
  int64_t window;
  // [tokens]
  const int64_t* positions;
  const int64_t* slot_mapping;
  // [sequences + 1] and [sequences]
  const int64_t* query_start;
  const int64_t* context_lens;
  // [sequences, table_width]
  const int64_t* block_tables;
  // [positions, head_dim] in the element type; the first half of a sine's row is negated.
  const void* cosines;
  const void* sines;
  float scale;
  // See Element.
  int32_t element;
};
