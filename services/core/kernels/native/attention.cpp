// Divides a step's attention into units of work and computes them; see attention.h.
#include "attention.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <vector>

#include "api.h"
#include "pool.h"

namespace expertfleet {
namespace {

// About what a thread does in the time that handing it work takes.
constexpr int64_t kWorthSharing = 1 << 14;
// What a unit gathers should stay in the cache nearest to the core.
constexpr int64_t kUnitFloats = 1 << 13;
constexpr int64_t kUnitsPerThread = 4;
constexpr int64_t kMostPartBytes = 32 << 20;
// Keys that are brought into the cache at a time, see `touch`.
constexpr int64_t kTouchedKeys = 128;

// Queries of one sequence and the splits of keys that at least one of them sees.
struct TileWork {
  Tile tile;
  int64_t sequence;
  int64_t first_token;
  int64_t first_split;
  int64_t num_splits;
  // Where the parts of its splits go, [key-value head, split], if several units compute them.
  int64_t parts;
};

// Some key-value heads and splits of a tile.
struct Unit {
  int64_t tile;
  int64_t first_head;
  int64_t num_heads;
  int64_t first_split;
  int64_t num_splits;
};

class Buffer {
 public:
  // At least so many bytes, 64-byte aligned; what was there is lost.
  void* reserve(size_t bytes) {
    if (bytes > size_) {
      size_ = (bytes + 4095) / 4096 * 4096;
      data_.reset(std::aligned_alloc(64, size_));
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(void* pointer) const { std::free(pointer); }
  };
  std::unique_ptr<void, Free> data_;
  size_t size_ = 0;
};

class StepAttention {
 public:
  StepAttention(const ef_attention_step& step, const void* qkv, const void* keys,
                const void* values, void* output)
      : step_(step),
        kernels_(attention_kernels(static_cast<Element>(step.element), active_isa())),
        element_bytes_(step.element == static_cast<int32_t>(Element::float32) ? 4 : 2),
        group_(step.num_heads / step.num_kv_heads),
        padded_(kernels_.padded_head_dim(step.head_dim)),
        queries_(static_cast<const char*>(qkv)),
        keys_(static_cast<const char*>(keys)),
        values_(static_cast<const char*>(values)),
        output_(static_cast<char*>(output)) {}

  void run() {
    make_tiles();
    make_units();
    share(static_cast<int64_t>(units_.size()), [this](int64_t unit) { compute(units_[unit]); });
    if (!is_split_) return;
    share(static_cast<int64_t>(tiles_.size()) * step_.num_kv_heads,
          [this](int64_t index) { join(index / step_.num_kv_heads, index % step_.num_kv_heads); });
  }

 private:
  template <class Body>
  void share(int64_t count, const Body& body) {
    if (work_ > kWorthSharing) {
      parallel_for(count, body);
    } else {
      for (int64_t i = 0; i < count; ++i) body(i);
    }
  }

  void make_tiles() {
    const int64_t most_queries = std::max<int64_t>(1, kTileRows / group_);
    const int64_t window = step_.window > 0 ? step_.window : INT64_MAX / 2;
    for (int64_t sequence = 0; sequence < step_.num_seqs; ++sequence) {
      const int64_t begin = step_.query_start[sequence], end = step_.query_start[sequence + 1];
      const int64_t earlier = step_.context_lens[sequence] - (end - begin);
      for (int64_t token = begin; token < end; token += most_queries) {
        const int64_t count = std::min(most_queries, end - token);
        const int64_t position = earlier + token - begin;
        const int64_t first_key = std::max<int64_t>(0, position - window + 1);
        const int64_t last_key = position + count - 1;
        const int64_t first_split = first_key / kSplitKeys;
        tiles_.push_back({{count, group_, step_.head_dim, position, window, step_.scale},
                          sequence, token, first_split, last_key / kSplitKeys - first_split + 1,
                          0});
        const int64_t num_blocks = last_key / kBlockKeys - first_key / kBlockKeys + 1;
        work_ += num_blocks * step_.num_kv_heads * (count * group_ + 2) * step_.head_dim / 16;
      }
    }
  }

