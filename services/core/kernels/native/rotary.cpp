#include <cstring>

#include "api.h"
#include "row_ops.h"
#include "row_sharing.h"

extern "C" {
#pragma GCC visibility push(default)
// Rotates queries and keys of `qkv` in place and writes keys and values to their slots.
void ef_rotate_and_store(const ef_attention_step* step, char* qkv, char* keys, char* values) {
  using namespace expertfleet;
  const RowOps& ops = row_ops(static_cast<Element>(step->element), active_isa());
  const int64_t element_bytes = step->element == static_cast<int32_t>(Element::float32) ? 4 : 2;
  const int64_t head_bytes = step->head_dim * element_bytes;
  const int64_t kv_bytes = step->num_kv_heads * head_bytes;
  const int64_t num_rotated = step->num_heads + step->num_kv_heads;
  const char* cosines = static_cast<const char*>(step->cosines);
  const char* sines = static_cast<const char*>(step->sines);
  const int64_t token_work = (num_rotated + step->num_kv_heads) * step->head_dim;
  for_each_row(step->num_tokens, token_work, [&](int64_t token) {
    char* row = qkv + token * (num_rotated * head_bytes + kv_bytes);
    const int64_t angle = step->positions[token] * head_bytes;
    ops.rotate(row, num_rotated, step->head_dim, cosines + angle, sines + angle);
    const char* key = row + step->num_heads * head_bytes;
    const int64_t slot = step->slot_mapping[token] * kv_bytes;
    std::memcpy(keys + slot, key, static_cast<size_t>(kv_bytes));
    std::memcpy(values + slot, key + kv_bytes, static_cast<size_t>(kv_bytes));
  });
}
#pragma GCC visibility pop
}
