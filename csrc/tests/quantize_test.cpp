// Quantize and dequantize of every instruction set that this machine has, against the reference, bit for bit.
#include <algorithm>
#include <cstdlib>
#include <random>
#include <string>

#include "loftq/cpu.h"
#include "tests/check.h"
#include "tests/isas.h"
#include "tests/reference.h"

using namespace loftq;
using namespace loftq::testing;

namespace {

struct Case {
  std::string isa;
  Rule rule;
  int bits;
  int64_t n, k, group_size, stride;
  DType weight_dtype;
  bool with_low_rank;
  DType residual_dtype = DType::kFloat32;

  std::string describe() const {
    return isa + " bits " + std::to_string(bits) + " n " + std::to_string(n) + " k " + std::to_string(k) + " group " +
           std::to_string(group_size) + " rule " + std::to_string(static_cast<int>(rule.scale_rule)) + " dtypes " +
           std::to_string(static_cast<int>(weight_dtype)) + std::to_string(static_cast<int>(rule.scale_dtype)) +
           (rule.scale_search ? " search" : "") + (with_low_rank ? " low rank" : "");
  }
};

// All buffers have exactly the size of the contract, so that a sanitizer sees one element too many.
struct Result {
  std::vector<uint8_t> codes;
  std::vector<char> scale, offset, residual;
  std::vector<double> norm2;
};

QuantizeParams params_of(const Case& c, const std::vector<char>& weight, Result& out) {
  const int64_t groups = num_groups(c.k, c.group_size);
  const bool affine = c.rule.scale_rule == ScaleRule::kMinMax;
  out.codes.assign(c.n * row_bytes(c.k, c.bits), 0xee);
  out.scale.assign(c.n * groups * size_of(c.rule.scale_dtype), 0);
  out.offset.assign(affine ? out.scale.size() : 0, 0);
  QuantizeParams p = {};
  p.weight = weight.data();
  p.weight_dtype = c.weight_dtype;
  p.weight_stride = c.stride;
  p.codebook = c.rule.codebook.data();
  p.n = c.n;
  p.k = c.k;
  p.bits = c.bits;
  p.group_size = c.group_size;
  p.scale_rule = c.rule.scale_rule;
  p.scale_search = c.rule.scale_search;
  p.scale_dtype = c.rule.scale_dtype;
  p.codes = out.codes.data();
  p.scale = out.scale.data();
  p.offset = affine ? out.offset.data() : nullptr;
  return p;
}

struct Expected {
  std::vector<int> codes;  // [n, k]
  std::vector<float> scale, offset;
  std::vector<float> decoded;  // [n, k]
};

Expected expected_of(const Case& c, const std::vector<float>& target) {
  Expected expected;
  const int64_t width = group_width(c.k, c.group_size);
  for (int64_t row = 0; row < c.n; ++row) {
    for (int64_t begin = 0; begin < c.k; begin += width) {
      const int64_t end = std::min(c.k, begin + width);
      const Group group = quantize_group({&target[row * c.k + begin], &target[row * c.k] + end}, c.rule);
      expected.scale.push_back(group.scale);
      expected.offset.push_back(group.offset);
      expected.codes.insert(expected.codes.end(), group.codes.begin(), group.codes.end());
      expected.decoded.insert(expected.decoded.end(), group.decoded.begin(), group.decoded.end());
    }
  }
  return expected;
}

void check_quantized(const Case& c, const Result& result, const Expected& expected) {
  const std::vector<float> scale = from_bytes(c.rule.scale_dtype, result.scale);
  const std::vector<float> offset = from_bytes(c.rule.scale_dtype, result.offset);
  for (size_t i = 0; i < scale.size(); ++i) {
    CHECK(same_bits(scale[i], expected.scale[i]), "%s: scale %zu is %a, not %a", c.describe().c_str(), i, scale[i],
          expected.scale[i]);
    if (offset.empty()) continue;
    CHECK(same_bits(offset[i], expected.offset[i]), "%s: offset %zu is %a, not %a", c.describe().c_str(), i, offset[i],
          expected.offset[i]);
  }
  for (int64_t row = 0; row < c.n; ++row) {
    const uint8_t* bytes = result.codes.data() + row * row_bytes(c.k, c.bits);
    for (int64_t column = 0; column < padded_k(c.k); ++column) {
      const int code = load_code(bytes, column, c.bits);
      const int wanted = column < c.k ? expected.codes[row * c.k + column] : 0;
      CHECK(code == wanted, "%s: code (%d, %d) is %d, not %d", c.describe().c_str(), int(row), int(column), code,
            wanted);
    }
  }
}

void check_residual(const Case& c, const Result& result, const std::vector<float>& weight, const Expected& expected) {
  const std::vector<float> stored = from_bytes(c.residual_dtype, result.residual);
  for (int64_t row = 0; row < c.n; ++row) {
    std::vector<double> squares;
    for (int64_t column = 0; column < c.k; ++column) {
      const int64_t i = row * c.k + column;
      const float residual = weight[i] - expected.decoded[i];
      const float wanted = round_to(c.residual_dtype, residual);
      CHECK(same_bits(stored[i], wanted), "%s: residual (%d, %d) is %a, not %a", c.describe().c_str(), int(row),
            int(column), stored[i], wanted);
      squares.push_back(static_cast<double>(residual) * residual);
    }
    CHECK(result.norm2[row] == sum(squares), "%s: norm of row %d is %a, not %a", c.describe().c_str(), int(row),
          result.norm2[row], sum(squares));
  }
}

void check_dequantized(const Case& c, const Result& quantized, const Expected& expected) {
  for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    std::vector<char> out(c.n * c.k * size_of(dtype));
    const bool affine = c.rule.scale_rule == ScaleRule::kMinMax;
    const DequantizeParams p = {quantized.codes.data(),
                                quantized.scale.data(),
                                affine ? quantized.offset.data() : nullptr,
                                c.rule.scale_dtype,
                                c.rule.codebook.data(),
                                c.n,
                                c.k,
                                c.bits,
                                c.group_size,
                                out.data(),
                                dtype};
    const Status status = launch_dequantize_cpu(p, 2);
    CHECK(status == nullptr, "%s: %s", c.describe().c_str(), status);
    const std::vector<float> dense = from_bytes(dtype, out);
    for (size_t i = 0; i < dense.size(); ++i) {
      const float wanted = round_to(dtype, expected.decoded[i]);
      CHECK(same_bits(dense[i], wanted), "%s: weight %zu is %a, not %a", c.describe().c_str(), i, dense[i], wanted);
    }
  }
}

