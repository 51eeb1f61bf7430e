// Splits a panel's product into blocks of rows that fit the registers, and of steps that fit the
// first-level cache. Included by one source file per instruction set.
#pragma once

#include <array>
#include <utility>

#include "float_format.h"

namespace expertfleet {
namespace {

// Steps of a panel that are multiplied by all rows before the next ones: 32 KB.
constexpr int64_t kBlockSteps = 256;

// A Kernel has kMaxRows, kRowStepBytes (of one prepared row) and
//   run<R>(weights, rows, stride, steps, out, is_first)
// which adds `steps` steps of R rows to out [R, kPanel], or begins it.
using Run = void (*)(const uint8_t* weights, const uint8_t* rows, size_t stride, int64_t steps,
                     float* out, bool is_first);

// body(0), ..., body(kCount - 1) with the number as a constant: gcc keeps arrays of sums in registers
// if all indices are constants from the start, and stores them in each step of a loop otherwise.
template <int kCount, class Body>
[[gnu::always_inline]] inline void unrolled(Body body) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    (body(std::integral_constant<int, I>{}), ...);
  }(std::make_integer_sequence<int, kCount>{});
}

template <class Kernel, size_t... I>
constexpr std::array<Run, sizeof...(I)> runs_of(std::index_sequence<I...>) {
  return {&Kernel::template run<static_cast<int>(I) + 1>...};
}

template <class Kernel>
void multiply_blocks(const Matrix& matrix, int64_t panel, const void* prepared, size_t stride,
                     int64_t count, float* out) {
  static constexpr auto kRuns = runs_of<Kernel>(std::make_index_sequence<Kernel::kMaxRows>());
  if (count == 0) return;
  const uint8_t* weights = panel_data(matrix, panel);
  const int64_t steps = num_steps(matrix.format, matrix.inputs);
  const int64_t num_blocks = (count + Kernel::kMaxRows - 1) / Kernel::kMaxRows;
  const int64_t block_steps = num_blocks == 1 ? steps : kBlockSteps;
  for (int64_t step = 0; step < steps; step += block_steps) {
    const int64_t now = steps - step < block_steps ? steps - step : block_steps;
    const uint8_t* rows =
        static_cast<const uint8_t*>(prepared) + step * Kernel::kRowStepBytes;
    float* target = out;
    for (int64_t block = 0; block < num_blocks; ++block) {
      const int64_t in_block = count / num_blocks + (block < count % num_blocks);
      kRuns[in_block - 1](weights + step * kStepBytes, rows, stride, now, target, step == 0);
      rows += in_block * stride;
      target += in_block * kPanel;
    }
  }
}

}  // namespace
}  // namespace expertfleet
