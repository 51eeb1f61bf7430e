#include "row_ops_kernel.h"

namespace expertfleet {

const RowOps& avx512_row_ops(Element element) { return compiled_row_ops(element); }

}  // namespace expertfleet
