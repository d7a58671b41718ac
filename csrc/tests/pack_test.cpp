// The storage contract: its group sizes and code widths, every byte and field of packed codes, and the way back.
#include <algorithm>
#include <random>
#include <vector>

#include "loftq/cpu.h"
#include "tests/check.h"

using namespace loftq;

namespace {

void check_group_sizes() {
  const std::vector<int64_t> legal = {-1, 32, 64, 128, 256};
  for (int64_t size = -3; size <= 520; ++size) {
    const bool wanted = std::count(legal.begin(), legal.end(), size) > 0;
    CHECK(is_group_size(size) == wanted, "group size %d", int(size));
    CHECK((check_group_size(size) == nullptr) == wanted, "group size %d", int(size));
  }
  CHECK(group_width(200, 64) == 64 && group_width(200, -1) == 200 && group_width(0, -1) == 0, "widths");
  CHECK(num_groups(200, 64) == 4 && num_groups(192, 64) == 3 && num_groups(1, 256) == 1, "groups");
  CHECK(num_groups(200, -1) == 1 && num_groups(0, -1) == 0 && num_groups(0, 32) == 0, "groups of whole rows");
}

void check_code_widths() {
  for (int64_t entries = -1; entries <= 1024; ++entries) {
    const int wanted = entries == 4 ? 2 : entries == 16 ? 4 : entries == 256 ? 8 : 0;
    CHECK(bits_of_codebook(entries) == wanted, "%d entries", int(entries));
  }
  for (int bits = -8; bits <= 64; ++bits) {
    CHECK(is_code_bits(bits) == (bits == 2 || bits == 4 || bits == 8), "%d bits", bits);
  }
}

}  // namespace

int main() {
  check_group_sizes();
  check_code_widths();
  std::mt19937 random(3);
  for (int bits : kCodeBits) {
    for (int64_t k : {0, 1, 63, 64, 65, 128, 200, 5000}) {
      const int64_t n = 7;
      std::vector<uint8_t> codes(n * k), packed(n * row_bytes(k, bits), 0xee), unpacked(n * k);
      for (uint8_t& code : codes) code = static_cast<uint8_t>(random() & ((1u << bits) - 1));
      CHECK(launch_pack_cpu({codes.data(), n, k, bits, packed.data()}, 2) == nullptr, "bits %d k %d", bits, int(k));
      for (int64_t row = 0; row < n; ++row) {
        for (int64_t column = 0; column < padded_k(k); ++column) {
          const int found = load_code(packed.data() + row * row_bytes(k, bits), column, bits);
          const int wanted = column < k ? codes[row * k + column] : 0;
          CHECK(found == wanted, "bits %d k %d (%d, %d): %d, not %d", bits, int(k), int(row), int(column), found,
                wanted);
        }
      }
      CHECK(launch_unpack_cpu({packed.data(), n, k, bits, unpacked.data()}, 2) == nullptr, "bits %d", bits);
      CHECK(unpacked == codes, "bits %d k %d", bits, int(k));
    }
  }
  CHECK(launch_pack_cpu({nullptr, 1, 64, 3, nullptr}, 1) != nullptr, "bits 3");
  CHECK(launch_unpack_cpu({nullptr, -1, 64, 4, nullptr}, 1) != nullptr, "n -1");
  return loftq::testing::test_result();
}
