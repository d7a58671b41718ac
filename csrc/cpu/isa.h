// What this machine's processor and operating system can run.
#pragma once

#include <cstdint>

namespace loftq {

enum Feature : uint32_t {
  kF16c = 1u << 0,
  kAvx2 = 1u << 1,
  kAvx512 = 1u << 2,      // F, BW, DQ and VL together: every server since 2017, desktop Zen 4
  kAvx512Bf16 = 1u << 3,  // Cooper Lake, Sapphire Rapids, Zen 4
};

// A mask of Feature; 0 on machines other than x86-64.
uint32_t cpu_features();

}  // namespace loftq
