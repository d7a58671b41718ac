// Calls that break the contract, at random: each gives a status, and no byte of any output changes. Calls that keep it
// succeed, and write nothing beside their outputs.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "loftq/check.h"
#include "loftq/cpu.h"
#include "tests/check.h"
#include "tests/isas.h"

using namespace loftq;
using namespace loftq::testing;

namespace {

using Random = std::mt19937;

constexpr uint8_t kGuard = 0x5e;
constexpr int64_t kGuardBytes = 64;

// An output with guard bytes around it.
class Output {
 public:
  explicit Output(int64_t size) : bytes_(static_cast<size_t>(size + 2 * kGuardBytes), kGuard) {}

  void* data() { return bytes_.data() + kGuardBytes; }
  bool untouched() const { return all_guard(bytes_.begin(), bytes_.end()); }
  bool within() const {
    return all_guard(bytes_.begin(), bytes_.begin() + kGuardBytes) &&
           all_guard(bytes_.end() - kGuardBytes, bytes_.end());
  }

 private:
  using Iterator = std::vector<uint8_t>::const_iterator;
  static bool all_guard(Iterator begin, Iterator end) {
    return std::all_of(begin, end, [](uint8_t byte) { return byte == kGuard; });
  }

  std::vector<uint8_t> bytes_;
};

template <class T>
T pick(std::initializer_list<T> choices, Random& random) {
  return choices.begin()[random() % choices.size()];
}

DType any_dtype(Random& random) { return pick({DType::kFloat32, DType::kFloat16, DType::kBFloat16}, random); }

// Values that break the contract wherever they stand.
int64_t wild_size(Random& random) {
  return pick<int64_t>({-1, -64, INT64_MIN, INT64_MAX, INT64_MAX / 2, (int64_t{1} << 56) + 1}, random);
}
int64_t negative(Random& random) { return pick<int64_t>({-1, -63, INT64_MIN}, random); }
int wild_threads(Random& random) { return pick({0, -1, -7, INT32_MIN}, random); }
int wild_bits(Random& random) { return pick({0, -4, 1, 3, 5, 16, 31, 64, INT32_MAX, INT32_MIN}, random); }
int64_t wild_group(Random& random) { return pick<int64_t>({0, 16, 63, 512, -2, INT64_MIN, INT64_MAX}, random); }
DType wild_dtype(Random& random) { return static_cast<DType>(pick({3, 4, -1, 255, INT32_MAX, INT32_MIN}, random)); }
ScaleRule wild_rule(Random& random) { return static_cast<ScaleRule>(pick({3, -1, 77, INT32_MIN}, random)); }

// A way to break a call that keeps the contract. It is passed over where it does not apply.
template <class Params>
struct Fault {
  const char* name;
  std::function<void(Params&, Random&)> apply;
  std::function<bool(const Params&)> applies = nullptr;  // nullptr: everywhere
};

// launch(params, threads) on a call that keeps the contract, then on the same call with one to three faults.
template <class Params, class Launch>
void check_call(const std::string& what, const Params& good, const std::vector<Fault<Params>>& faults,
                const std::vector<Output*>& outputs, const Launch& launch, Random& random) {
  Params bad = good;
  int threads = 1 + static_cast<int>(random() % 3);
  std::string applied;
  for (int count = 1 + static_cast<int>(random() % 3); count > 0 || applied.empty(); --count) {
    const size_t index = random() % (faults.size() + 1);
    if (index == faults.size()) {
      threads = wild_threads(random);
      applied += " threads";
    } else if (!faults[index].applies || faults[index].applies(bad)) {
      faults[index].apply(bad, random);
      applied += std::string(" ") + faults[index].name;
    }
  }
  const Status refused = launch(bad, threads);
  CHECK(refused != nullptr && *refused != '\0', "%s accepts wrong%s", what.c_str(), applied.c_str());
  for (Output* output : outputs) CHECK(output->untouched(), "%s wrote despite wrong%s", what.c_str(), applied.c_str());

  const Status status = launch(good, 1 + static_cast<int>(random() % 3));
  CHECK(status == nullptr, "%s: %s", what.c_str(), status);
  for (Output* output : outputs) CHECK(output->within(), "%s wrote beside its outputs", what.c_str());
}

// The faults of a field: a pointer that becomes null, a number that becomes one of the wild ones.
template <class Params, class T>
Fault<Params> null(const char* name, T* Params::* field) {
  return {name, [field](Params& p, Random&) { p.*field = nullptr; }};
}
template <class Params, class T>
Fault<Params> wild(const char* name, T Params::* field, T (*value)(Random&)) {
  return {name, [field, value](Params& p, Random& random) { p.*field = value(random); }};
}

struct Shape {
  int64_t n, k, group_size;
  int bits;
  DType scale_dtype;
  bool affine;

