// Attention over a paged KV cache: the seam between what is attended to (attention.cpp) and the
// arithmetic of one block of keys (attention_kernel.h, one copy per instruction set).
//
// Keys are taken in blocks of kBlockKeys and splits of kSplitKeys that begin at multiples of these
// in the sequence. A query goes through the blocks of a split with an online softmax (Milakov and
// Gimelshein 2018) in float32, and the splits are merged in ascending order (Dao et al. 2023),
// whether they were computed one after the other or by several threads. A key that a query does not
// see counts exactly nothing (as long as what lies there is finite), so a query's bits depend on
// its own keys and values alone.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"

namespace expertfleet {

constexpr int64_t kBlockKeys = 32;
constexpr int64_t kSplitKeys = 512;
constexpr int64_t kMaxHeadDim = 256;
// Rows that one tile may have at most, unless a single query has more.
constexpr int64_t kTileRows = 64;

enum class Element : int32_t { float32 = 0, bfloat16 = 1 };

// Adjacent queries of one sequence, times the heads that share a key-value head: row r is query
// r / group, head r % group of the group.
struct Tile {
  int64_t num_queries;
  int64_t group;
  int64_t head_dim;
  int64_t first_position;
  // Keys that a query sees, itself included.
  int64_t window;
  float scale;

  int64_t num_rows() const { return num_queries * group; }
  int64_t position(int64_t row) const { return first_position + row / group; }
};

// What a tile's rows have gathered: the largest score, lanes of the sum of exponentials [rows, 16],
// and the weighted sum of values [rows, padded head_dim].
struct Gathered {
  float* largest;
  float* sums;
  float* values;
};

// 32 keys of one sequence, of which `offsets` says where they lie: in elements from `keys` and
// `values`, or -1 for a place that holds nothing of this sequence.
struct KeyBlock {
  const void* keys;
  const void* values;
  const int64_t* offsets;
  int64_t first_position;
};

struct AttentionKernels {
  int64_t (*padded_head_dim)(int64_t head_dim);
  size_t (*packed_query_bytes)(int64_t num_rows, int64_t head_dim);
  // `queries` is the first row; a query's heads are adjacent, queries are `stride` elements apart.
  void (*pack_queries)(const Tile& tile, const void* queries, int64_t stride, void* packed);
  void (*clear)(const Tile& tile, Gathered gathered);
  void (*attend)(const Tile& tile, const void* packed_queries, const KeyBlock& block, void* scratch,
                 Gathered gathered);
  void (*merge)(const Tile& tile, Gathered part, Gathered total);
  // Writes the rows, laid out as those of `pack_queries`.
  void (*finish)(const Tile& tile, Gathered total, void* output, int64_t stride);
  // In place, for tests: the e^x that weigh the values; all x <= 0.
  void (*exponentials)(float* values, int64_t count);
};

// Bytes of the scratch that `attend` needs, 64-byte aligned.
constexpr size_t kAttendScratchBytes = 3 * kBlockKeys * kMaxHeadDim * sizeof(float);

const AttentionKernels& attention_kernels(Element element, Isa isa);

// Defined by one file each.
const AttentionKernels& portable_attention_kernels(Element element);
const AttentionKernels& avx2_attention_kernels(Element element);
const AttentionKernels& avx512_attention_kernels(Element element);
const AttentionKernels& avx512_bf16_attention_kernels();

}  // namespace expertfleet
