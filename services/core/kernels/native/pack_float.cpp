// Packs rows of float weights into panels.

#include <algorithm>

#include "float_format.h"
#include "pool.h"

namespace expertfleet {
namespace {

// step of output n, half h (float32 has one) is value (step * 32 + n) * halves + h of a panel.
template <class Value, int64_t kHalves>
void pack_panel(const Value* weight, int64_t outputs, int64_t inputs, Value* panel) {
  const int64_t padded = padded_inputs(inputs);
  for (int64_t begin = 0; begin < padded; begin += kInputPad) {
    const int64_t end = std::min(begin + kInputPad, inputs);
    for (int64_t n = 0; n < kPanel; ++n) {
      Value run[kInputPad] = {};
      if (n < outputs && begin < end) {
        std::memcpy(run, weight + n * inputs + begin, (end - begin) * sizeof(Value));
      }
      Value* target = panel + begin * kPanel + n * kHalves;
      for (int64_t k = 0; k < kInputPad; k += kHalves) {
        for (int64_t h = 0; h < kHalves; ++h) target[k * kPanel + h] = run[k + h];
      }
    }
  }
}

template <class Value, int64_t kHalves>
void pack(const void* weight, int64_t outputs, int64_t inputs, void* packed) {
  const int64_t panel_values = padded_inputs(inputs) * kPanel;
  parallel_for(num_panels(outputs), [&](int64_t panel) {
    const int64_t first = panel * kPanel;
    pack_panel<Value, kHalves>(static_cast<const Value*>(weight) + first * inputs,
                               std::min(kPanel, outputs - first), inputs,
                               static_cast<Value*>(packed) + panel * panel_values);
  });
}

}  // namespace
}  // namespace expertfleet

extern "C" {
#pragma GCC visibility push(default)
// Packs weight rows [outputs, inputs] of float32 (of bfloat16) into the panels at `packed`. A
// matrix may be packed in parts that begin at multiples of kPanel outputs.
void ef_pack_float32(const void* weight, int64_t outputs, int64_t inputs, void* packed) {
  expertfleet::pack<uint32_t, 1>(weight, outputs, inputs, packed);
}
void ef_pack_bfloat16(const void* weight, int64_t outputs, int64_t inputs, void* packed) {
  expertfleet::pack<uint16_t, 2>(weight, outputs, inputs, packed);
}
#pragma GCC visibility pop
}
