// A shard's side of the lanes, for services/core/lane/client.py. One thread at a time.
#include <sys/epoll.h>
#include <unistd.h>

#include <algorithm>
#include <ctime>
#include <deque>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "client_connection.h"
#include "client_layers.h"
#include "client_round.h"
#include "frame.h"

namespace expertfleet::lane::client {
namespace {

constexpr int kMaxReady = 64;
// Call ids of rounds; those of frames that are sent one by one lie below.
constexpr int64_t kFirstCallId = int64_t{1} << 40;

int64_t now_ns() {
  timespec time{};
  clock_gettime(CLOCK_MONOTONIC, &time);
  return int64_t{time.tv_sec} * 1'000'000'000 + time.tv_nsec;
}

// The worker's figures are its own clock's; they cannot take longer than the round trip.
void add_times(const RoundResult& result, int64_t started_ns, int64_t ended_ns,
               LayersRequest& layers) {
  const int64_t trip_ns = result.received_ns - result.sent_ns;
  const int64_t expert_ns = std::min(1000 * result.compute_us, trip_ns);
  const int64_t queue_ns = std::min(1000 * result.queue_us, trip_ns - expert_ns);
  layers.num_parts += result.num_parts;
  layers.pack_ns += result.sent_ns - started_ns;
  layers.wire_ns += trip_ns - expert_ns - queue_ns;
  layers.queue_ns += queue_ns;
  layers.expert_ns += expert_ns;
  layers.combine_ns += ended_ns - result.received_ns;
}

enum EventKind : int64_t { kGreeted = 1, kConnectionBroke = 2, kAnswer = 3, kRoundSettled = 4 };

// `source` is a connection, or the round that settled; `text` is the reason of a break.
struct Event {
  EventKind kind;
  int64_t source;
  Message message;
  std::string text;
};

// An event as Python reads it; its bytes are valid until the next one is taken.
struct EventWords {
  int64_t kind;
  int64_t source;
  const void* bytes;
  int64_t num_bytes;
};

class Client {
 public:
  Client() : epoll_fd_(epoll_create1(EPOLL_CLOEXEC)) {}
  ~Client() {
    connections_.clear();
    if (epoll_fd_ >= 0) close(epoll_fd_);
  }

  int epoll_fd() const { return epoll_fd_; }

  int64_t connect(const char* address, int port, size_t max_message_bytes) {
    const int64_t id = ++last_connection_;
    auto& place = connections_[id];
    place = std::make_unique<Connection>(id, epoll_fd_, address, port, max_message_bytes);
    if (place->is_broken()) note_broken(*place);
    return id;
  }

  int64_t disconnect(int64_t id) {
    connections_.erase(id);
    break_rounds(id);
    return num_events();
  }

  int64_t send(int64_t id, const void* frame, size_t size) {
    const auto found = connections_.find(id);
    if (found != connections_.end() && !found->second->is_broken()) {
      uint8_t length[kLengthBytes];
      write_length(length, static_cast<uint32_t>(size));
      const iovec parts[] = {{length, kLengthBytes}, {const_cast<void*>(frame), size}};
      found->second->write(parts, 2);
      if (found->second->is_broken()) note_broken(*found->second);
    }
    return num_events();
  }

  // Deals with what has come, after waiting for it if need be; -1: for as long as it takes.
  int64_t poll(int timeout_ms) {
    epoll_event ready[kMaxReady];
    const int count = epoll_wait(epoll_fd_, ready, kMaxReady, timeout_ms);
    for (int i = 0; i < count; ++i) {
      auto& connection = *static_cast<Connection*>(ready[i].data.ptr);
      if (connection.is_broken()) continue;
      connection.handle(ready[i].events, buffers_, received_);
      if (connection.take_greeted()) events_.push_back({kGreeted, connection.id(), {}, {}});
      for (Message& message : received_) deliver(connection, message);
      received_.clear();
      if (connection.is_broken()) note_broken(connection);
    }
    return num_events();
  }

  int64_t num_events() const { return static_cast<int64_t>(events_.size()); }

