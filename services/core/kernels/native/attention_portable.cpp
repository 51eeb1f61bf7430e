#include "attention_kernel.h"

namespace expertfleet {

const AttentionKernels& portable_attention_kernels(Element element) {
  return element == Element::float32 ? float_attention_kernels<float>()
                                     : float_attention_kernels<uint16_t>();
}

}  // namespace expertfleet
