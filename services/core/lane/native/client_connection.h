// A shard's connection to a worker's lane: messages out of and into one TCP socket.
// Framing is that of frame.h; frames may follow our greeting before the worker's has come.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace expertfleet::lane::client {

// Bytes whose memory is not written before use, and kept for the next.
class Buffer {
 public:
  Buffer() = default;
  Buffer(Buffer&& other) noexcept
      : data_(std::move(other.data_)), capacity_(std::exchange(other.capacity_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    data_ = std::move(other.data_);
    capacity_ = std::exchange(other.capacity_, 0);
    return *this;
  }

  uint8_t* data() { return data_.get(); }
  const uint8_t* data() const { return data_.get(); }
  size_t capacity() const { return capacity_; }
  // At least so many bytes; the first `kept` of them stay as they are.
  void reserve(size_t capacity, size_t kept);

 private:
  std::unique_ptr<uint8_t[]> data_;
  size_t capacity_ = 0;
};

// A message that was received: `size` bytes from `start` in `buffer`.
struct Message {
  Buffer buffer;
  size_t start = 0;
  size_t size = 0;

  const uint8_t* bytes() const { return buffer.data() + start; }
};

// Buffers of messages that were dealt with, but for very large ones.
class BufferPool {
 public:
  Buffer take();
  void give_back(Buffer buffer);

 private:
  std::vector<Buffer> free_;
};

class Connection {
 public:
  enum class Greeting { waited_for, just_came, done };

  // Begins to connect to a numeric IPv4 or IPv6 address, and greets. A connection that fails is
  // broken from the start. Longer messages than `max_message_bytes` break it.
  Connection(int64_t id, int epoll_fd, const char* address, int port, size_t max_message_bytes);
  ~Connection();
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;

  int64_t id() const { return id_; }
  bool is_broken() const { return fd_ < 0; }
  const std::string& reason() const { return reason_; }

  // Sends the bytes of all parts; what the socket does not take now is copied and goes out later.
  void write(const iovec* parts, int count);

  // Deals with what epoll reported. Whole messages are appended to `received`.
  void handle(uint32_t epoll_events, BufferPool& buffers, std::vector<Message>& received);

  // Whether the worker's greeting has come since this was last asked.
  bool take_greeted();

  void break_off(const std::string& reason);

 private:
  void open(const char* address, int port);
  void flush();
  void receive(BufferPool& buffers, std::vector<Message>& received);
  bool take_messages(BufferPool& buffers, std::vector<Message>& received);
  bool take_greeting();
  void wait_for_room(bool is_waiting);
  void break_with_errno(const char* what, int error);

  const int64_t id_;
  const int epoll_fd_;
  const size_t max_message_bytes_;
  int fd_ = -1;
  std::string reason_;
  Greeting greeting_ = Greeting::waited_for;
  bool is_waiting_for_room_ = false;
  std::vector<char> unsent_;
  size_t unsent_start_ = 0;
  Buffer in_;
  size_t in_start_ = 0;
  size_t in_stop_ = 0;
};

}  // namespace expertfleet::lane::client
