#include "batch.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <limits>
#include <numeric>

#include "kernels/native/panels.h"

namespace expertfleet::lane {
namespace {

// Where an answer's rows begin in its block; there is room for what stands before them.
constexpr size_t kPayloadOffset = 64;
constexpr uint64_t kMostAnswerBytes = uint64_t{1} << 31;

// As expert_service/compute.py has it: some 25 ms on one core, and how many rows through a matrix
// cost as much as reading it.
constexpr uint64_t kShortBytes = 256 << 20;
constexpr uint64_t kRowsLikeReading = 8;

uint32_t wire_type(Activation type) { return type == Activation::float32 ? kFloat32 : kBfloat16; }

// Of little-endian values that need not be aligned.
template <class Value>
Value value_at(const uint8_t* data, size_t index) {
  Value value;
  std::memcpy(&value, data + index * sizeof(Value), sizeof(Value));
  return value;
}

// An exponent of ones is NaN or infinity.
template <class Bits>
bool are_finite(const uint8_t* data, size_t count, Bits exponent) {
  constexpr size_t kRun = 1024;
  for (size_t start = 0; start < count; start += kRun) {
    const size_t stop = std::min(count, start + kRun);
    Bits is_bad = 0;
    for (size_t i = start; i < stop; ++i) {
      is_bad |= static_cast<Bits>((value_at<Bits>(data, i) & exponent) == exponent);
    }
    if (is_bad) return false;
  }
  return true;
}

bool are_finite(const uint8_t* data, size_t count, Activation type) {
  return type == Activation::float32 ? are_finite<uint32_t>(data, count, 0x7f800000)
                                     : are_finite<uint16_t>(data, count, 0x7f80);
}

uint32_t microseconds(uint64_t from_ns, uint64_t to_ns) {
  const uint64_t us = to_ns > from_ns ? (to_ns - from_ns) / 1000 : 0;
  return static_cast<uint32_t>(std::min<uint64_t>(us, std::numeric_limits<uint32_t>::max()));
}

bool is_plain_traceparent(Bytes text) {
  if (text.size != 0 && text.size != kTraceparentBytes) return false;
  return std::all_of(text.data, text.data + text.size, [](uint8_t byte) { return byte < 0x80; });
}

}  // namespace

uint64_t now_ns() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}

bool is_long(const ExpertTable& table, const RequestView& view) {
  // A byte for each expert id below 128, four for each assignment.
  const uint64_t num_assignments = view.token_rows.size / sizeof(int32_t);
  const uint64_t readings = view.expert_ids.size + num_assignments / kRowsLikeReading;
  return readings * table.expert_bytes > kShortBytes;
}

void Batch::clear(const ExpertTable* table) {
  table_ = table;
  items_.clear();
  expert_ids_.clear();
  rows_per_expert_.clear();
  token_rows_.clear();
  topk_weights_.clear();
  is_computed_ = false;
}

bool Batch::add(Frame& frame, BlockPool& pool) {
  if (!is_plain(frame.view)) return false;
  Assigned assigned{expert_ids_.size(), 0, token_rows_.size(), 0};
  try {
    if (read_assignments(frame.view, &assigned)) {
      Item item{{}, assigned, {}};
      item.frame.view = frame.view;
      const uint64_t answer_bytes =
          item.num_rows() * frame.view.hidden_size * value_bytes(table_->type);
      if (answer_bytes <= kMostAnswerBytes) {
        item.answer.block = pool.take(kPayloadOffset + answer_bytes + kMaxResponseTailBytes);
        items_.push_back(std::move(item));
        items_.back().frame = std::move(frame);
        return true;
      }
    }
  } catch (const std::bad_alloc&) {
    drop_assignments(assigned);
    throw;
  }
  drop_assignments(assigned);
  return false;
}

bool Batch::is_plain(const RequestView& view) const {
  const uint32_t dtype = wire_type(table_->type);
  if (view.dtype != dtype || view.hidden_size != table_->hidden_size) return false;
  if (view.answer_dtype != kNoDtype && view.answer_dtype != dtype) return false;
  if (view.scales.size || !view.num_tokens || !is_plain_traceparent(view.traceparent)) return false;
  const size_t num_values = size_t{view.num_tokens} * view.hidden_size;
  return view.hidden_states.size == num_values * value_bytes(table_->type) &&
         are_finite(view.hidden_states.data, num_values, table_->type);
}

