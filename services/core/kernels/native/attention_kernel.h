// The arithmetic of attention.h, written once over Lanes. `Dot` says how scores and weighted sums
// are formed; FloatDot works on float32 copies of the keys and values.
#pragma once

#include "attention.h"
#include "lanes.h"

namespace expertfleet {
namespace {

// Stands for "no score yet"; not infinity, so that a difference of two of them is 0.
constexpr float kNoScore = -3.0e38f;
constexpr int64_t kVectors = kBlockKeys / kLanes;

#if defined(__AVX512F__)
constexpr int kRowsAtOnce = 4;
constexpr int kColumnsAtOnce = 4;
#else
constexpr int kRowsAtOnce = 2;
constexpr int kColumnsAtOnce = 2;
#endif

inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// A row of a block, `stride` elements apart, or zeros where the block has nothing.
template <class T>
inline const T* row_or_zeros(const void* base, int64_t offset) {
  alignas(64) static const T zeros[kMaxHeadDim] = {};
  return offset < 0 ? zeros : static_cast<const T*>(base) + offset;
}

template <class T>
inline Lanes load_columns(const T* row, int64_t column, int64_t head_dim) {
  if (column + kLanes <= head_dim) return load_row(row + column);
  return load_some(row + column, head_dim - column);
}

// T is float or uint16_t (bf16), both converted to float32.
template <class T>
struct FloatDot {
  using Packed = float;
  static constexpr int64_t kColumnUnit = kLanes;
  // What a query's dot product takes step by step.
  static int64_t steps(int64_t head_dim) { return head_dim; }

  static Packed packed(const T* row, int64_t step) {
    if constexpr (sizeof(T) == 2) return from_bf16(row[step]);
    else return row[step];
  }

  // packed[d][key]
  static void pack_keys(const KeyBlock& block, int64_t head_dim, float* packed) {
    for (int64_t vector = 0; vector < kVectors; ++vector) {
      for (int64_t column = 0; column < head_dim; column += kLanes) {
        Lanes square[kLanes];
        for (int64_t key = 0; key < kLanes; ++key) {
          const T* row = row_or_zeros<T>(block.keys, block.offsets[vector * kLanes + key]);
          square[key] = load_columns(row, column, head_dim);
        }
        transpose(square);
        for (int64_t i = 0; i < kLanes; ++i) {
          store(packed + (column + i) * kBlockKeys + vector * kLanes, square[i]);
        }
      }
    }
  }

  // packed[key][padded d]
  static void pack_values(const KeyBlock& block, int64_t head_dim, int64_t padded, float* packed) {
    for (int64_t key = 0; key < kBlockKeys; ++key) {
      const T* row = row_or_zeros<T>(block.values, block.offsets[key]);
      for (int64_t column = 0; column < padded; column += kLanes) {
        store(packed + key * padded + column, load_columns(row, column, head_dim));
      }
    }
  }

  // scores[row][vector] = query row times each key
  template <int R>
  static void scores(const float* queries, const float* keys, int64_t num_steps,
                     Lanes result[R][kVectors]) {
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < kVectors; ++v) result[r][v] = broadcast(0.0f);
    }
    for (int64_t step = 0; step < num_steps; ++step) {
      Lanes key[kVectors];
      for (int v = 0; v < kVectors; ++v) key[v] = load(keys + step * kBlockKeys + v * kLanes);
      for (int r = 0; r < R; ++r) {
        const Lanes query = broadcast(queries[step * R + r]);
        for (int v = 0; v < kVectors; ++v) result[r][v] = fma(query, key[v], result[r][v]);
      }
    }
  }

  struct Weights {
    alignas(64) float rows[kRowsAtOnce][kBlockKeys];
    void set(int row, const Lanes weights[kVectors]) {
      for (int v = 0; v < kVectors; ++v) store(rows[row] + v * kLanes, weights[v]);
    }
  };

  // sums[row][column] += weights of the row times the values
  template <int R, int C>
  static void add_values(const Weights& weights, const float* values, int64_t padded,
                         Lanes sums[R][C]) {
    for (int64_t key = 0; key < kBlockKeys; ++key) {
      Lanes value[C];
      for (int c = 0; c < C; ++c) value[c] = load(values + key * padded + c * kLanes);
      for (int r = 0; r < R; ++r) {
        const Lanes weight = broadcast(weights.rows[r][key]);
        for (int c = 0; c < C; ++c) sums[r][c] = fma(weight, value[c], sums[r][c]);
      }
    }
  }
};

