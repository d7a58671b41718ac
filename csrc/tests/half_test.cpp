// fp16 and bf16 conversions: every 16-bit value, and every float32 near a place where rounding changes.
#include <algorithm>

#include "loftq/half.h"
#include "tests/check.h"
#include "tests/reference.h"

using namespace loftq;
using namespace loftq::testing;

namespace {

void check_float(float value) {
  const uint16_t half = float_to_half(value);
  const uint16_t bfloat = float_to_bfloat(value);
  CHECK(same_bits(half_to_float(half), round_to(DType::kFloat16, value)), "%a became %04x", value, half);
  CHECK(same_bits(bfloat_to_float(bfloat), round_to(DType::kBFloat16, value)), "%a became %04x", value, bfloat);
}

}  // namespace

int main() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const uint16_t word = static_cast<uint16_t>(bits);
    CHECK(same_bits(half_to_float(word), decode(DType::kFloat16, word)), "half %04x", word);
    CHECK(same_bits(bfloat_to_float(word), decode(DType::kBFloat16, word)), "bfloat %04x", word);
    // Around this bfloat and, as a half's 13 dropped bits begin elsewhere, around every eighth part of the way on.
    for (uint32_t part = 0; part < 16; ++part) {
      for (uint32_t nudge : {0u, 1u, 0xfffu, ~0u}) check_float(float_of((bits << 16) + part * 0x1000u + nudge));
    }
  }
  return test_result();
}