  bool take_event(EventWords& words) {
    buffers_.give_back(std::move(taken_.message.buffer));
    if (events_.empty()) return false;
    taken_ = std::move(events_.front());
    events_.pop_front();
    words = {taken_.kind, taken_.source, nullptr, 0};
    if (taken_.kind == kAnswer) {
      words.bytes = taken_.message.bytes();
      words.num_bytes = static_cast<int64_t>(taken_.message.size);
    } else if (taken_.kind == kConnectionBroke) {
      words.bytes = taken_.text.data();
      words.num_bytes = static_cast<int64_t>(taken_.text.size());
    }
    return true;
  }

  // The id of the round, or a Refusal. Waits for its end for `wait_us`, less if there are events.
  int64_t run_round(const RoundRequest& request, int64_t wait_us) {
    std::unique_ptr<Round> round = free_round();
    if (!round->plan(request)) return give_up(std::move(round), round->refusal());
    for (size_t i = 0; i < round->num_parts(); ++i) {
      const Connection* connection = find(round->connection_of(i));
      if (!connection || connection->is_broken()) return give_up(std::move(round), kNoWorker);
    }
    const int64_t started_ns = now_ns(), id = ++last_round_;
    round->start(id, next_call_id_, started_ns);
    next_call_id_ += static_cast<int64_t>(round->num_parts());
    Round& running = *round;
    rounds_.push_back(std::move(round));
    for (size_t i = 0; i < running.num_parts(); ++i) {
      Connection& connection = *find(running.connection_of(i));
      const iovec frame = running.frame(i, scratch_);
      connection.write(&frame, 1);
      running.sent(i, now_ns());
      if (connection.is_broken()) note_broken(connection);
    }
    waited_for_ = id;
    const int64_t give_up_ns = started_ns + 1000 * wait_us;
    while (wait_us > 0 && running.state() == kWaiting && events_.empty()) {
      const int64_t left_ms = (give_up_ns - now_ns() + 999'999) / 1'000'000;
      if (left_ms <= 0) break;
      poll(static_cast<int>(left_ms));
    }
    waited_for_ = 0;
    running.result().num_events = num_events();
    if (running.state() == kWhole) release(id);
    return id;
  }

  // Layer after layer while rounds become whole in time. Of the first that did not, what comes
  // before its experts is done; returned is its round, or why there is none. 0: all are whole.
  int64_t run_layers(LayersRequest& layers, int64_t wait_us) {
    const char* update = layers.update;
    int64_t round = 0, ended_ns = now_ns();
    layers.num_whole = layers.num_parts = layers.attention_ns = layers.pack_ns = layers.wire_ns = 0;
    layers.queue_ns = layers.expert_ns = layers.combine_ns = 0;
    while (layers.num_whole < layers.num_layers) {
      LayerStep& step = layers.steps[layers.num_whole];
      const RoundRequest& request = *step.request;
      ef_attention_part_forward(step.part, layers.attention, layers.x, update, step.keys, step.values,
                                step.hidden_states, layers.scratch, step.topk_ids,
                                step.topk_weights);
      step.attended_ns = now_ns();
      layers.attention_ns += step.attended_ns - ended_ns;
      round = run_round(request, wait_us);
      ended_ns = now_ns();
      const auto& result = *reinterpret_cast<const RoundResult*>(request.result);
      if (round < 0 || result.state != kWhole) break;
      add_times(result, step.attended_ns, ended_ns, layers);
      update = reinterpret_cast<const char*>(request.output);
      ++layers.num_whole;
    }
    layers.num_events = num_events();
    return layers.num_whole == layers.num_layers ? 0 : round;
  }

  void release(int64_t id) {
    for (size_t i = 0; i < rounds_.size(); ++i) {
      if (rounds_[i]->id() != id) continue;
      rounds_[i]->release(buffers_);
      free_rounds_.push_back(std::move(rounds_[i]));
      rounds_.erase(rounds_.begin() + static_cast<int64_t>(i));
      return;
    }
  }

 private:
  Connection* find(int64_t id) {
    const auto found = connections_.find(id);
    return found == connections_.end() ? nullptr : found->second.get();
  }

  std::unique_ptr<Round> free_round() {
    if (free_rounds_.empty()) return std::make_unique<Round>();
    std::unique_ptr<Round> round = std::move(free_rounds_.back());
    free_rounds_.pop_back();
    return round;
  }

  int64_t give_up(std::unique_ptr<Round> round, Refusal refusal) {
    round->release(buffers_);
    free_rounds_.push_back(std::move(round));
    return refusal;
  }

  void deliver(Connection& connection, Message& message) {
    ResponseView response;
    if (!parse_response({message.bytes(), message.size}, &response)) {
      if (!connection.is_broken()) connection.break_off("an answer could not be read");
      return;
    }
    for (auto& round : rounds_) {
      const bool was_waiting = round->state() == kWaiting;
      if (!round->take(connection.id(), response, message, now_ns())) continue;
      if (was_waiting) tell_if_settled(*round);
      if (round->state() == kWhole && round->id() != waited_for_) release(round->id());
      return;
    }
    events_.push_back({kAnswer, connection.id(), std::move(message), {}});
  }

  void note_broken(const Connection& connection) {
    events_.push_back({kConnectionBroke, connection.id(), {}, connection.reason()});
    break_rounds(connection.id());
  }

  void break_rounds(int64_t connection) {
    for (auto& round : rounds_) {
      const bool was_waiting = round->state() == kWaiting;
      round->broken(connection, now_ns());
      if (was_waiting) tell_if_settled(*round);
    }
  }

  // Who waits for the round in `run_round` sees for itself.
  void tell_if_settled(const Round& round) {
    if (round.state() == kWaiting || round.id() == waited_for_) return;
    events_.push_back({kRoundSettled, round.id(), {}, {}});
  }

  const int epoll_fd_;
  int64_t last_connection_ = 0, last_round_ = 0, waited_for_ = 0;
  int64_t next_call_id_ = kFirstCallId;
  std::unordered_map<int64_t, std::unique_ptr<Connection>> connections_;
  std::vector<std::unique_ptr<Round>> rounds_, free_rounds_;
  std::deque<Event> events_;
  Event taken_{kGreeted, 0, {}, {}};
  std::vector<Message> received_;
  BufferPool buffers_;
  Buffer scratch_;
};

}  // namespace
}  // namespace expertfleet::lane::client

extern "C" {
#pragma GCC visibility push(default)
using expertfleet::lane::client::Client;

// Null where the system gives no more descriptors.
void* ef_lane_open() {
  auto client = std::make_unique<Client>();
  return client->epoll_fd() < 0 ? nullptr : client.release();
}

void ef_lane_close(void* client) { delete static_cast<Client*>(client); }

// Readable when `ef_lane_poll` has something to do.
int32_t ef_lane_fd(void* client) { return static_cast<Client*>(client)->epoll_fd(); }

int64_t ef_lane_connect(void* client, const char* address, int32_t port, int64_t max_bytes) {
  return static_cast<Client*>(client)->connect(address, port, static_cast<size_t>(max_bytes));
}

// This, `ef_lane_send` and `ef_lane_poll` return how many events there are to take.
int64_t ef_lane_disconnect(void* client, int64_t connection) {
  return static_cast<Client*>(client)->disconnect(connection);
}

int64_t ef_lane_send(void* client, int64_t connection, const void* frame, int64_t size) {
  return static_cast<Client*>(client)->send(connection, frame, static_cast<size_t>(size));
}

int64_t ef_lane_poll(void* client) { return static_cast<Client*>(client)->poll(0); }

int32_t ef_lane_take_event(void* client, void* words) {
  return static_cast<Client*>(client)->take_event(
      *static_cast<expertfleet::lane::client::EventWords*>(words));
}

int64_t ef_lane_run_round(void* client, const void* request, int64_t wait_us) {
  return static_cast<Client*>(client)->run_round(
      *static_cast<const expertfleet::lane::client::RoundRequest*>(request), wait_us);
}

int64_t ef_lane_run_layers(void* client, void* layers, int64_t wait_us) {
  return static_cast<Client*>(client)->run_layers(
      *static_cast<expertfleet::lane::client::LayersRequest*>(layers), wait_us);
}

void ef_lane_release_round(void* client, int64_t round) {
  static_cast<Client*>(client)->release(round);
}
#pragma GCC visibility pop
}
