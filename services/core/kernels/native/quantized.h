// How int8 and int4 weights lie in memory, and the arithmetic that all their kernels share.
//
// Both formats multiply integers. A row of activations is cut into groups of kGroup along K; a
// group with the largest magnitude m has the scale a = m / 127 and the integers
// round_to_even(x * (127 / m)). A group's integer product is exact, so nothing in it depends on
// the instruction set. Groups are then added in ascending order, each with one fused
// multiply-add in float32:
//
//   int8   total = fma(product, a, total), and the whole is multiplied by the output's scale;
//   int4   total = fma(product, s * a, total), where s is the scale of the group and the output.
//
// So every instruction set gives the same bits. A group that holds a NaN or an infinity has the
// scale NaN, and so has every output of the row.
//
// Weights are stored as unsigned bytes or nibbles, with kInt8Offset or kInt4Offset added, as the
// instruction vpdpbusd wants one operand; what that adds is offset * (sum of the group's integers).
// K is padded with zeros to whole groups.
//
//   int8 panel  [K / 4][kPanel][4] bytes
//   int4 panel  [K / 8][kPanel][4] bytes: of the eight weights of a step, byte b has number b in
//               its low and number 4 + b in its high half
//   int8 scales [outputs] float32;  int4 scales [panel][group][kPanel] bfloat16; padded with zeros
#pragma once

#include "matrix.h"

namespace expertfleet {

constexpr int64_t kGroup = 64;
constexpr int kInt8Offset = 128;
constexpr int kInt4Offset = 8;

inline int64_t num_groups(int64_t inputs) { return (inputs + kGroup - 1) / kGroup; }

// A prepared row: int8 values [groups * kGroup], then per group the scale (float32), then per group
// the sum of its values (int32).
struct QuantizedRow {
  const int8_t* values;
  const float* scales;
  const int32_t* sums;
};

inline size_t quantized_row_bytes(int64_t inputs) {
  const int64_t groups = num_groups(inputs);
  return static_cast<size_t>((groups * (kGroup + 8) + 63) / 64 * 64);
}

inline QuantizedRow quantized_row(const void* prepared, int64_t index, int64_t inputs) {
  const int64_t groups = num_groups(inputs);
  const char* row = static_cast<const char*>(prepared) + index * quantized_row_bytes(inputs);
  return {reinterpret_cast<const int8_t*>(row),
          reinterpret_cast<const float*>(row + groups * kGroup),
          reinterpret_cast<const int32_t*>(row + groups * (kGroup + 4))};
}

inline const uint8_t* int8_panel(const Matrix& matrix, int64_t panel) {
  return static_cast<const uint8_t*>(matrix.data) +
         panel * num_groups(matrix.inputs) * kGroup * kPanel;
}

inline const uint8_t* int4_panel(const Matrix& matrix, int64_t panel) {
  return static_cast<const uint8_t*>(matrix.data) +
         panel * num_groups(matrix.inputs) * kGroup / 2 * kPanel;
}

inline const float* int8_panel_scales(const Matrix& matrix, int64_t panel) {
  return static_cast<const float*>(matrix.scales) + panel * kPanel;
}

inline const uint16_t* int4_panel_scales(const Matrix& matrix, int64_t panel) {
  return static_cast<const uint16_t*>(matrix.scales) + panel * num_groups(matrix.inputs) * kPanel;
}

// Of a group whose largest magnitude has these bits: the scale, and what values are multiplied by,
// which is 0 where all become 0 (a group of zeros, or one that is not finite).
struct GroupScale {
  float scale;
  float inverse;
};
GroupScale group_scale(uint32_t most);

size_t int8_packed_bytes(int64_t outputs, int64_t inputs);
size_t int4_packed_bytes(int64_t outputs, int64_t inputs);
size_t quantized_prepared_bytes(int64_t count, int64_t inputs);

#if defined(EXPERTFLEET_X86)
const FormatKernels& quantized_kernels_avx2(Format format);
const FormatKernels& quantized_kernels_avx512_vnni(Format format);
#endif

}  // namespace expertfleet
