// bf16 products as the processor makes them, two at a time; exponentials are rounded to bf16 before
// they weigh the values, as Hugging Face rounds the softmax. Sums are float32.
#include "attention_kernel.h"

namespace expertfleet {
namespace {

struct PairDot {
  using Packed = uint32_t;
  static constexpr int64_t kColumnUnit = 2 * kLanes;
  static int64_t steps(int64_t head_dim) { return head_dim / 2; }

  static Packed packed(const uint16_t* row, int64_t step) {
    Packed pair;
    std::memcpy(&pair, row + 2 * step, sizeof pair);
    return pair;
  }

  static __m512i load_pairs(const uint16_t* row, int64_t column, int64_t head_dim) {
    const int64_t left = head_dim - column;
    if (left >= 2 * kLanes) return _mm512_loadu_si512(row + column);
    return _mm512_maskz_loadu_epi16((__mmask32{1} << left) - 1, row + column);
  }

  // packed[pair of d][key]
  static void pack_keys(const KeyBlock& block, int64_t head_dim, Packed* packed) {
    for (int64_t vector = 0; vector < kVectors; ++vector) {
      for (int64_t column = 0; column < head_dim; column += 2 * kLanes) {
        Lanes square[kLanes];
        for (int64_t key = 0; key < kLanes; ++key) {
          const int64_t offset = block.offsets[vector * kLanes + key];
          const uint16_t* row = row_or_zeros<uint16_t>(block.keys, offset);
          square[key].v = _mm512_castsi512_ps(load_pairs(row, column, head_dim));
        }
        transpose(square);
        for (int64_t i = 0; i < kLanes; ++i) {
          Packed* target = packed + (column / 2 + i) * kBlockKeys + vector * kLanes;
          _mm512_storeu_ps(target, square[i].v);
        }
      }
    }
  }

  // packed[pair of keys][padded d], each the values of two keys
  static void pack_values(const KeyBlock& block, int64_t head_dim, int64_t padded,
                          Packed* packed) {
    alignas(64) static const uint16_t kLower[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                    37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                    11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i lower = _mm512_load_si512(kLower);
    const __m512i upper = _mm512_add_epi16(lower, _mm512_set1_epi16(16));
    for (int64_t key = 0; key < kBlockKeys; key += 2) {
      const uint16_t* even = row_or_zeros<uint16_t>(block.values, block.offsets[key]);
      const uint16_t* odd = row_or_zeros<uint16_t>(block.values, block.offsets[key + 1]);
      for (int64_t column = 0; column < padded; column += 2 * kLanes) {
        const __m512i a = load_pairs(even, column, head_dim), b = load_pairs(odd, column, head_dim);
        Packed* target = packed + key / 2 * padded + column;
        _mm512_storeu_si512(target, _mm512_permutex2var_epi16(a, lower, b));
        _mm512_storeu_si512(target + kLanes, _mm512_permutex2var_epi16(a, upper, b));
      }
    }
  }

  static __m512bh pair_broadcast(Packed pair) {
    return (__m512bh)_mm512_set1_epi32(static_cast<int>(pair));
  }
  static __m512bh pair_load(const Packed* pairs) { return (__m512bh)_mm512_loadu_si512(pairs); }

  template <int R>
  static void scores(const Packed* queries, const Packed* keys, int64_t num_steps,
                     Lanes result[R][kVectors]) {
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < kVectors; ++v) result[r][v] = broadcast(0.0f);
    }
    for (int64_t step = 0; step < num_steps; ++step) {
      __m512bh key[kVectors];
      for (int v = 0; v < kVectors; ++v) key[v] = pair_load(keys + step * kBlockKeys + v * kLanes);
      for (int r = 0; r < R; ++r) {
        const __m512bh query = pair_broadcast(queries[step * R + r]);
        for (int v = 0; v < kVectors; ++v) {
          result[r][v].v = _mm512_dpbf16_ps(result[r][v].v, key[v], query);
        }
      }
    }
  }

  struct Weights {
    alignas(64) Packed rows[kRowsAtOnce][kBlockKeys / 2];
    void set(int row, const Lanes weights[kVectors]) {
      static_assert(kVectors == 2);
      const __m512bh rounded = _mm512_cvtne2ps_pbh(weights[1].v, weights[0].v);
      _mm512_store_si512(rows[row], (__m512i)rounded);
    }
  };

  template <int R, int C>
  static void add_values(const Weights& weights, const Packed* values, int64_t padded,
                         Lanes sums[R][C]) {
    for (int64_t pair = 0; pair < kBlockKeys / 2; ++pair) {
      __m512bh value[C];
      for (int c = 0; c < C; ++c) value[c] = pair_load(values + pair * padded + c * kLanes);
      for (int r = 0; r < R; ++r) {
        const __m512bh weight = pair_broadcast(weights.rows[r][pair]);
        for (int c = 0; c < C; ++c) {
          sums[r][c].v = _mm512_dpbf16_ps(sums[r][c].v, value[c], weight);
        }
      }
    }
  }
};

}  // namespace

const AttentionKernels& avx512_bf16_attention_kernels() {
  static constexpr AttentionKernels kernels = AttentionKernel<uint16_t, PairDot>::table();
  return kernels;
}

}  // namespace expertfleet
