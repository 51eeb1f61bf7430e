#include <immintrin.h>

#include "float_blocks.h"

namespace expertfleet {
namespace {

constexpr int kQuarters = 4;  // 256-bit registers of a panel's sums

// The sums of R rows of a panel, that of row r in of[kQuarters * r] and the following ones.
template <int R>
struct Sums {
  __m256 of[R * kQuarters];

  Sums(const float* out, bool is_first) {
    unrolled<R * kQuarters>(
        [&](auto i) { of[i] = is_first ? _mm256_setzero_ps() : _mm256_loadu_ps(out + 8 * i); });
  }

  void store(float* out) const {
    unrolled<R * kQuarters>([&](auto i) { _mm256_storeu_ps(out + 8 * i, of[i]); });
  }
};

struct Float32Kernel {
  static constexpr int kMaxRows = 3;
  static constexpr int64_t kRowStepBytes = 4;

  template <int R>
  static void run(const uint8_t* weights, const uint8_t* rows, size_t stride, int64_t steps,
                  float* out, bool is_first) {
    Sums<R> sums(out, is_first);
    for (int64_t step = 0; step < steps; ++step, weights += kStepBytes) {
      __m256 x[R];
      unrolled<R>([&](auto r) {
        x[r] = _mm256_broadcast_ss(reinterpret_cast<const float*>(rows + r * stride) + step);
      });
      unrolled<kQuarters>([&](auto q) {
        const __m256 w = _mm256_load_ps(reinterpret_cast<const float*>(weights) + 8 * q);
        unrolled<R>([&](auto r) {
          __m256& sum = sums.of[kQuarters * r + q];
          sum = _mm256_fmadd_ps(w, x[r], sum);
        });
      });
    }
    sums.store(out);
  }
};

// Prepared rows are float32; the weights are widened in registers.
struct Bfloat16Kernel {
  static constexpr int kMaxRows = 2;
  static constexpr int64_t kRowStepBytes = 8;

  template <int R>
  static void run(const uint8_t* weights, const uint8_t* rows, size_t stride, int64_t steps,
                  float* out, bool is_first) {
    Sums<R> sums(out, is_first);
    const __m256i high = _mm256_set1_epi32(-65536);
    for (int64_t step = 0; step < steps; ++step, weights += kStepBytes) {
      __m256 x0[R], x1[R];
      unrolled<R>([&](auto r) {
        const float* pair = reinterpret_cast<const float*>(rows + r * stride) + 2 * step;
        x0[r] = _mm256_broadcast_ss(pair);
        x1[r] = _mm256_broadcast_ss(pair + 1);
      });
      unrolled<kQuarters>([&](auto q) {
        const __m256i w = _mm256_load_si256(reinterpret_cast<const __m256i*>(weights) + q);
        const __m256 w0 = _mm256_castsi256_ps(_mm256_slli_epi32(w, 16));
        const __m256 w1 = _mm256_castsi256_ps(_mm256_and_si256(w, high));
        unrolled<R>([&](auto r) {
          __m256& sum = sums.of[kQuarters * r + q];
          sum = _mm256_fmadd_ps(w1, x1[r], _mm256_fmadd_ps(w0, x0[r], sum));
        });
      });
    }
    sums.store(out);
  }
};

}  // namespace

void multiply_float32_avx2(const Matrix& matrix, int64_t panel, const void* prepared, int64_t count,
                           float* out) {
  multiply_blocks<Float32Kernel>(matrix, panel, prepared, row_stride(matrix.inputs, 4), count, out);
}

void multiply_bfloat16_avx2(const Matrix& matrix, int64_t panel, const void* prepared,
                            int64_t count, float* out) {
  multiply_blocks<Bfloat16Kernel>(matrix, panel, prepared, row_stride(matrix.inputs, 4), count,
                                  out);
}

}  // namespace expertfleet
