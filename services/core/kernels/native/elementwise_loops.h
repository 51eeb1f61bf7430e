// The loops of elementwise.h, plain enough for the compiler to vectorise them. Included by one
// source file per instruction set, each of which gets its own copy.
#pragma once

#include <bit>
#include <cstring>

#include "elementwise.h"
#include "float_format.h"

namespace expertfleet {
namespace {

// e^x to 2 units in the last place: 2^n e^r with |r| <= ln(2) / 2, e^r by its Taylor series to the
// seventh power. Saturates at the ends of the normal range; NaN stays NaN in `silu` below.
inline float exponential(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  float r = x - n * 0.693145752f;
  r = r - n * 1.42860677e-6f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const uint32_t exponent = (std::bit_cast<uint32_t>(shifted) << 23) + (127u << 23);
  return p * std::bit_cast<float>(exponent);
}

inline float silu(float x) { return x / (1.0f + exponential(-x)); }

struct Float32 {
  using Value = float;
  static float get(Value value) { return value; }
  static Value round(float value) { return value; }
};

struct Bfloat16 {
  using Value = uint16_t;
  static float get(Value value) { return widen(value); }
  static Value round(float value) { return narrow(value); }
};

template <class Value>
void copy(Value* target, const Value* values, int64_t width) {
  if (width == kPanel) {
    std::memcpy(target, values, kPanel * sizeof(Value));
  } else {
    std::memcpy(target, values, width * sizeof(Value));
  }
}

template <class Type>
void store_as(const float* products, int64_t count, bool with_silu, const PanelTarget& target) {
  auto* values = static_cast<typename Type::Value*>(target.values);
  for (int64_t r = 0; r < count; ++r, products += kPanel, values += target.stride) {
    typename Type::Value rounded[kPanel];
    if (with_silu) {
      for (int n = 0; n < kPanel; ++n) rounded[n] = Type::round(silu(products[n]));
    } else {
      for (int n = 0; n < kPanel; ++n) rounded[n] = Type::round(products[n]);
    }
    copy(values, rounded, target.width);
  }
}

template <class Type>
void swiglu_as(const float* gate, const float* up, int64_t count, const PanelTarget& target) {
  auto* values = static_cast<typename Type::Value*>(target.values);
  for (int64_t r = 0; r < count; ++r, gate += kPanel, up += kPanel, values += target.stride) {
    typename Type::Value rounded[kPanel];
    for (int n = 0; n < kPanel; ++n) {
      const float activated = Type::get(Type::round(silu(gate[n])));
      rounded[n] = Type::round(activated * Type::get(Type::round(up[n])));
    }
    copy(values, rounded, target.width);
  }
}

template <class Type>
void combine_as(const float* products, const MoeRow* rows, int64_t count, int64_t first_column,
                int64_t width) {
  using Value = typename Type::Value;
  for (int64_t r = 0; r < count; ++r, products += kPanel) {
    const float weight = rows[r].weight;
    Value weighted[kPanel];
    for (int n = 0; n < kPanel; ++n) {
      weighted[n] = Type::round(Type::get(Type::round(products[n])) * weight);
    }
    Value* output = reinterpret_cast<Value*>(rows[r].output) + first_column;
    if (rows[r].is_added) {
      Value before[kPanel] = {};
      copy(before, output, width);
      for (int n = 0; n < kPanel; ++n) {
        weighted[n] = Type::round(Type::get(before[n]) + Type::get(weighted[n]));
      }
    }
    copy(output, weighted, width);
  }
}

void store(const float* products, int64_t count, bool with_silu, const PanelTarget& target) {
  if (target.type == Activation::float32) {
    store_as<Float32>(products, count, with_silu, target);
  } else {
    store_as<Bfloat16>(products, count, with_silu, target);
  }
}

void swiglu(const float* gate, const float* up, int64_t count, const PanelTarget& target) {
  if (target.type == Activation::float32) {
    swiglu_as<Float32>(gate, up, count, target);
  } else {
    swiglu_as<Bfloat16>(gate, up, count, target);
  }
}

void combine(const float* products, const MoeRow* rows, int64_t count, int64_t first_column,
             int64_t width, Activation type) {
  if (type == Activation::float32) {
    combine_as<Float32>(products, rows, count, first_column, width);
  } else {
    combine_as<Bfloat16>(products, rows, count, first_column, width);
  }
}

}  // namespace
}  // namespace expertfleet
