#include "quantized_rounding.h"

#include "pool.h"

namespace expertfleet {
namespace {

constexpr int64_t kRowsOfAChunk = 8;

RoundRows fastest_rounding(Format format) {
#if defined(EXPERTFLEET_X86)
  if (active_isa() >= Isa::avx512) return avx512_rounding(format);
  if (active_isa() >= Isa::avx2) return avx2_rounding(format);
#endif
  return portable_rounding(format);
}

}  // namespace

RoundRows portable_rounding(Format format) { return rounding_for(format); }

}  // namespace expertfleet

extern "C" {
#pragma GCC visibility push(default)

// See Rounding; weights are contiguous [count, inputs].
void ef_quantize(int32_t format, const void* weights, int32_t type, int64_t count, int64_t inputs,
                 void* values, int64_t row_bytes, void* scales, const float* ranges,
                 int64_t num_ranges) {
  using namespace expertfleet;
  const Rounding rounding{weights,   static_cast<Activation>(type), inputs, values, row_bytes,
                          scales, ranges,                        num_ranges};
  const RoundRows round = fastest_rounding(static_cast<Format>(format));
  parallel_for((count + kRowsOfAChunk - 1) / kRowsOfAChunk, [&](int64_t chunk) {
    const int64_t first = chunk * kRowsOfAChunk, last = first + kRowsOfAChunk;
    round(rounding, first, last < count ? last : count);
  });
}

#pragma GCC visibility pop
}
