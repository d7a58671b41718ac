// Quantizes a matrix to 4 bits, decodes it again, and multiplies by it, with an adapter and a bias: on the library's
// threads, then on our own. Prints the errors; ends with status 1 if one is too large.
#include <cmath>
#include <cstdio>
#include <random>
#include <thread>
#include <vector>

#include "loftq/cpu.h"
#include "loftq/parallel.h"

namespace {

using Floats = std::vector<float>;

constexpr int64_t n = 256, k = 1000, group_size = 64, m = 3, rank = 8;
constexpr int bits = 4, num_threads = 2;
constexpr float scaling = 0.5f;

struct Packed {
  Floats codebook;
  std::vector<uint8_t> codes = std::vector<uint8_t>(n * loftq::row_bytes(k, bits));
  Floats scale = Floats(n * loftq::num_groups(k, group_size));
};

// Any ascending table of 2^bits values; here -1 .. 1, denser around zero.
Floats make_codebook() {
  Floats codebook;
  for (int i = 0; i < 1 << bits; ++i) {
    const float t = -1 + 2.0f * static_cast<float>(i) / ((1 << bits) - 1);
    codebook.push_back(std::copysign(std::pow(std::fabs(t), 1.3f), t));
  }
  return codebook;
}

Floats normal_values(int64_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Floats values(static_cast<size_t>(count));
  for (float& value : values) value = normal(random);
  return values;
}

loftq::Status quantize(const Floats& weight, Packed& packed) {
  loftq::QuantizeParams params = {};
  params.weight = weight.data();
  params.weight_dtype = loftq::DType::kFloat32;
  params.weight_stride = k;
  params.codebook = packed.codebook.data();
  params.n = n;
  params.k = k;
  params.bits = bits;
  params.group_size = group_size;
  params.scale_rule = loftq::ScaleRule::kAbsmax;
  params.scale_search = true;
  params.scale_dtype = loftq::DType::kFloat32;
  params.codes = packed.codes.data();
  params.scale = packed.scale.data();
  return loftq::launch_quantize_cpu(params, num_threads);
}

loftq::Status dequantize(const Packed& packed, Floats& out) {
  loftq::DequantizeParams params = {};
  params.codes = packed.codes.data();
  params.scale = packed.scale.data();
  params.scale_dtype = loftq::DType::kFloat32;
  params.codebook = packed.codebook.data();
  params.n = n;
  params.k = k;
  params.bits = bits;
  params.group_size = group_size;
  params.out = out.data();
  params.out_dtype = loftq::DType::kFloat32;
  return loftq::launch_dequantize_cpu(params, num_threads);
}

struct Layer {
  Packed packed;
  Floats lora_A = normal_values(rank * k, 1), lora_B = normal_values(n * rank, 2), bias = normal_values(n, 3);
};

// y = x D^T + scaling * (x lora_A^T) lora_B^T + bias
loftq::Status multiply(const Floats& x, const Layer& layer, Floats& y) {
  constexpr loftq::DType kFloat32 = loftq::DType::kFloat32;
  loftq::LinearParams params = {};
  params.x = {x.data(), kFloat32, m, k, k};
  params.weight.codes = layer.packed.codes.data();
  params.weight.scale = layer.packed.scale.data();
  params.weight.scale_dtype = kFloat32;
  params.weight.codebook = layer.packed.codebook.data();
  params.weight.n = n;
  params.weight.k = k;
  params.weight.bits = bits;
  params.weight.group_size = group_size;
  params.lora_A = {layer.lora_A.data(), kFloat32, rank, k, k};
  params.lora_B = {layer.lora_B.data(), kFloat32, n, rank, rank};
  params.scaling = scaling;
  params.bias = layer.bias.data();
  params.bias_dtype = kFloat32;
  params.y = y.data();
  return loftq::launch_linear_cpu(params, num_threads);
}

// The same product in double, with the decoded weight.
std::vector<double> product(const Floats& x, const Layer& layer, const Floats& dense) {
  const auto dot = [&x](int64_t row, const float* factors) {
    double sum = 0;
    for (int64_t column = 0; column < k; ++column) sum += double{x[row * k + column]} * factors[column];
    return sum;
  };
  std::vector<double> y(m * n);
  for (int64_t row = 0; row < m; ++row) {
    double hidden[rank];
    for (int64_t r = 0; r < rank; ++r) hidden[r] = dot(row, &layer.lora_A[r * k]);
    for (int64_t i = 0; i < n; ++i) {
      double adapter = 0;
      for (int64_t r = 0; r < rank; ++r) adapter += hidden[r] * layer.lora_B[i * rank + r];
      y[row * n + i] = dot(row, &dense[i * k]) + scaling * adapter + layer.bias[i];
    }
  }
  return y;
}

// ||a - b|| / ||b||
template <class A, class B>
double relative_error(const A& a, const B& b) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < b.size(); ++i) {
    error += std::pow(double{a[i]} - double{b[i]}, 2.0);
    norm += std::pow(double{b[i]}, 2.0);
  }
  return std::sqrt(error / norm);
}

// A thread pool would hand out the calls; this starts threads for them.
void run_on_own_threads(int count, void (*task)(void* context), void* context) {
  std::vector<std::thread> threads;
  for (int i = 1; i < count; ++i) threads.emplace_back(task, context);
  task(context);
  for (std::thread& thread : threads) thread.join();
}

bool failed(const char* what, loftq::Status error) {
  if (error != nullptr) std::fprintf(stderr, "%s: %s\n", what, error);
  return error != nullptr;
}

}  // namespace

int main() {
  const Floats weight = normal_values(n * k, 0), x = normal_values(m * k, 4);
  Layer layer;
  layer.packed.codebook = make_codebook();
  Floats dense(n * k), y(m * n), again(m * n);
  if (failed("quantize", quantize(weight, layer.packed))) return 1;
  if (failed("dequantize", dequantize(layer.packed, dense))) return 1;
  if (failed("multiply", multiply(x, layer, y))) return 1;
  loftq::set_parallel_runner(run_on_own_threads);
  if (failed("multiply on our threads", multiply(x, layer, again))) return 1;
  loftq::set_parallel_runner(nullptr);

  const double of_weight = relative_error(dense, weight), of_product = relative_error(y, product(x, layer, dense));
  std::printf("%d bits on %s: relative error of the weight %.4f, of the product %.1e, %s on our own threads\n", bits,
              loftq::active_isa(), of_weight, of_product, y == again ? "the same" : "another one");
  return of_weight < 0.12 && of_product < 1e-5 && y == again ? 0 : 1;
}
