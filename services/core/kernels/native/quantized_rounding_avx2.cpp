#include "quantized_rounding.h"

namespace expertfleet {

RoundRows avx2_rounding(Format format) { return rounding_for(format); }

}  // namespace expertfleet