// Appends the frame's assignments if they are good ones; where it says no, some may be appended.
bool Batch::read_assignments(const RequestView& view, Assigned* assigned) {
  const auto layer = table_->layers.find(view.layer);
  if (layer == table_->layers.end()) return false;
  if (!parse_packed(view.expert_ids, &expert_ids_)) return false;
  if (!parse_packed(view.rows_per_expert, &rows_per_expert_)) return false;
  const size_t num_experts = expert_ids_.size() - assigned->first_expert;
  if (!num_experts || rows_per_expert_.size() != expert_ids_.size()) return false;
  const uint32_t* ids = &expert_ids_[assigned->first_expert];
  const uint32_t* counts = &rows_per_expert_[assigned->first_expert];

  uint64_t num_assignments = 0;
  for (size_t i = 0; i < num_experts; ++i) {
    if (i && ids[i] <= ids[i - 1]) return false;
    if (!counts[i] || !layer->second.contains(ids[i])) return false;
    num_assignments += counts[i];
  }
  const uint64_t num_bytes = num_assignments * sizeof(float);
  if (view.token_rows.size != num_bytes || view.topk_weights.size != num_bytes) return false;
  if (!are_finite(view.topk_weights.data, num_assignments, Activation::float32)) return false;

  size_t next = 0;
  for (size_t i = 0; i < num_experts; ++i) {
    int64_t last = -1;
    for (uint32_t left = counts[i]; left; --left) {
      const int64_t row = value_at<int32_t>(view.token_rows.data, next);
      if (row <= last || row >= int64_t{view.num_tokens}) return false;
      token_rows_.push_back(row);
      topk_weights_.push_back(value_at<float>(view.topk_weights.data, next));
      last = row;
      ++next;
    }
  }
  assigned->num_experts = num_experts;
  assigned->num_assignments = num_assignments;
  return true;
}

void Batch::drop_assignments(const Assigned& assigned) {
  expert_ids_.resize(assigned.first_expert);
  rows_per_expert_.resize(assigned.first_expert);
  token_rows_.resize(assigned.first_assignment);
  topk_weights_.resize(assigned.first_assignment);
}

void Batch::compute() {
  started_ns_ = now_ns();
  try {
    forward();
  } catch (const std::bad_alloc&) {
    return;
  }
  compute_us_ = microseconds(started_ns_, now_ns());
  write_answers();
  is_computed_ = true;
}

void Batch::forward() {
  moe_frames_.clear();
  parts_.clear();
  for (const Item& item : items_) {
    const RequestView& view = item.frame.view;
    uint8_t* const rows = item.answer.block.data() + kPayloadOffset;
    if (view.combine) std::memset(rows, 0, view.hidden_states.size);  // results are added to it
    moe_frames_.push_back({view.hidden_states.data, view.num_tokens,
                           &token_rows_[item.assigned.first_assignment],
                           &topk_weights_[item.assigned.first_assignment], rows, view.combine});
  }
  // In ascending expert id, and within it in the order of the frames: each frame's ids ascend.
  for (const auto& [id, expert] : table_->layers.at(items_[0].frame.view.layer)) {
    for (size_t i = 0; i < items_.size(); ++i) {
      const Assigned& assigned = items_[i].assigned;
      const uint32_t* const ids = &expert_ids_[assigned.first_expert];
      const uint32_t* const found = std::lower_bound(ids, ids + assigned.num_experts, id);
      if (found == ids + assigned.num_experts || *found != id) continue;
      const uint32_t* const counts = &rows_per_expert_[assigned.first_expert];
      const int64_t start = std::accumulate(counts, counts + (found - ids), int64_t{0});
      parts_.push_back({expert, static_cast<int64_t>(i), start, counts[found - ids]});
    }
  }
  moe_forward(moe_frames_.data(), parts_.data(), static_cast<int64_t>(parts_.size()),
              table_->type);
}

void Batch::write_answers() {
  for (size_t i = 0; i < items_.size(); ++i) {
    Item& item = items_[i];
    const RequestView& view = item.frame.view;
    const size_t payload_bytes = item.num_rows() * view.hidden_size * value_bytes(table_->type);
    uint8_t* const rows = item.answer.block.data() + kPayloadOffset;
    uint8_t* const tail = rows + payload_bytes;
    uint8_t* const end = write_response_tail(
        tail, {view.call_id, wire_type(table_->type), static_cast<uint32_t>(item.num_rows()),
               queue_us(i), compute_us_});
    item.answer.begin = write_before_payload(rows, payload_bytes, end - tail);
    item.answer.size = end - item.answer.begin;
  }
}

uint32_t Batch::queue_us(size_t i) const {
  return microseconds(items_[i].frame.arrived_ns, started_ns_);
}

void Batch::append_record(size_t i, std::vector<uint32_t>* words) const {
  const Assigned& assigned = items_[i].assigned;
  const auto num_experts = static_cast<uint32_t>(assigned.num_experts);
  const auto batch_rows = static_cast<uint32_t>(token_rows_.size());
  const Frame& frame = items_[i].frame;
  const Bytes traceparent = frame.view.traceparent;
  words->insert(words->end(),
                {frame.view.layer, num_experts, static_cast<uint32_t>(i), queue_us(i), compute_us_,
                 batch_rows, frame.view.num_tokens, static_cast<uint32_t>(frame.arrived_ns),
                 static_cast<uint32_t>(frame.arrived_ns >> 32),
                 static_cast<uint32_t>(traceparent.size)});
  for (const auto* values : {&expert_ids_, &rows_per_expert_}) {
    const uint32_t* first = values->data() + assigned.first_expert;
    words->insert(words->end(), first, first + num_experts);
  }
  if (traceparent.size) {
    const size_t start = words->size();
    words->resize(start + (traceparent.size + sizeof(uint32_t) - 1) / sizeof(uint32_t));
    std::memcpy(words->data() + start, traceparent.data, traceparent.size);
  }
}

}  // namespace expertfleet::lane
