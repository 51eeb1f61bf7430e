// One MoE layer call of a shard: a frame to each worker that has something to do, and the sum of
// what they answer. Same grouping and same bits as router_service/dispatch/dispatch_plan.py.
//
// Shapes: T tokens, K experts per token (1 or 2), E experts, W workers, H hidden_size.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "client_connection.h"
#include "frame.h"

namespace expertfleet::lane::client {

// An expert that several workers compute, whatever worker_of_expert says: of its rows in ascending
// token the first go to the worker of its first share, and so on. They cover all of its rows.
struct RowShare {
  int64_t expert;
  int64_t worker;
  int64_t num_rows;
};

// What is computed, as services/core/lane/client.py passes it: words of 64 bits.
struct RoundRequest {
  int64_t layer;
  int64_t dtype;  // kFloat32 or kBfloat16
  int64_t num_tokens;
  int64_t top_k;
  int64_t hidden_size;
  int64_t num_experts;
  int64_t num_workers;
  const uint8_t* hidden_states;     // [T, H]
  const int64_t* topk_ids;          // [T, K], distinct within a row
  const float* topk_weights;        // [T, K]
  const int64_t* worker_of_expert;  // [E], negative: none
  const int64_t* connections;       // [W], negative: none
  const int64_t* max_rows;          // [W]
  uint8_t* output;                  // [T, H], written once the round is whole
  int64_t* rows_per_expert;         // [E], written at once
  int64_t* result;                  // RoundResult and W times PartResult, kept up to date
  int64_t num_shares;
  const RowShare* shares;           // [S], those of an expert together, experts ascending
  const uint8_t* traceparents;      // [W, kTraceparentBytes], of each worker's frame; or null
};

enum RoundState : int64_t { kWaiting = 0, kWhole = 1, kFaulty = 2 };

struct RoundResult {
  int64_t state;
  int64_t num_parts;
  int64_t num_events;  // to be taken by the caller
  // Of the frame that was answered last; nanoseconds of CLOCK_MONOTONIC.
  int64_t sent_ns;
  int64_t received_ns;
  int64_t queue_us;
  int64_t compute_us;
};

// Instead of a Status.
enum PartOutcome : int64_t { kUnanswered = -1, kBroken = -2, kWrongRows = -3 };

struct PartResult {
  int64_t worker;
  int64_t call_id;
  int64_t sent_ns;
  int64_t received_ns;
  int64_t outcome;
  int64_t num_assignments;
  int64_t num_experts;
  int64_t queue_us;
  int64_t compute_us;
  const uint8_t* answer;  // the whole message, until the round is released; null if there is none
  int64_t answer_bytes;
};

// Why a round is not begun; nothing was sent.
enum Refusal : int64_t {
  kNone = 0,
  kNotFinite = -1,
  kNoWorker = -2,
  kTooManyRows = -3,
  kBadRequest = -4
};

class Round {
 public:
  // Groups tokens by worker and expert. False: `refusal()` says why not.
  bool plan(const RoundRequest& request);
  Refusal refusal() const { return refusal_; }

  void start(int64_t id, int64_t first_call_id, int64_t now_ns);
  int64_t id() const { return id_; }
  RoundState state() const { return static_cast<RoundState>(result_->state); }
  RoundResult& result() { return *result_; }

  size_t num_parts() const { return parts_.size(); }
  int64_t connection_of(size_t part) const { return parts_[part].connection; }
  // The bytes of a part's frame, length and all, valid until the next call of this.
  iovec frame(size_t part, Buffer& scratch);
  void sent(size_t part, int64_t now_ns);

  // Takes the answer in if the round waits for it, else leaves it alone.
  bool take(int64_t connection, const ResponseView& response, Message& message, int64_t now_ns);
  void broken(int64_t connection, int64_t now_ns);
  void release(BufferPool& buffers);

 private:
  struct Part {
    int64_t worker;
    int64_t connection;
    uint64_t call_id;
    // Ranges of the vectors below.
    size_t first_expert, stop_expert;
    size_t first_token, stop_token;
    size_t first_assignment, stop_assignment;
    const uint8_t* rows;
    Message message;
  };

  // Consecutive rows of an expert, a range of by_expert_, that one worker computes.
  struct Piece {
    size_t expert;
    int64_t worker;
    size_t first, stop;
  };

  bool refuse(Refusal refusal);
  bool is_finite() const;
  bool sort_by_expert();
  Refusal cut();
  bool add_piece(size_t expert, int64_t worker, size_t first, size_t stop);
  bool plan_worker(int64_t worker);
  size_t row_bytes() const;
  PartResult& part_result(size_t part);
  void combine();
  template <class Sum>
  void combine_rows();

  RoundRequest request_{};
  RoundResult* result_ = nullptr;
  Refusal refusal_ = kBadRequest;
  int64_t id_ = 0;
  size_t num_waiting_ = 0;
  std::vector<Part> parts_;
  std::vector<size_t> first_of_expert_;   // [E + 1]
  std::vector<int32_t> by_expert_;        // [A], assignments token * K + k
  std::vector<Piece> pieces_;             // all of by_expert_, in its order
  std::vector<int32_t> row_of_token_;     // [T], of one worker
  std::vector<uint8_t> has_row_;          // [T]
  // Of all parts, one after the other.
  std::vector<uint32_t> expert_ids_, rows_per_expert_;
  std::vector<int32_t> token_ids_, token_rows_;
  std::vector<float> topk_weights_;
};

}  // namespace expertfleet::lane::client
