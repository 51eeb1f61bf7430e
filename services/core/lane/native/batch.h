// Frames of one layer that are computed together.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <unordered_map>
#include <vector>

#include "block.h"
#include "frame.h"
#include "kernels/native/moe.h"

namespace expertfleet::lane {

// The experts a worker holds; never changed, replaced as a whole.
struct ExpertTable {
  Activation type;
  uint32_t hidden_size;
  uint64_t expert_bytes;  // weights of one of them
  std::unordered_map<uint32_t, std::map<uint32_t, const Expert*>> layers;
};

// A request that was read whole. The view and `message` lie in the block.
struct Frame {
  uint64_t connection;
  BlockRef block;
  Bytes message;
  RequestView view;
  uint64_t arrived_ns;
};

// A response ready to be sent: `size` bytes from `begin`, which lies in the block.
struct Answer {
  BlockRef block;
  const uint8_t* begin = nullptr;
  size_t size = 0;
};

// Whether computing a frame takes so long that others should not wait for it.
bool is_long(const ExpertTable& table, const RequestView& view);

// Checks frames one by one, computes those that passed, writes their answers.
class Batch {
 public:
  // Begins anew. `table` must stay alive until the answers are taken.
  void clear(const ExpertTable* table);

  // Takes a frame of the batch's layer if it is a plain good one: what services/core/wire_checks.py
  // and the worker's own checks ask for, in the worker's dtype, without scales. Of all others,
  // false, and the frame is left as it was.
  bool add(Frame& frame, BlockPool& pool);

  bool is_empty() const { return items_.empty(); }
  size_t size() const { return items_.size(); }

  // Touches no block's count of users, so it may run on any thread.
  void compute();

  // False if it was not computed for want of memory; there are no answers then.
  bool is_computed() const { return is_computed_; }

  const Frame& frame(size_t i) const { return items_[i].frame; }

  // That of frame i, once it is computed.
  Answer& answer(size_t i) { return items_[i].answer; }

  // Appends what happened to frame i as words: layer, number of experts E, i, queue_us, compute_us,
  // rows of the batch, tokens of the frame, arrived_ns (the lower half first), bytes of its
  // traceparent, E expert ids, E rows of each, the traceparent in whole words.
  void append_record(size_t i, std::vector<uint32_t>* words) const;

 private:
  struct Assigned {
    size_t first_expert;
    size_t num_experts;
    size_t first_assignment;
    size_t num_assignments;
  };
  struct Item {
    Frame frame;
    Assigned assigned;
    Answer answer;

    size_t num_rows() const {  // of the answer
      return frame.view.combine ? frame.view.num_tokens : assigned.num_assignments;
    }
  };

  bool is_plain(const RequestView& view) const;
  bool read_assignments(const RequestView& view, Assigned* assigned);
  void drop_assignments(const Assigned& assigned);
  void forward();
  void write_answers();
  uint32_t queue_us(size_t i) const;

  const ExpertTable* table_ = nullptr;
  std::vector<Item> items_;
  // Of all frames, one after the other.
  std::vector<uint32_t> expert_ids_;
  std::vector<uint32_t> rows_per_expert_;
  std::vector<int64_t> token_rows_;
  std::vector<float> topk_weights_;
  std::vector<MoeFrame> moe_frames_;
  std::vector<MoePart> parts_;
  uint64_t started_ns_ = 0;
  uint32_t compute_us_ = 0;
  bool is_computed_ = false;
};

// CLOCK_MONOTONIC, as Python's time.perf_counter_ns.
uint64_t now_ns();

}  // namespace expertfleet::lane
