#include "isa.h"

#include <atomic>
#include <cstdint>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace expertfleet {
namespace {

#if defined(__x86_64__) && defined(__linux__)
// Linux hands out the tile registers on request (Documentation/arch/x86/xstate.rst).
bool amx_permitted() {
  constexpr int kArchReqXcompPerm = 0x1023;
  constexpr int kXfeatureXtiledata = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
}

bool has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tile = d >> 24 & 1, bf16 = d >> 22 & 1, int8 = d >> 25 & 1;
  return tile && bf16 && int8 && amx_permitted();
}

bool has_avx512_bf16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}

Isa detect() {
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::portable;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return Isa::avx2;
  }
  if (!__builtin_cpu_supports("avx512vnni")) return Isa::avx512;
  if (!has_avx512_bf16()) return Isa::avx512_vnni;
  return has_amx() ? Isa::amx : Isa::avx512_bf16;
}
#else
Isa detect() { return Isa::portable; }
#endif

std::atomic<int> limit{static_cast<int>(Isa::amx)};

}  // namespace

Isa detected_isa() {
  static const Isa isa = detect();
  return isa;
}

Isa active_isa() {
  const int allowed = limit.load(std::memory_order_relaxed);
  return allowed < static_cast<int>(detected_isa()) ? static_cast<Isa>(allowed) : detected_isa();
}

}  // namespace expertfleet

extern "C" {
#pragma GCC visibility push(default)
int32_t ef_detected_isa() { return static_cast<int32_t>(expertfleet::detected_isa()); }
int32_t ef_active_isa() { return static_cast<int32_t>(expertfleet::active_isa()); }
void ef_limit_isa(int32_t isa) { expertfleet::limit.store(isa); }
#pragma GCC visibility pop
}
