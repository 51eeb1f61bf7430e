#include "server.h"

#ifdef __linux__

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

namespace expertfleet::lane {
namespace {

constexpr uint64_t kListener = 0, kWake = 1, kFirstConnection = 16;
constexpr size_t kMaxConnections = 4096;
constexpr int kMaxEvents = 64;
constexpr int kReadsAtOnce = 16;
constexpr uint64_t kMillisecond = 1'000'000, kSecond = 1000 * kMillisecond;
constexpr uint64_t kTickNs = kSecond;
constexpr uint64_t kGreetingNs = 10 * kSecond;
// A frame that stops half way holds room that others wait for.
constexpr uint64_t kStalledNs = 30 * kSecond;
// Times the largest frame: what all connections together may have in hand.
constexpr size_t kMaxFramesInHand = 4;
// What a frame costs besides its bytes, so that empty ones are not free.
constexpr size_t kFrameOverhead = 256;
constexpr size_t kManyRecordWords = 1 << 16, kMostRecordWords = 1 << 20;

// A client that is gone without a word; the client's own end finds out sooner. Also one that does
// not read its answers for so long.
constexpr int kUserTimeoutMs = 10'000, kKeepIdleS = 5, kKeepIntervalS = 2, kKeepCount = 3;

void signal_fd(int fd) {
  const uint64_t one = 1;
  [[maybe_unused]] const auto written = ::write(fd, &one, sizeof one);
}

void clear_fd(int fd) {
  uint64_t count;
  [[maybe_unused]] const auto taken = ::read(fd, &count, sizeof count);
}

int checked(int result, const char* what) {
  if (result < 0) throw std::system_error(errno, std::generic_category(), what);
  return result;
}

void set_option(int fd, int level, int name, int value) {
  ::setsockopt(fd, level, name, &value, sizeof value);
}

void set_options(int fd) {
  set_option(fd, IPPROTO_TCP, TCP_NODELAY, 1);
  set_option(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
  set_option(fd, IPPROTO_TCP, TCP_KEEPIDLE, kKeepIdleS);
  set_option(fd, IPPROTO_TCP, TCP_KEEPINTVL, kKeepIntervalS);
  set_option(fd, IPPROTO_TCP, TCP_KEEPCNT, kKeepCount);
  set_option(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, kUserTimeoutMs);
}

// Signals are for the interpreter's threads.
template <class Run>
std::thread thread_without_signals(const char* name, Run run) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  std::thread thread(run);
  pthread_setname_np(thread.native_handle(), name);
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return thread;
}

}  // namespace

LongComputer::LongComputer(int wake_fd) : wake_fd_(wake_fd) {
  thread_ = thread_without_signals("lane-long", [this] { run(); });
}

LongComputer::~LongComputer() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    is_ending_ = true;
  }
  has_work_.notify_one();
  thread_.join();
}

void LongComputer::submit(Batch* batch) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    batch_ = batch;
    state_.store(State::computing, std::memory_order_release);
  }
  has_work_.notify_one();
}

bool LongComputer::take_done() {
  State done = State::done;
  return state_.compare_exchange_strong(done, State::idle, std::memory_order_acq_rel);
}

void LongComputer::run() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    has_work_.wait(lock, [this] { return batch_ || is_ending_; });
    if (is_ending_) return;
    Batch* const batch = batch_;
    batch_ = nullptr;
    lock.unlock();
    batch->compute();
    state_.store(State::done, std::memory_order_release);
    signal_fd(wake_fd_);
    lock.lock();
  }
}

Server::Server(int listen_fd, int notify_fd, size_t max_frame_bytes)
    : listen_fd_(listen_fd),
      notify_fd_(notify_fd),
      max_frame_bytes_(max_frame_bytes),
      next_connection_(kFirstConnection) {
  epoll_fd_ = checked(::epoll_create1(EPOLL_CLOEXEC), "epoll_create1");
  wake_fd_ = checked(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), "eventfd");
  epoll_event event{EPOLLIN, {.u64 = kWake}};
  checked(::epoll_ctl(epoll_fd_, EPOLL_CTL_ADD, wake_fd_, &event), "epoll_ctl");
  watch_listener(true);
  long_computer_ = std::make_unique<LongComputer>(wake_fd_);
  thread_ = thread_without_signals("lane", [this] { run(); });
}

