#include "cpu/isa.h"
#include "loftq/config.h"

#include "cpu/target.h"

#if LOFTQ_X86
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace loftq {
inline namespace LOFTQ_VERSION {

#if LOFTQ_X86

namespace {

// XCR0: the register files that the operating system saves at a context switch. A processor may have AVX-512 while
// the system does not save zmm registers; CPUID alone would then choose instructions that fault.
uint64_t saved_registers() {
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

constexpr bool has_all(uint64_t value, uint64_t mask) { return (value & mask) == mask; }

uint32_t detect() {
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return 0;
  const bool f16c = c & bit_F16C, fma = c & bit_FMA;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
  constexpr uint64_t kYmm = 0x06;       // xmm, ymm
  constexpr uint64_t kZmm = 0xe6;       // and the mask registers, the upper halves of zmm0-15, zmm16-31
  constexpr uint64_t kTiles = 3 << 17;  // their configuration and their data
  const uint64_t saved = saved_registers();
  uint32_t features = 0;
  if (has_all(saved, kYmm) && f16c) features |= kF16c;
  if (has_all(saved, kYmm) && (b & bit_AVX2) && fma) features |= kAvx2;
  constexpr uint32_t kAvx512Bits = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
  if (has_all(saved, kZmm) && has_all(b, kAvx512Bits)) features |= kAvx512;
  constexpr uint32_t kAmxBits = 1u << 24 | 1u << 22;  // AMX-TILE, AMX-BF16: GCC 10's cpuid.h does not name them
  if (has_all(saved, kTiles) && has_all(d, kAmxBits)) features |= kAmxBf16;
  if ((features & kAvx512) && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & bit_AVX512BF16)) features |= kAvx512Bf16;
  return features;
}

}  // namespace

uint32_t cpu_features() {
  static const uint32_t features = detect();
  return features;
}

#else

uint32_t cpu_features() { return 0; }

#endif

#if LOFTQ_X86 && defined(__linux__)

bool tiles_permitted() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  // The request is refused where a seccomp filter forbids it, or where the alternate signal stack of a thread has no
  // room for the tiles.
  static const bool permitted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return permitted;
}

#else

bool tiles_permitted() { return false; }  // other operating systems have other ways to ask, which are not implemented

#endif

}  // namespace LOFTQ_VERSION
}  // namespace loftq
