// The instruction sets that a test program goes through.
#pragma once

#include <cstdlib>
#include <string>
#include <vector>

#include "loftq/cpu.h"

namespace loftq::testing {

// Those of this machine, or only the one that LOFTQ_CPU_ISA names (valgrind does not support AVX-512).
inline std::vector<std::string> isas_under_test() {
  const char* const forced = std::getenv("LOFTQ_CPU_ISA");
  if (forced != nullptr) return {forced};
  const char* names[8];
  return {names, names + supported_isas(names, 8)};
}

}  // namespace loftq::testing
