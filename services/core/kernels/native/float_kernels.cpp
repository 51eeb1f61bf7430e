// Which kernel serves float weights on which instruction set, and the portable ones.

#include "float_blocks.h"

namespace expertfleet {
namespace {

template <int R>
struct Sums {
  float of[R][kPanel];

  Sums(const float* out, bool is_first) {
    if (is_first) {
      std::memset(of, 0, sizeof of);
    } else {
      std::memcpy(of, out, sizeof of);
    }
  }
  void add(int r, const float* weights, float x) {
    for (int n = 0; n < kPanel; ++n) of[r][n] += weights[n] * x;
  }
};

struct Float32Kernel {
  static constexpr int kMaxRows = 4;
  static constexpr int64_t kRowStepBytes = 4;

  template <int R>
  static void run(const uint8_t* weights, const uint8_t* rows, size_t stride, int64_t steps,
                  float* out, bool is_first) {
    Sums<R> sums(out, is_first);
    for (int64_t step = 0; step < steps; ++step, weights += kStepBytes) {
      for (int r = 0; r < R; ++r) {
        const auto* row = reinterpret_cast<const float*>(rows + r * stride);
        sums.add(r, reinterpret_cast<const float*>(weights), row[step]);
      }
    }
    std::memcpy(out, sums.of, sizeof sums.of);
  }
};

// Prepared rows are float32; the weights are widened a step at a time.
struct Bfloat16Kernel {
  static constexpr int kMaxRows = 4;
  static constexpr int64_t kRowStepBytes = 8;

  template <int R>
  static void run(const uint8_t* weights, const uint8_t* rows, size_t stride, int64_t steps,
                  float* out, bool is_first) {
    Sums<R> sums(out, is_first);
    for (int64_t step = 0; step < steps; ++step, weights += kStepBytes) {
      float even[kPanel], odd[kPanel];
      for (int n = 0; n < kPanel; ++n) {
        even[n] = widen(reinterpret_cast<const uint16_t*>(weights)[2 * n]);
        odd[n] = widen(reinterpret_cast<const uint16_t*>(weights)[2 * n + 1]);
      }
      for (int r = 0; r < R; ++r) {
        const auto* row = reinterpret_cast<const float*>(rows + r * stride);
        sums.add(r, even, row[2 * step]);
        sums.add(r, odd, row[2 * step + 1]);
      }
    }
    std::memcpy(out, sums.of, sizeof sums.of);
  }
};

size_t packed_bytes_float32(int64_t outputs, int64_t inputs) {
  return num_panels(outputs) * num_steps(Format::float32, inputs) * kStepBytes;
}

size_t packed_bytes_bfloat16(int64_t outputs, int64_t inputs) {
  return num_panels(outputs) * num_steps(Format::bfloat16, inputs) * kStepBytes;
}

size_t float32_rows_bytes(int64_t count, int64_t inputs) { return count * row_stride(inputs, 4); }

size_t bfloat16_rows_bytes(int64_t count, int64_t inputs) { return count * row_stride(inputs, 2); }

void prepare_float32(const void* row, Activation type, int64_t inputs, void* prepared) {
  float* target = static_cast<float*>(prepared);
  if (type == Activation::float32) {
    std::memcpy(target, row, inputs * sizeof(float));
  } else {
    const auto* source = static_cast<const uint16_t*>(row);
    for (int64_t k = 0; k < inputs; ++k) target[k] = widen(source[k]);
  }
  std::memset(target + inputs, 0, (padded_inputs(inputs) - inputs) * sizeof(float));
}

void prepare_bfloat16(const void* row, Activation type, int64_t inputs, void* prepared) {
  auto* target = static_cast<uint16_t*>(prepared);
  if (type == Activation::bfloat16) {
    std::memcpy(target, row, inputs * sizeof(uint16_t));
  } else {
    const auto* source = static_cast<const float*>(row);
    for (int64_t k = 0; k < inputs; ++k) target[k] = narrow(source[k]);
  }
  std::memset(target + inputs, 0, (padded_inputs(inputs) - inputs) * sizeof(uint16_t));
}

constexpr FormatKernels float32_kernels(Multiply multiply) {
  return {packed_bytes_float32, float32_rows_bytes, prepare_float32, multiply};
}

// Weights are widened and multiplied by float32 rows.
constexpr FormatKernels widened_kernels(Multiply multiply) {
  return {packed_bytes_bfloat16, float32_rows_bytes, prepare_float32, multiply};
}

constexpr FormatKernels bfloat16_kernels(Multiply multiply) {
  return {packed_bytes_bfloat16, bfloat16_rows_bytes, prepare_bfloat16, multiply};
}

const FormatKernels kFloat32Portable = float32_kernels(multiply_float32_portable);
const FormatKernels kBfloat16Portable = widened_kernels(multiply_bfloat16_portable);

#if defined(EXPERTFLEET_X86)
const FormatKernels kFloat32Avx2 = float32_kernels(multiply_float32_avx2);
const FormatKernels kFloat32Avx512 = float32_kernels(multiply_float32_avx512);
const FormatKernels kBfloat16Avx2 = widened_kernels(multiply_bfloat16_avx2);
const FormatKernels kBfloat16Avx512 = widened_kernels(multiply_bfloat16_avx512);
const FormatKernels kBfloat16Avx512Bf16 = bfloat16_kernels(multiply_bfloat16_avx512_bf16);
const FormatKernels kBfloat16Amx = bfloat16_kernels(multiply_bfloat16_amx);

const FormatKernels& float32_for(Isa isa) {
  if (isa >= Isa::avx512) return kFloat32Avx512;
  return isa >= Isa::avx2 ? kFloat32Avx2 : kFloat32Portable;
}

const FormatKernels& bfloat16_for(Isa isa) {
  if (isa >= Isa::amx && amx_is_sound()) return kBfloat16Amx;
  if (isa >= Isa::avx512_bf16) return kBfloat16Avx512Bf16;
  if (isa >= Isa::avx512) return kBfloat16Avx512;
  return isa >= Isa::avx2 ? kBfloat16Avx2 : kBfloat16Portable;
}
#else
const FormatKernels& float32_for(Isa) { return kFloat32Portable; }
const FormatKernels& bfloat16_for(Isa) { return kBfloat16Portable; }
#endif

}  // namespace

void multiply_float32_portable(const Matrix& matrix, int64_t panel, const void* prepared,
                               int64_t count, float* out) {
  multiply_blocks<Float32Kernel>(matrix, panel, prepared, row_stride(matrix.inputs, 4), count, out);
}

void multiply_bfloat16_portable(const Matrix& matrix, int64_t panel, const void* prepared,
                                int64_t count, float* out) {
  multiply_blocks<Bfloat16Kernel>(matrix, panel, prepared, row_stride(matrix.inputs, 4), count,
                                  out);
}

const FormatKernels& float_kernels(Format format, Isa isa) {
  return format == Format::float32 ? float32_for(isa) : bfloat16_for(isa);
}

const FormatKernels& format_kernels(Format format, Isa isa) {
  const bool is_float = format == Format::float32 || format == Format::bfloat16;
  return is_float ? float_kernels(format, isa) : quantized_kernels(format, isa);
}

}  // namespace expertfleet
