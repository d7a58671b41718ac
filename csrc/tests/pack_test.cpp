// Pack and unpack: every byte and field of the storage contract, and the way back.
#include <random>
#include <vector>

#include "loftq/cpu.h"
#include "tests/check.h"

using namespace loftq;

int main() {
  std::mt19937 random(3);
  for (int bits : {2, 4, 8}) {
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
