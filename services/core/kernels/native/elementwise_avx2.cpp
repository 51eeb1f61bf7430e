#include "elementwise_loops.h"

namespace expertfleet {

const ElementwiseKernels kElementwiseAvx2{store, swiglu, combine};

}  // namespace expertfleet
