#include "elementwise_loops.h"

namespace expertfleet {

const ElementwiseKernels kElementwiseAvx512{store, swiglu, combine};

}  // namespace expertfleet
