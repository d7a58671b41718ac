// A program without Python that loads the library named by its argument and calls the ops through torch's dispatcher.
#include <dlfcn.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "aten/dispatcher.h"

namespace {

using namespace loftq::aten;

constexpr Device kHost{0, -1};
constexpr int64_t kM = 3, kN = 7, kK = 130, kRank = 2, kGroupSize = 32, kGroups = 5;
constexpr double kScaling = 0.5;

// A smooth, irregular matrix of numbers in [-1, 1].
Tensor waves(int64_t rows, int64_t columns, double frequency) {
  const Tensor result = empty({rows, columns}, kFloat, kHost);
  float* next = result.mutable_data<float>();
  for (int64_t i = 0; i < rows * columns; ++i)
    next[i] = static_cast<float>(std::sin(frequency * (i + 1.0) * (i + 1.0)));
  return result;
}

double at(const Tensor& matrix, int64_t row, int64_t column) {
  return matrix.const_data<float>()[row * matrix.size(1) + column];
}

// x W^T + scaling (x A^T) B^T + bias for one element, in float64 from codes, one per byte.
double expected(int64_t m, int64_t n, const Tensor& x, const Tensor& codes, const Tensor& scale, const Tensor& codebook,
                const Tensor& lora_A, const Tensor& lora_B, const Tensor& bias) {
  double sum = bias.const_data<float>()[n];
  for (int64_t k = 0; k < kK; ++k) {
    const int code = codes.const_data<uint8_t>()[n * kK + k];
    sum += at(x, m, k) * codebook.const_data<float>()[code] * at(scale, n, k / kGroupSize);
    for (int64_t r = 0; r < kRank; ++r) sum += kScaling * at(x, m, k) * at(lora_A, r, k) * at(lora_B, n, r);
  }
  return sum;
}

double largest_difference() {
  const Tensor x = waves(kM, kK, 0.1), weight = waves(kN, kK, 0.2), bias = empty({kN}, kFloat, kHost);
  const Tensor lora_A = waves(kRank, kK, 0.3), lora_B = waves(kN, kRank, 0.4), codebook = empty({16}, kFloat, kHost);
  for (int i = 0; i < kN; ++i) bias.mutable_data<float>()[i] = static_cast<float>(i) / 4;
  for (int i = 0; i < 16; ++i) codebook.mutable_data<float>()[i] = static_cast<float>(i - 8) / 8;
  using Stored = std::tuple<Tensor, Tensor, Tensor>;
  const auto [packed, scale, offset] =
      call<Stored>("loftq_kernels::quantize", "", weight, codebook, kGroupSize, std::string("absmax"), kFloat, false);
  const Tensor codes = call<Tensor>("loftq_kernels::unpack_codes", "", packed, int64_t{4}, kK);
  const Tensor y =
      call<Tensor>("loftq_kernels::qlora_linear", "", x, packed, scale, std::optional<Tensor>(), codebook, kGroupSize,
                   std::optional(lora_A), std::optional(lora_B), kScaling, std::optional(bias));
  if (y.size(0) != kM || y.size(1) != kN || scale.size(1) != kGroups) throw std::runtime_error("wrong shapes");
  double largest = 0;
  for (int64_t m = 0; m < kM; ++m) {
    for (int64_t n = 0; n < kN; ++n) {
      const double right = expected(m, n, x, codes, scale, codebook, lora_A, lora_B, bias);
      largest = std::max(largest, std::abs(at(y, m, n) - right));
    }
  }
  return largest;
}

bool refuses_wrong_shapes() {
  try {
    call<Tensor>("loftq_kernels::pack_codes", "", empty({3}, kByte, kHost), int64_t{4});
  } catch (const std::runtime_error&) {
    return true;
  }
  return false;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2 || dlopen(argv[1], RTLD_NOW) == nullptr) {
    std::fprintf(stderr, "cannot load the library: %s\n", argc == 2 ? dlerror() : "its path is missing");
    return EXIT_FAILURE;
  }
  const double difference = largest_difference();
  std::printf("largest difference from float64: %.2e\n", difference);
  if (!(difference < 1e-4) || !refuses_wrong_shapes()) return EXIT_FAILURE;
  if (dlsym(RTLD_DEFAULT, "Py_IsInitialized") != nullptr) {
    std::fprintf(stderr, "there is a Python in this process\n");
    return EXIT_FAILURE;
  }
  return EXIT_SUCCESS;
}