Server::~Server() {
  is_ending_.store(true);
  wake();
  thread_.join();
  long_computer_.reset();
  for (auto& [id, connection] : connections_) ::close(connection->fd);
  if (listen_fd_ >= 0) ::close(listen_fd_);
  ::close(wake_fd_);
  ::close(epoll_fd_);
  long_table_.reset();
  table_.reset();
}

void Server::set_table(std::unique_ptr<ExpertTable> table) {
  std::shared_ptr<const ExpertTable> next;
  if (table) {
    num_tables_.fetch_add(1);
    next = std::shared_ptr<const ExpertTable>(table.release(), [this](const ExpertTable* gone) {
      delete gone;
      num_tables_.fetch_sub(1);
      notify();
    });
  }
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    table_.swap(next);
  }
}

std::unique_ptr<Handed> Server::next_handed() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (handed_.empty()) return nullptr;
  auto next = std::move(handed_.front());
  handed_.pop_front();
  return next;
}

void Server::reply(uint64_t connection, std::vector<uint8_t> message, size_t request_bytes) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    replies_.push_back({connection, std::move(message), request_bytes});
  }
  wake();
}

bool Server::is_connected(uint64_t connection) {
  const std::lock_guard<std::mutex> lock(mutex_);
  return connected_.contains(connection);
}

std::vector<uint32_t> Server::take_records() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return std::exchange(records_, {});
}

void Server::drain() {
  is_draining_.store(true);
  wake();
}

void Server::run() {
  while (!is_ending_.load()) {
    try {
      if (!run_round()) return;
    } catch (const std::bad_alloc&) {
      // Whoever ran out of memory has lost its connection; the others go on.
    }
    closed_.clear();
  }
}

// False when there is no way to go on.
bool Server::run_round() {
  uint64_t now = now_ns();
  int timeout_ms = -1;
  if (!short_frames_.empty()) {
    timeout_ms = 0;
  } else if (!connections_.empty() || !is_listening_) {
    timeout_ms = next_tick_ns_ > now ? static_cast<int>((next_tick_ns_ - now) / kMillisecond) + 1 : 0;
  }
  epoll_event events[kMaxEvents];
  const int count = ::epoll_wait(epoll_fd_, events, kMaxEvents, timeout_ms);
  if (count < 0 && errno != EINTR) return false;
  for (int i = 0; i < count; ++i) {
    const uint64_t id = events[i].data.u64;
    if (id == kListener) {
      on_listener();
    } else if (id == kWake) {
      on_wake();
    } else if (Connection* connection = find(id)) {
      try {
        on_connection(*connection, events[i].events);
      } catch (const std::bad_alloc&) {
        close(*connection);
      }
    }
  }
  if (long_computer_->take_done()) {
    finish(long_batch_);
    long_table_.reset();
  }
  start_long();
  compute_next();
  resume_paused();
  now = now_ns();
  if (now >= next_tick_ns_) on_tick(now);
  if (is_draining_.load() && !is_drained_.load() && is_all_answered()) {
    end_connections();
    is_drained_.store(true);
    notify();
  }
  return true;
}

void Server::on_wake() {
  clear_fd(wake_fd_);
  std::vector<Reply> replies;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    replies.swap(replies_);
  }
  for (Reply& reply : replies) send_reply(reply);
  if (is_draining_.load() && listen_fd_ >= 0) {
    watch_listener(false);
    ::close(std::exchange(listen_fd_, -1));
  }
}

