// Which instruction sets kernels may use.
#pragma once

namespace expertfleet {

// Each level has all that is below it. avx512 is F, BW, DQ and VL; amx is AMX-TILE, -BF16, -INT8.
enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, avx512_vnni = 3, avx512_bf16 = 4, amx = 5 };

// What this processor and its kernel offer.
Isa detected_isa();

// The level in use: the detected one, or a lower one that a test has asked for.
Isa active_isa();

}  // namespace expertfleet