void check_case(const Case& c, std::mt19937& random) {
  std::normal_distribution<float> normal;
  float magnitude = std::pow(10.0f, std::uniform_real_distribution<float>(-3, 1)(random));
  // Magnitudes at which squares overflow or vanish, or scales are denormal; not where fp16 has no such values.
  const bool wide = c.weight_dtype != DType::kFloat16 && c.rule.scale_dtype != DType::kFloat16 &&
                    !(c.with_low_rank && c.residual_dtype == DType::kFloat16);
  if (wide && random() % 4 == 0) magnitude = std::vector<float>{1e-40f, 1e-30f, 1e30f}[random() % 3];
  std::vector<float> stored(c.n > 0 ? (c.n - 1) * c.stride + c.k : 0);
  for (float& v : stored) v = round_to(c.weight_dtype, normal(random) * magnitude);
  // Runs of equal weights: constant groups, zero groups, ties.
  if (random() % 3 == 0) {
    for (size_t i = 0; i < stored.size(); ++i) stored[i] = (i / 96 % 2) ? 0.0f : round_to(c.weight_dtype, magnitude);
  }
  std::vector<float> weight, target, low_rank;
  for (int64_t i = 0; i < c.n * c.k; ++i) {
    weight.push_back(stored[i / c.k * c.stride + i % c.k]);
    low_rank.push_back(round_to(c.residual_dtype, normal(random) * magnitude * 0.3f));
    target.push_back(c.with_low_rank ? weight[i] - low_rank[i] : weight[i]);
  }
  const Expected expected = expected_of(c, target);

  Result result;
  const std::vector<char> weight_bytes = to_bytes(c.weight_dtype, stored);
  QuantizeParams p = params_of(c, weight_bytes, result);
  if (c.with_low_rank) {
    result.residual = to_bytes(c.residual_dtype, low_rank);  // in place
    p.residual_dtype = c.residual_dtype;
    result.norm2.assign(c.n, -1.0);
    p.low_rank = p.residual = result.residual.data();
    p.residual_norm2 = result.norm2.data();
  }
  const Status status = launch_quantize_cpu(p, 3);
  CHECK(status == nullptr, "%s: %s", c.describe().c_str(), status);
  if (status != nullptr) return;
  check_quantized(c, result, expected);
  if (c.with_low_rank) check_residual(c, result, weight, expected);
  check_dequantized(c, result, expected);
}

std::vector<float> integers(int bits) {
  std::vector<float> table;
  for (int i = 0; i < 1 << bits; ++i) table.push_back(static_cast<float>(i - (1 << (bits - 1))));
  return table;
}

std::vector<float> evenly_spaced(int bits) {
  std::vector<float> table;
  for (int i = 0; i < 1 << bits; ++i) table.push_back(-1 + 2.0f * i / ((1 << bits) - 1));
  return table;
}

std::vector<float> irregular(int bits, std::mt19937& random) {
  std::vector<float> table;
  for (int i = 0; i < 1 << bits; ++i) table.push_back(std::uniform_real_distribution<float>(-1, 1)(random));
  table.front() = -1;
  table.back() = 1;
  std::sort(table.begin(), table.end());
  return table;
}