  // Bits do not depend on what is decided here.
  void make_units() {
    const int64_t wanted = kUnitsPerThread * num_threads();
    int64_t num_splits = 0, num_rows = 1, part_bytes = 0;
    for (const TileWork& work : tiles_) {
      num_splits += work.num_splits;
      part_bytes += floats_of(work.tile) * step_.num_kv_heads * work.num_splits * 4;
      num_rows = std::max(num_rows, work.tile.num_rows());
    }
    const int64_t num_tiles = static_cast<int64_t>(tiles_.size());
    is_split_ =
        num_splits > num_tiles && num_tiles < wanted && part_bytes <= kMostPartBytes;
    const int64_t num_ranges = is_split_ ? num_splits : num_tiles;
    int64_t heads = std::max<int64_t>(1, kUnitFloats / (num_rows * padded_));
    heads = std::min(heads, step_.num_kv_heads);
    while (heads > 1 && num_ranges * (step_.num_kv_heads / heads) < wanted) heads /= 2;
    int64_t parts = 0;
    for (int64_t index = 0; index < num_tiles; ++index) {
      TileWork& work = tiles_[index];
      work.parts = parts;
      const int64_t step = is_split_ ? 1 : work.num_splits;
      for (int64_t split = 0; split < work.num_splits; split += step) {
        for (int64_t head = 0; head < step_.num_kv_heads; head += heads) {
          const int64_t count = std::min(heads, step_.num_kv_heads - head);
          units_.push_back({index, head, count, work.first_split + split, step});
        }
      }
      if (is_split_) parts += floats_of(work.tile) * step_.num_kv_heads * work.num_splits;
    }
    parts_ = static_cast<float*>(parts_buffer().reserve(static_cast<size_t>(parts) * 4));
  }

  void compute(const Unit& unit) {
    const TileWork& work = tiles_[unit.tile];
    const Tile& tile = work.tile;
    const int64_t size = floats_of(tile);
    const size_t query_bytes =
        (kernels_.packed_query_bytes(tile.num_rows(), tile.head_dim) + 63) / 64 * 64;
    thread_local Buffer buffer;
    char* memory = static_cast<char*>(buffer.reserve(
        kAttendScratchBytes + unit.num_heads * (query_bytes + 2 * size * sizeof(float))));
    char* packed = memory + kAttendScratchBytes;
    float* part = reinterpret_cast<float*>(packed + unit.num_heads * query_bytes);
    float* total = part + unit.num_heads * size;
    for (int64_t i = 0; i < unit.num_heads; ++i) {
      kernels_.pack_queries(tile, query_rows(work, unit.first_head + i), token_stride(),
                            packed + i * query_bytes);
      kernels_.clear(tile, gathered(tile, total + i * size));
    }
    for (int64_t split = 0; split < unit.num_splits; ++split) {
      for (int64_t i = 0; i < unit.num_heads; ++i) {
        kernels_.clear(tile, gathered(tile, target(work, unit, i, part)));
      }
      attend_split(work, unit, unit.first_split + split, packed, query_bytes, memory, part);
      if (is_split_) return;
      for (int64_t i = 0; i < unit.num_heads; ++i) {
        kernels_.merge(tile, gathered(tile, part + i * size), gathered(tile, total + i * size));
      }
    }
    for (int64_t i = 0; i < unit.num_heads; ++i) {
      kernels_.finish(tile, gathered(tile, total + i * size),
                      output_rows(work, unit.first_head + i), step_.num_heads * step_.head_dim);
    }
  }

  void attend_split(const TileWork& work, const Unit& unit, int64_t split, const char* packed,
                    size_t query_bytes, void* scratch, float* part) {
    const Tile& tile = work.tile;
    const int64_t first_key = std::max<int64_t>(0, tile.first_position - tile.window + 1);
    const int64_t last_key = tile.first_position + tile.num_queries - 1;
    const int64_t begin = std::max(split * kSplitKeys, first_key / kBlockKeys * kBlockKeys);
    const int64_t end = std::min((split + 1) * kSplitKeys, last_key + 1);
    int64_t offsets[kBlockKeys];
    for (int64_t position = begin; position < end; position += kBlockKeys) {
      if (tile.num_queries == 1 && (position == begin || position % kTouchedKeys == 0)) {
        const int64_t next = (position / kTouchedKeys + 1) * kTouchedKeys;
        touch(work.sequence, std::max(position, first_key), std::min(end, next), unit);
      }
      find_keys(work.sequence, position, first_key, last_key, offsets);
      for (int64_t i = 0; i < unit.num_heads; ++i) {
        const int64_t head = unit.first_head + i;
        const int64_t shift = head * step_.head_dim * element_bytes_;
        kernels_.attend(tile, packed + i * query_bytes,
                        {keys_ + shift, values_ + shift, offsets, position}, scratch,
                        gathered(tile, target(work, unit, i, part)));
      }
    }
  }

  // Keys outside of [first, last] are nobody's or unseen by the whole tile, and not read.
  void find_keys(int64_t sequence, int64_t position, int64_t first, int64_t last,
                 int64_t* offsets) const {
    for (int64_t key = 0; key < kBlockKeys; ++key) {
      const int64_t at = position + key;
      const bool is_hidden = at < first || at > last;
      offsets[key] = is_hidden ? -1 : slot(sequence, at) * step_.num_kv_heads * step_.head_dim;
    }
  }

