// A test program is a main() that calls CHECK and returns test_result().
#pragma once

#include <cstdio>

namespace loftq::testing {

inline int& failures() {
  static int count = 0;
  return count;
}

inline int test_result() {
  if (failures() > 0) std::fprintf(stderr, "%d checks failed\n", failures());
  return failures() > 0 ? 1 : 0;
}

}  // namespace loftq::testing

// CHECK(condition, "printf format", values...): says where and with which values a condition failed, up to ten times.
#define CHECK(condition, ...)                                                     \
  do {                                                                            \
    if (!(condition) && ++::loftq::testing::failures() <= 10) {                   \
      std::fprintf(stderr, "%s:%d: %s failed: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                          \
      std::fprintf(stderr, "\n");                                                 \
    }                                                                             \
  } while (false)
