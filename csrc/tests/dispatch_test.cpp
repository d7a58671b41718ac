// The choice of instruction set, and arguments that must be refused.
#include <cstdlib>
#include <cstring>
#include <vector>

#include "loftq/cpu.h"
#include "tests/check.h"

using namespace loftq;

namespace {

struct Problem {
  std::vector<float> weight = std::vector<float>(2 * 64, 1.0f);
  std::vector<float> codebook = {-1.0f, 0.0f, 0.5f, 1.0f};
  std::vector<uint8_t> codes = std::vector<uint8_t>(2 * 16, 0xee);
  std::vector<float> scale = std::vector<float>(2, -1.0f);
  QuantizeParams params = {};

  Problem() {
    params.weight = weight.data();
    params.weight_stride = 64;
    params.codebook = codebook.data();
    params.n = 2;
    params.k = 64;
    params.bits = 2;
    params.group_size = 64;
    params.codes = codes.data();
    params.scale = scale.data();
  }

  bool untouched() const { return scale[0] == -1.0f && scale[1] == -1.0f && codes[0] == 0xee && codes[31] == 0xee; }
};

template <class Spoil>
void check_refused(const Spoil& spoil, const char* part_of_reason) {
  Problem problem;
  spoil(problem.params);
  const Status status = launch_quantize_cpu(problem.params, 1);
  CHECK(status != nullptr && std::strstr(status, part_of_reason), "expected '%s' in '%s'", part_of_reason,
        status ? status : "success");
  CHECK(problem.untouched(), "a refused call wrote its outputs (%s)", part_of_reason);
}

}  // namespace

int main() {
  unsetenv("LOFTQ_CPU_ISA");
  const char* names[8];
  const int count = supported_isas(names, 8);
  CHECK(count >= 1 && std::strcmp(names[count - 1], "scalar") == 0, "%d sets", count);
  CHECK(std::strcmp(active_isa(), names[0]) == 0, "%s is active, %s is the widest", active_isa(), names[0]);
  for (int i = 0; i < count; ++i) {
    setenv("LOFTQ_CPU_ISA", names[i], 1);
    CHECK(active_isa() != nullptr && std::strcmp(active_isa(), names[i]) == 0, "%s was not forced", names[i]);
  }

  setenv("LOFTQ_CPU_ISA", "mmx", 1);
  Status status = nullptr;
  CHECK(active_isa(&status) == nullptr, "mmx was accepted");
  CHECK(status && std::strstr(status, "LOFTQ_CPU_ISA=mmx") && std::strstr(status, "scalar"), "%s", status);
  check_refused([](QuantizeParams&) {}, "mmx");
  unsetenv("LOFTQ_CPU_ISA");

  check_refused([](QuantizeParams& p) { p.bits = 3; }, "bits");
  check_refused([](QuantizeParams& p) { p.n = -1; }, "negative");
  for (int64_t size : {-2, 0, 16, 48, 96, 512}) {
    check_refused([size](QuantizeParams& p) { p.group_size = size; }, "group_size");
    const DequantizeParams dequantize = {nullptr, nullptr, nullptr, DType::kFloat32, nullptr,        1,
                                         64,      4,       size,    nullptr,         DType::kFloat32};
    const Status refused = launch_dequantize_cpu(dequantize, 1);
    CHECK(refused && std::strstr(refused, "group_size"), "dequantize, group size %d", int(size));
  }
  check_refused([](QuantizeParams& p) { p.scale_rule = ScaleRule::kMinMax; }, "offset");
  check_refused([](QuantizeParams& p) { p.residual_norm2 = reinterpret_cast<double*>(p.codes); }, "residual");

  Problem good;
  CHECK(launch_quantize_cpu(good.params, 1) == nullptr, "a good call was refused");
  CHECK(!good.untouched(), "a good call wrote nothing");
  return loftq::testing::test_result();
}
