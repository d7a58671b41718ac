// Plain data types shared by every kernel. This header does not need torch and may be vendored alone.
#pragma once

#include "loftq/config.h"  // first: it refuses machines that the library is not for

#include <cstdint>

#if defined(__CUDACC__)
#define LOFTQ_HD __host__ __device__
#else
#define LOFTQ_HD
#endif

namespace loftq {
inline namespace LOFTQ_VERSION {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// How the scale (and offset) of a group follows from its weights; see quantize.h.
enum class ScaleRule : int { kAbsmax = 0, kMinMax = 1, kMeanStd = 2 };

// What a launch_* function returns: a static message, or nullptr when all is well. Kernels never throw, print or abort.
using Status = const char*;

constexpr LOFTQ_HD int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

constexpr LOFTQ_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace LOFTQ_VERSION
}  // namespace loftq