void check_all_formats(const std::string& isa) {
  std::mt19937 random(1);
  const int64_t columns[] = {0, 1, 2, 31, 32, 33, 63, 64, 65, 96, 127, 128, 200, 256, 300, 513};
  const DType dtypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
  for (int bits : kCodeBits) {
    for (const auto& codebook : {integers(bits), evenly_spaced(bits), irregular(bits, random)}) {
      for (ScaleRule scale_rule : {ScaleRule::kAbsmax, ScaleRule::kMinMax, ScaleRule::kMeanStd}) {
        for (int64_t group_size : kGroupSizes) {
          for (int64_t k : columns) {
            Case c;
            c.isa = isa;
            // 25 times the work for the reference, so the search is tried on few of the 8-bit cases.
            const bool search = random() % (bits == 8 ? 40 : 4) == 0;
            c.rule = {codebook, scale_rule, dtypes[random() % 3], search};
            c.bits = bits;
            c.n = random() % 4;
            c.k = k;
            c.group_size = group_size;
            c.stride = k + (random() % 2 ? 0 : random() % 7);
            c.weight_dtype = dtypes[random() % 3];
            c.with_low_rank = random() % 2;
            c.residual_dtype = dtypes[random() % 3];
            check_case(c, random);
          }
        }
      }
    }
  }
}

// A NaN or Inf shows in the scale of its group, wherever it stands and whatever the rule, and in no other group.
void check_non_finite(const std::string& isa) {
  for (ScaleRule scale_rule : {ScaleRule::kAbsmax, ScaleRule::kMinMax, ScaleRule::kMeanStd}) {
    for (float bad : {NAN, INFINITY, -INFINITY}) {
      for (int64_t at = 0; at < 150; at += 7) {
        const Case c = {
            isa, {integers(4), scale_rule, DType::kFloat32, at % 2 == 0}, 4, 1, 150, 64, 150, DType::kFloat32, false};
        std::vector<float> weight(c.k);
        for (int64_t i = 0; i < c.k; ++i) weight[i] = std::sin(static_cast<float>(i));
        weight[at] = bad;
        const std::vector<char> bytes = to_bytes(DType::kFloat32, weight);
        Result result;
        const QuantizeParams p = params_of(c, bytes, result);
        CHECK(launch_quantize_cpu(p, 1) == nullptr, "%s", isa.c_str());
        const std::vector<float> scale = from_bytes(DType::kFloat32, result.scale);
        for (int64_t g = 0; g < 3; ++g) {
          CHECK(std::isfinite(scale[g]) == (g != at / 64), "%s: %f at %d gives scale %d = %f", c.describe().c_str(),
                bad, int(at), int(g), scale[g]);
        }
      }
    }
  }
}

// Midpoints themselves, and their neighbours: where a rounding error in finding the code would show.
void check_ties(const std::string& isa) {
  for (int bits : kCodeBits) {
    const Rule rule = {integers(bits), ScaleRule::kAbsmax, DType::kFloat32, false};
    std::vector<float> weight = {static_cast<float>((1 << (bits - 1)) - 1)};  // absmax / last = 1: scale 1
    for (int i = -(1 << (bits - 1)) + 1; i < (1 << (bits - 1)) - 1; ++i) {
      const float tie = i + 0.5f;
      for (float v : {tie, std::nextafter(tie, -1e9f), std::nextafter(tie, 1e9f)}) weight.push_back(v);
    }
    const int64_t k = static_cast<int64_t>(weight.size());
    const Case c = {isa, rule, bits, 1, k, -1, k, DType::kFloat32, false};
    Result result;
    const std::vector<char> bytes = to_bytes(DType::kFloat32, weight);
    CHECK(launch_quantize_cpu(params_of(c, bytes, result), 1) == nullptr, "%s", isa.c_str());
    check_quantized(c, result, expected_of(c, weight));
  }
}

void check_threads(const std::string& isa) {
  const Case c = {
      isa,  {evenly_spaced(4), ScaleRule::kAbsmax, DType::kFloat16, false}, 4, 97, 1000, 64, 1000, DType::kFloat32,
      false};
  std::mt19937 random(2);
  std::vector<float> weight(c.n * c.k);
  for (float& v : weight) v = std::normal_distribution<float>()(random);
  const std::vector<char> bytes = to_bytes(DType::kFloat32, weight);
  Result alone, together;
  CHECK(launch_quantize_cpu(params_of(c, bytes, alone), 1) == nullptr, "%s", isa.c_str());
  for (int threads : {2, 3, 5, 200}) {
    CHECK(launch_quantize_cpu(params_of(c, bytes, together), threads) == nullptr, "%s", isa.c_str());
    CHECK(alone.codes == together.codes && alone.scale == together.scale, "%s, %d threads", isa.c_str(), threads);
  }
  for (int threads : {0, -1}) {
    const Status status = launch_quantize_cpu(params_of(c, bytes, together), threads);
    CHECK(status && std::strstr(status, "num_threads"), "%d threads: %s", threads, status ? status : "success");
  }
}

}  // namespace

int main() {
  for (const std::string& isa : isas_under_test()) {
    setenv("LOFTQ_CPU_ISA", isa.c_str(), 1);
    check_all_formats(isa);
    check_non_finite(isa);
    check_ties(isa);
    check_threads(isa);
  }
  return test_result();
}
