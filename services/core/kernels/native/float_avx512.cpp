#include <immintrin.h>

#include "float_blocks.h"

namespace expertfleet {
namespace {

// The sums of R rows of a panel.
template <int R>
struct Sums {
  __m512 left[R], right[R];

  Sums(const float* out, bool is_first) {
    unrolled<R>([&](auto r) {
      left[r] = is_first ? _mm512_setzero_ps() : _mm512_loadu_ps(out + r * kPanel);
      right[r] = is_first ? _mm512_setzero_ps() : _mm512_loadu_ps(out + r * kPanel + 16);
    });
  }

  void store(float* out) const {
    unrolled<R>([&](auto r) {
      _mm512_storeu_ps(out + r * kPanel, left[r]);
      _mm512_storeu_ps(out + r * kPanel + 16, right[r]);
    });
  }
};

constexpr int64_t kPrefetchBytes = 4096;

void prefetch(const uint8_t* weights) {
  _mm_prefetch(weights + kPrefetchBytes, _MM_HINT_T0);
  _mm_prefetch(weights + kPrefetchBytes + 64, _MM_HINT_T0);
}

struct Float32Kernel {
  static constexpr int kMaxRows = 12;
  static constexpr int64_t kRowStepBytes = 4;

  template <int R>
  static void run(const uint8_t* weights, const uint8_t* rows, size_t stride, int64_t steps,
                  float* out, bool is_first) {
    Sums<R> sums(out, is_first);
    const float* row[R];
    unrolled<R>([&](auto r) { row[r] = reinterpret_cast<const float*>(rows + r * stride); });
    for (int64_t step = 0; step < steps; ++step, weights += kStepBytes) {
      prefetch(weights);
      const __m512 left = _mm512_load_ps(weights), right = _mm512_load_ps(weights + 64);
      unrolled<R>([&](auto r) {
        const __m512 x = _mm512_set1_ps(row[r][step]);
        sums.left[r] = _mm512_fmadd_ps(left, x, sums.left[r]);
        sums.right[r] = _mm512_fmadd_ps(right, x, sums.right[r]);
      });
    }
    sums.store(out);
  }
};

// Prepared rows are float32; the weights are widened in registers.
struct Bfloat16Kernel {
  static constexpr int kMaxRows = 10;
  static constexpr int64_t kRowStepBytes = 8;

  template <int R>
  static void run(const uint8_t* weights, const uint8_t* rows, size_t stride, int64_t steps,
                  float* out, bool is_first) {
    Sums<R> sums(out, is_first);
    const float* row[R];
    unrolled<R>([&](auto r) { row[r] = reinterpret_cast<const float*>(rows + r * stride); });
    for (int64_t step = 0; step < steps; ++step, weights += kStepBytes) {
      prefetch(weights);
      const __m512i left = _mm512_load_si512(weights), right = _mm512_load_si512(weights + 64);
      const __m512 left0 = even(left), right0 = even(right), left1 = odd(left), right1 = odd(right);
      unrolled<R>([&](auto r) {
        const __m512 x0 = _mm512_set1_ps(row[r][2 * step]);
        const __m512 x1 = _mm512_set1_ps(row[r][2 * step + 1]);
        sums.left[r] = _mm512_fmadd_ps(left1, x1, _mm512_fmadd_ps(left0, x0, sums.left[r]));
        sums.right[r] = _mm512_fmadd_ps(right1, x1, _mm512_fmadd_ps(right0, x0, sums.right[r]));
      });
    }
    sums.store(out);
  }

  static __m512 even(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }

  static __m512 odd(__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-65536)));
  }
};

}  // namespace

void multiply_float32_avx512(const Matrix& matrix, int64_t panel, const void* prepared,
                             int64_t count, float* out) {
  multiply_blocks<Float32Kernel>(matrix, panel, prepared, row_stride(matrix.inputs, 4), count, out);
}

void multiply_bfloat16_avx512(const Matrix& matrix, int64_t panel, const void* prepared,
                              int64_t count, float* out) {
  multiply_blocks<Bfloat16Kernel>(matrix, panel, prepared, row_stride(matrix.inputs, 4), count,
                                  out);
}

}  // namespace expertfleet
