// What the library tells about itself, for ctypes and other foreign function interfaces.
#include <string>

#include <torch/headeronly/version.h>
#include "aten/library.h"
#include "aten/version.h"
#include "loftq/cpu.h"
#include "loftq/packing.h"
#include "loftq/parallel.h"

#if defined(_WIN32)
#define LOFTQ_EXPORT extern "C" __declspec(dllexport)
#else
#define LOFTQ_EXPORT extern "C" __attribute__((visibility("default")))
#endif

#define LOFTQ_TEXT(value) LOFTQ_TEXT_OF(value)
#define LOFTQ_TEXT_OF(value) #value

#if defined(__clang__)
#define LOFTQ_COMPILER "clang " __clang_version__
#elif defined(__GNUC__)
#define LOFTQ_COMPILER "gcc " __VERSION__
#else
#define LOFTQ_COMPILER "unknown"
#endif

#if defined(LOFTQ_WITH_CUDA)
#define LOFTQ_HAS_CUDA "true"
#else
#define LOFTQ_HAS_CUDA "false"
#endif

namespace {

template <class Values>
std::string list_of(const Values& values) {
  std::string text;
  for (const auto& value : values) text += (text.empty() ? "[" : ", ") + std::to_string(value);
  return text + "]";
}

}  // namespace

// JSON. torch: the version whose headers it was built with; torch_at_least: the oldest one that it runs with.
LOFTQ_EXPORT const char* loftq_build_info() {
  static const std::string info = "{\"torch\": \"" TORCH_VERSION
                                  "\", \"torch_at_least\": \"" LOFTQ_TEXT(LOFTQ_TORCH_MAJOR) "." LOFTQ_TEXT(
                                      LOFTQ_TORCH_MINOR) "\", \"compiler\": \"" LOFTQ_COMPILER
                                                         "\", \"cuda\": " LOFTQ_HAS_CUDA ", \"group_sizes\": " +
                                  list_of(loftq::kGroupSizes) + ", \"code_bits\": " + list_of(loftq::kCodeBits) + "}";
  return info.c_str();
}

// The CPU instruction set in use, or null and the reason why there is none. LOFTQ_CPU_ISA forces one.
LOFTQ_EXPORT const char* loftq_cpu_isa(const char** reason) { return loftq::active_isa(reason); }

// Writes the names of the CPU instruction sets that this machine and build have, widest first, and returns their
// number.
LOFTQ_EXPORT int loftq_cpu_isas(const char** names, int most) { return loftq::supported_isas(names, most); }

// The most threads that a kernel uses, whatever torch has; below 1 for no limit.
LOFTQ_EXPORT void loftq_set_thread_limit(int threads) { loftq::set_thread_limit(threads); }
LOFTQ_EXPORT int loftq_thread_limit() { return loftq::thread_limit(); }

// Why torch refused the ops and kernels, of which then none is registered; null if it took them.
LOFTQ_EXPORT const char* loftq_load_error() { return loftq::aten::load_error(); }
