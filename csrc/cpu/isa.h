// What this machine's processor and operating system can run.
#pragma once

#include <cstdint>

#include "loftq/config.h"

namespace loftq {
inline namespace LOFTQ_VERSION {

enum Feature : uint32_t {
  kF16c = 1u << 0,
  kAvx2 = 1u << 1,
  kAvx512 = 1u << 2,      // F, BW, DQ and VL together: every server since 2017, desktop Zen 4
  kAvx512Bf16 = 1u << 3,  // Cooper Lake, Sapphire Rapids, Zen 4
  kAmxBf16 = 1u << 4,     // AMX-TILE and AMX-BF16: Sapphire Rapids and its successors
};

// A mask of Feature; 0 on machines other than x86-64.
uint32_t cpu_features();

// Whether this process may use the tile registers of AMX; for machines with kAmxBf16. The first call asks the operating
// system, which from then on requires alternate signal stacks to be 8 KB larger: do not call it before there is need.
bool tiles_permitted();

}  // namespace LOFTQ_VERSION
}  // namespace loftq
