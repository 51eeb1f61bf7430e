// The worker's end of the lanes: reads frames, computes the plain good ones, hands the rest to the
// interpreter. One thread does it all, but for frames that take long, which have another.
#pragma once

#ifdef __linux__

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "batch.h"
#include "block.h"
#include "connection.h"
#include "frame.h"

namespace expertfleet::lane {

// A frame for the interpreter. Of one that is too large (`total_bytes` > what `message` has) only
// the fields after the first one are there, if they could be found.
struct Handed {
  uint64_t connection;
  uint64_t total_bytes;
  std::vector<uint8_t> message;
};

// Computes one batch at a time on a thread of its own.
class LongComputer {
 public:
  // `wake_fd`, an eventfd, is written to when a batch is done.
  explicit LongComputer(int wake_fd);
  ~LongComputer();

  bool is_idle() const { return state_.load(std::memory_order_acquire) == State::idle; }

  // While it is idle. The batch must not be touched until `take_done` was true.
  void submit(Batch* batch);

  // Whether the batch is done; then it is idle again.
  bool take_done();

 private:
  enum class State { idle, computing, done };
  void run();

  const int wake_fd_;
  std::atomic<State> state_{State::idle};
  std::mutex mutex_;
  std::condition_variable has_work_;
  Batch* batch_ = nullptr;
  bool is_ending_ = false;
  std::thread thread_;
};

// All public functions may be called from one other thread (the interpreter's event loop).
class Server {
 public:
  // Takes over `listen_fd`, which listens and does not block. `notify_fd`, an eventfd that stays
  // the caller's, is written to when `next_handed`, `take_records`, `is_drained` or `num_tables`
  // have news. Throws std::system_error or std::bad_alloc.
  Server(int listen_fd, int notify_fd, size_t max_frame_bytes);
  // Ends the threads after the batches in hand, and closes the connections.
  ~Server();

  // What is computed from now on; null: nothing, all frames are handed over. Weights must stay
  // alive until `num_tables` says that a table is gone.
  void set_table(std::unique_ptr<ExpertTable> table);

  // Tables set, or still computed with; `set_table(nullptr)` and the end of the batches make it 0.
  int64_t num_tables() const { return num_tables_.load(); }

  // The next frame for the interpreter, oldest first; null if there is none.
  std::unique_ptr<Handed> next_handed();

  // Answers a frame that was handed over. Of a connection that is gone: nothing happens.
  void reply(uint64_t connection, std::vector<uint8_t> message, size_t request_bytes);

  bool is_connected(uint64_t connection);

  // All records since the last call (`Batch::append_record`), one after the other.
  std::vector<uint32_t> take_records();

  // Takes no more connections; when all answers are written, ends the ones there are and notifies.
  void drain();
  bool is_drained() const { return is_drained_.load(); }

 private:
  struct Reply {
    uint64_t connection;
    std::vector<uint8_t> message;
    size_t request_bytes;
  };

  void run();
  bool run_round();
  void on_wake();
  void on_listener();
  void on_connection(Connection& connection, uint32_t events);
  void on_tick(uint64_t now);

  void read(Connection& connection);
  void take_frames(Connection& connection);
  void resume_paused();
  bool has_room(const Connection& connection) const;
  void hold(Connection& connection, size_t num_bytes);
  void release(Connection& connection, size_t num_bytes);

  std::shared_ptr<const ExpertTable> current_table();
  void compute_next();
  void start_long();
  void finish(Batch& batch);
  void take_in(Batch& batch, const ExpertTable* table, Frame& frame);
  void take_layer(std::vector<Frame>& frames, Batch& batch, const ExpertTable* table);

  void hand_over(Connection& connection, uint64_t total_bytes, Bytes message);
  void send_reply(Reply& reply);
  void send(Connection& connection, Answer answer, size_t held_bytes);
  void flush(Connection& connection);
  void watch(Connection& connection);
  void close(Connection& connection);
  Connection* find(uint64_t id);
  void watch_listener(bool is_watched);
  bool is_all_answered();
  void end_connections();
  void notify();
  void wake();

  int listen_fd_;
  const int notify_fd_;
  const size_t max_frame_bytes_;
  int epoll_fd_ = -1;
  int wake_fd_ = -1;

  // Of the lane's thread alone. Frames not yet looked at are short. The pool outlives what is taken from it.
  BlockPool pool_;
  std::unordered_map<uint64_t, std::unique_ptr<Connection>> connections_;
  std::vector<std::unique_ptr<Connection>> closed_;
  uint64_t next_connection_;
  size_t in_hand_bytes_ = 0;
  std::vector<Frame> short_frames_, long_frames_;
  Batch short_batch_, long_batch_;
  std::shared_ptr<const ExpertTable> long_table_;
  std::unique_ptr<LongComputer> long_computer_;
  std::vector<uint64_t> paused_;
  uint64_t next_tick_ns_ = 0;
  bool is_listening_ = false;

  std::mutex mutex_;  // of what both sides touch:
  std::shared_ptr<const ExpertTable> table_;
  std::deque<std::unique_ptr<Handed>> handed_;
  std::vector<Reply> replies_;
  std::vector<uint32_t> records_;
  std::unordered_set<uint64_t> connected_;

  std::atomic<int64_t> num_tables_{0};
  std::atomic<bool> is_draining_{false}, is_drained_{false}, is_ending_{false};
  std::thread thread_;
};

}  // namespace expertfleet::lane

#endif
