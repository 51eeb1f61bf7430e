// bfloat16 on AMX tiles, for any number of rows: its sums have another order than vdpbf16ps, so
// taking that one for few rows would make a row's bits depend on how many there are.

#include <immintrin.h>

#include "float_format.h"

namespace expertfleet {
namespace {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileSteps = 16;
constexpr int64_t kTileBytes = 64;  // of a row of any tile

// Intel SDM volume 1, 18.2: the operand of LDTILECFG.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 and 1 are the sums of the upper rows, 2 and 3 of the lower ones, 4 and 5 the rows,
// 6 and 7 the left and right half of the panel's weights.
void configure(int64_t upper, int64_t lower) {
  TileConfig config;
  const int64_t rows[8] = {upper, upper, lower, lower, upper, lower, kTileRows, kTileRows};
  for (int tile = 0; tile < 8; ++tile) {
    config.rows[tile] = static_cast<uint8_t>(rows[tile]);
    config.row_bytes[tile] = rows[tile] ? kTileBytes : 0;
  }
  // Without this gcc 12 takes the stores to `config` for dead ones.
  asm volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}

void multiply_upper(const uint8_t* weights, const uint8_t* rows, size_t stride, int64_t steps,
                    float* out) {
  _tile_zero(0);
  _tile_zero(1);
  for (int64_t step = 0; step < steps; step += kTileSteps) {
    _tile_loadd(6, weights, kStepBytes);
    _tile_loadd(7, weights + kTileBytes, kStepBytes);
    _tile_loadd(4, rows, stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    weights += kTileSteps * kStepBytes;
    rows += kTileBytes;
  }
  _tile_stored(0, out, kPanel * sizeof(float));
  _tile_stored(1, out + kPanel / 2, kPanel * sizeof(float));
}

void multiply_both(const uint8_t* weights, const uint8_t* rows, size_t stride, int64_t steps,
                   float* out) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = 0; step < steps; step += kTileSteps) {
    _tile_loadd(6, weights, kStepBytes);
    _tile_loadd(7, weights + kTileBytes, kStepBytes);
    _tile_loadd(4, rows, stride);
    _tile_loadd(5, rows + kTileRows * stride, stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    weights += kTileSteps * kStepBytes;
    rows += kTileBytes;
  }
  float* lower = out + kTileRows * kPanel;
  _tile_stored(0, out, kPanel * sizeof(float));
  _tile_stored(1, out + kPanel / 2, kPanel * sizeof(float));
  _tile_stored(2, lower, kPanel * sizeof(float));
  _tile_stored(3, lower + kPanel / 2, kPanel * sizeof(float));
}

constexpr int64_t kTrialInputs = 3 * kInputPad;
constexpr int64_t kTrialRows = 2 * kTileRows + 5;
constexpr int64_t kTrialStride = (kTrialInputs * 2 / 64 | 1) * 64;

void fill_randomly(uint16_t* values, int64_t count, uint32_t state) {
  for (int64_t i = 0; i < count; ++i) {
    state = state * 1664525 + 1013904223;
    values[i] = narrow(static_cast<float>(state >> 8) / (1 << 23) - 1);
  }
}

bool try_out() {
  alignas(64) uint16_t weights[kTrialInputs * kPanel];
  alignas(64) uint16_t rows[kTrialRows * kTrialStride / 2];
  float result[kTrialRows * kPanel], expected[kTrialRows * kPanel];
  fill_randomly(weights, kTrialInputs * kPanel, 1);
  fill_randomly(rows, kTrialRows * kTrialStride / 2, 2);
  const Matrix matrix{Format::bfloat16, kPanel, kTrialInputs, weights, nullptr};
  constexpr int64_t kCounts[] = {1, kTileRows, kTileRows + 3, kTrialRows};
  for (int64_t count : kCounts) {
    multiply_bfloat16_amx(matrix, 0, rows, count, result);
    multiply_bfloat16_avx512_bf16(matrix, 0, rows, count, expected);
    for (int64_t i = 0; i < count * kPanel; ++i) {
      const float difference = result[i] - expected[i];
      if (!(difference < 1e-4f && difference > -1e-4f)) return false;
    }
  }
  return true;
}

}  // namespace

void multiply_bfloat16_amx(const Matrix& matrix, int64_t panel, const void* prepared,
                           int64_t count, float* out) {
  const uint8_t* weights = panel_data(matrix, panel);
  const auto* rows = static_cast<const uint8_t*>(prepared);
  const size_t stride = row_stride(matrix.inputs, 2);
  const int64_t steps = num_steps(Format::bfloat16, matrix.inputs);
  int64_t configured = 0;
  for (int64_t first = 0; first < count; first += 2 * kTileRows) {
    const int64_t in_block = count - first < 2 * kTileRows ? count - first : 2 * kTileRows;
    const int64_t upper = in_block < kTileRows ? in_block : kTileRows;
    if (in_block != configured) configure(upper, in_block - upper);
    configured = in_block;
    const auto multiply = in_block > kTileRows ? multiply_both : multiply_upper;
    multiply(weights, rows + first * stride, stride, steps, out + first * kPanel);
  }
  if (count) _tile_release();
}

bool amx_is_sound() {
  static const bool is_sound = try_out();
  return is_sound;
}

}  // namespace expertfleet
