// The products that use AMX tiles, against sums in float64. Where the machine has no AMX its instructions are emulated;
// AVX-512 with bfloat16, which the same code uses, is not, and where it is missing the test is skipped.
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/target.h"
#include "tests/check.h"
#include "tests/reference.h"

namespace {

constexpr int kSkipped = 77;

}  // namespace

#if LOFTQ_X86 && defined(__linux__)

#include "tests/amx_emulation.h"

using namespace loftq;
using namespace loftq::testing;

namespace {

struct Case {
  int64_t m, n, k;
  int bits;
  int64_t group_size, rank;
  bool affine, integers, bias;
  DType scale_dtype, adapter_dtype;
  int threads;

  std::string describe() const {
    std::string text;
    for (int64_t v : {m, n, k, int64_t{bits}, group_size, rank}) text += std::to_string(v) + " ";
    return "m n k bits group rank = " + text + (affine ? "affine " : "") + (bias ? "bias " : "") +
           std::to_string(threads) + " threads";
  }
};

// A matrix as the kernels are given it, in a buffer of no more than its size, and its values rounded to bfloat16.
struct Operand {
  std::vector<char> bytes;
  std::vector<float> values;
  Matrix matrix;

  Operand(DType dtype, int64_t rows, int64_t columns, int64_t stride, std::mt19937& random) {
    std::vector<float> stored(rows > 0 ? (rows - 1) * stride + columns : 0);
    for (float& v : stored) v = round_to(dtype, std::normal_distribution<float>()(random));
    for (int64_t i = 0; i < rows * columns; ++i) {
      values.push_back(round_to(DType::kBFloat16, stored[i / columns * stride + i % columns]));
    }
    bytes = to_bytes(dtype, stored);
    matrix = {rows > 0 ? bytes.data() : nullptr, dtype, rows, columns, stride};
  }
};

struct Weight {
  std::vector<uint8_t> codes;
  std::vector<float> codebook;
  std::vector<char> scale, offset;
  std::vector<float> values;  // [n, k], rounded to bfloat16
  PackedWeight packed;

  Weight(const Case& c, std::mt19937& random) {
    const int size = 1 << c.bits;
    for (int i = 0; i < size; ++i) codebook.push_back(static_cast<float>(i - size / 2));
    if (!c.integers) codebook[size / 3] += 0.3f;
    codes.resize(c.n * row_bytes(c.k, c.bits));
    for (uint8_t& byte : codes) byte = static_cast<uint8_t>(random());
    const int64_t groups = num_groups(c.k, c.group_size);
    std::vector<float> scales, offsets;
    for (int64_t i = 0; i < c.n * groups; ++i) {
      scales.push_back(round_to(c.scale_dtype, std::uniform_real_distribution<float>(0.5f, 1.5f)(random) / size));
      offsets.push_back(round_to(c.scale_dtype, std::normal_distribution<float>()(random)));
    }
    for (int64_t i = 0; i < c.n * c.k; ++i) {
      const int64_t column = i % c.k, row = i / c.k;
      const int64_t group = row * groups + column / group_width(c.k, c.group_size);
      const float scaled =
          codebook[load_code(codes.data() + row * row_bytes(c.k, c.bits), column, c.bits)] * scales[group];
      values.push_back(round_to(DType::kBFloat16, c.affine ? scaled + offsets[group] : scaled));
    }
    scale = to_bytes(c.scale_dtype, scales);
    offset = to_bytes(c.scale_dtype, offsets);
    packed = {codes.data(), scale.data(), c.affine ? offset.data() : nullptr, c.scale_dtype, codebook.data(), c.n, c.k,
              c.bits,       c.group_size};
  }
};

// out += x y^T, and the sum of magnitudes: what rounding errors are proportional to
struct Sums {
  int64_t rows, columns;
  std::vector<double> value, magnitude;

  Sums(int64_t rows, int64_t columns)
      : rows(rows), columns(columns), value(rows * columns), magnitude(rows * columns) {}

  // y(column, inner)
  template <class Y>
  void add(const std::vector<float>& x, int64_t inner, const Y& y) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) {
        for (int64_t i = 0; i < inner; ++i) {
          const double term = static_cast<double>(x[r * inner + i]) * y(c, i);
          value[r * columns + c] += term;
          magnitude[r * columns + c] += std::fabs(term);
        }
      }
    }
  }
};

struct Problem {
  Case c;
  Weight weight;
  Operand lora_A, lora_B;
  std::vector<float> bias;
  LinearParams params;

  Problem(const Case& c, std::mt19937& random)
      : c(c),
        weight(c, random),
        lora_A(c.adapter_dtype, c.rank, c.k, c.k + 3, random),
        lora_B(c.adapter_dtype, c.rank > 0 ? c.n : 0, c.rank, c.rank, random) {
    for (int64_t i = 0; i < c.n; ++i) bias.push_back(std::normal_distribution<float>()(random));
    params = {};
    params.weight = weight.packed;
    params.lora_A = lora_A.matrix;
    params.lora_B = lora_B.matrix;
    params.scaling = 0.5f;
  }