template <class T, class Dot>
struct AttentionKernel {
  using Packed = typename Dot::Packed;

  static int64_t padded_head_dim(int64_t head_dim) { return round_up(head_dim, Dot::kColumnUnit); }

  static size_t packed_query_bytes(int64_t num_rows, int64_t head_dim) {
    return static_cast<size_t>(num_rows * Dot::steps(head_dim)) * sizeof(Packed);
  }

  // In bundles of kRowsAtOnce rows (the last may have fewer): packed[step][row of the bundle].
  static void pack_queries(const Tile& tile, const void* queries, int64_t stride, void* packed) {
    const int64_t num_rows = tile.num_rows(), num_steps = Dot::steps(tile.head_dim);
    Packed* target = static_cast<Packed*>(packed);
    for (int64_t first = 0; first < num_rows; first += kRowsAtOnce) {
      const int64_t count = bundle(first, num_rows);
      for (int64_t r = 0; r < count; ++r) {
        const T* row = row_of(tile, static_cast<const T*>(queries), stride, first + r);
        for (int64_t step = 0; step < num_steps; ++step) {
          target[step * count + r] = Dot::packed(row, step);
        }
      }
      target += count * num_steps;
    }
  }

  static void clear(const Tile& tile, Gathered gathered) {
    const int64_t num_rows = tile.num_rows(), padded = padded_head_dim(tile.head_dim);
    for (int64_t row = 0; row < num_rows; ++row) gathered.largest[row] = kNoScore;
    std::memset(gathered.sums, 0, static_cast<size_t>(num_rows * kLanes) * sizeof(float));
    std::memset(gathered.values, 0, static_cast<size_t>(num_rows * padded) * sizeof(float));
  }

  static void attend(const Tile& tile, const void* packed_queries, const KeyBlock& block,
                     void* scratch, Gathered gathered) {
    const int64_t padded = padded_head_dim(tile.head_dim), num_rows = tile.num_rows();
    Packed* keys = static_cast<Packed*>(scratch);
    Packed* values = keys + kBlockKeys * round_up(Dot::steps(tile.head_dim), kLanes);
    Dot::pack_keys(block, tile.head_dim, keys);
    Dot::pack_values(block, tile.head_dim, padded, values);
    const Packed* queries = static_cast<const Packed*>(packed_queries);
    for (int64_t first = 0; first < num_rows; first += kRowsAtOnce) {
      const int64_t count = bundle(first, num_rows);
      const Gathered rows{gathered.largest + first, gathered.sums + first * kLanes,
                          gathered.values + first * padded};
      if (count == kRowsAtOnce) {
        attend_rows<kRowsAtOnce>(tile, first, queries, block, keys, values, rows);
      } else if (count == 3) {
        attend_rows<3>(tile, first, queries, block, keys, values, rows);
      } else if (count == 2) {
        attend_rows<2>(tile, first, queries, block, keys, values, rows);
      } else {
        attend_rows<1>(tile, first, queries, block, keys, values, rows);
      }
      queries += count * Dot::steps(tile.head_dim);
    }
  }

  static void merge(const Tile& tile, Gathered part, Gathered total) {
    const int64_t num_rows = tile.num_rows(), padded = padded_head_dim(tile.head_dim);
    for (int64_t row = 0; row < num_rows; ++row) {
      const float largest = greater(part.largest[row], total.largest[row]);
      const Lanes before = exp_nonpositive(broadcast(total.largest[row] - largest));
      const Lanes now = exp_nonpositive(broadcast(part.largest[row] - largest));
      total.largest[row] = largest;
      add_scaled(part.sums + row * kLanes, now, total.sums + row * kLanes, before, kLanes);
      add_scaled(part.values + row * padded, now, total.values + row * padded, before, padded);
    }
  }

  static void finish(const Tile& tile, Gathered total, void* output, int64_t stride) {
    const int64_t padded = padded_head_dim(tile.head_dim);
    for (int64_t row = 0; row < tile.num_rows(); ++row) {
      const Lanes share = broadcast(1.0f / sum(load(total.sums + row * kLanes)));
      T* target = const_cast<T*>(row_of(tile, static_cast<const T*>(output), stride, row));
      for (int64_t column = 0; column < tile.head_dim; column += kLanes) {
        const Lanes value = mul(load(total.values + row * padded + column), share);
        T rounded[kLanes];
        store_row(rounded, value);
        const int64_t left = tile.head_dim - column;
        const int64_t count = left < kLanes ? left : kLanes;
        std::memcpy(target + column, rounded, static_cast<size_t>(count) * sizeof(T));
      }
    }
  }

