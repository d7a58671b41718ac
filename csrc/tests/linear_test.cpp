// The products of every instruction set, against sums in double: every element within its rounding errors.
// If LOFTQ_CPU_ISA is set, only that instruction set is tested.
#include <algorithm>
#include <cmath>
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

constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
constexpr char kGuard = 0x5e;
constexpr int64_t kGuardBytes = 256;

struct Case {
  std::string isa;
  bool transposed;
  int64_t m, n, k, rank;
  int bits;
  bool affine;
  bool integer;  // the code book
  int64_t group_size;
  int threads;
  DType x_dtype = DType::kFloat32, scale_dtype = DType::kFloat32, adapter_dtype = DType::kFloat32;
  DType bias_dtype = DType::kFloat32;
  bool bias = false;
  int64_t gap = 0;    // between rows of x and of the adapter
  int64_t shift = 0;  // of every pointer, in elements

  int64_t from() const { return transposed ? n : k; }
  int64_t to() const { return transposed ? k : n; }

  std::string describe() const {
    std::string text = isa + (transposed ? " transposed" : "") + " dtypes ";
    for (DType dtype : {x_dtype, scale_dtype, adapter_dtype, bias_dtype}) text += std::to_string(int(dtype));
    const std::pair<const char*, int64_t> numbers[] = {{" m ", m},
                                                       {" n ", n},
                                                       {" k ", k},
                                                       {" rank ", rank},
                                                       {" bits ", bits},
                                                       {" bias ", bias},
                                                       {" affine ", affine},
                                                       {" group ", group_size},
                                                       {" threads ", threads},
                                                       {" gap ", gap}};
    for (const auto& [name, value] : numbers) text += name + std::to_string(value);
    return text;
  }
};

// Values that fill the end of their allocation: a sanitizer sees one element too many. What lies before them and
// between their rows is NaN, which shows in a result that it enters.
struct Block {
  DType dtype;
  int64_t rows, columns, stride, shift;
  std::vector<float> values;  // [rows, columns]
  std::vector<char> bytes;

  Block(DType dtype, int64_t rows, int64_t columns, int64_t gap, int64_t shift, float size, std::mt19937& random)
      : dtype(dtype), rows(rows), columns(columns), stride(columns + gap), shift(shift) {
    for (int64_t i = 0; i < rows * columns; ++i) {
      values.push_back(round_to(dtype, std::normal_distribution<float>(0, size)(random)));
    }
    store();
  }

  void store() {
    std::vector<float> spread(shift + (values.empty() ? 0 : (rows - 1) * stride + columns), NAN);
    for (size_t i = 0; i < values.size(); ++i) spread[shift + i / columns * stride + i % columns] = values[i];
    bytes = to_bytes(dtype, spread);
  }

  float at(int64_t row, int64_t column) const { return values[row * columns + column]; }
  const void* data() const { return bytes.data() + shift * size_of(dtype); }
  Matrix matrix() const { return {data(), dtype, rows, columns, stride}; }
};

std::vector<float> codebook_of(const Case& c, std::mt19937& random) {
  std::vector<float> codebook;
  for (int i = 0; i < 1 << c.bits; ++i) {
    const float irregular = std::uniform_real_distribution<float>(-1, 1)(random);
    codebook.push_back(c.integer ? static_cast<float>(i - (1 << (c.bits - 1))) : irregular);
  }
  return codebook;
}

struct Problem {
  const Case c;
  Block x, scale, offset, lora_A, lora_B, bias;
  std::vector<float> codebook;
  std::vector<uint8_t> codes;

  Problem(const Case& c, std::mt19937& random)
      : c(c),
        x(c.x_dtype, c.m, c.from(), c.gap, c.shift, 1.0f, random),
        scale(c.scale_dtype, c.n, num_groups(c.k, c.group_size), 0, c.shift, 0.1f, random),
        offset(c.scale_dtype, c.affine ? c.n : 0, num_groups(c.k, c.group_size), 0, c.shift, 0.1f, random),
        lora_A(c.adapter_dtype, c.rank, c.k, c.gap, c.shift, 0.1f, random),
        lora_B(c.adapter_dtype, c.n, c.rank, c.gap, c.shift, 0.1f, random),
        bias(c.bias_dtype, 1, c.bias ? c.n : 0, 0, c.shift, 1.0f, random),
        codebook(codebook_of(c, random)),
        codes(c.shift + c.n * row_bytes(c.k, c.bits)) {
    for (uint8_t& byte : codes) byte = static_cast<uint8_t>(random());
  }

