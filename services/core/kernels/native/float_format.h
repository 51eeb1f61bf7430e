// float32 and bfloat16 weights: how panels and prepared rows lie in memory.
//
// A panel is a run of steps of 128 bytes, K padded with zeros to a multiple of kInputPad:
//   float32:  [K][32]            step k is input k of the 32 outputs
//   bfloat16: [K / 2][32][2]     step p is inputs 2p and 2p + 1 of the 32 outputs
// so that a bfloat16 step is two 512-bit operands of vdpbf16ps, and 16 steps are two AMX tiles.
//
// Sums run over the steps in ascending order, one accumulator an output, so all of the kernels
// give a row the same bits whatever is computed beside it. float32 agrees between AVX2 and
// AVX-512; bfloat16 too where it is widened to float32. vdpbf16ps and AMX add the two products of
// a step (AMX: of 16 steps) in orders of their own.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "matrix.h"

namespace expertfleet {

constexpr int64_t kInputPad = 32;
constexpr int64_t kStepBytes = 128;

using Multiply = decltype(FormatKernels::multiply);

void multiply_float32_portable(const Matrix&, int64_t, const void*, int64_t, float*);
void multiply_bfloat16_portable(const Matrix&, int64_t, const void*, int64_t, float*);
void multiply_float32_avx2(const Matrix&, int64_t, const void*, int64_t, float*);
void multiply_bfloat16_avx2(const Matrix&, int64_t, const void*, int64_t, float*);
void multiply_float32_avx512(const Matrix&, int64_t, const void*, int64_t, float*);
void multiply_bfloat16_avx512(const Matrix&, int64_t, const void*, int64_t, float*);
void multiply_bfloat16_avx512_bf16(const Matrix&, int64_t, const void*, int64_t, float*);
void multiply_bfloat16_amx(const Matrix&, int64_t, const void*, int64_t, float*);

// Whether the AMX kernel gives what the AVX-512 one gives, but for rounding; tried once.
bool amx_is_sound();

namespace {  // a copy for every instruction set: shared ones could be compiled for the wrong one

inline int64_t padded_inputs(int64_t inputs) {
  return (inputs + kInputPad - 1) / kInputPad * kInputPad;
}

// Rows begin an odd number of cache lines apart, so that the rows of a block, which are read in
// step, do not fall into the same few sets of the cache.
inline size_t row_stride(int64_t inputs, size_t value_bytes) {
  const size_t lines = (static_cast<size_t>(padded_inputs(inputs)) * value_bytes + 63) / 64;
  return (lines | 1) * 64;
}

inline int64_t num_steps(Format format, int64_t inputs) {
  return format == Format::float32 ? padded_inputs(inputs) : padded_inputs(inputs) / 2;
}

inline const uint8_t* panel_data(const Matrix& matrix, int64_t panel) {
  const int64_t bytes = num_steps(matrix.format, matrix.inputs) * kStepBytes;
  return static_cast<const uint8_t*>(matrix.data) + panel * bytes;
}

inline float widen(uint16_t value) { return std::bit_cast<float>(uint32_t{value} << 16); }

// To the nearest bfloat16, ties to even, as torch does it.
inline uint16_t narrow(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

}  // namespace
}  // namespace expertfleet
