#include "elementwise_loops.h"

namespace expertfleet {

const ElementwiseKernels kElementwisePortable{store, swiglu, combine};

const ElementwiseKernels& elementwise_kernels(Isa isa) {
#if defined(EXPERTFLEET_X86)
  if (isa >= Isa::avx512) return kElementwiseAvx512;
  if (isa >= Isa::avx2) return kElementwiseAvx2;
#endif
  return kElementwisePortable;
}

}  // namespace expertfleet
