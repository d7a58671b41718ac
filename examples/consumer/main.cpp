// Quantizes a matrix to 4 bits, decodes it again, and prints the relative error.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "loftq/cpu.h"

int main() {
  constexpr int64_t n = 256, k = 1000, group_size = 64;
  constexpr int bits = 4, threads = 2;

  std::mt19937 random(0);
  std::normal_distribution<float> normal;
  std::vector<float> weight(n * k);
  for (float& w : weight) w = normal(random);

  std::vector<float> codebook;  // any ascending table of 2^bits values; here -1 .. 1, denser around zero
  for (int i = 0; i < 1 << bits; ++i) {
    const float t = -1 + 2.0f * i / ((1 << bits) - 1);
    codebook.push_back(std::copysign(std::pow(std::fabs(t), 1.3f), t));
  }

  std::vector<uint8_t> codes(n * loftq::row_bytes(k, bits));
  std::vector<float> scale(n * loftq::num_groups(k, group_size));
  loftq::QuantizeParams quantize = {};
  quantize.weight = weight.data();
  quantize.weight_dtype = loftq::DType::kFloat32;
  quantize.weight_stride = k;
  quantize.codebook = codebook.data();
  quantize.n = n;
  quantize.k = k;
  quantize.bits = bits;
  quantize.group_size = group_size;
  quantize.scale_rule = loftq::ScaleRule::kAbsmax;
  quantize.scale_search = true;
  quantize.scale_dtype = loftq::DType::kFloat32;
  quantize.codes = codes.data();
  quantize.scale = scale.data();
  if (loftq::Status error = loftq::launch_quantize_cpu(quantize, threads)) {
    std::fprintf(stderr, "quantize: %s\n", error);
    return 1;
  }

  std::vector<float> decoded(n * k);
  loftq::DequantizeParams dequantize = {};
  dequantize.codes = codes.data();
  dequantize.scale = scale.data();
  dequantize.scale_dtype = loftq::DType::kFloat32;
  dequantize.codebook = codebook.data();
  dequantize.n = n;
  dequantize.k = k;
  dequantize.bits = bits;
  dequantize.group_size = group_size;
  dequantize.out = decoded.data();
  dequantize.out_dtype = loftq::DType::kFloat32;
  if (loftq::Status error = loftq::launch_dequantize_cpu(dequantize, threads)) {
    std::fprintf(stderr, "dequantize: %s\n", error);
    return 1;
  }

  double error = 0, norm = 0;
  for (size_t i = 0; i < weight.size(); ++i) {
    error += std::pow(weight[i] - decoded[i], 2.0);
    norm += std::pow(weight[i], 2.0);
  }
  const double relative = std::sqrt(error / norm);
  std::printf("%d bits on %s: %zu -> %zu bytes, relative error %.4f\n", bits, loftq::active_isa(),
              weight.size() * sizeof(float), codes.size() + scale.size() * sizeof(float), relative);
  return relative < 0.12 ? 0 : 1;
}
