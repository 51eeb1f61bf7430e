#include "client_connection.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "frame.h"

namespace expertfleet::lane::client {
namespace {

constexpr size_t kFirstReadBytes = 64 << 10;
constexpr size_t kMaxPooledBuffers = 32;
constexpr size_t kMaxPooledBytes = 4 << 20;
// A peer that has gone without a word is noticed after about so long.
constexpr int kUserTimeoutMs = 2000;

void set_option(int fd, int level, int option, int value) {
  setsockopt(fd, level, option, &value, sizeof(value));
}

void set_options(int fd) {
  set_option(fd, IPPROTO_TCP, TCP_NODELAY, 1);
  set_option(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
  set_option(fd, IPPROTO_TCP, TCP_KEEPIDLE, 1);
  set_option(fd, IPPROTO_TCP, TCP_KEEPINTVL, 1);
  set_option(fd, IPPROTO_TCP, TCP_KEEPCNT, 2);
  set_option(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, kUserTimeoutMs);
}

// The length of the address; 0 where the text is none.
socklen_t parse_address(const char* text, int port, sockaddr_storage& address) {
  auto* v4 = reinterpret_cast<sockaddr_in*>(&address);
  auto* v6 = reinterpret_cast<sockaddr_in6*>(&address);
  if (inet_pton(AF_INET, text, &v4->sin_addr) == 1) {
    v4->sin_family = AF_INET;
    v4->sin_port = htons(static_cast<uint16_t>(port));
    return sizeof(sockaddr_in);
  }
  if (inet_pton(AF_INET6, text, &v6->sin6_addr) == 1) {
    v6->sin6_family = AF_INET6;
    v6->sin6_port = htons(static_cast<uint16_t>(port));
    return sizeof(sockaddr_in6);
  }
  return 0;
}

bool must_wait(int error) { return error == EAGAIN || error == EWOULDBLOCK || error == EINTR; }

}  // namespace

void Buffer::reserve(size_t capacity, size_t kept) {
  if (capacity <= capacity_) return;
  std::unique_ptr<uint8_t[]> larger(new uint8_t[capacity]);
  if (kept) std::memcpy(larger.get(), data_.get(), kept);
  data_ = std::move(larger);
  capacity_ = capacity;
}

Buffer BufferPool::take() {
  if (free_.empty()) return {};
  Buffer buffer = std::move(free_.back());
  free_.pop_back();
  return buffer;
}

void BufferPool::give_back(Buffer buffer) {
  if (buffer.capacity() && buffer.capacity() <= kMaxPooledBytes &&
      free_.size() < kMaxPooledBuffers) {
    free_.push_back(std::move(buffer));
  }
}

Connection::Connection(int64_t id, int epoll_fd, const char* address, int port,
                       size_t max_message_bytes)
    : id_(id), epoll_fd_(epoll_fd), max_message_bytes_(max_message_bytes) {
  open(address, port);
}

Connection::~Connection() {
  if (fd_ >= 0) close(fd_);
}

void Connection::open(const char* address, int port) {
  sockaddr_storage peer{};
  const socklen_t size = parse_address(address, port, peer);
  if (!size) return break_off(std::string(address) + " is no numeric address");
  fd_ = socket(peer.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (fd_ < 0) return break_with_errno("no socket", errno);
  set_options(fd_);
  if (connect(fd_, reinterpret_cast<sockaddr*>(&peer), size) && errno != EINPROGRESS) {
    return break_with_errno("no connection", errno);
  }
  epoll_event interest{};
  interest.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP;
  interest.data.ptr = this;
  if (epoll_ctl(epoll_fd_, EPOLL_CTL_ADD, fd_, &interest)) {
    return break_with_errno("no place in epoll", errno);
  }
  // Sent once the connection is there.
  is_waiting_for_room_ = true;
  unsent_.assign(kMagic, kMagic + kMagicBytes);
}

void Connection::write(const iovec* parts, int count) {
  if (is_broken()) return;
  size_t sent = 0;
  if (!is_waiting_for_room_) {
    msghdr message{};
    message.msg_iov = const_cast<iovec*>(parts);
    message.msg_iovlen = static_cast<size_t>(count);
    const ssize_t result = sendmsg(fd_, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (result < 0 && !must_wait(errno)) return break_with_errno("sending failed", errno);
    sent = result > 0 ? static_cast<size_t>(result) : 0;
  }
  for (int i = 0; i < count; ++i) {
    const size_t skipped = std::min(sent, parts[i].iov_len);
    const char* bytes = static_cast<const char*>(parts[i].iov_base);
    unsent_.insert(unsent_.end(), bytes + skipped, bytes + parts[i].iov_len);
    sent -= skipped;
  }
  if (!unsent_.empty()) wait_for_room(true);
}

void Connection::handle(uint32_t epoll_events, BufferPool& buffers,
                        std::vector<Message>& received) {
  if (is_broken()) return;
  if (epoll_events & EPOLLERR) {
    int error = 0;
    socklen_t size = sizeof(error);
    getsockopt(fd_, SOL_SOCKET, SO_ERROR, &error, &size);
    if (error) return break_with_errno("the connection broke", error);
  }
  if (epoll_events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP)) receive(buffers, received);
  if (!is_broken() && (epoll_events & EPOLLOUT)) flush();
}

bool Connection::take_greeted() {
  if (greeting_ != Greeting::just_came) return false;
  greeting_ = Greeting::done;
  return true;
}

void Connection::flush() {
  while (unsent_start_ < unsent_.size()) {
    const ssize_t sent = send(fd_, unsent_.data() + unsent_start_, unsent_.size() - unsent_start_,
                              MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent < 0) {
      if (must_wait(errno)) return;
      return break_with_errno("sending failed", errno);
    }
    unsent_start_ += static_cast<size_t>(sent);
  }
  unsent_.clear();
  unsent_start_ = 0;
  wait_for_room(false);
}

void Connection::receive(BufferPool& buffers, std::vector<Message>& received) {
  while (true) {
    if (!in_.capacity()) in_ = buffers.take();
    in_.reserve(kFirstReadBytes, in_stop_);
    const size_t room = in_.capacity() - in_stop_;
    const ssize_t count = recv(fd_, in_.data() + in_stop_, room, MSG_DONTWAIT);
    if (count == 0) return break_off("the worker closed the connection");
    if (count < 0) {
      if (errno == EINTR) continue;
      if (must_wait(errno)) return;
      return break_with_errno("receiving failed", errno);
    }
    in_stop_ += static_cast<size_t>(count);
    if (!take_messages(buffers, received)) return;
    if (static_cast<size_t>(count) < room) return;
  }
}

// False once the connection is broken. Afterwards there is room for more in the buffer.
bool Connection::take_messages(BufferPool& buffers, std::vector<Message>& received) {
  if (greeting_ == Greeting::waited_for && !take_greeting()) return !is_broken();
  while (in_stop_ - in_start_ >= kLengthBytes) {
    const uint32_t length = read_length(in_.data() + in_start_);
    if (length > max_message_bytes_) {
      break_off("a message of " + std::to_string(length) + " bytes is longer than " +
                std::to_string(max_message_bytes_));
      return false;
    }
    const size_t start = in_start_ + kLengthBytes, stop = start + length;
    if (stop > in_stop_) {
      if (in_start_) {
        std::memmove(in_.data(), in_.data() + in_start_, in_stop_ - in_start_);
        in_stop_ -= in_start_;
        in_start_ = 0;
      }
      in_.reserve(kLengthBytes + length, in_stop_);
      return true;
    }
    Message message{{}, start, length};
    if (stop == in_stop_) {
      message.buffer = std::move(in_);
      in_start_ = in_stop_ = 0;
    } else {
      message.buffer = buffers.take();
      message.buffer.reserve(length, 0);
      message.start = 0;
      std::memcpy(message.buffer.data(), in_.data() + start, length);
      in_start_ = stop;
    }
    received.push_back(std::move(message));
  }
  if (in_start_ && in_start_ < in_stop_) {
    std::memmove(in_.data(), in_.data() + in_start_, in_stop_ - in_start_);
  }
  in_stop_ -= in_start_;
  in_start_ = 0;
  return true;
}

bool Connection::take_greeting() {
  const size_t size = std::min(in_stop_, kMagicBytes);
  if (std::memcmp(in_.data(), kMagic, size) != 0) {
    break_off("what listens there is no expertfleet lane of this version");
    return false;
  }
  if (size < kMagicBytes) return false;
  in_start_ = kMagicBytes;
  greeting_ = Greeting::just_came;
  return true;
}

void Connection::wait_for_room(bool is_waiting) {
  if (is_waiting == is_waiting_for_room_) return;
  is_waiting_for_room_ = is_waiting;
  epoll_event interest{};
  interest.events = EPOLLIN | EPOLLRDHUP | (is_waiting ? uint32_t{EPOLLOUT} : 0u);
  interest.data.ptr = this;
  epoll_ctl(epoll_fd_, EPOLL_CTL_MOD, fd_, &interest);
}

void Connection::break_with_errno(const char* what, int error) {
  break_off(std::string(what) + ": " + std::strerror(error));
}

void Connection::break_off(const std::string& reason) {
  reason_ = reason;
  if (fd_ >= 0) close(fd_);
  fd_ = -1;
  unsent_.clear();
  unsent_start_ = 0;
}

}  // namespace expertfleet::lane::client