  int64_t slot(int64_t sequence, int64_t position) const {
    const int64_t* table = step_.block_tables + sequence * step_.table_width;
    const int64_t block = table[position / step_.block_size];
    return block * step_.block_size + position % step_.block_size;
  }

  // Reads keys and then values as they lie in memory, which the processor recognises and runs
  // ahead of, as it does not when they are read head by head; that takes a third longer.
  void touch(int64_t sequence, int64_t begin, int64_t end, const Unit& unit) const {
    const int64_t head_bytes = step_.head_dim * element_bytes_;
    const int64_t row_bytes = unit.num_heads * head_bytes;
    for (const char* base : {keys_, values_}) {
      for (int64_t position = begin; position < end; ++position) {
        const int64_t row = slot(sequence, position) * step_.num_kv_heads + unit.first_head;
        const volatile char* bytes = base + row * head_bytes;
        for (int64_t byte = 0; byte < row_bytes; byte += 64) static_cast<void>(bytes[byte]);
      }
    }
  }

  void join(int64_t index, int64_t head) {
    const TileWork& work = tiles_[index];
    const Tile& tile = work.tile;
    thread_local Buffer buffer;
    const size_t bytes = static_cast<size_t>(floats_of(tile)) * sizeof(float);
    const Gathered total = gathered(tile, static_cast<float*>(buffer.reserve(bytes)));
    kernels_.clear(tile, total);
    for (int64_t split = 0; split < work.num_splits; ++split) {
      kernels_.merge(tile, gathered(tile, part_of(work, head, work.first_split + split)), total);
    }
    kernels_.finish(tile, total, output_rows(work, head), step_.num_heads * step_.head_dim);
  }

  // Where the i-th head of a unit gathers a split: for other units to see, or in its own memory.
  float* target(const TileWork& work, const Unit& unit, int64_t i, float* own) const {
    if (is_split_) return part_of(work, unit.first_head + i, unit.first_split);
    return own + i * floats_of(work.tile);
  }

  int64_t floats_of(const Tile& tile) const {
    return (tile.num_rows() * (1 + 16 + padded_) + 15) / 16 * 16;
  }

  Gathered gathered(const Tile& tile, float* memory) const {
    float* sums = memory + tile.num_rows() * padded_;
    return {sums + tile.num_rows() * 16, sums, memory};
  }

  float* part_of(const TileWork& work, int64_t head, int64_t split) const {
    const int64_t index = head * work.num_splits + split - work.first_split;
    return parts_ + work.parts + index * floats_of(work.tile);
  }

  int64_t token_stride() const {
    return (step_.num_heads + 2 * step_.num_kv_heads) * step_.head_dim;
  }

  const void* query_rows(const TileWork& work, int64_t head) const {
    const int64_t element = work.first_token * token_stride() + head * group_ * step_.head_dim;
    return queries_ + element * element_bytes_;
  }

  void* output_rows(const TileWork& work, int64_t head) const {
    const int64_t row = work.first_token * step_.num_heads + head * group_;
    return output_ + row * step_.head_dim * element_bytes_;
  }

  static Buffer& parts_buffer() {
    thread_local Buffer buffer;
    return buffer;
  }

  const ef_attention_step& step_;
  const AttentionKernels& kernels_;
  const int64_t element_bytes_, group_, padded_;
  const char* queries_;
  const char* keys_;
  const char* values_;
  char* output_;
  std::vector<TileWork> tiles_;
  std::vector<Unit> units_;
  int64_t work_ = 0;
  bool is_split_ = false;
  float* parts_ = nullptr;
};

}  // namespace

const AttentionKernels& attention_kernels(Element element, Isa isa) {
#if defined(EXPERTFLEET_X86)
  const bool has_products = isa >= Isa::avx512_bf16 && element == Element::bfloat16;
  if (has_products) return avx512_bf16_attention_kernels();
  if (isa >= Isa::avx512) return avx512_attention_kernels(element);
  if (isa >= Isa::avx2) return avx2_attention_kernels(element);
#endif
  return portable_attention_kernels(element);
}

}  // namespace expertfleet

extern "C" {
#pragma GCC visibility push(default)
void ef_attend(const ef_attention_step* step, const void* qkv, const void* keys, const void* values,
               void* output) {
  expertfleet::StepAttention(*step, qkv, keys, values, output).run();
}

// e^x in place as attention computes it, for tests; all x <= 0.
void ef_attention_exponentials(float* values, int64_t count) {
  using namespace expertfleet;
  attention_kernels(Element::float32, active_isa()).exponentials(values, count);
}
#pragma GCC visibility pop
}
