// int8 and int4 weights: the portable kernels, and the choice among the others.
#include "quantized.h"

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

namespace expertfleet {
namespace {

float bfloat16_to_float(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

float activation(const void* row, Activation type, int64_t index) {
  if (type == Activation::float32) return static_cast<const float*>(row)[index];
  return bfloat16_to_float(static_cast<const uint16_t*>(row)[index]);
}

void prepare(const void* row, Activation type, int64_t inputs, void* prepared) {
  const QuantizedRow parts = quantized_row(prepared, 0, inputs);
  auto* values = const_cast<int8_t*>(parts.values);
  auto* scales = const_cast<float*>(parts.scales);
  auto* sums = const_cast<int32_t*>(parts.sums);
  std::memset(values, 0, static_cast<size_t>(num_groups(inputs) * kGroup));
  for (int64_t group = 0; group < num_groups(inputs); ++group) {
    const int64_t first = group * kGroup;
    const int64_t count = inputs - first < kGroup ? inputs - first : kGroup;
    float group_values[kGroup];
    uint32_t most = 0;  // magnitudes compare as their bits do, with infinity and NaN on top
    for (int64_t k = 0; k < count; ++k) {
      group_values[k] = activation(row, type, first + k);
      const uint32_t magnitude = std::bit_cast<uint32_t>(group_values[k]) & 0x7fffffff;
      most = magnitude > most ? magnitude : most;
    }
    const GroupScale scale = group_scale(most);
    int32_t sum = 0;
    for (int64_t k = 0; k < count && scale.inverse > 0; ++k) {
      const auto value = static_cast<int8_t>(std::lrintf(group_values[k] * scale.inverse));
      values[first + k] = value;
      sum += value;
    }
    scales[group] = scale.scale;
    sums[group] = sum;
  }
}

void multiply_int8(const Matrix& matrix, int64_t panel, const void* prepared, int64_t count,
                   float* out) {
  const uint8_t* weights = int8_panel(matrix, panel);
  const float* scales = int8_panel_scales(matrix, panel);
  for (int64_t r = 0; r < count; ++r) {
    const QuantizedRow row = quantized_row(prepared, r, matrix.inputs);
    float totals[kPanel] = {};
    for (int64_t group = 0; group < num_groups(matrix.inputs); ++group) {
      int32_t products[kPanel];
      for (auto& product : products) product = -kInt8Offset * row.sums[group];
      for (int64_t k = group * kGroup; k < (group + 1) * kGroup; ++k) {
        const uint8_t* step = weights + k / 4 * 4 * kPanel + k % 4;
        for (int64_t n = 0; n < kPanel; ++n) products[n] += row.values[k] * step[4 * n];
      }
      for (int64_t n = 0; n < kPanel; ++n) {
        totals[n] = std::fma(static_cast<float>(products[n]), row.scales[group], totals[n]);
      }
    }
    for (int64_t n = 0; n < kPanel; ++n) out[r * kPanel + n] = totals[n] * scales[n];
  }
}

void multiply_int4(const Matrix& matrix, int64_t panel, const void* prepared, int64_t count,
                   float* out) {
  const uint8_t* weights = int4_panel(matrix, panel);
  const uint16_t* scales = int4_panel_scales(matrix, panel);
  for (int64_t r = 0; r < count; ++r) {
    const QuantizedRow row = quantized_row(prepared, r, matrix.inputs);
    float totals[kPanel] = {};
    for (int64_t group = 0; group < num_groups(matrix.inputs); ++group) {
      int32_t products[kPanel];
      for (auto& product : products) product = -kInt4Offset * row.sums[group];
      for (int64_t k = group * kGroup; k < (group + 1) * kGroup; ++k) {
        const uint8_t* step = weights + k / 8 * 4 * kPanel + k % 4;
        const int shift = k % 8 < 4 ? 0 : 4;
        for (int64_t n = 0; n < kPanel; ++n) {
          products[n] += row.values[k] * (step[4 * n] >> shift & 15);
        }
      }
      for (int64_t n = 0; n < kPanel; ++n) {
        const float scale = bfloat16_to_float(scales[group * kPanel + n]) * row.scales[group];
        totals[n] = std::fma(static_cast<float>(products[n]), scale, totals[n]);
      }
    }
    std::memcpy(out + r * kPanel, totals, sizeof totals);
  }
}

const FormatKernels& portable_kernels(Format format) {
  static const FormatKernels int8{int8_packed_bytes, quantized_prepared_bytes, prepare,
                                  multiply_int8};
  static const FormatKernels int4{int4_packed_bytes, quantized_prepared_bytes, prepare,
                                  multiply_int4};
  return format == Format::int8 ? int8 : int4;
}

}  // namespace

GroupScale group_scale(uint32_t most) {
  constexpr uint32_t kInfinity = 0x7f800000;
  constexpr float kLeast = 1e-30f;  // below, 127 / m could overflow
  if (most >= kInfinity) return {std::numeric_limits<float>::quiet_NaN(), 0.0f};
  const float magnitude = std::bit_cast<float>(most);
  if (magnitude < kLeast) return {0.0f, 0.0f};
  return {magnitude / 127.0f, 127.0f / magnitude};
}

size_t int8_packed_bytes(int64_t outputs, int64_t inputs) {
  return static_cast<size_t>(num_panels(outputs) * num_groups(inputs) * kGroup * kPanel);
}

size_t int4_packed_bytes(int64_t outputs, int64_t inputs) {
  return int8_packed_bytes(outputs, inputs) / 2;
}

size_t quantized_prepared_bytes(int64_t count, int64_t inputs) {
  return static_cast<size_t>(count) * quantized_row_bytes(inputs);
}

const FormatKernels& quantized_kernels(Format format, [[maybe_unused]] Isa isa) {
#if defined(EXPERTFLEET_X86)
  if (isa >= Isa::avx512_vnni) return quantized_kernels_avx512_vnni(format);
  if (isa >= Isa::avx2) return quantized_kernels_avx2(format);
#endif
  return portable_kernels(format);
}

}  // namespace expertfleet
