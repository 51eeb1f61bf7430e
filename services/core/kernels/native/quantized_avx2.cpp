// int8 and int4 weights without VNNI: products of bytes in pairs of 16 bits, which hold them.
#include "quantized.h"

#include <immintrin.h>

namespace expertfleet {
namespace {

constexpr int kVectors = kPanel / 8;

__m256 load_activations(const void* row, Activation type, int64_t index) {
  if (type == Activation::float32) return _mm256_loadu_ps(static_cast<const float*>(row) + index);
  const __m128i bits =
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(row) + index));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

// x [kGroup], padded with zeros.
void load_group(const void* row, Activation type, int64_t inputs, int64_t first, float* x) {
  if (first + kGroup <= inputs) {
    for (int64_t k = 0; k < kGroup; k += 8) {
      _mm256_storeu_ps(x + k, load_activations(row, type, first + k));
    }
    return;
  }
  for (int64_t k = 0; k < kGroup; ++k) {
    uint32_t bits = 0;
    if (first + k < inputs) {
      bits = type == Activation::float32
                 ? static_cast<const uint32_t*>(row)[first + k]
                 : static_cast<uint32_t>(static_cast<const uint16_t*>(row)[first + k]) << 16;
    }
    __builtin_memcpy(x + k, &bits, 4);
  }
}

int32_t largest(__m256i v) {
  __m128i most = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(most, _mm_shuffle_epi32(most, 0xb1)));
}

void prepare(const void* row, Activation type, int64_t inputs, void* prepared) {
  const QuantizedRow parts = quantized_row(prepared, 0, inputs);
  auto* values = const_cast<int8_t*>(parts.values);
  auto* scales = const_cast<float*>(parts.scales);
  auto* sums = const_cast<int32_t*>(parts.sums);
  const __m256i magnitude_bits = _mm256_set1_epi32(0x7fffffff);
  for (int64_t group = 0; group < num_groups(inputs); ++group) {
    alignas(32) float x[kGroup];
    load_group(row, type, inputs, group * kGroup, x);
    __m256i most = _mm256_setzero_si256();
    for (int64_t k = 0; k < kGroup; k += 8) {
      const __m256i bits = _mm256_load_si256(reinterpret_cast<const __m256i*>(x + k));
      most = _mm256_max_epi32(most, _mm256_and_si256(bits, magnitude_bits));
    }
    const GroupScale scale = group_scale(static_cast<uint32_t>(largest(most)));
    const __m256 inverse = _mm256_set1_ps(scale.inverse);
    int32_t sum = 0;
    for (int64_t k = 0; k < kGroup; k += 8) {
      alignas(32) int32_t q[8] = {};
      if (scale.inverse > 0) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(q),
                           _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(x + k), inverse)));
      }
      for (int i = 0; i < 8; ++i) {
        values[group * kGroup + k + i] = static_cast<int8_t>(q[i]);
        sum += q[i];
      }
    }
    scales[group] = scale.scale;
    sums[group] = sum;
  }
}

// Four bytes of activations in every lane.
__m256i broadcast(const int8_t* values) {
  int32_t four;
  __builtin_memcpy(&four, values, 4);
  return _mm256_set1_epi32(four);
}

// |w| x sign(x, w) in pairs is at most 2 * 128 * 127, which 16 bits hold; a weight of -128 has the
// magnitude 128 as an unsigned byte.
__m256i int8_products(__m256i weights, __m256i x) {
  const __m256i pairs =
      _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(x, weights));
  return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

void multiply_int8(const Matrix& matrix, int64_t panel, const void* prepared, int64_t count,
                   float* out) {
  const uint8_t* weights = int8_panel(matrix, panel);
  const float* scales = int8_panel_scales(matrix, panel);
  const __m256i offset = _mm256_set1_epi8(static_cast<char>(kInt8Offset));
  for (int64_t r = 0; r < count; ++r) {
    const QuantizedRow row = quantized_row(prepared, r, matrix.inputs);
    __m256 totals[kVectors];
    for (auto& total : totals) total = _mm256_setzero_ps();
    for (int64_t group = 0; group < num_groups(matrix.inputs); ++group) {
      __m256i sums[kVectors];
      for (auto& sum : sums) sum = _mm256_setzero_si256();
      for (int64_t k = group * kGroup; k < (group + 1) * kGroup; k += 4) {
        const __m256i x = broadcast(row.values + k);
        const auto* step = reinterpret_cast<const __m256i*>(weights + k * kPanel);
        for (int v = 0; v < kVectors; ++v) {
          const __m256i w = _mm256_xor_si256(_mm256_load_si256(step + v), offset);
          sums[v] = _mm256_add_epi32(sums[v], int8_products(w, x));
        }
      }
      const __m256 scale = _mm256_set1_ps(row.scales[group]);
      for (int v = 0; v < kVectors; ++v) {
        totals[v] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[v]), scale, totals[v]);
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      _mm256_storeu_ps(out + r * kPanel + 8 * v,
                       _mm256_mul_ps(totals[v], _mm256_loadu_ps(scales + 8 * v)));
    }
  }
}

void multiply_int4(const Matrix& matrix, int64_t panel, const void* prepared, int64_t count,
                   float* out) {
  const uint8_t* weights = int4_panel(matrix, panel);
  const uint16_t* scales = int4_panel_scales(matrix, panel);
  const __m256i low_half = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  for (int64_t r = 0; r < count; ++r) {
    const QuantizedRow row = quantized_row(prepared, r, matrix.inputs);
    __m256 totals[kVectors];
    for (auto& total : totals) total = _mm256_setzero_ps();
    for (int64_t group = 0; group < num_groups(matrix.inputs); ++group) {
      __m256i sums[kVectors];
      for (auto& sum : sums) sum = _mm256_set1_epi32(-kInt4Offset * row.sums[group]);
      for (int64_t k = group * kGroup; k < (group + 1) * kGroup; k += 8) {
        const __m256i x = broadcast(row.values + k), next = broadcast(row.values + k + 4);
        const auto* step = reinterpret_cast<const __m256i*>(weights + k / 2 * kPanel);
        for (int v = 0; v < kVectors; ++v) {
          const __m256i w = _mm256_load_si256(step + v);
          const __m256i low = _mm256_and_si256(w, low_half);
          const __m256i high = _mm256_and_si256(_mm256_srli_epi16(w, 4), low_half);
          const __m256i pairs =
              _mm256_add_epi16(_mm256_maddubs_epi16(low, x), _mm256_maddubs_epi16(high, next));
          sums[v] = _mm256_add_epi32(sums[v], _mm256_madd_epi16(pairs, ones));
        }
      }
      const __m256 scale = _mm256_set1_ps(row.scales[group]);
      for (int v = 0; v < kVectors; ++v) {
        const auto* bits = reinterpret_cast<const __m128i*>(scales + group * kPanel + 8 * v);
        const __m256 output_scale = _mm256_castsi256_ps(
            _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(bits)), 16));
        totals[v] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[v]),
                                    _mm256_mul_ps(output_scale, scale), totals[v]);
      }
    }
    for (int v = 0; v < kVectors; ++v) _mm256_storeu_ps(out + r * kPanel + 8 * v, totals[v]);
  }
}

}  // namespace

const FormatKernels& quantized_kernels_avx2(Format format) {
  static const FormatKernels int8{int8_packed_bytes, quantized_prepared_bytes, prepare,
                                  multiply_int8};
  static const FormatKernels int4{int4_packed_bytes, quantized_prepared_bytes, prepare,
                                  multiply_int4};
  return format == Format::int8 ? int8 : int4;
}

}  // namespace expertfleet
