// Consecutive layers of a decoder: what comes before a layer's experts, and the round to them.
#pragma once

#include <cstdint>

#include "client_round.h"
#include "kernels/native/attention_part.h"

namespace expertfleet::lane::client {

// One layer, as services/core/lane/layers.py passes it.
struct LayerStep {
  const ef_attention_part* part;
  char* keys;
  char* values;
  // Written, and then read by the request.
  char* hidden_states;
  int64_t* topk_ids;
  float* topk_weights;
  const RoundRequest* request;
  int64_t attended_ns;  // written: when what comes before the experts was done, CLOCK_MONOTONIC
};

// x [T, H] is added to in place; `update` [T, H] is added to it first, then each layer's output.
struct LayersRequest {
  const ef_attention_step* attention;
  char* x;
  const char* update;
  char* scratch;  // as ef_attention_part_forward wants it
  int64_t num_layers;
  LayerStep* steps;
  // Written: layers whose rounds are whole; events to be taken by the caller.
  int64_t num_whole;
  int64_t num_events;
  // Written: sums over the whole rounds, as `DispatchTimings` of router_service/dispatch has them;
  // attention_ns, what comes before experts, is also of the layer after them.
  int64_t num_parts;
  int64_t attention_ns;
  int64_t pack_ns;
  int64_t wire_ns;
  int64_t queue_ns;
  int64_t expert_ns;
  int64_t combine_ns;
};

}  // namespace expertfleet::lane::client
