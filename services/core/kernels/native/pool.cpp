#include "pool.h"

#include <atomic>
#include <chrono>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace expertfleet {
namespace {

// An idle helper stays awake for so long before it sleeps, if nobody else wants its core. A core that
// fell asleep between two layers comes back late, and on a shared host often beside the other one's
// thread, with half of its bandwidth. But helpers of many processes that stay awake on few cores
// take a third of what they are for.
constexpr auto kLinger = std::chrono::milliseconds(2);
// Giving way takes longer than this if somebody took it.
constexpr auto kAlone = std::chrono::microseconds(4);
constexpr int kPauses = 32;
constexpr int kChunkBits = 20;
constexpr uint64_t kChunkMask = (uint64_t{1} << kChunkBits) - 1;

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

void give_way() {
  for (int i = 0; i < kPauses; ++i) pause();
  std::this_thread::yield();
}

// One 64-bit word says which job it is, how many chunks it has and which is next, so that a
// helper that slept through a job can never claim, or even see, a part of the one after it.
class Pool {
 public:
  // Threads outlive main; they hold nothing that has to be released.
  static Pool& instance() {
    static Pool* pool = new Pool;
    return *pool;
  }

  void resize(int count) {
    const std::lock_guard<std::mutex> lock(owner_);
    limit_ = count < 1 ? 1 : count;
    while (num_helpers_ < limit_ - 1) {
      const int number = ++num_helpers_;
      std::thread([this, number] { serve(number); }).detach();
    }
  }

  int limit() const { return limit_; }

  void run(int64_t num_chunks, const std::function<void(int64_t)>& body) {
    std::unique_lock<std::mutex> lock(owner_, std::try_to_lock);
    if (!lock.owns_lock() || limit_ == 1 || num_chunks < 2) {
      for (int64_t chunk = 0; chunk < num_chunks; ++chunk) body(chunk);
      return;
    }
    done_.store(0, std::memory_order_relaxed);
    body_ = &body;
    const uint64_t job = ++job_ << (2 * kChunkBits);
    ticket_.store(job | static_cast<uint64_t>(num_chunks) << kChunkBits);
    epoch_.fetch_add(1);
    if (sleepers_.load() > 0) epoch_.notify_all();
    work();
    while (done_.load(std::memory_order_acquire) != num_chunks) give_way();
  }

 private:
  // Claims and does chunks of the current job until none is left.
  void work() {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    for (;;) {
      const uint64_t chunk = ticket & kChunkMask;
      const uint64_t count = ticket >> kChunkBits & kChunkMask;
      if (chunk >= count) return;
      if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) continue;
      (*body_)(static_cast<int64_t>(chunk));
      done_.fetch_add(1, std::memory_order_release);
      ticket = ticket_.load(std::memory_order_acquire);
    }
  }

  void serve(int number) {
    uint32_t seen = epoch_.load();
    for (;;) {
      const auto idle_since = std::chrono::steady_clock::now();
      auto before = idle_since;
      while (epoch_.load(std::memory_order_acquire) == seen) {
        give_way();
        const auto now = std::chrono::steady_clock::now();
        if (now - before < kAlone && now - idle_since < kLinger) {
          before = now;
          continue;
        }
        sleepers_.fetch_add(1);
        epoch_.wait(seen);
        sleepers_.fetch_sub(1);
      }
      seen = epoch_.load(std::memory_order_acquire);
      if (number < limit_) work();
    }
  }

  std::mutex owner_;
  std::atomic<int> limit_{1};
  int num_helpers_ = 0;
  uint64_t job_ = 0;
  const std::function<void(int64_t)>* body_ = nullptr;
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<uint32_t> epoch_{0};
  alignas(64) std::atomic<int> sleepers_{0};
};

}  // namespace

void set_num_threads(int count) { Pool::instance().resize(count); }

int num_threads() { return Pool::instance().limit(); }

void parallel_for(int64_t num_chunks, const std::function<void(int64_t)>& body) {
  Pool::instance().run(num_chunks, body);
}

}  // namespace expertfleet

extern "C" {
#pragma GCC visibility push(default)
void ef_set_num_threads(int32_t count) { expertfleet::set_num_threads(count); }
int32_t ef_num_threads() { return expertfleet::num_threads(); }
#pragma GCC visibility pop
}
