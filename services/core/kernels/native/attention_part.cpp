// What of a decoder layer comes before its experts, in one call: each call from Python would start
// cold, as the experts' weights have passed through every cache since the layer before.

#include "attention_part.h"

#include "api.h"
#include "panels.h"

extern "C" {
#pragma GCC visibility push(default)
void ef_attention_part_forward(const ef_attention_part* part, const ef_attention_step* step, char* x,
                               const char* update, char* keys, char* values, char* normed,
                               char* scratch, int64_t* topk_ids, float* topk_weights) {
  const int64_t tokens = step->num_tokens, hidden_size = part->qkv_proj->inputs;
  const int32_t element = step->element;
  const auto bytes = static_cast<int64_t>(
      expertfleet::value_bytes(static_cast<expertfleet::Activation>(element)));
  auto* logits = reinterpret_cast<float*>(scratch);
  char* qkv = scratch + tokens * part->num_experts * static_cast<int64_t>(sizeof(float));
  char* attended = qkv + tokens * part->qkv_proj->outputs * bytes;
  char* projected = attended + tokens * part->o_proj->inputs * bytes;
  ef_add_rms_norm(x, update, part->input_norm, x, normed, tokens, hidden_size, part->eps, element);
  ef_linear(part->qkv_proj, normed, tokens, element, qkv, element, 0);
  ef_rotate_and_store(step, qkv, keys, values);
  ef_attend(step, qkv, keys, values, attended);
  ef_linear(part->o_proj, attended, tokens, element, projected, element, 0);
  ef_add_rms_norm(x, projected, part->post_attention_norm, x, normed, tokens, hidden_size,
                  part->eps, element);
  if (part->gate == nullptr) return;
  ef_topk_gate(normed, part->gate, logits, topk_ids, topk_weights, tokens, hidden_size,
               part->num_experts, part->num_experts_per_tok, element);
}
#pragma GCC visibility pop
}
