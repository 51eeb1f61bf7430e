// int8 and int4 weights by vpdpbusd: four products of an unsigned and a signed byte, added to a
// 32-bit sum without saturation.
#include "quantized.h"

#include <immintrin.h>

namespace expertfleet {
namespace {

// Sums have this type instead of __m512i, whose elements are 64 bits wide: gcc 12 would keep each of
// them twice, as either type, and run out of registers.
using Sums [[gnu::vector_size(64)]] = int32_t;

constexpr int kMaxRows = 8;
// Panels are taken in blocks that stay in the first-level cache while all rows pass.
constexpr int64_t kInt8BlockGroups = 8;
constexpr int64_t kInt4BlockGroups = 8;

__m512 load_activations(const void* row, Activation type, int64_t index, __mmask16 mask) {
  if (type == Activation::float32) {
    return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(row) + index);
  }
  const __m256i bits = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(row) + index);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

void prepare(const void* row, Activation type, int64_t inputs, void* prepared) {
  const QuantizedRow parts = quantized_row(prepared, 0, inputs);
  auto* values = const_cast<int8_t*>(parts.values);
  auto* scales = const_cast<float*>(parts.scales);
  auto* sums = const_cast<int32_t*>(parts.sums);
  constexpr int kParts = kGroup / 16;
  const __m512i magnitude_bits = _mm512_set1_epi32(0x7fffffff);
  for (int64_t group = 0; group < num_groups(inputs); ++group) {
    __m512 x[kParts];
    __m512i most = _mm512_setzero_si512();
    for (int p = 0; p < kParts; ++p) {
      const int64_t first = group * kGroup + p * 16, left = inputs - first;
      const auto mask = static_cast<__mmask16>(left >= 16 ? 0xffff : left > 0 ? (1 << left) - 1 : 0);
      x[p] = load_activations(row, type, first, mask);
      most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_castps_si512(x[p]), magnitude_bits));
    }
    const GroupScale scale = group_scale(static_cast<uint32_t>(_mm512_reduce_max_epi32(most)));
    __m512i sum = _mm512_setzero_si512();
    for (int p = 0; p < kParts; ++p) {
      __m512i q = _mm512_setzero_si512();
      if (scale.inverse > 0) {
        q = _mm512_cvtps_epi32(_mm512_mul_ps(x[p], _mm512_set1_ps(scale.inverse)));
      }
      sum = _mm512_add_epi32(sum, q);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(values + group * kGroup + p * 16),
                       _mm512_cvtepi32_epi8(q));
    }
    scales[group] = scale.scale;
    sums[group] = _mm512_reduce_add_epi32(sum);
  }
}

// Four bytes of activations in every lane.
__m512i broadcast(const int8_t* values) {
  int32_t four;
  __builtin_memcpy(&four, values, 4);
  return _mm512_set1_epi32(four);
}

__m512 load_bfloat16(const uint16_t* values) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

Sums add_products(Sums sums, __m512i weights, __m512i x) {
  return reinterpret_cast<Sums>(
      _mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sums), weights, x));
}

void add_scaled(Sums product, __m512 scale, float* total) {
  const __m512 factor = _mm512_cvtepi32_ps(reinterpret_cast<__m512i>(product));
  _mm512_storeu_ps(total, _mm512_fmadd_ps(factor, scale, _mm512_loadu_ps(total)));
}

// The two below: out [R, kPanel] += the product over the groups first to last, the scales of int8
// outputs not applied. `weights` is the whole panel. Loops over rows are kept so small that the
// compiler unrolls them before it decides what lives in registers.
template <int R>
[[gnu::noinline]] void add_int8(const uint8_t* weights, const QuantizedRow* rows, int64_t first, int64_t last,
              float* out) {
  for (int64_t group = first; group < last; ++group) {
    Sums low[R], high[R];
    for (int r = 0; r < R; ++r) {
      low[r] = high[r] = Sums{} - kInt8Offset * rows[r].sums[group];
    }
    const uint8_t* step = weights + group * kGroup * kPanel;
    for (int64_t k = group * kGroup; k < (group + 1) * kGroup; k += 4, step += 4 * kPanel) {
      const __m512i w0 = _mm512_load_si512(step), w1 = _mm512_load_si512(step + 64);
      for (int r = 0; r < R; ++r) {
        const __m512i x = broadcast(rows[r].values + k);
        low[r] = add_products(low[r], w0, x);
        high[r] = add_products(high[r], w1, x);
      }
    }
    for (int r = 0; r < R; ++r) {
      add_scaled(low[r], _mm512_set1_ps(rows[r].scales[group]), out + r * kPanel);
    }
    for (int r = 0; r < R; ++r) {
      add_scaled(high[r], _mm512_set1_ps(rows[r].scales[group]), out + r * kPanel + 16);
    }
  }
}