  LinearParams params(void* y) const {
    LinearParams p = {};
    p.x = x.matrix();
    p.weight = {codes.data() + c.shift,
                scale.data(),
                c.affine ? offset.data() : nullptr,
                c.scale_dtype,
                codebook.data(),
                c.n,
                c.k,
                c.bits,
                c.group_size};
    if (c.rank > 0) {
      p.lora_A = lora_A.matrix();
      p.lora_B = lora_B.matrix();
    }
    p.scaling = 0.75f;
    p.bias = c.bias ? bias.data() : nullptr;
    p.bias_dtype = c.bias_dtype;
    p.y = y;
    return p;
  }
};

Status launch(const Case& c, const LinearParams& p, int threads) {
  return c.transposed ? launch_linear_grad_input_cpu(p, threads) : launch_linear_cpu(p, threads);
}

// The result y, with a guard before and after it.
struct Result {
  std::vector<char> bytes;
  Status status;

  Result(const Problem& problem, int threads) {
    const Case& c = problem.c;
    const int64_t size = c.m * c.to() * size_of(c.x_dtype);
    bytes.assign(size + 2 * kGuardBytes, kGuard);
    status = launch(c, problem.params(bytes.data() + kGuardBytes), threads);
    CHECK(status == nullptr, "%s: %s", c.describe().c_str(), status);
    const auto untouched = [](char byte) { return byte == kGuard; };
    CHECK(std::all_of(bytes.begin(), bytes.begin() + kGuardBytes, untouched), "%s", c.describe().c_str());
    CHECK(std::all_of(bytes.end() - kGuardBytes, bytes.end(), untouched), "%s", c.describe().c_str());
    bytes = std::vector<char>(bytes.begin() + kGuardBytes, bytes.end() - kGuardBytes);
  }

  std::vector<float> values(DType dtype) const { return from_bytes(dtype, bytes); }
};

// A sum in double, and the sum of magnitudes to which its rounding errors are proportional.
struct Sum {
  double value = 0, weight = 0, adapter = 0;
};

class Reference {
 public:
  explicit Reference(const Problem& problem) : problem_(problem) {
    const Case& c = problem.c;
    const int64_t groups = num_groups(c.k, c.group_size), width = group_width(c.k, c.group_size);
    for (int64_t row = 0; row < c.n; ++row) {
      const uint8_t* const bytes = problem.codes.data() + c.shift + row * row_bytes(c.k, c.bits);
      for (int64_t column = 0; column < c.k; ++column) {
        const int64_t group = row * groups + column / width;
        const double entry = problem.codebook[load_code(bytes, column, c.bits)];
        const double scaled = entry * problem.scale.values[group];
        const double offset = c.affine ? problem.offset.values[group] : 0.0;
        dense_.push_back(scaled + offset);
        magnitude_.push_back(std::fabs(scaled) + std::fabs(offset));
      }
    }
    for (int64_t row = 0; row < c.m; ++row) {
      for (int64_t r = 0; r < c.rank; ++r) hidden_.push_back(hidden(row, r));
    }
  }

  Sum element(int64_t row, int64_t column) const {
    const Case& c = problem_.c;
    Sum sum;
    for (int64_t i = 0; i < c.from(); ++i) {
      const int64_t at = c.transposed ? i * c.k + column : column * c.k + i;
      sum.value += problem_.x.at(row, i) * dense_[at];
      sum.weight += std::fabs(problem_.x.at(row, i)) * magnitude_[at];
    }
    for (int64_t r = 0; r < c.rank; ++r) {
      const double factor = 0.75 * (c.transposed ? problem_.lora_A.at(r, column) : problem_.lora_B.at(column, r));
      sum.value += hidden_[row * c.rank + r].value * factor;
      sum.adapter += hidden_[row * c.rank + r].weight * std::fabs(factor);
    }
    if (c.bias) sum.value += problem_.bias.values[column];
    if (c.bias) sum.weight += std::fabs(problem_.bias.values[column]);
    return sum;
  }

 private:
  // x A^T, or grad_y B
  Sum hidden(int64_t row, int64_t r) const {
    const Case& c = problem_.c;
    Sum sum;
    for (int64_t i = 0; i < c.from(); ++i) {
      const double factor = c.transposed ? problem_.lora_B.at(i, r) : problem_.lora_A.at(r, i);
      sum.value += problem_.x.at(row, i) * factor;
      sum.weight += std::fabs(problem_.x.at(row, i) * factor);
    }
    return sum;
  }

  const Problem& problem_;
  std::vector<double> dense_, magnitude_;  // [n, k]: D, |codebook * scale| + |offset|
  std::vector<Sum> hidden_;                // [m, rank]
};