  static void exponentials(float* values, int64_t count) {
    for (int64_t i = 0; i < count; ++i) values[i] = exp_nonpositive(values[i]);
  }

  static constexpr AttentionKernels table() {
    return {padded_head_dim, packed_query_bytes, pack_queries, clear, attend, merge, finish,
            exponentials};
  }

 private:
  static int64_t bundle(int64_t first, int64_t num_rows) {
    return num_rows - first < kRowsAtOnce ? num_rows - first : kRowsAtOnce;
  }

  static const T* row_of(const Tile& tile, const T* base, int64_t stride, int64_t row) {
    return base + row / tile.group * stride + row % tile.group * tile.head_dim;
  }

  // The second if one is NaN; what is not finite then shows in the exponentials.
  static float greater(float a, float b) { return a > b ? a : b; }

  static void add_scaled(const float* part, Lanes now, float* total, Lanes before, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes) {
      store(total + i, fma(load(total + i), before, mul(load(part + i), now)));
    }
  }

  // Bit k is set if a query at `position` sees the key at first_key + k.
  static uint32_t visible_keys(int64_t first_key, int64_t position, int64_t window) {
    int64_t begin = position - window + 1 - first_key, end = position + 1 - first_key;
    begin = begin < 0 ? 0 : begin;
    end = end > kBlockKeys ? kBlockKeys : end;
    if (begin >= end) return 0;
    return static_cast<uint32_t>((uint64_t{1} << end) - (uint64_t{1} << begin));
  }

  template <int R>
  static void attend_rows(const Tile& tile, int64_t first_row, const Packed* queries,
                          const KeyBlock& block, const Packed* keys, const Packed* values,
                          Gathered rows) {
    Lanes scores[R][kVectors];
    Dot::template scores<R>(queries, keys, Dot::steps(tile.head_dim), scores);
    typename Dot::Weights weights;
    Lanes shrink[R];
    const Lanes hidden = broadcast(-__builtin_inff()), scale = broadcast(tile.scale);
    for (int r = 0; r < R; ++r) {
      const uint32_t visible =
          visible_keys(block.first_position, tile.position(first_row + r), tile.window);
      Lanes best = broadcast(rows.largest[r]);
      for (int v = 0; v < kVectors; ++v) {
        scores[r][v] = select(visible >> (v * kLanes), mul(scores[r][v], scale), hidden);
        best = max(scores[r][v], best);
      }
      const float largest = expertfleet::largest(best);
      Lanes sums = broadcast(0.0f);
      for (int v = 0; v < kVectors; ++v) {
        scores[r][v] = exp_nonpositive(sub(scores[r][v], broadcast(largest)));
        sums = add(sums, scores[r][v]);
      }
      weights.set(r, scores[r]);
      shrink[r] = exp_nonpositive(broadcast(rows.largest[r] - largest));
      rows.largest[r] = largest;
      store(rows.sums + r * kLanes, fma(load(rows.sums + r * kLanes), shrink[r], sums));
    }
    const int64_t padded = padded_head_dim(tile.head_dim);
    int64_t column = 0;
    for (; column + kColumnsAtOnce * kLanes <= padded; column += kColumnsAtOnce * kLanes) {
      add_columns<R, kColumnsAtOnce>(weights, values, column, padded, shrink, rows);
    }
    for (; column < padded; column += kLanes) {
      add_columns<R, 1>(weights, values, column, padded, shrink, rows);
    }
  }

  template <int R, int C>
  static void add_columns(const typename Dot::Weights& weights, const Packed* values,
                          int64_t column, int64_t padded, const Lanes shrink[R], Gathered rows) {
    Lanes sums[R][C];
    for (int r = 0; r < R; ++r) {
      for (int c = 0; c < C; ++c) {
        sums[r][c] = mul(load(rows.values + r * padded + column + c * kLanes), shrink[r]);
      }
    }
    Dot::template add_values<R, C>(weights, values + column, padded, sums);
    for (int r = 0; r < R; ++r) {
      for (int c = 0; c < C; ++c) {
        store(rows.values + r * padded + column + c * kLanes, sums[r][c]);
      }
    }
  }
};

template <class T>
inline const AttentionKernels& float_attention_kernels() {
  static constexpr AttentionKernels kernels = AttentionKernel<T, FloatDot<T>>::table();
  return kernels;
}

}  // namespace
}  // namespace expertfleet