template <int R>
[[gnu::noinline]] void add_int4(const uint8_t* weights, const uint16_t* scales, const QuantizedRow* rows,
              int64_t first, int64_t last, float* out) {
  const __m512i half = _mm512_set1_epi8(15);
  for (int64_t group = first; group < last; ++group) {
    Sums low[R], high[R];
    for (int r = 0; r < R; ++r) {
      low[r] = high[r] = Sums{} - kInt4Offset * rows[r].sums[group];
    }
    const uint8_t* step = weights + group * kGroup / 2 * kPanel;
    for (int64_t k = group * kGroup; k < (group + 1) * kGroup; k += 8, step += 4 * kPanel) {
      const __m512i w0 = _mm512_load_si512(step), w1 = _mm512_load_si512(step + 64);
      const __m512i w00 = _mm512_and_si512(w0, half), w10 = _mm512_and_si512(w1, half);
      for (int r = 0; r < R; ++r) {
        const __m512i x = broadcast(rows[r].values + k);
        low[r] = add_products(low[r], w00, x);
        high[r] = add_products(high[r], w10, x);
      }
      const __m512i w01 = _mm512_and_si512(_mm512_srli_epi16(w0, 4), half);
      const __m512i w11 = _mm512_and_si512(_mm512_srli_epi16(w1, 4), half);
      for (int r = 0; r < R; ++r) {
        const __m512i x = broadcast(rows[r].values + k + 4);
        low[r] = add_products(low[r], w01, x);
        high[r] = add_products(high[r], w11, x);
      }
    }
    const __m512 scale0 = load_bfloat16(scales + group * kPanel);
    const __m512 scale1 = load_bfloat16(scales + group * kPanel + 16);
    for (int r = 0; r < R; ++r) {
      const __m512 scale = _mm512_set1_ps(rows[r].scales[group]);
      add_scaled(low[r], _mm512_mul_ps(scale0, scale), out + r * kPanel);
    }
    for (int r = 0; r < R; ++r) {
      const __m512 scale = _mm512_set1_ps(rows[r].scales[group]);
      add_scaled(high[r], _mm512_mul_ps(scale1, scale), out + r * kPanel + 16);
    }
  }
}

// body with the count as a constant.
template <int R = kMaxRows, typename Body>
void with_count(int count, const Body& body) {
  if constexpr (R > 1) {
    if (count < R) return with_count<R - 1>(count, body);
  }
  body.template operator()<R>();
}

// add(rows, first row, first group, last group), its rows as a constant, until all is done; `out`
// begins as zero.
template <typename Add>
void for_each_tile(const Matrix& matrix, const void* prepared, int64_t count, int64_t block_groups,
                   float* out, const Add& add) {
  __builtin_memset(out, 0, static_cast<size_t>(count * kPanel) * sizeof(float));
  const int64_t groups = num_groups(matrix.inputs);
  const int64_t num_tiles = (count + kMaxRows - 1) / kMaxRows;
  if (num_tiles <= 1) block_groups = groups;
  for (int64_t first = 0; first < groups; first += block_groups) {
    const int64_t last = first + block_groups < groups ? first + block_groups : groups;
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
      const int64_t begin = count * tile / num_tiles, end = count * (tile + 1) / num_tiles;
      QuantizedRow rows[kMaxRows];
      for (int64_t r = begin; r < end; ++r) {
        rows[r - begin] = quantized_row(prepared, r, matrix.inputs);
      }
      with_count(static_cast<int>(end - begin),
                 [&]<int R>() { add.template operator()<R>(rows, begin, first, last); });
    }
  }
}

void multiply_int8(const Matrix& matrix, int64_t panel, const void* prepared, int64_t count,
                   float* out) {
  const uint8_t* weights = int8_panel(matrix, panel);
  for_each_tile(matrix, prepared, count, kInt8BlockGroups, out,
                [=]<int R>(const QuantizedRow* rows, int64_t begin, int64_t first, int64_t last) {
                  add_int8<R>(weights, rows, first, last, out + begin * kPanel);
                });
  const float* scales = int8_panel_scales(matrix, panel);
  const __m512 scale0 = _mm512_loadu_ps(scales), scale1 = _mm512_loadu_ps(scales + 16);
  for (float* row = out; row < out + count * kPanel; row += kPanel) {
    _mm512_storeu_ps(row, _mm512_mul_ps(_mm512_loadu_ps(row), scale0));
    _mm512_storeu_ps(row + 16, _mm512_mul_ps(_mm512_loadu_ps(row + 16), scale1));
  }
}

void multiply_int4(const Matrix& matrix, int64_t panel, const void* prepared, int64_t count,
                   float* out) {
  const uint8_t* weights = int4_panel(matrix, panel);
  const uint16_t* scales = int4_panel_scales(matrix, panel);
  for_each_tile(matrix, prepared, count, kInt4BlockGroups, out,
                [=]<int R>(const QuantizedRow* rows, int64_t begin, int64_t first, int64_t last) {
                  add_int4<R>(weights, scales, rows, first, last, out + begin * kPanel);
                });
}

}  // namespace

const FormatKernels& quantized_kernels_avx512_vnni(Format format) {
  static const FormatKernels int8{int8_packed_bytes, quantized_prepared_bytes, prepare,
                                  multiply_int8};
  static const FormatKernels int4{int4_packed_bytes, quantized_prepared_bytes, prepare,
                                  multiply_int4};
  return format == Format::int8 ? int8 : int4;
}

}  // namespace expertfleet
