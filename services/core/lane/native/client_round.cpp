#include "client_round.h"

#include <bit>
#include <cmath>
#include <cstring>

namespace expertfleet::lane::client {
namespace {

// Room before a payload for the message's length and the payload's head.
constexpr size_t kMaxBeforePayload = 16;

template <class Word>
bool has_exponent_of_ones(const uint8_t* values, size_t count, Word exponent) {
  uint32_t found = 0;
  for (size_t i = 0; i < count; ++i) {
    Word value;
    std::memcpy(&value, values + i * sizeof(Word), sizeof(Word));
    found |= (value & exponent) == exponent;
  }
  return found != 0;
}

// The first row of a token: 0 + x, which is x but for a negative zero. Then the second.

struct Float32Sum {
  using Value = float;
  static float first(float x) { return 0.0f + x; }
  static float second(float sum, float x) { return sum + x; }
};

struct Bfloat16Sum {
  using Value = uint16_t;
  static uint16_t first(uint16_t x) { return x == 0x8000 ? 0 : x; }
  static uint16_t second(uint16_t sum, uint16_t x) {
    const float exact = widened(sum) + widened(x);
    const uint32_t bits = std::bit_cast<uint32_t>(exact);
    const uint16_t rounded = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    return exact != exact ? uint16_t{0x7fc0} : rounded;
  }
  static float widened(uint16_t x) { return std::bit_cast<float>(uint32_t{x} << 16); }
};

}  // namespace

bool Round::plan(const RoundRequest& request) {
  request_ = request;
  result_ = reinterpret_cast<RoundResult*>(request.result);
  *result_ = {};
  parts_.clear();
  expert_ids_.clear();
  rows_per_expert_.clear();
  token_ids_.clear();
  token_rows_.clear();
  topk_weights_.clear();
  if (request.num_tokens < 1 || request.top_k < 1 || request.top_k > 2) return refuse(kBadRequest);
  if (!sort_by_expert()) return refuse(kBadRequest);
  if (!is_finite()) return refuse(kNotFinite);
  if (const Refusal refusal = cut(); refusal != kNone) return refuse(refusal);
  for (int64_t worker = 0; worker < request.num_workers; ++worker) {
    if (!plan_worker(worker)) return refuse(kTooManyRows);
  }
  return true;
}

void Round::start(int64_t id, int64_t first_call_id, int64_t now_ns) {
  id_ = id;
  num_waiting_ = parts_.size();
  result_->num_parts = static_cast<int64_t>(parts_.size());
  for (size_t i = 0; i < parts_.size(); ++i) {
    Part& part = parts_[i];
    part.call_id = static_cast<uint64_t>(first_call_id) + i;
    PartResult& result = part_result(i);
    result = {};
    result.worker = part.worker;
    result.call_id = first_call_id + static_cast<int64_t>(i);
    result.sent_ns = now_ns;
    result.outcome = kUnanswered;
    result.num_assignments = static_cast<int64_t>(part.stop_assignment - part.first_assignment);
    result.num_experts = static_cast<int64_t>(part.stop_expert - part.first_expert);
  }
}

iovec Round::frame(size_t index, Buffer& scratch) {
  const Part& part = parts_[index];
  const size_t num_tokens = part.stop_token - part.first_token;
  const size_t payload_bytes = num_tokens * row_bytes();
  RequestFields fields;
  fields.call_id = part.call_id;
  fields.layer = static_cast<uint32_t>(request_.layer);
  fields.dtype = static_cast<uint32_t>(request_.dtype);
  fields.num_tokens = static_cast<uint32_t>(num_tokens);
  fields.hidden_size = static_cast<uint32_t>(request_.hidden_size);
  fields.expert_ids = expert_ids_.data() + part.first_expert;
  fields.rows_per_expert = rows_per_expert_.data() + part.first_expert;
  fields.num_experts = part.stop_expert - part.first_expert;
  fields.token_rows = token_rows_.data() + part.first_assignment;
  fields.topk_weights = topk_weights_.data() + part.first_assignment;
  fields.num_assignments = part.stop_assignment - part.first_assignment;
  fields.combine = true;
  if (request_.traceparents) {
    fields.traceparent = {
        request_.traceparents + static_cast<size_t>(part.worker) * kTraceparentBytes,
        kTraceparentBytes};
  }
  scratch.reserve(kMaxBeforePayload + payload_bytes + max_request_tail_bytes(fields), 0);
  uint8_t* const payload = scratch.data() + kMaxBeforePayload;
  if (num_tokens == static_cast<size_t>(request_.num_tokens)) {
    std::memcpy(payload, request_.hidden_states, payload_bytes);
  } else {
    const int32_t* tokens = token_ids_.data() + part.first_token;
    for (size_t row = 0; row < num_tokens; ++row) {
      std::memcpy(payload + row * row_bytes(),
                  request_.hidden_states + static_cast<size_t>(tokens[row]) * row_bytes(),
                  row_bytes());
    }
  }
  uint8_t* const tail = payload + payload_bytes;
  uint8_t* const stop = write_request_tail(tail, fields);
  uint8_t* const start =
      write_before_payload(payload, payload_bytes, static_cast<size_t>(stop - tail));
  return {start, static_cast<size_t>(stop - start)};
}

void Round::sent(size_t part, int64_t now_ns) { part_result(part).sent_ns = now_ns; }

bool Round::take(int64_t connection, const ResponseView& response, Message& message,
                 int64_t now_ns) {
  for (size_t i = 0; i < parts_.size(); ++i) {
    Part& part = parts_[i];
    PartResult& result = part_result(i);
    if (part.connection != connection || part.call_id != response.call_id ||
        result.outcome != kUnanswered) {
      continue;
    }
    const size_t num_rows = part.stop_token - part.first_token;
    const bool is_right = response.dtype == static_cast<uint32_t>(request_.dtype) &&
                          response.num_rows == num_rows &&
                          response.hidden_states.size == num_rows * row_bytes();
    part.message = std::move(message);
    part.rows = response.hidden_states.data;
    result.queue_us = response.queue_us;
    result.compute_us = response.compute_us;
    result.received_ns = now_ns;
    result.answer = part.message.bytes();
    result.answer_bytes = static_cast<int64_t>(part.message.size);
    result.outcome = response.status == kOk && !is_right ? static_cast<int64_t>(kWrongRows)
                                                         : static_cast<int64_t>(response.status);
    if (result.outcome != kOk) {
      result_->state = kFaulty;
    } else if (--num_waiting_ == 0 && state() == kWaiting) {
      result_->sent_ns = result.sent_ns;
      result_->received_ns = now_ns;
      result_->queue_us = response.queue_us;
      result_->compute_us = response.compute_us;
      combine();
      result_->state = kWhole;
    }
    return true;
  }
  return false;
}

void Round::broken(int64_t connection, int64_t now_ns) {
  for (size_t i = 0; i < parts_.size(); ++i) {
    PartResult& result = part_result(i);
    if (parts_[i].connection != connection || result.outcome != kUnanswered) continue;
    result.outcome = kBroken;
    result.received_ns = now_ns;
    result_->state = kFaulty;
  }
}

void Round::release(BufferPool& buffers) {
  for (Part& part : parts_) buffers.give_back(std::move(part.message.buffer));
  parts_.clear();
}

bool Round::refuse(Refusal refusal) {
  refusal_ = refusal;
  return false;
}

bool Round::is_finite() const {
  const size_t count = static_cast<size_t>(request_.num_tokens * request_.hidden_size);
  const bool is_bad = request_.dtype == kBfloat16
                          ? has_exponent_of_ones<uint16_t>(request_.hidden_states, count, 0x7f80)
                          : has_exponent_of_ones<uint32_t>(request_.hidden_states, count,
                                                           0x7f80'0000u);
  return !is_bad && !has_exponent_of_ones<uint32_t>(
                        reinterpret_cast<const uint8_t*>(request_.topk_weights),
                        by_expert_.size(), 0x7f80'0000u);
}

// Fills rows_per_expert too. False if an id is none.
bool Round::sort_by_expert() {
  const int64_t num_experts = request_.num_experts;
  const int64_t count = request_.num_tokens * request_.top_k;
  int64_t* const rows_per_expert = request_.rows_per_expert;
  std::memset(rows_per_expert, 0, static_cast<size_t>(num_experts) * sizeof(int64_t));
  for (int64_t i = 0; i < count; ++i) {
    const int64_t expert = request_.topk_ids[i];
    if (expert < 0 || expert >= num_experts) return false;
    ++rows_per_expert[expert];
  }
  first_of_expert_.resize(static_cast<size_t>(num_experts) + 1);
  size_t first = 0;
  for (int64_t expert = 0; expert < num_experts; ++expert) {
    first_of_expert_[static_cast<size_t>(expert)] = first;
    first += static_cast<size_t>(rows_per_expert[expert]);
  }
  by_expert_.resize(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    const size_t expert = static_cast<size_t>(request_.topk_ids[i]);
    by_expert_[first_of_expert_[expert]++] = static_cast<int32_t>(i);
  }
  // Each was moved on to where the next begins.
  for (size_t expert = static_cast<size_t>(num_experts); expert > 0; --expert) {
    first_of_expert_[expert] = first_of_expert_[expert - 1];
  }
  first_of_expert_[0] = 0;
  return true;
}

// Cuts the sorted assignments into pieces of one expert and one worker each.
Refusal Round::cut() {
  pieces_.clear();
  const RowShare* share = request_.shares;
  const RowShare* const stop_share = share + request_.num_shares;
  for (size_t expert = 0; expert < static_cast<size_t>(request_.num_experts); ++expert) {
    size_t first = first_of_expert_[expert];
    const size_t stop = first_of_expert_[expert + 1];
    if (share == stop_share || share->expert != static_cast<int64_t>(expert)) {
      if (!add_piece(expert, request_.worker_of_expert[expert], first, stop)) return kNoWorker;
      continue;
    }
    for (; share != stop_share && share->expert == static_cast<int64_t>(expert); ++share) {
      if (share->num_rows < 0 || share->num_rows > static_cast<int64_t>(stop - first)) {
        return kBadRequest;
      }
      const size_t next = first + static_cast<size_t>(share->num_rows);
      if (!add_piece(expert, share->worker, first, next)) return kNoWorker;
      first = next;
    }
    if (first != stop) return kBadRequest;
  }
  return share == stop_share ? kNone : kBadRequest;
}

// False if nobody can be sent it.
bool Round::add_piece(size_t expert, int64_t worker, size_t first, size_t stop) {
  if (first == stop) return true;
  if (worker < 0 || worker >= request_.num_workers) return false;
  if (request_.connections[worker] < 0) return false;
  pieces_.push_back({expert, worker, first, stop});
  return true;
}

// False if there are more rows than the worker takes.
bool Round::plan_worker(int64_t worker) {
  const size_t num_tokens = static_cast<size_t>(request_.num_tokens);
  const int32_t top_k = static_cast<int32_t>(request_.top_k);
  Part part{};
  part.worker = worker;
  part.connection = request_.connections[worker];
  part.first_expert = expert_ids_.size();
  part.first_token = token_ids_.size();
  part.first_assignment = token_rows_.size();
  row_of_token_.assign(num_tokens, -1);
  for (const Piece& piece : pieces_) {
    if (piece.worker != worker) continue;
    expert_ids_.push_back(static_cast<uint32_t>(piece.expert));
    rows_per_expert_.push_back(static_cast<uint32_t>(piece.stop - piece.first));
    for (size_t i = piece.first; i < piece.stop; ++i) {
      row_of_token_[static_cast<size_t>(by_expert_[i] / top_k)] = 0;
    }
  }
  part.stop_expert = expert_ids_.size();
  if (part.stop_expert == part.first_expert) return true;
  int32_t num_rows = 0;
  for (size_t token = 0; token < num_tokens; ++token) {
    if (row_of_token_[token] < 0) continue;
    row_of_token_[token] = num_rows++;
    token_ids_.push_back(static_cast<int32_t>(token));
  }
  for (const Piece& piece : pieces_) {
    if (piece.worker != worker) continue;
    for (size_t a = piece.first; a < piece.stop; ++a) {
      token_rows_.push_back(row_of_token_[static_cast<size_t>(by_expert_[a] / top_k)]);
      topk_weights_.push_back(request_.topk_weights[by_expert_[a]]);
    }
  }
  part.stop_token = token_ids_.size();
  part.stop_assignment = token_rows_.size();
  parts_.push_back(std::move(part));
  return num_rows <= request_.max_rows[worker];
}

size_t Round::row_bytes() const {
  return static_cast<size_t>(request_.hidden_size) * (request_.dtype == kBfloat16 ? 2 : 4);
}

PartResult& Round::part_result(size_t part) {
  return reinterpret_cast<PartResult*>(result_ + 1)[part];
}

void Round::combine() {
  if (request_.dtype == kBfloat16) {
    combine_rows<Bfloat16Sum>();
  } else {
    combine_rows<Float32Sum>();
  }
}

// A token has one or two rows; sums of two do not depend on their order.
template <class Sum>
void Round::combine_rows() {
  using Value = typename Sum::Value;
  const size_t size = static_cast<size_t>(request_.hidden_size);
  const size_t num_tokens = static_cast<size_t>(request_.num_tokens);
  if (parts_.size() == 1) {
    std::memcpy(request_.output, parts_[0].rows, num_tokens * row_bytes());
    return;
  }
  has_row_.assign(num_tokens, 0);
  for (const Part& part : parts_) {
    const uint8_t* row = part.rows;
    for (size_t i = part.first_token; i < part.stop_token; ++i, row += row_bytes()) {
      const size_t token = static_cast<size_t>(token_ids_[i]);
      Value* const sum = reinterpret_cast<Value*>(request_.output) + token * size;
      const bool is_second = has_row_[token];
      has_row_[token] = 1;
      for (size_t column = 0; column < size; ++column) {
        Value value;
        std::memcpy(&value, row + column * sizeof(Value), sizeof(Value));
        sum[column] = is_second ? Sum::second(sum[column], value) : Sum::first(value);
      }
    }
  }
}

template void Round::combine_rows<Float32Sum>();
template void Round::combine_rows<Bfloat16Sum>();

}  // namespace expertfleet::lane::client