void Server::on_listener() {
  for (int i = 0; i < kMaxEvents; ++i) {
    const int fd = ::accept4(listen_fd_, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd < 0) {
      // Without a descriptor to spare it would be told of the same client over and over.
      const bool is_none_waiting = errno == EAGAIN || errno == EWOULDBLOCK;
      if (!is_none_waiting && errno != ECONNABORTED && errno != EINTR) watch_listener(false);
      return;
    }
    if (connections_.size() >= kMaxConnections) {
      ::close(fd);
      continue;
    }
    set_options(fd);
    const uint64_t id = next_connection_++;
    auto connection = std::make_unique<Connection>(fd, id, pool_, max_frame_bytes_, now_ns());
    connection->watched = EPOLLIN;
    epoll_event event{EPOLLIN, {.u64 = id}};
    if (::epoll_ctl(epoll_fd_, EPOLL_CTL_ADD, fd, &event) < 0) {
      ::close(fd);
      continue;
    }
    connections_.emplace(id, std::move(connection));
    const std::lock_guard<std::mutex> lock(mutex_);
    connected_.insert(id);
  }
}

void Server::on_connection(Connection& connection, uint32_t events) {
  if (events & (EPOLLERR | EPOLLHUP)) return close(connection);
  if (events & EPOLLOUT) flush(connection);
  if (events & EPOLLIN && connection.fd >= 0) read(connection);
}

void Server::on_tick(uint64_t now) {
  next_tick_ns_ = now + kTickNs;
  std::vector<Connection*> late;
  for (auto& [id, connection] : connections_) {
    if (connection->is_paused) connection->progress_ns = now;
    const uint64_t silent_ns = now - std::min(now, connection->progress_ns);
    const bool is_stalled = connection->reader.is_amid() && silent_ns > kStalledNs;
    const bool is_mute = !connection->is_greeted && silent_ns > kGreetingNs;
    if (is_stalled || is_mute) late.push_back(connection.get());
  }
  for (Connection* connection : late) close(*connection);
  if (!is_listening_ && listen_fd_ >= 0) watch_listener(true);
}

void Server::read(Connection& connection) {
  for (int i = 0; i < kReadsAtOnce && !connection.is_paused; ++i) {
    const auto room = connection.reader.room();
    const ssize_t count = ::recv(connection.fd, room.data, room.size, 0);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return;
    if (count <= 0) return close(connection);  // who ends its side wants no more answers
    if (connection.is_ended) continue;
    connection.reader.commit(count);
    connection.progress_ns = now_ns();
    if (!connection.is_greeted) {
      const auto is_magic = connection.reader.take_magic();
      if (!is_magic) continue;
      if (!*is_magic) return close(connection);
      connection.is_greeted = true;
      Answer greeting{pool_.take(kMagicBytes)};
      std::memcpy(greeting.block.data(), kMagic, kMagicBytes);
      greeting.begin = greeting.block.data();
      greeting.size = kMagicBytes;
      send(connection, std::move(greeting), 0);
    }
    take_frames(connection);
    if (connection.fd < 0 || static_cast<size_t>(count) < room.size) return;
  }
}

void Server::take_frames(Connection& connection) {
  while (connection.fd >= 0) {
    const auto length = connection.reader.next_length();
    if (length && *length <= max_frame_bytes_ && !connection.receiving_bytes) {
      if (!has_room(connection)) {
        connection.is_paused = true;
        paused_.push_back(connection.id);
        return watch(connection);
      }
      connection.receiving_bytes = *length + kFrameOverhead;
      hold(connection, connection.receiving_bytes);
    }
    MessageReader::Message message;
    if (!connection.reader.take(&message)) return;
    if (message.total_bytes > max_frame_bytes_) {
      hold(connection, message.bytes.size + kFrameOverhead);
      hand_over(connection, message.total_bytes, message.bytes);
      continue;
    }
    connection.receiving_bytes = 0;
    Frame frame{connection.id, std::move(message.block), message.bytes, {}, now_ns()};
    if (!parse_request(frame.message, &frame.view)) {
      hand_over(connection, frame.message.size, frame.message);
      continue;
    }
    short_frames_.push_back(std::move(frame));
  }
}

bool Server::has_room(const Connection& connection) const {
  return connection.in_hand_bytes < max_frame_bytes_ &&
         in_hand_bytes_ < kMaxFramesInHand * max_frame_bytes_;
}

