// quantize.h, read literally: one scalar loop per group. It shares nothing with the kernels' code but the address of a
// code.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "loftq/quantize.h"

namespace reference {

using loftq::DType;
using loftq::ScaleRule;

inline float rounded(DType dtype, float x) {
  if (dtype == DType::kFloat32) return x;
  if (dtype == DType::kFloat16) return static_cast<float>(static_cast<_Float16>(x));
  if (x != x) return x;
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t low = bits & 0xffffu, even = bits >> 16 & 1u;
  bits &= 0xffff0000u;
  if (low > 0x8000u || (low == 0x8000u && even)) bits += 0x10000u;
  std::memcpy(&x, &bits, 4);
  return x;
}

// 32 interleaved partial sums, folded by halves.
struct Sums {
  double part[32] = {};
  void add(int64_t column, double term) { part[column % 32] += term; }
  double total() const {
    double sum[32];
    std::copy(part, part + 32, sum);
    for (int half = 16; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) sum[i] += sum[i + half];
    }
    return sum[0];
  }
};

struct Problem {
  int64_t n, k;
  int bits;
  int64_t group_size;
  ScaleRule rule;
  bool search;
  DType scale_dtype;
  std::vector<float> codebook;
  std::vector<float> weight;    // [n, k]
  std::vector<float> low_rank;  // [n, k] or empty
};

struct Result {
  std::vector<uint8_t> codes;   // [n, k], one per byte
  std::vector<float> scale;     // [n, groups]
  std::vector<float> offset;    // [n, groups] or empty
  std::vector<float> decoded;   // [n, k]
  std::vector<float> residual;  // [n, k]
  std::vector<double> norm2;    // [n]
};

inline int nearest(const std::vector<float>& codebook, float x) {
  int count = 0;
  for (size_t i = 0; i + 1 < codebook.size(); ++i) count += (codebook[i] + codebook[i + 1]) / 2 < x;
  return count;
}

inline float base_scale(const Problem& p, const float* w, int64_t count) {
  float low = w[0], high = w[0], largest = 0.0f;
  Sums sum, deviation;
  for (int64_t i = 0; i < count; ++i) {
    if (!std::isfinite(w[i])) return INFINITY;
    low = std::fmin(low, w[i]);
    high = std::fmax(high, w[i]);
    largest = std::fmax(largest, std::fabs(w[i]));
    sum.add(i, w[i]);
  }
  if (p.rule == ScaleRule::kMinMax) return (high - low + 0.0f) / static_cast<float>((1 << p.bits) - 1);
  const float absmax = largest / p.codebook.back();
  if (p.rule == ScaleRule::kAbsmax) return absmax;
  const double mean = sum.total() / static_cast<double>(count);
  for (int64_t i = 0; i < count; ++i) deviation.add(i, (w[i] - mean) * (w[i] - mean));
  const double std_dev = std::sqrt(deviation.total() / static_cast<double>(count - 1));
  const float scale = static_cast<float>(mean + 2.5 * std_dev);
  return scale > 0.0f ? scale : absmax;
}

// One group: w [count] -> codes [count], returns scale and offset.
inline std::pair<float, float> quantize_group(const Problem& p, const float* w, int64_t count, uint8_t* codes) {
  const float base = base_scale(p, w, count);
  float low = INFINITY, high = -INFINITY;
  for (int64_t i = 0; i < count; ++i) low = std::fmin(low, w[i] + 0.0f), high = std::fmax(high, w[i] + 0.0f);
  const auto scale_at = [&](float f) {
    const float scale = rounded(p.scale_dtype, f * base);
    const float half = (1.0f - f) * 0.5f * (high - low);
    const float top = static_cast<float>(1 << (p.bits - 1)) * scale;
    return std::pair<float, float>(scale,
                                   p.rule == ScaleRule::kMinMax ? rounded(p.scale_dtype, (low + half) + top) : 0.0f);
  };
  const auto code_of = [&](float x, std::pair<float, float> at) {
    const float inverse = 1.0f / std::fmax(at.first, FLT_MIN);
    return nearest(p.codebook, (x - at.second) * inverse);
  };
  float best_factor = 1.0f;
  double least = INFINITY;
  for (int step = 0; step < (p.search ? 25 : 0); ++step) {
    const float factor = 1.0f - static_cast<float>(step) / 32.0f;
    const auto at = scale_at(factor);
    Sums error;
    for (int64_t i = 0; i < count; ++i) {
      const float product = p.codebook[code_of(w[i], at)] * at.first;
      const float decoded = p.rule == ScaleRule::kMinMax ? product + at.second : product;
      const float difference = w[i] - decoded;
      error.add(i, static_cast<double>(difference) * difference);
    }
    if (error.total() < least) least = error.total(), best_factor = factor;
  }
  const auto best = scale_at(best_factor);
  for (int64_t i = 0; i < count; ++i) codes[i] = static_cast<uint8_t>(code_of(w[i], best));
  return best;
}

inline Result quantize(const Problem& p) {
  const int64_t groups = loftq::num_groups(p.k, p.group_size), size = loftq::group_width(p.k, p.group_size);
  Result r;
  r.codes.resize(p.n * p.k);
  r.scale.resize(p.n * groups);
  if (p.rule == ScaleRule::kMinMax) r.offset.resize(p.n * groups);
  r.decoded.resize(p.n * p.k);
  r.residual.resize(p.n * p.k);
  std::vector<float> target(p.weight);
  for (size_t i = 0; i < p.low_rank.size(); ++i) target[i] = p.weight[i] - p.low_rank[i];
  for (int64_t row = 0; row < p.n; ++row) {
    Sums norm2;
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t first = row * p.k + group * size;
      const int64_t count = std::min(size, p.k - group * size);
      const auto [scale, offset] = quantize_group(p, &target[first], count, &r.codes[first]);
      r.scale[row * groups + group] = scale;
      if (!r.offset.empty()) r.offset[row * groups + group] = offset;
      for (int64_t i = first; i < first + count; ++i) {
        const float product = p.codebook[r.codes[i]] * scale;
        r.decoded[i] = r.offset.empty() ? product : product + offset;
        r.residual[i] = p.weight[i] - r.decoded[i];
        norm2.add(i - row * p.k, static_cast<double>(r.residual[i]) * r.residual[i]);
      }
    }
    r.norm2.push_back(norm2.total());
  }
  return r;
}

// Fields beyond k are 0.
inline std::vector<uint8_t> pack(const std::vector<uint8_t>& codes, int64_t n, int64_t k, int bits) {
  const int64_t bytes = loftq::row_bytes(k, bits);
  std::vector<uint8_t> packed(n * bytes, 0);
  for (int64_t row = 0; row < n; ++row) {
    for (int64_t column = 0; column < k; ++column) {
      const loftq::CodeAddress at = loftq::code_address(column, bits);
      packed[row * bytes + at.byte] |= static_cast<uint8_t>(codes[row * k + column] << at.shift);
    }
  }
  return packed;
}

}  // namespace reference
