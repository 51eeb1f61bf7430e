// The server as C functions for services/core/lane/server.py.

#ifdef __linux__

#include <cstring>
#include <exception>

#include "server.h"

extern "C" {
#pragma GCC visibility push(default)

// Null if it cannot be started; the descriptor is then still the caller's.
void* ef_lane_start(int32_t listen_fd, int32_t notify_fd, uint64_t max_frame_bytes) {
  try {
    return new expertfleet::lane::Server(listen_fd, notify_fd, max_frame_bytes);
  } catch (const std::exception&) {
    return nullptr;
  }
}

void ef_lane_stop(void* server) { delete static_cast<expertfleet::lane::Server*>(server); }

// `slots` are `count` triples of layer, expert and address of an Expert; none: compute nothing.
void ef_lane_set_experts(void* server, const int64_t* slots, int64_t count, int32_t type,
                         uint32_t hidden_size, uint64_t expert_bytes) {
  using namespace expertfleet;
  std::unique_ptr<lane::ExpertTable> table;
  if (count) {
    table = std::make_unique<lane::ExpertTable>();
    table->type = static_cast<Activation>(type);
    table->hidden_size = hidden_size;
    table->expert_bytes = expert_bytes;
    for (const int64_t* slot = slots; slot < slots + 3 * count; slot += 3) {
      table->layers[static_cast<uint32_t>(slot[0])][static_cast<uint32_t>(slot[1])] =
          reinterpret_cast<const Expert*>(slot[2]);
    }
  }
  static_cast<lane::Server*>(server)->set_table(std::move(table));
}

int64_t ef_lane_num_tables(void* server) {
  return static_cast<expertfleet::lane::Server*>(server)->num_tables();
}

// The next frame for the interpreter, to be given to ef_lane_forget; null if there is none.
void* ef_lane_next(void* server, uint64_t* connection, uint64_t* total_bytes,
                   const uint8_t** message, uint64_t* message_bytes) {
  auto handed = static_cast<expertfleet::lane::Server*>(server)->next_handed();
  if (!handed) return nullptr;
  *connection = handed->connection;
  *total_bytes = handed->total_bytes;
  *message = handed->message.data();
  *message_bytes = handed->message.size();
  return handed.release();
}

void ef_lane_forget(void* handed) { delete static_cast<expertfleet::lane::Handed*>(handed); }

void ef_lane_reply(void* server, uint64_t connection, const uint8_t* message,
                   uint64_t message_bytes, uint64_t request_bytes) {
  static_cast<expertfleet::lane::Server*>(server)->reply(
      connection, {message, message + message_bytes}, request_bytes);
}

int32_t ef_lane_is_connected(void* server, uint64_t connection) {
  return static_cast<expertfleet::lane::Server*>(server)->is_connected(connection);
}

// The words of all records so far, to be given to ef_lane_forget_records.
void* ef_lane_records(void* server, const uint32_t** words, uint64_t* num_words) {
  auto* records = new std::vector<uint32_t>(
      static_cast<expertfleet::lane::Server*>(server)->take_records());
  *words = records->data();
  *num_words = records->size();
  return records;
}

void ef_lane_forget_records(void* records) { delete static_cast<std::vector<uint32_t>*>(records); }

void ef_lane_drain(void* server) { static_cast<expertfleet::lane::Server*>(server)->drain(); }

int32_t ef_lane_is_drained(void* server) {
  return static_cast<expertfleet::lane::Server*>(server)->is_drained();
}

#pragma GCC visibility pop
}

#endif