void Server::hold(Connection& connection, size_t num_bytes) {
  connection.in_hand_bytes += num_bytes;
  in_hand_bytes_ += num_bytes;
}

void Server::release(Connection& connection, size_t num_bytes) {
  connection.in_hand_bytes -= num_bytes;
  in_hand_bytes_ -= num_bytes;
}

// In the order in which they were paused.
void Server::resume_paused() {
  if (paused_.empty()) return;
  const std::vector<uint64_t> paused = std::exchange(paused_, {});
  for (const uint64_t id : paused) {
    Connection* const connection = find(id);
    if (!connection) continue;
    if (connection->is_ended) continue;
    if (!has_room(*connection)) {
      paused_.push_back(id);
      continue;
    }
    connection->is_paused = false;
    try {
      take_frames(*connection);
    } catch (const std::bad_alloc&) {
      close(*connection);
    }
    if (connection->fd >= 0) watch(*connection);
  }
}

// Computes the frames of the layer that has waited longest, but for long ones, which are set aside.
void Server::compute_next() {
  if (short_frames_.empty()) return;
  const std::shared_ptr<const ExpertTable> table = current_table();
  take_layer(short_frames_, short_batch_, table.get());
  if (!short_batch_.is_empty()) {
    short_batch_.compute();
    finish(short_batch_);
  }
  start_long();
}

void Server::start_long() {
  while (!long_frames_.empty() && long_computer_->is_idle()) {
    long_table_ = current_table();
    take_layer(long_frames_, long_batch_, long_table_.get());
    if (!long_batch_.is_empty()) return long_computer_->submit(&long_batch_);
    long_table_.reset();
  }
}

std::shared_ptr<const ExpertTable> Server::current_table() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return table_;
}

// Moves the frames of the first one's layer into the batch.
void Server::take_layer(std::vector<Frame>& frames, Batch& batch, const ExpertTable* table) {
  const uint32_t layer = frames.front().view.layer;
  batch.clear(table);
  auto kept = frames.begin();
  for (Frame& frame : frames) {
    if (frame.view.layer != layer) {
      if (&*kept != &frame) *kept = std::move(frame);
      ++kept;
    } else if (table && &batch == &short_batch_ && is_long(*table, frame.view)) {
      long_frames_.push_back(std::move(frame));
    } else {
      take_in(batch, table, frame);
    }
  }
  frames.erase(kept, frames.end());
}

// What is not taken is handed over; nobody waits for frames of a connection that is gone.
void Server::take_in(Batch& batch, const ExpertTable* table, Frame& frame) {
  Connection* const connection = find(frame.connection);
  if (!connection) return;
  try {
    if (table && batch.add(frame, pool_)) return;
  } catch (const std::bad_alloc&) {
    return close(*connection);
  }
  hand_over(*connection, frame.message.size, frame.message);
}

void Server::finish(Batch& batch) {
  for (size_t i = 0; i < batch.size(); ++i) {
    const Frame& frame = batch.frame(i);
    Connection* const connection = find(frame.connection);
    if (!connection) continue;
    if (!batch.is_computed()) {
      hand_over(*connection, frame.message.size, frame.message);
      continue;
    }
    hold(*connection, batch.answer(i).size);
    const size_t held_bytes = frame.message.size + kFrameOverhead + batch.answer(i).size;
    send(*connection, std::move(batch.answer(i)), held_bytes);
  }
  if (batch.is_computed()) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const size_t num_before = records_.size();
    for (size_t i = 0; i < batch.size() && records_.size() < kMostRecordWords; ++i) {
      batch.append_record(i, &records_);
    }
    if (num_before < kManyRecordWords && records_.size() >= kManyRecordWords) notify();
  }
  batch.clear(nullptr);
}