  // expected += scaling (x first^T) second, each rounded to bfloat16; first(rank, inner), second(rank, column)
  template <class First, class Second>
  void add_adapter(const std::vector<float>& x, int64_t inner, const First& first, const Second& second,
                   Sums& expected) const {
    Sums hidden(c.m, c.rank);
    hidden.add(x, inner, first);
    std::vector<float> rounded;
    for (double v : hidden.value) {
      rounded.push_back(round_to(DType::kBFloat16, static_cast<float>(v * params.scaling)));
    }
    Sums term(c.m, expected.columns);
    term.add(rounded, c.rank, [&](int64_t column, int64_t r) { return second(r, column); });
    for (size_t i = 0; i < term.value.size(); ++i) {
      expected.value[i] += term.value[i];
      // Where a sum falls on the other side of a midpoint it is rounded the other way: by 2^-8 of it, or 1e-5 * 800.
      expected.magnitude[i] += 800 * term.magnitude[i];
    }
  }

  void check(const char* product, const Sums& expected, const std::vector<char>& bytes) const {
    const std::vector<float> y = from_bytes(DType::kBFloat16, bytes);
    for (size_t i = 0; i < y.size(); ++i) {
      const double tolerance = std::fabs(expected.value[i]) / 256 + 1e-5 * expected.magnitude[i] + 1e-6;
      CHECK(std::fabs(y[i] - expected.value[i]) <= tolerance, "%s, %s: [%d, %d] = %g, expected %g +- %g", product,
            c.describe().c_str(), int(i / expected.columns), int(i % expected.columns), y[i], expected.value[i],
            tolerance);
    }
    CHECK(!tile_registers().configured(), "%s, %s: the tiles were not released", product, c.describe().c_str());
  }

  void check_linear(std::mt19937& random) {
    const Operand x(DType::kBFloat16, c.m, c.k, c.k + 5, random);
    Sums expected(c.m, c.n);
    expected.add(x.values, c.k, [&](int64_t n, int64_t k) { return weight.values[n * c.k + k]; });
    if (c.rank > 0) {
      add_adapter(
          x.values, c.k, [&](int64_t r, int64_t k) { return lora_A.values[r * c.k + k]; },
          [&](int64_t r, int64_t n) { return lora_B.values[n * c.rank + r]; }, expected);
    }
    for (int64_t i = 0; c.bias && i < c.m * c.n; ++i) expected.value[i] += bias[i % c.n];
    std::vector<char> y(c.m * c.n * 2);
    params.x = x.matrix;
    params.bias = c.bias ? bias.data() : nullptr;
    params.y = y.data();
    const Status status = kAmxBf16Kernels.linear(params, c.threads);
    CHECK(status == nullptr, "%s", status);
    check("linear", expected, y);
  }

  void check_grad_input(std::mt19937& random) {
    const Operand grad(DType::kBFloat16, c.m, c.n, c.n + 1, random);
    Sums expected(c.m, c.k);
    expected.add(grad.values, c.n, [&](int64_t k, int64_t n) { return weight.values[n * c.k + k]; });
    if (c.rank > 0) {
      add_adapter(
          grad.values, c.n, [&](int64_t r, int64_t n) { return lora_B.values[n * c.rank + r]; },
          [&](int64_t r, int64_t k) { return lora_A.values[r * c.k + k]; }, expected);
    }
    std::vector<char> grad_x(c.m * c.k * 2);
    params.x = grad.matrix;
    params.bias = nullptr;
    params.y = grad_x.data();
    const Status status = kAmxBf16Kernels.linear_grad_input(params, c.threads);
    CHECK(status == nullptr, "%s", status);
    check("linear_grad_input", expected, grad_x);
  }
};

template <class T, size_t kCount>
T one_of(const T (&values)[kCount], std::mt19937& random) {
  return values[random() % kCount];
}

void check_shape(int64_t m, int64_t n, int64_t k, std::mt19937& random) {
  const DType dtypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
  const int threads[] = {1, 3};
  const int64_t ranks[] = {0, 1, 16, 65};
  Case c = {};
  c.m = m;
  c.n = n;
  c.k = k;
  c.bits = one_of(kCodeBits, random);
  c.group_size = one_of(kGroupSizes, random);
  c.rank = one_of(ranks, random);
  c.affine = random() % 2;
  c.integers = random() % 2;
  c.bias = random() % 2;
  c.scale_dtype = one_of(dtypes, random);
  c.adapter_dtype = one_of(dtypes, random);
  c.threads = one_of(threads, random);
  Problem problem(c, random);
  problem.check_grad_input(random);
  if (m > 8) problem.check_linear(random);  // up to 8 rows are kAvx512Bf16Kernels'
}

}  // namespace

int main() {
  constexpr uint32_t kNeeded = kAvx512Bf16 | kAvx512 | kAvx2 | kF16c;
  if ((cpu_features() & kNeeded) != kNeeded) {
    std::puts("skipped: this machine has no AVX-512 with bfloat16");
    return kSkipped;
  }
  const bool native = (cpu_features() & kAmxBf16) && tiles_permitted();
  if (!native) emulate_amx();
  std::mt19937 random(1);
  for (int64_t m : {1, 2, 8, 9, 15, 16, 17, 31, 32, 33, 48, 65, 100}) {
    for (int64_t n : {1, 16, 31, 33, 131}) {
      for (int64_t k : {1, 40, 64, 100, 200, 600}) check_shape(m, n, k, random);
    }
  }
  check_shape(530, 17, 70, random);   // more rows than a chunk
  check_shape(20, 33, 1100, random);  // more columns, and then more rows of the weight, than two panels
  check_shape(20, 1100, 33, random);
  std::printf("%s tiles, %lld products of tiles\n", native ? "the machine's" : "emulated",
              static_cast<long long>(tile_products()));
  CHECK(native || tile_products() > 0, "no tile was multiplied");
  return test_result();
}

#else

int main() {
  std::puts("skipped: AMX is for Linux on x86-64");
  return kSkipped;
}

#endif
