#include <immintrin.h>

#include "float_blocks.h"

namespace expertfleet {
namespace {

struct Kernel {
  static constexpr int kMaxRows = 12;
  static constexpr int64_t kRowStepBytes = 4;
  // Far enough ahead of the loads to hide the memory's latency, also into the next panel.
  static constexpr int64_t kPrefetchBytes = 4096;

  template <int R>
  static void run(const uint8_t* weights, const uint8_t* rows, size_t stride, int64_t steps,
                  float* out, bool is_first) {
    __m512 left_sums[R], right_sums[R];
    const uint8_t* row[R];
    unrolled<R>([&](auto r) {
      row[r] = rows + r * stride;
      left_sums[r] = is_first ? _mm512_setzero_ps() : _mm512_loadu_ps(out + r * kPanel);
      right_sums[r] = is_first ? _mm512_setzero_ps() : _mm512_loadu_ps(out + r * kPanel + 16);
    });
    for (int64_t step = 0; step < steps; ++step, weights += kStepBytes) {
      _mm_prefetch(weights + kPrefetchBytes, _MM_HINT_T0);
      _mm_prefetch(weights + kPrefetchBytes + 64, _MM_HINT_T0);
      const auto left = reinterpret_cast<__m512bh>(_mm512_load_si512(weights));
      const auto right = reinterpret_cast<__m512bh>(_mm512_load_si512(weights + 64));
      unrolled<R>([&](auto r) {
        int32_t pair;
        std::memcpy(&pair, row[r] + step * kRowStepBytes, sizeof pair);
        const auto both = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
        left_sums[r] = _mm512_dpbf16_ps(left_sums[r], left, both);
        right_sums[r] = _mm512_dpbf16_ps(right_sums[r], right, both);
      });
    }
    unrolled<R>([&](auto r) {
      _mm512_storeu_ps(out + r * kPanel, left_sums[r]);
      _mm512_storeu_ps(out + r * kPanel + 16, right_sums[r]);
    });
  }
};

}  // namespace

void multiply_bfloat16_avx512_bf16(const Matrix& matrix, int64_t panel, const void* prepared,
                                   int64_t count, float* out) {
  multiply_blocks<Kernel>(matrix, panel, prepared, row_stride(matrix.inputs, 2), count, out);
}

}  // namespace expertfleet
