// Rounding of float weights to int8 and int4, row by row: services/core/quantization/rounding.py
// says how, and is the oracle. Plain loops, compiled once per instruction set.
#pragma once

#include <cstdint>

#include "quantized.h"

namespace expertfleet {

// Rows of weights [rows, inputs], and what they become. For int8, values are int8 [rows, inputs]
// and scales float32 [rows]; for int4, values are uint8 [rows, row_bytes], two to a byte, and
// scales bfloat16 [rows, groups].
struct Rounding {
  const void* weights;
  Activation type;
  int64_t inputs;
  void* values;
  int64_t row_bytes;
  void* scales;
  // int4: where a group's largest magnitude may lie, in steps of its scale.
  const float* ranges;
  int64_t num_ranges;
};

using RoundRows = void (*)(const Rounding& rounding, int64_t first, int64_t last);

RoundRows portable_rounding(Format format);
#if defined(EXPERTFLEET_X86)
RoundRows avx2_rounding(Format format);
RoundRows avx512_rounding(Format format);
#endif

namespace {

constexpr float kLeastMagnitude = 1e-30f;

// To the nearest integer, ties to even, for magnitudes below 2^22.
inline float rounded(float value) {
  constexpr float kUnits = 12582912.0f;
  return (value + kUnits) - kUnits;
}

inline float widened(uint16_t bfloat16) {
  const uint32_t bits = static_cast<uint32_t>(bfloat16) << 16;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// Of a finite value, to the nearest, ties to even.
inline uint16_t narrowed(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float at(const float* weights, int64_t k) { return weights[k]; }
inline float at(const uint16_t* weights, int64_t k) { return widened(weights[k]); }

// The largest magnitude; comparing bits lets the compiler reorder.
template <typename Value>
float largest(const Value* weights, int64_t count) {
  uint32_t most = 0;
  for (int64_t k = 0; k < count; ++k) {
    const float value = at(weights, k);
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    bits &= 0x7fffffff;
    most = bits > most ? bits : most;
  }
  float magnitude;
  __builtin_memcpy(&magnitude, &most, 4);
  return magnitude > kLeastMagnitude ? magnitude : kLeastMagnitude;
}

template <typename Value>
void round_int8_row(const Value* weights, int64_t inputs, int8_t* values, float* scale) {
  *scale = largest(weights, inputs) / 127.0f;
  for (int64_t k = 0; k < inputs; ++k) {
    const float value = rounded(at(weights, k) / *scale);
    values[k] = static_cast<int8_t>(static_cast<int32_t>(value > 127.0f    ? 127.0f
                                                         : value < -127.0f ? -127.0f
                                                                           : value));
  }
}

inline float int4_step(float value, float scale) {
  const float step = rounded(value / scale);
  return step > 7.0f ? 7.0f : step < -8.0f ? -8.0f : step;
}

// In float64, so that the order of the sum decides nothing.
inline double squared_error(const float* group, float scale) {
  constexpr int kLanes = 8;
  double errors[kLanes] = {};
  for (int64_t k = 0; k < kGroup; k += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const float difference = int4_step(group[k + lane], scale) * scale - group[k + lane];
      errors[lane] += static_cast<double>(difference * difference);
    }
  }
  double sum = 0;
  for (const double error : errors) sum += error;
  return sum;
}

inline uint16_t best_int4_scale(const float* group, const Rounding& rounding) {
  const float most = largest(group, kGroup);
  uint16_t best = narrowed(most / rounding.ranges[0]);
  if (rounding.num_ranges == 1) return best;
  double least = squared_error(group, widened(best));
  for (int64_t i = 1; i < rounding.num_ranges; ++i) {
    const uint16_t scale = narrowed(most / rounding.ranges[i]);
    const double error = squared_error(group, widened(scale));
    if (error < least) {
      least = error;
      best = scale;
    }
  }
  return best;
}

template <typename Value>
void round_int4_row(const Rounding& rounding, const Value* weights, uint8_t* values,
                    uint16_t* scales) {
  for (int64_t group = 0; group < num_groups(rounding.inputs); ++group) {
    const int64_t first = group * kGroup;
    const int64_t left = rounding.inputs - first, count = left < kGroup ? left : kGroup;
    float padded[kGroup] = {};
    for (int64_t k = 0; k < count; ++k) padded[k] = at(weights + first, k);
    scales[group] = best_int4_scale(padded, rounding);
    const float scale = widened(scales[group]);
    uint8_t steps[kGroup] = {};
    for (int64_t k = 0; k < count; ++k) {
      steps[k] = static_cast<uint8_t>(static_cast<int32_t>(int4_step(padded[k], scale)) +
                                      kInt4Offset);
    }
    const int64_t bytes = rounding.row_bytes - first / 2;
    for (int64_t i = 0; i < kGroup / 2 && i < bytes; ++i) {
      values[first / 2 + i] = static_cast<uint8_t>(steps[2 * i] | steps[2 * i + 1] << 4);
    }
  }
}

template <typename Value>
void round_int8_rows(const Rounding& rounding, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    round_int8_row(static_cast<const Value*>(rounding.weights) + row * rounding.inputs,
                   rounding.inputs, static_cast<int8_t*>(rounding.values) + row * rounding.inputs,
                   static_cast<float*>(rounding.scales) + row);
  }
}

template <typename Value>
void round_int4_rows(const Rounding& rounding, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    round_int4_row(rounding, static_cast<const Value*>(rounding.weights) + row * rounding.inputs,
                   static_cast<uint8_t*>(rounding.values) + row * rounding.row_bytes,
                   static_cast<uint16_t*>(rounding.scales) + row * num_groups(rounding.inputs));
  }
}

inline void round_int8(const Rounding& rounding, int64_t first, int64_t last) {
  const bool is_float32 = rounding.type == Activation::float32;
  (is_float32 ? round_int8_rows<float> : round_int8_rows<uint16_t>)(rounding, first, last);
}

inline void round_int4(const Rounding& rounding, int64_t first, int64_t last) {
  const bool is_float32 = rounding.type == Activation::float32;
  (is_float32 ? round_int4_rows<float> : round_int4_rows<uint16_t>)(rounding, first, last);
}

inline RoundRows rounding_for(Format format) {
  return format == Format::int8 ? round_int8 : round_int4;
}

}  // namespace
}  // namespace expertfleet
