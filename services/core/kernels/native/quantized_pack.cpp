// Brings quantised weights [outputs, inputs] into panels.
#include "pool.h"
#include "quantized.h"

namespace expertfleet {
namespace {

// Where output `n` of a panel has its weight `k`, and in which half of the byte.
int64_t int8_position(int64_t k, int64_t n) { return (k / 4 * kPanel + n) * 4 + k % 4; }
int64_t int4_position(int64_t k, int64_t n) { return (k / 8 * kPanel + n) * 4 + k % 4; }

void pack_int8_panel(const int8_t* weight, int64_t count, int64_t inputs, uint8_t* panel) {
  const int64_t padded = num_groups(inputs) * kGroup;
  for (int64_t n = 0; n < kPanel; ++n) {
    const int8_t* row = n < count ? weight + n * inputs : nullptr;
    for (int64_t k = 0; k < padded; ++k) {
      const int value = row && k < inputs ? row[k] : 0;
      panel[int8_position(k, n)] = static_cast<uint8_t>(value + kInt8Offset);
    }
  }
}

// `weight` has two weights in a byte, the first in the low half, with the offset added already.
void pack_int4_panel(const uint8_t* weight, int64_t row_bytes, int64_t count, int64_t inputs,
                     uint8_t* panel) {
  const int64_t padded = num_groups(inputs) * kGroup;
  for (int64_t n = 0; n < kPanel; ++n) {
    const uint8_t* row = n < count ? weight + n * row_bytes : nullptr;
    const auto value = [&](int64_t k) -> int {
      return row && k < inputs ? row[k / 2] >> 4 * (k % 2) & 15 : kInt4Offset;
    };
    for (int64_t step = 0; step < padded; step += 8) {
      for (int64_t k = step; k < step + 4; ++k) {
        panel[int4_position(k, n)] = static_cast<uint8_t>(value(k) | value(k + 4) << 4);
      }
    }
  }
}

}  // namespace
}  // namespace expertfleet

extern "C" {
#pragma GCC visibility push(default)

// Weights [count, inputs] of outputs first to first + count, `first` a multiple of the panel's
// outputs; `packed` is the start of the whole matrix.
void ef_pack_int8(const int8_t* weight, int64_t first, int64_t count, int64_t inputs,
                  uint8_t* packed) {
  using namespace expertfleet;
  parallel_for(num_panels(count), [=](int64_t panel) {
    const int64_t begin = panel * kPanel;
    const int64_t rows = count - begin < kPanel ? count - begin : kPanel;
    pack_int8_panel(weight + begin * inputs, rows, inputs,
                    packed + int8_packed_bytes(first + begin, inputs));
  });
}

// As above; a row of `weight` has row_bytes. `scales` are bfloat16 [count, groups], and go to
// `packed_scales` [panels, groups, kPanel].
void ef_pack_int4(const uint8_t* weight, int64_t row_bytes, const uint16_t* scales, int64_t first,
                  int64_t count, int64_t inputs, uint8_t* packed, uint16_t* packed_scales) {
  using namespace expertfleet;
  const int64_t groups = num_groups(inputs);
  parallel_for(num_panels(count), [=](int64_t panel) {
    const int64_t begin = panel * kPanel;
    const int64_t rows = count - begin < kPanel ? count - begin : kPanel;
    pack_int4_panel(weight + begin * row_bytes, row_bytes, rows, inputs,
                    packed + int4_packed_bytes(first + begin, inputs));
    uint16_t* panel_scales = packed_scales + (first + begin) * groups;
    for (int64_t group = 0; group < groups; ++group) {
      for (int64_t n = 0; n < kPanel; ++n) {
        panel_scales[group * kPanel + n] = n < rows ? scales[(begin + n) * groups + group] : 0;
      }
    }
  });
}

int64_t ef_quantized_group() { return expertfleet::kGroup; }

#pragma GCC visibility pop
}
