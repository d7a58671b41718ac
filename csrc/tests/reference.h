// Quantization as loftq/quantize.h states it, one weight at a time and without any of the library's own functions but
// the sizes. The kernels are compared with this, bit for bit.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "loftq/quantize.h"

namespace loftq::testing {

inline bool same_bits(float a, float b) {
  return std::memcmp(&a, &b, sizeof a) == 0 || (std::isnan(a) && std::isnan(b));
}

// The value rounded to nearest even in a format of `mantissa` stored bits whose smallest normal is 2^lowest_exponent.
inline float round_to_grid(float value, int mantissa, int lowest_exponent, double largest) {
  if (!std::isfinite(value) || value == 0) return value;
  const int exponent = std::max(std::ilogb(value), lowest_exponent);
  const double ulp = std::ldexp(1.0, exponent - mantissa);
  const double rounded = std::nearbyint(value / ulp) * ulp;
  if (std::fabs(rounded) > largest) return std::copysign(std::numeric_limits<float>::infinity(), value);
  return std::copysign(static_cast<float>(rounded), value);
}

inline float round_to(DType dtype, float value) {
  if (dtype == DType::kFloat16) return round_to_grid(value, 10, -14, 65504.0);
  if (dtype == DType::kBFloat16) return round_to_grid(value, 7, -126, 3.3895313892515355e38);
  return value;
}

// Bits of a value that fp16 or bf16 holds exactly, by search of its exponent.
inline uint16_t encode(DType dtype, float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const int mantissa = dtype == DType::kFloat16 ? 10 : 7;
  const int lowest = dtype == DType::kFloat16 ? -14 : -126;
  const uint16_t infinity = dtype == DType::kFloat16 ? 0x7c00 : 0x7f80;
  const double magnitude = std::fabs(static_cast<double>(value));
  if (std::isnan(value)) return static_cast<uint16_t>(infinity | 1 << (mantissa - 1));
  if (std::isinf(value)) return sign | infinity;
  if (magnitude < std::ldexp(1.0, lowest))
    return sign | static_cast<uint16_t>(std::ldexp(magnitude, mantissa - lowest));
  const int exponent = std::ilogb(magnitude);
  const int fraction = static_cast<int>(std::ldexp(magnitude, mantissa - exponent)) - (1 << mantissa);
  return static_cast<uint16_t>(sign | (exponent - lowest + 1) << mantissa | fraction);
}

inline float decode(DType dtype, uint16_t bits) {
  const int mantissa = dtype == DType::kFloat16 ? 10 : 7;
  const int lowest = dtype == DType::kFloat16 ? -14 : -126;
  const int largest_exponent = dtype == DType::kFloat16 ? 31 : 255;
  const int exponent = (bits & 0x7fff) >> mantissa;
  const int fraction = bits & ((1 << mantissa) - 1);
  double magnitude;
  if (exponent == largest_exponent) {
    magnitude = fraction ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity();
  } else if (exponent == 0) {
    magnitude = std::ldexp(fraction, lowest - mantissa);
  } else {
    magnitude = std::ldexp(fraction + (1 << mantissa), exponent - 1 + lowest - mantissa);
  }
  return static_cast<float>(bits & 0x8000 ? -magnitude : magnitude);
}

// Values of `dtype` held in bytes, as the kernels take and give them.
inline std::vector<char> to_bytes(DType dtype, const std::vector<float>& values) {
  std::vector<char> bytes(values.size() * size_of(dtype));
  for (size_t i = 0; i < values.size(); ++i) {
    const uint16_t word = dtype == DType::kFloat32 ? 0 : encode(dtype, values[i]);
    std::memcpy(bytes.data() + i * size_of(dtype), dtype == DType::kFloat32 ? (const void*)&values[i] : &word,
                size_of(dtype));
  }
  return bytes;
}

inline std::vector<float> from_bytes(DType dtype, const std::vector<char>& bytes) {
  std::vector<float> values(bytes.size() / size_of(dtype));
  for (size_t i = 0; i < values.size(); ++i) {
    uint16_t word;
    if (dtype == DType::kFloat32) {
      std::memcpy(&values[i], bytes.data() + 4 * i, 4);
    } else {
      std::memcpy(&word, bytes.data() + 2 * i, 2);
      values[i] = decode(dtype, word);
    }
  }
  return values;
}

struct Group {
  float scale, offset;
  std::vector<int> codes;
  std::vector<float> decoded;
};

struct Rule {
  std::vector<float> codebook;
  ScaleRule scale_rule;
  DType scale_dtype;
  bool scale_search;
};

// 32 interleaved partial sums, folded by halves.
inline double sum(const std::vector<double>& terms) {
  double partial[32] = {};
  for (size_t i = 0; i < terms.size(); ++i) partial[i % 32] += terms[i];
  for (int half = 16; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) partial[i] += partial[i + half];
  }
  return partial[0];
}

inline Group quantize_with_factor(const std::vector<float>& w, const Rule& rule, float factor) {
  const int size = static_cast<int>(rule.codebook.size());
  float largest = 0, low = w[0], high = w[0];
  std::vector<double> terms;
  for (float v : w) {
    largest = std::max(largest, std::fabs(v));
    low = std::min(low, v);
    high = std::max(high, v);
    terms.push_back(v);
  }
  float base = largest / rule.codebook.back();
  if (rule.scale_rule == ScaleRule::kMinMax) base = (high - low) / (size - 1);
  if (rule.scale_rule == ScaleRule::kMeanStd && w.size() > 1) {
    const double mean = sum(terms) / w.size();
    for (double& term : terms) term = (term - mean) * (term - mean);
    const float scale = static_cast<float>(mean + 2.5 * std::sqrt(sum(terms) / (w.size() - 1)));
    if (scale > 0) base = scale;
  }
  Group group;
  group.scale = round_to(rule.scale_dtype, factor * base);
  group.offset = 0;
  if (rule.scale_rule == ScaleRule::kMinMax) {
    const float slack = (1 - factor) * 0.5f * (high - low);
    const float from_low = (low + slack);
    const float half = size / 2 * group.scale;
    group.offset = round_to(rule.scale_dtype, from_low + half);
  }
  const float inverse = 1 / std::max(group.scale, std::numeric_limits<float>::min());
  for (float v : w) {
    const float shifted = rule.scale_rule == ScaleRule::kMinMax ? v - group.offset : v;
    const float x = shifted * inverse;
    int code = 0;
    for (int i = 0; i + 1 < size; ++i) code += (rule.codebook[i] + rule.codebook[i + 1]) / 2 < x;
    float decoded = rule.codebook[code] * group.scale;
    if (rule.scale_rule == ScaleRule::kMinMax) decoded += group.offset;
    group.codes.push_back(code);
    group.decoded.push_back(decoded);
  }
  return group;
}

inline Group quantize_group(const std::vector<float>& w, const Rule& rule) {
  Group best;
  double least = 0;
  for (int step = 0; step < (rule.scale_search ? 25 : 1); ++step) {
    Group candidate = quantize_with_factor(w, rule, 1 - step / 32.0f);
    std::vector<double> terms;
    for (size_t i = 0; i < w.size(); ++i) {
      const double difference = w[i] - candidate.decoded[i];
      terms.push_back(difference * difference);
    }
    const double error = sum(terms);
    if (step > 0 && !(error < least)) continue;
    least = error;
    best = candidate;
  }
  return best;
}

}  // namespace loftq::testing