  explicit Shape(Random& random)
      : n(1 + static_cast<int64_t>(random() % 5)),
        k(1 + static_cast<int64_t>(random() % 150)),
        group_size(kGroupSizes[random() % 5]),
        bits(kCodeBits[random() % 3]),
        scale_dtype(any_dtype(random)),
        affine(random() % 2 == 0) {}

  int64_t code_bytes() const { return n * row_bytes(k, bits); }
  int64_t scale_bytes() const { return n * num_groups(k, group_size) * size_of(scale_dtype); }
  std::vector<float> codebook() const {
    std::vector<float> table;
    for (int i = 0; i < 1 << bits; ++i) table.push_back(static_cast<float>(i - (1 << (bits - 1))));
    return table;
  }
};

std::vector<char> zeros(int64_t size) { return std::vector<char>(static_cast<size_t>(size)); }

const std::vector<Fault<QuantizeParams>> kQuantizeFaults = {
    null("weight", &QuantizeParams::weight),
    null("codebook", &QuantizeParams::codebook),
    null("codes", &QuantizeParams::codes),
    null("scale", &QuantizeParams::scale),
    wild("n", &QuantizeParams::n, wild_size),
    wild("k", &QuantizeParams::k, wild_size),
    wild("weight_stride", &QuantizeParams::weight_stride, negative),
    {"long weight_stride", [](QuantizeParams& p, Random&) { p.weight_stride = INT64_MAX - 1; }},
    wild("bits", &QuantizeParams::bits, wild_bits),
    wild("group_size", &QuantizeParams::group_size, wild_group),
    wild("weight_dtype", &QuantizeParams::weight_dtype, wild_dtype),
    wild("scale_dtype", &QuantizeParams::scale_dtype, wild_dtype),
    wild("scale_rule", &QuantizeParams::scale_rule, wild_rule),
    {"missing offset", [](QuantizeParams& p, Random&) { p.offset = nullptr, p.scale_rule = ScaleRule::kMinMax; }},
    {"needless offset", [](QuantizeParams& p, Random&) { p.offset = p.scale, p.scale_rule = ScaleRule::kAbsmax; },
     [](const QuantizeParams& p) { return p.scale != nullptr; }},
    {"residual_norm2 alone", [](QuantizeParams& p, Random&) { p.residual = nullptr; },
     [](const QuantizeParams& p) { return p.residual_norm2 != nullptr; }},
    {"residual_dtype", [](QuantizeParams& p, Random& random) { p.residual_dtype = wild_dtype(random); },
     [](const QuantizeParams& p) { return p.residual != nullptr || p.low_rank != nullptr; }},
};

void check_quantize(Random& random) {
  const Shape shape(random);
  const int64_t stride = shape.k + static_cast<int64_t>(random() % 3);
  const DType dtype = any_dtype(random);
  const std::vector<char> weight = zeros(shape.n * stride * size_of(dtype));
  const std::vector<float> codebook = shape.codebook();
  Output codes(shape.code_bytes()), scale(shape.scale_bytes()), offset(shape.scale_bytes());
  Output residual(shape.n * shape.k * 4), norms(shape.n * 8);
  QuantizeParams p = {};
  p.weight = weight.data();
  p.weight_dtype = dtype;
  p.weight_stride = stride;
  p.codebook = codebook.data();
  p.n = shape.n;
  p.k = shape.k;
  p.bits = shape.bits;
  p.group_size = shape.group_size;
  p.scale_rule = shape.affine ? ScaleRule::kMinMax : ScaleRule::kAbsmax;
  p.scale_dtype = shape.scale_dtype;
  p.codes = static_cast<uint8_t*>(codes.data());
  p.scale = scale.data();
  p.offset = shape.affine ? offset.data() : nullptr;
  if (random() % 2) {
    p.residual = residual.data();
    p.residual_dtype = any_dtype(random);
    p.residual_norm2 = static_cast<double*>(norms.data());
  }
  check_call("quantize", p, kQuantizeFaults, {&codes, &scale, &offset, &residual, &norms}, launch_quantize_cpu, random);
}

const std::vector<Fault<DequantizeParams>> kDequantizeFaults = {
    null("codes", &DequantizeParams::codes),
    null("scale", &DequantizeParams::scale),
    null("codebook", &DequantizeParams::codebook),
    null("out", &DequantizeParams::out),
    wild("n", &DequantizeParams::n, wild_size),
    wild("k", &DequantizeParams::k, wild_size),
    wild("bits", &DequantizeParams::bits, wild_bits),
    wild("group_size", &DequantizeParams::group_size, wild_group),
    wild("scale_dtype", &DequantizeParams::scale_dtype, wild_dtype),
    wild("out_dtype", &DequantizeParams::out_dtype, wild_dtype),
};

void check_dequantize(Random& random) {
  const Shape shape(random);
  const std::vector<float> codebook = shape.codebook();
  const std::vector<uint8_t> codes(static_cast<size_t>(shape.code_bytes()));
  const std::vector<char> scale = zeros(shape.scale_bytes());
  const DType dtype = any_dtype(random);
  Output out(shape.n * shape.k * size_of(dtype));
  const DequantizeParams p = {codes.data(),
                              scale.data(),
                              shape.affine ? scale.data() : nullptr,
                              shape.scale_dtype,
                              codebook.data(),
                              shape.n,
                              shape.k,
                              shape.bits,
                              shape.group_size,
                              out.data(),
                              dtype};
  check_call("dequantize", p, kDequantizeFaults, {&out}, launch_dequantize_cpu, random);
}

bool present(const Matrix& matrix) { return matrix.data != nullptr; }
bool present(const PackedWeight&) { return true; }

// Faults of a matrix or of the weight within LinearParams.
template <class Part, class T>
Fault<LinearParams> part(const char* name, Part LinearParams::* which, T Part::* field, T (*value)(Random&)) {
  return {name, [=](LinearParams& p, Random& random) { p.*which.*field = value(random); },
          [=](const LinearParams& p) { return present(p.*which); }};
}

template <class T>
T* nothing(Random&) {
  return nullptr;
}

std::vector<Fault<LinearParams>> linear_faults(bool transposed) {
  using P = LinearParams;
  using W = PackedWeight;
  std::vector<Fault<P>> faults = {
      null("y", &P::y),
      part("codes", &P::weight, &W::codes, nothing<const uint8_t>),
      part("scale", &P::weight, &W::scale, nothing<const void>),
      part("codebook", &P::weight, &W::codebook, nothing<const float>),
      part("scale_dtype", &P::weight, &W::scale_dtype, wild_dtype),
      part("n", &P::weight, &W::n, wild_size),
      part("k", &P::weight, &W::k, wild_size),
      part("bits", &P::weight, &W::bits, wild_bits),
      part("group_size", &P::weight, &W::group_size, wild_group),
      {"bias_dtype", [](P& p, Random& random) { p.bias_dtype = wild_dtype(random); },
       [](const P& p) { return p.bias != nullptr; }},
      {"lora_A alone", [](P& p, Random&) { p.lora_B.data = nullptr; },
       [](const P& p) { return p.lora_A.data != nullptr; }},
      {"lora_B alone", [](P& p, Random&) { p.lora_A.data = nullptr; },
       [](const P& p) { return p.lora_B.data != nullptr; }},
      {"x", [](P& p, Random&) { p.x.data = nullptr; }},
  };
  if (transposed)
    faults.push_back(
        {"bias", [](P& p, Random&) { p.bias = p.weight.scale; }, [](const P& p) { return p.weight.scale != nullptr; }});
  for (Matrix P::* which : {&P::x, &P::lora_A, &P::lora_B}) {
    faults.push_back(part("dtype of a matrix", which, &Matrix::dtype, wild_dtype));
    faults.push_back(part("stride of a matrix", which, &Matrix::stride, negative));
    faults.push_back(part("rows of a matrix", which, &Matrix::rows, wild_size));
    faults.push_back(part("columns of a matrix", which, &Matrix::columns, wild_size));
  }
  return faults;
}

void check_linear(Random& random, bool transposed) {
  static const std::vector<Fault<LinearParams>> kFaults[] = {linear_faults(false), linear_faults(true)};
  const Shape shape(random);
  const int64_t m = 1 + static_cast<int64_t>(random() % 12), r = static_cast<int64_t>(random() % 4);
  const int64_t from = transposed ? shape.n : shape.k, to = transposed ? shape.k : shape.n;
  const DType dtype = any_dtype(random), adapter_dtype = any_dtype(random);
  const std::vector<float> codebook = shape.codebook();
  const std::vector<uint8_t> codes(static_cast<size_t>(shape.code_bytes()));
  const std::vector<char> scale = zeros(shape.scale_bytes()), x = zeros(m * from * 4);
  const std::vector<char> lora_A = zeros(r * shape.k * 4), lora_B = zeros(shape.n * r * 4), bias = zeros(shape.n * 4);
  Output y(m * to * size_of(dtype));
  LinearParams p = {};
  p.x = {x.data(), dtype, m, from, from};
  p.weight = {codes.data(),      scale.data(),    shape.affine ? scale.data() : nullptr,
              shape.scale_dtype, codebook.data(), shape.n,
              shape.k,           shape.bits,      shape.group_size};
  if (r > 0) {
    p.lora_A = {lora_A.data(), adapter_dtype, r, shape.k, shape.k};
    p.lora_B = {lora_B.data(), adapter_dtype, shape.n, r, r};
  }
  p.scaling = random() % 8 ? 0.5f : NAN;  // a NaN is a number to multiply with as any other
  if (!transposed && random() % 2) p.bias = bias.data();
  p.bias_dtype = any_dtype(random);
  p.y = y.data();
  check_call(transposed ? "linear_grad_input" : "linear", p, kFaults[transposed], {&y},
             transposed ? launch_linear_grad_input_cpu : launch_linear_cpu, random);
}

template <class Params>
std::vector<Fault<Params>> packing_faults() {
  return {null("codes", &Params::codes), null("packed", &Params::packed), wild("n", &Params::n, wild_size),
          wild("k", &Params::k, wild_size), wild("bits", &Params::bits, wild_bits)};
}

void check_packing(Random& random) {
  const Shape shape(random);
  Output codes(shape.n * shape.k), packed(shape.code_bytes());
  auto* const codes_data = static_cast<uint8_t*>(codes.data());
  auto* const packed_data = static_cast<uint8_t*>(packed.data());
  const PackParams pack = {codes_data, shape.n, shape.k, shape.bits, packed_data};
  check_call("pack", pack, packing_faults<PackParams>(), {&packed}, launch_pack_cpu, random);
  const UnpackParams unpack = {packed_data, shape.n, shape.k, shape.bits, codes_data};
  check_call("unpack", unpack, packing_faults<UnpackParams>(), {&codes}, launch_unpack_cpu, random);
}

// What a check says is what the launch says, and it names what is wrong.
void check_reasons() {
  const auto says = [](Status status, const char* part_of_reason) {
    CHECK(status && std::strstr(status, part_of_reason), "'%s' in '%s'", part_of_reason, status ? status : "success");
  };
  const PackParams nowhere = {nullptr, 1, 64, 4, nullptr};
  says(check_params(nowhere), "codes must not be null");
  says(launch_pack_cpu(nowhere, 1), "codes must not be null");
  says(launch_pack_cpu(nowhere, 0), "num_threads must be at least 1");
  const PackParams nothing = {nullptr, 0, 64, 4, nullptr};
  CHECK(launch_pack_cpu(nothing, 1) == nullptr, "pointers to nothing may be null");
  says(launch_pack_cpu(nothing, 0), "num_threads");  // also where there is nothing to do
  LinearParams linear = {};
  linear.weight = {nullptr, nullptr, nullptr, DType::kFloat32, nullptr, 3, 0, 4, 64};
  linear.x = {nullptr, DType::kFloat32, 2, 0, 0};
  says(launch_linear_cpu(linear, 1), "y must not be null");  // y is [2, 3], although x is [2, 0]
  linear.x.rows = 0;
  CHECK(launch_linear_cpu(linear, 1) == nullptr, "nothing to write");
}

}  // namespace

int main() {
  check_reasons();
  for (const std::string& isa : isas_under_test()) {
    setenv("LOFTQ_CPU_ISA", isa.c_str(), 1);
    Random random(11);
    for (int i = 0; i < 2000; ++i) {
      check_quantize(random);
      check_dequantize(random);
      check_linear(random, false);
      check_linear(random, true);
      check_packing(random);
    }
  }
  return test_result();
}
