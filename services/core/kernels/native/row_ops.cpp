#include "row_ops.h"

namespace expertfleet {

const RowOps& row_ops(Element element, Isa isa) {
#if defined(EXPERTFLEET_X86)
  if (isa >= Isa::avx512) return avx512_row_ops(element);
  if (isa >= Isa::avx2) return avx2_row_ops(element);
#endif
  return portable_row_ops(element);
}

}  // namespace expertfleet