// Each operation rounds by at most the unit of its type, relative to its result; a sum of many, in whatever order, by
// the number of its terms times that.
double tolerance(const Case& c, const Sum& sum) {
  const bool bfloat_operands = c.x_dtype == DType::kBFloat16 && c.isa.find("bf16") != std::string::npos;
  const double units[] = {0x1p-24, 0x1p-11, 0x1p-8}, unit = units[static_cast<int>(c.x_dtype)];
  const double operand = bfloat_operands ? 0x1p-8 : 0;
  const double sums = static_cast<double>(c.from() + c.rank + 32) * 0x1p-24 * (sum.weight + sum.adapter);
  const double of_weight = !c.transposed && c.m <= 8 ? 2 : 1;  // few rows of x: the code book, rounded to either side
  const double operands = 1.01 * operand * (of_weight * sum.weight + 3 * sum.adapter);
  const double smallest = c.x_dtype == DType::kFloat16 ? 0x1p-25 : 0x1p-120;
  return (sums + operands) * (1 + unit) + unit * std::fabs(sum.value) + smallest;
}

void check_case(const Case& c, std::mt19937& random) {
  const Problem problem(c, random);
  const Result result(problem, c.threads);
  const Reference reference(problem);
  const std::vector<float> y = result.values(c.x_dtype);
  for (int64_t i = 0; i < c.m * c.to(); ++i) {
    const Sum sum = reference.element(i / c.to(), i % c.to());
    const double error = std::fabs(y[i] - sum.value), allowed = tolerance(c, sum);
    CHECK(error <= allowed, "%s: (%d, %d) is %g, not %g: error %g of %g", c.describe().c_str(), int(i / c.to()),
          int(i % c.to()), y[i], sum.value, error, allowed);
  }
  CHECK(Result(problem, c.threads).bytes == result.bytes, "%s: another result the second time", c.describe().c_str());
}

template <class T, size_t kCount>
T pick(const T (&choices)[kCount], std::mt19937& random) {
  return choices[random() % kCount];
}

void check_awkward_shapes(const std::string& isa) {
  std::mt19937 random(4);
  const int64_t rows[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 33}, sizes[] = {1, 2, 3, 5, 16, 17, 23, 25, 31};
  const int64_t columns[] = {1, 31, 32, 33, 63, 64, 65, 96, 127, 129, 200, 257}, ranks[] = {0, 1, 3, 16, 17, 65};
  for (int i = 0; i < 600; ++i) {
    const bool transposed = i % 3 == 0;
    Case c = {isa,
              transposed,
              pick(rows, random),
              pick(sizes, random),
              pick(columns, random),
              pick(ranks, random),
              2 << i % 3,
              random() % 2 == 0,
              random() % 2 == 0,
              pick(kGroupSizes, random),
              1 + i % 3};
    c.x_dtype = pick(kDTypes, random);
    c.scale_dtype = pick(kDTypes, random);
    c.adapter_dtype = pick(kDTypes, random);
    c.bias_dtype = pick(kDTypes, random);
    c.bias = !transposed && random() % 2;
    c.gap = random() % 3;
    c.shift = random() % 4;
    check_case(c, random);
  }
}

// More threads than rows of the weight, more rows of x than a chunk, more columns than a panel.
void check_many_threads(const std::string& isa) {
  std::mt19937 random(5);
  struct Size {
    int64_t m, n, k, rank;
  };
  const Size sizes[] = {{1, 1, 8200, 3},   {2, 5, 5000, 0},  {8, 3, 4100, 9},  {9, 3, 4100, 2},
                        {20, 150, 300, 5}, {530, 20, 70, 2}, {1025, 1, 130, 0}};
  for (const Size& size : sizes) {
    for (bool transposed : {false, true}) {
      for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
        Case c = {isa, transposed, size.m, size.n, size.k, size.rank, 4, false, false, 64, 8};
        if (transposed) std::swap(c.n, c.k);
        c.x_dtype = dtype;
        check_case(c, random);
      }
    }
  }
}

// With nothing to sum, the result is the bias, or zero.
void check_empty_sums(const std::string& isa) {
  std::mt19937 random(6);
  for (int64_t m : {0, 1, 8, 9, 40}) {
    for (int64_t rank : {0, 2}) {
      for (bool transposed : {false, true}) {
        Case c = {isa, transposed, m, transposed ? 0 : 19, transposed ? 70 : 0, rank, 4, false, false, 64, 2};
        c.bias = !transposed;
        check_case(c, random);
        std::swap(c.n, c.k);  // and no results at all
        check_case(c, random);
      }
    }
  }
}

