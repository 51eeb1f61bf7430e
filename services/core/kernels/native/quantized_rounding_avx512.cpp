#include "quantized_rounding.h"

namespace expertfleet {

RoundRows avx512_rounding(Format format) { return rounding_for(format); }

}  // namespace expertfleet
