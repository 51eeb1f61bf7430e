// Memory for messages: taken and given back by the lane's own thread only.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>
#include <vector>

namespace expertfleet::lane {

class BlockPool;

struct Block {
  BlockPool* pool;
  uint8_t* data;  // 64-byte aligned
  size_t capacity;
  uint32_t num_users;
};

// One user of a block; the last one gives it back to its pool.
class BlockRef {
 public:
  BlockRef() = default;
  explicit BlockRef(Block* block) : block_(block) { ++block_->num_users; }
  BlockRef(const BlockRef& other) : block_(other.block_) {
    if (block_) ++block_->num_users;
  }
  BlockRef(BlockRef&& other) noexcept : block_(std::exchange(other.block_, nullptr)) {}
  BlockRef& operator=(BlockRef other) noexcept {
    std::swap(block_, other.block_);
    return *this;
  }
  ~BlockRef();

  explicit operator bool() const { return block_ != nullptr; }
  uint8_t* data() const { return block_->data; }
  size_t capacity() const { return block_->capacity; }

 private:
  Block* block_ = nullptr;
};

// Keeps free blocks, the one used last on top, as it may still be in a cache. Outlives its blocks.
class BlockPool {
 public:
  BlockPool() = default;
  BlockPool(const BlockPool&) = delete;
  BlockPool& operator=(const BlockPool&) = delete;
  ~BlockPool() {
    for (auto& blocks : free_) {
      for (Block* block : blocks) destroy(block);
    }
  }

  // Of at least `num_bytes`; throws std::bad_alloc.
  BlockRef take(size_t num_bytes) {
    const size_t capacity = std::bit_ceil(std::max(num_bytes, kLeastBytes));
    auto& blocks = free_[std::countr_zero(capacity)];
    if (!blocks.empty()) {
      Block* block = blocks.back();
      blocks.pop_back();
      free_bytes_ -= capacity;
      return BlockRef(block);
    }
    auto* data = static_cast<uint8_t*>(std::aligned_alloc(64, capacity));
    if (!data) throw std::bad_alloc();
    return BlockRef(new Block{this, data, capacity, 0});
  }

  void give_back(Block* block) {
    if (free_bytes_ + block->capacity > kMostFreeBytes) return destroy(block);
    free_bytes_ += block->capacity;
    free_[std::countr_zero(block->capacity)].push_back(block);
  }

 private:
  static constexpr size_t kLeastBytes = 16 << 10;
  static constexpr size_t kMostFreeBytes = 64 << 20;

  static void destroy(Block* block) {
    std::free(block->data);
    delete block;
  }

  std::vector<Block*> free_[64];
  size_t free_bytes_ = 0;
};

inline BlockRef::~BlockRef() {
  if (block_ && --block_->num_users == 0) block_->pool->give_back(block_);
}

}  // namespace expertfleet::lane