// Rows of the weight are divided in whole: results depend on the number of threads only where columns are divided.
void check_thread_counts(const std::string& isa) {
  std::mt19937 random(7);
  for (int64_t m : {1, 8, 9, 40}) {
    for (bool transposed : {false, true}) {
      Case c = {isa, transposed, m, 97, 1000, 5, 4, true, false, 64, 1};
      c.x_dtype = m % 2 ? DType::kFloat32 : DType::kBFloat16;
      const Problem problem(c, random);
      const Result alone(problem, 1);
      for (int threads : {2, 3, 5, 16}) {
        CHECK(Result(problem, threads).bytes == alone.bytes, "%s, %d threads", c.describe().c_str(), threads);
      }
    }
  }
}

// NaN and Inf stay in the row of x that has them; the other rows have the bits that they have beside zeros.
void check_non_finite(const std::string& isa) {
  std::mt19937 random(8);
  for (DType dtype : kDTypes) {
    for (bool transposed : {false, true}) {
      for (int64_t m : {2, 8, 20}) {
        Case c = {isa, transposed, m, 70, 70, 3, 4, true, false, 32, 1};
        c.x_dtype = dtype;
        Problem problem(c, random);
        const std::vector<float> clean = Result(problem, 1).values(dtype);
        for (float bad : {NAN, INFINITY}) {
          problem.x.values[70 + 69] = bad;  // the last of the second row
          problem.x.store();
          const std::vector<float> y = Result(problem, 1).values(dtype);
          for (int64_t i = 0; i < m * 70; ++i) {
            const bool right = i / 70 == 1 ? !std::isfinite(y[i]) : same_bits(y[i], clean[i]);
            CHECK(right, "%s: %g in row 1 makes (%d, %d) %g", c.describe().c_str(), bad, int(i / 70), int(i % 70),
                  y[i]);
          }
        }
      }
    }
  }
}

void check_refused(bool transposed, void (*spoil)(LinearParams&), const char* part_of_reason) {
  std::mt19937 random(9);
  const Case c = {"any", transposed, 2, 3, 64, 2, 4, false, false, 64, 1};
  const Problem problem(c, random);
  std::vector<char> y(c.m * c.to() * size_of(c.x_dtype), kGuard);
  LinearParams p = problem.params(y.data());
  spoil(p);
  const Status status = launch(c, p, 1);
  CHECK(status && std::strstr(status, part_of_reason), "'%s' in '%s'", part_of_reason, status ? status : "success");
  const bool untouched = std::all_of(y.begin(), y.end(), [](char byte) { return byte == kGuard; });
  CHECK(untouched, "a refused call wrote its output (%s)", part_of_reason);
}

void check_bad_parameters() {
  for (bool transposed : {false, true}) {
    check_refused(transposed, [](LinearParams& p) { p.weight.bits = 3; }, "bits");
    check_refused(transposed, [](LinearParams& p) { p.weight.n = -1; }, "negative");
    check_refused(transposed, [](LinearParams& p) { p.weight.k = -64; }, "negative");
    check_refused(transposed, [](LinearParams& p) { p.weight.group_size = 48; }, "group_size");
    check_refused(transposed, [](LinearParams& p) { p.x.columns = 65; }, "columns");
    check_refused(transposed, [](LinearParams& p) { p.x.rows = -1; }, "x");
    check_refused(transposed, [](LinearParams& p) { p.lora_A.data = nullptr; }, "together");
    check_refused(transposed, [](LinearParams& p) { p.lora_B.data = nullptr; }, "together");
    check_refused(transposed, [](LinearParams& p) { p.lora_A.columns = 63; }, "lora_A");
    check_refused(transposed, [](LinearParams& p) { p.lora_B.rows = 4; }, "lora_B");
    check_refused(transposed, [](LinearParams& p) { p.lora_A.rows = 3; }, "lora_A");
    check_refused(transposed, [](LinearParams& p) { p.lora_A.rows = p.lora_B.columns = 0; }, "lora_A");
  }
  setenv("LOFTQ_CPU_ISA", "mmx", 1);
  for (bool transposed : {false, true}) check_refused(transposed, [](LinearParams&) {}, "mmx");
}

}  // namespace

int main() {
  for (const std::string& isa : isas_under_test()) {
    setenv("LOFTQ_CPU_ISA", isa.c_str(), 1);
    check_awkward_shapes(isa);
    check_many_threads(isa);
    check_empty_sums(isa);
    check_thread_counts(isa);
    check_non_finite(isa);
  }
  check_bad_parameters();
  return test_result();
}