void Server::hand_over(Connection& connection, uint64_t total_bytes, Bytes message) {
  try {
    auto handed = std::make_unique<Handed>();
    handed->connection = connection.id;
    handed->total_bytes = total_bytes;
    handed->message.assign(message.data, message.data + message.size);
    const std::lock_guard<std::mutex> lock(mutex_);
    handed_.push_back(std::move(handed));
  } catch (const std::bad_alloc&) {
    return close(connection);
  }
  ++connection.num_handed;
  notify();
}

void Server::send_reply(Reply& reply) {
  Connection* const connection = find(reply.connection);
  if (!connection) return;
  --connection->num_handed;
  try {
    Answer answer{pool_.take(kLengthBytes + reply.message.size())};
    uint8_t* const data = answer.block.data();
    write_length(data, static_cast<uint32_t>(reply.message.size()));
    std::copy(reply.message.begin(), reply.message.end(), data + kLengthBytes);
    answer.begin = data;
    answer.size = kLengthBytes + reply.message.size();
    hold(*connection, answer.size);
    const size_t held_bytes = reply.request_bytes + kFrameOverhead + answer.size;
    send(*connection, std::move(answer), held_bytes);
  } catch (const std::bad_alloc&) {
    close(*connection);
  }
}

void Server::send(Connection& connection, Answer answer, size_t held_bytes) {
  connection.unsent.push_back({std::move(answer), held_bytes});
  if (connection.unsent.size() == 1) flush(connection);
}

void Server::flush(Connection& connection) {
  while (!connection.unsent.empty()) {
    auto& [answer, held_bytes] = connection.unsent.front();
    const ssize_t count = ::send(connection.fd, answer.begin, answer.size, MSG_NOSIGNAL);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) break;
    if (count < 0) return close(connection);
    answer.begin += count;
    answer.size -= count;
    if (answer.size) continue;
    release(connection, held_bytes);
    connection.unsent.pop_front();
  }
  watch(connection);
}

void Server::watch(Connection& connection) {
  const uint32_t wanted =
      (connection.is_paused ? 0u : EPOLLIN) | (connection.unsent.empty() ? 0u : EPOLLOUT);
  if (wanted == connection.watched) return;
  epoll_event event{wanted, {.u64 = connection.id}};
  ::epoll_ctl(epoll_fd_, EPOLL_CTL_MOD, connection.fd, &event);
  connection.watched = wanted;
}

// It stays in memory until the end of the round, as a caller may still have it in its hands.
void Server::close(Connection& connection) {
  if (connection.fd < 0) return;
  ::close(connection.fd);
  connection.fd = -1;
  in_hand_bytes_ -= connection.in_hand_bytes;
  const auto found = connections_.find(connection.id);
  closed_.push_back(std::move(found->second));
  connections_.erase(found);
  const std::lock_guard<std::mutex> lock(mutex_);
  connected_.erase(connection.id);
  std::erase_if(handed_, [&](const auto& handed) { return handed->connection == connection.id; });
}

Connection* Server::find(uint64_t id) {
  const auto found = connections_.find(id);
  return found == connections_.end() ? nullptr : found->second.get();
}

void Server::watch_listener(bool is_watched) {
  epoll_event event{EPOLLIN, {.u64 = kListener}};
  const int action = is_watched ? EPOLL_CTL_ADD : EPOLL_CTL_DEL;
  ::epoll_ctl(epoll_fd_, action, listen_fd_, &event);
  is_listening_ = is_watched;
}

bool Server::is_all_answered() {
  if (!short_frames_.empty() || !long_frames_.empty() || !long_computer_->is_idle()) return false;
  for (const auto& [id, connection] : connections_) {
    if (connection->num_handed || !connection->unsent.empty()) return false;
  }
  return true;
}

// Closing with bytes unread would reset the connection, and answers on their way would be lost.
void Server::end_connections() {
  for (auto& [id, connection] : connections_) {
    ::shutdown(connection->fd, SHUT_WR);
    connection->is_ended = true;
    connection->is_paused = false;
    watch(*connection);
  }
}

void Server::notify() { signal_fd(notify_fd_); }

void Server::wake() { signal_fd(wake_fd_); }

}  // namespace expertfleet::lane

#endif
