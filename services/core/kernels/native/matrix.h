// The seam between what is computed (linear layers, an expert's FFN) and how weights are stored.
//
// A weight W [N outputs, K inputs] is packed in panels of kPanel outputs, panel after panel. A
// format's kernel multiplies prepared rows by one panel; all else is the same for every format.
//
// What must hold for every kernel: the bits of a row's result depend on that row and the weights
// alone, not on how many rows are beside it, where it stands among them, or how the work is split.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"

namespace expertfleet {

constexpr int64_t kPanel = 32;

enum class Format : int32_t { float32 = 0, bfloat16 = 1, int8 = 2, int4 = 3 };
enum class Activation : int32_t { float32 = 0, bfloat16 = 1 };

inline int64_t num_panels(int64_t outputs) { return (outputs + kPanel - 1) / kPanel; }

struct Matrix {
  Format format;
  int64_t outputs;
  int64_t inputs;
  // The packed panels; the last one is padded with zeros. 64-byte aligned.
  const void* data;
  // Dequantisation scales, laid out as the format says; null for float formats.
  const void* scales;
};

struct FormatKernels {
  // Bytes of the packed panels of W [outputs, inputs].
  size_t (*packed_bytes)(int64_t outputs, int64_t inputs);
  // Bytes that `count` prepared rows of `inputs` take; row i begins at i * prepared_bytes(1, inputs).
  size_t (*prepared_bytes)(int64_t count, int64_t inputs);
  // Brings one row of activations into the form that `multiply` reads (a copy, a conversion, a
  // quantisation of this row alone).
  void (*prepare)(const void* row, Activation type, int64_t inputs, void* prepared);
  // out[r * kPanel + n] = prepared row r times output n of the panel, in float32, scales applied.
  void (*multiply)(const Matrix& matrix, int64_t panel, const void* prepared, int64_t count,
                   float* out);
};

// The fastest kernels of a format for an instruction set; never null.
const FormatKernels& format_kernels(Format format, Isa isa);

// Defined by each family of formats.
const FormatKernels& float_kernels(Format format, Isa isa);
const FormatKernels& quantized_kernels(Format format, Isa isa);

}  // namespace expertfleet
