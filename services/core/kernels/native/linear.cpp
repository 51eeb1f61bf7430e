// One linear layer.

#include "api.h"
#include "elementwise.h"
#include "panels.h"
#include "scratch.h"

namespace expertfleet {
namespace {

// Rows that are prepared and multiplied at once; bounds the memory that is kept.
constexpr int64_t kMaxRows = 1024;

struct Rows {
  const uint8_t* values;
  int64_t count;
  Activation type;
};

void linear(const Matrix& matrix, const Rows& rows, uint8_t* out, Activation out_type, bool silu) {
  const FormatKernels& kernels = format_kernels(matrix.format, active_isa());
  const ElementwiseKernels& elementwise = elementwise_kernels(active_isa());
  static thread_local Scratch prepared_rows;
  const size_t stride = kernels.prepared_bytes(1, matrix.inputs);
  auto* prepared = prepared_rows.take<uint8_t>(rows.count * stride);
  parallel_rows(rows.count, stride, [&](int64_t row) {
    kernels.prepare(rows.values + row * matrix.inputs * value_bytes(rows.type), rows.type,
                    matrix.inputs, prepared + row * stride);
  });
  parallel_runs(num_panels(matrix.outputs), [&](int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    float* products = scratch.take<float>(std::min(kTileRows, rows.count) * kPanel);
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t column = panel * kPanel;
      for (int64_t row = 0; row < rows.count; row += kTileRows) {
        const int64_t count = std::min(kTileRows, rows.count - row);
        kernels.multiply(matrix, panel, prepared + row * stride, count, products);
        const PanelTarget target{
            out + (row * matrix.outputs + column) * value_bytes(out_type), matrix.outputs,
            std::min(kPanel, matrix.outputs - column), out_type};
        elementwise.store(products, count, silu, target);
      }
    }
  });
}

}  // namespace
}  // namespace expertfleet

extern "C" {
#pragma GCC visibility push(default)
size_t ef_packed_bytes(int32_t format, int64_t outputs, int64_t inputs) {
  using namespace expertfleet;
  return format_kernels(static_cast<Format>(format), active_isa()).packed_bytes(outputs, inputs);
}

// out [count, outputs] = rows [count, inputs] W^T, both contiguous; with `silu`, silu of that.
void ef_linear(const expertfleet::Matrix* matrix, const void* rows, int64_t count,
               int32_t row_type, void* out, int32_t out_type, int32_t silu) {
  using namespace expertfleet;
  const auto type = static_cast<Activation>(row_type), to = static_cast<Activation>(out_type);
  const auto* values = static_cast<const uint8_t*>(rows);
  for (int64_t row = 0; row < count; row += kMaxRows) {
    const Rows part{values + row * matrix->inputs * value_bytes(type),
                    std::min(kMaxRows, count - row), type};
    linear(*matrix, part, static_cast<uint8_t*>(out) + row * matrix->outputs * value_bytes(to), to,
           silu != 0);
  }
}
#pragma GCC visibility pop
}
