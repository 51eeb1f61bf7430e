// The arithmetic of row_ops.h, written once over Lanes. AVX2 and AVX-512 give the same bits.
#pragma once

#include "lanes.h"
#include "row_ops.h"

namespace expertfleet {
namespace {

inline float as_float(float value) { return value; }
inline float as_float(uint16_t value) { return from_bf16(value); }

// T is float or uint16_t (bf16).
template <class T>
struct RowKernel {
  static Lanes rounded(Lanes a) {
    if constexpr (sizeof(T) == 4) return a;
    T halves[kLanes];
    store_row(halves, a);
    return load_row(halves);
  }

  static Lanes get(const T* row, int64_t at, int64_t size) {
    return at + kLanes <= size ? load_row(row + at) : load_some(row + at, size - at);
  }

  static void put(T* row, int64_t at, int64_t size, Lanes a) {
    if (at + kLanes <= size) {
      store_row(row + at, a);
      return;
    }
    T values[kLanes];
    store_row(values, a);
    std::memcpy(row + at, values, static_cast<size_t>(size - at) * sizeof(T));
  }

  static void add_rms_norm(const void* x, const void* update, const void* weight, float eps,
                           int64_t size, void* sum, void* normed) {
    const T* row = static_cast<const T*>(x);
    if (update != nullptr) {
      for (int64_t at = 0; at < size; at += kLanes) {
        const Lanes added = get(static_cast<const T*>(update), at, size);
        put(static_cast<T*>(sum), at, size, add(get(row, at, size), added));
      }
      row = static_cast<const T*>(sum);
    }
    const float mean = sum_of_squares(row, size) / static_cast<float>(size);
    const Lanes factor = broadcast(1.0f / __builtin_sqrtf(mean + eps));
    for (int64_t at = 0; at < size; at += kLanes) {
      const Lanes scaled = rounded(mul(get(row, at, size), factor));
      const Lanes weights = get(static_cast<const T*>(weight), at, size);
      put(static_cast<T*>(normed), at, size, mul(scaled, weights));
    }
  }

  static float sum_of_squares(const T* row, int64_t size) {
    Lanes sums[4] = {broadcast(0.0f), broadcast(0.0f), broadcast(0.0f), broadcast(0.0f)};
    int64_t at = 0;
    for (; at + 4 * kLanes <= size; at += 4 * kLanes) {
      for (int i = 0; i < 4; ++i) {
        const Lanes part = load_row(row + at + i * kLanes);
        sums[i] = fma(part, part, sums[i]);
      }
    }
    for (; at < size; at += kLanes) {
      const Lanes part = get(row, at, size);
      sums[0] = fma(part, part, sums[0]);
    }
    return expertfleet::sum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
  }

  static void rotate(void* heads, int64_t count, int64_t head_dim, const void* cosines,
                     const void* sines) {
    const T* cos = static_cast<const T*>(cosines);
    const T* sin = static_cast<const T*>(sines);
    const int64_t half = head_dim / 2;
    for (int64_t i = 0; i < count; ++i) {
      T* lower = static_cast<T*>(heads) + i * head_dim;
      T* upper = lower + half;
      for (int64_t at = 0; at < half; at += kLanes) {
        const Lanes a = get(lower, at, half), b = get(upper, at, half);
        const Lanes low = add(rounded(mul(a, get(cos, at, half))),
                              rounded(mul(b, get(sin, at, half))));
        const Lanes high = add(rounded(mul(b, get(cos + half, at, half))),
                               rounded(mul(a, get(sin + half, at, half))));
        put(lower, at, half, low);
        put(upper, at, half, high);
      }
    }
  }

  static void gate_logits(const void* x, const void* weight, int64_t num_experts, int64_t size,
                          float* logits) {
    const T* row = static_cast<const T*>(x);
    const T* weights = static_cast<const T*>(weight);
    int64_t expert = 0;
    for (; expert + 4 <= num_experts; expert += 4) dots<4>(row, weights, expert, size, logits);
    for (; expert < num_experts; ++expert) dots<1>(row, weights, expert, size, logits);
  }

  template <int N>
  static void dots(const T* row, const T* weights, int64_t expert, int64_t size, float* logits) {
    Lanes sums[N][2];
    for (int n = 0; n < N; ++n) sums[n][0] = sums[n][1] = broadcast(0.0f);
    for (int64_t at = 0; at < size; at += 2 * kLanes) {
      for (int i = 0; i < 2 && at + i * kLanes < size; ++i) {
        const Lanes part = get(row, at + i * kLanes, size);
        for (int n = 0; n < N; ++n) {
          const Lanes weight = get(weights + (expert + n) * size, at + i * kLanes, size);
          sums[n][i] = fma(part, weight, sums[n][i]);
        }
      }
    }
    for (int n = 0; n < N; ++n) {
      const float logit = expertfleet::sum(add(sums[n][0], sums[n][1]));
      logits[expert + n] = sizeof(T) == 2 ? from_bf16(to_bf16(logit)) : logit;
    }
  }

  static constexpr RowOps table() { return {add_rms_norm, rotate, gate_logits}; }
};

inline const RowOps& compiled_row_ops(Element element) {
  static constexpr RowOps floats = RowKernel<float>::table();
  static constexpr RowOps halves = RowKernel<uint16_t>::table();
  return element == Element::float32 ? floats : halves;
}

}  // namespace
}  // namespace expertfleet
