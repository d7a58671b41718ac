// From normalised weights to codes and back, for one code book. S is the class of one of the simd_*.h files.
// The files in generic/ are included inside the LOFTQ_TARGET region of one instruction set; all names are local to it.
#pragma once

#include "loftq/quantize.h"

namespace loftq {
inline namespace LOFTQ_VERSION {
namespace {

// The offset of groups that have none: adding -0 changes no float, not even the sign of a zero.
constexpr float kNoOffset = -0.0f;

bool is_integer_codebook(const float* codebook, int bits) {
  for (int i = 0; i < 1 << bits; ++i) {
    if (codebook[i] != static_cast<float>(i - (1 << (bits - 1)))) return false;
  }
  return true;
}

// The midpoints of a code book, and after them one more so that a bisection may look at index 2^bits - 1.
struct Midpoints {
  float values[256];

  Midpoints(const float* codebook, int bits) {
    const int last = (1 << bits) - 1;
    for (int i = 0; i < last; ++i) values[i] = (codebook[i] + codebook[i + 1]) * 0.5f;
    values[last] = codebook[last];
  }
};

// Nearest code by comparison with the midpoints.
template <class S, int kBits>
class NearestInTable {
 public:
  explicit NearestInTable(const Midpoints& midpoints) : count_below_(midpoints.values) {}

  typename S::Ints operator()(typename S::Floats x) const { return count_below_(x); }

 private:
  typename S::template CountBelow<kBits> count_below_;  // may point into the midpoints
};

// Nearest code of the integers -2^(b-1) .. 2^(b-1) - 1: rounding, with ties down. The midpoints i + 1/2 are exact, so
// this is their count below x, provided no step rounds across one:
//   r = (x + 3 * 2^22) - 3 * 2^22 is x rounded to the nearest integer, ties to even (the sum has an ulp of 1, and its
//   low bits are the integer);
//   x - r is exact (|x - r| <= 1/2 is a multiple of x's ulp), and is -1/2 just where a tie was rounded up.
template <class S, int kBits>
struct NearestInteger {
  static constexpr int kHalf = 1 << (kBits - 1);
  static constexpr float kRound = 12582912.0f;  // 3 * 2^22
  static constexpr int32_t kRoundBits = 0x4b400000;

  explicit NearestInteger(const Midpoints&) {}

  typename S::Ints operator()(typename S::Floats x) const {
    x = S::min(S::max(x, S::broadcast(static_cast<float>(-kHalf))), S::broadcast(static_cast<float>(kHalf - 1)));
    const auto shifted = S::add(x, S::broadcast(kRound));
    const auto remainder = S::sub(x, S::sub(shifted, S::broadcast(kRound)));
    const auto one_less = S::add(S::bits(shifted), kHalf - 1 - kRoundBits);
    return S::count_if_less(one_less, S::broadcast(-0.5f), remainder);
  }
};

template <class S, int kBits, bool kInteger>
struct NearestOf {
  using type = NearestInTable<S, kBits>;
};

template <class S, int kBits>
struct NearestOf<S, kBits, true> {
  using type = NearestInteger<S, kBits>;
};

// codebook[code] * scale + offset. Up to 4 bits the whole table is scaled once per group, and a weight is one lookup.
template <class S, int kBits, bool kInteger>
class Decoder {
 public:
  explicit Decoder(const float* codebook) : table_(codebook) {}
  Decoder(const Decoder& base, float scale, float offset) : table_(base.table_.scaled(scale, offset)) {}

  // Bits of `code` above the kBits lowest are ignored.
  typename S::Floats operator()(typename S::Ints code) const { return table_[code]; }

 private:
  typename S::template Table<kBits> table_;
};

template <class S, bool kInteger>
class Decoder<S, 8, kInteger> {
 public:
  explicit Decoder(const float* codebook) : Decoder(codebook, 1.0f, kNoOffset) {}
  Decoder(const Decoder& base, float scale, float offset) : Decoder(base.codebook_, scale, offset) {}

  typename S::Floats operator()(typename S::Ints code) const {
    const auto value = kInteger ? S::to_floats(S::add(code, -128)) : S::gather(codebook_, code);
    return S::add(S::mul(value, scale_), offset_);
  }

 private:
  Decoder(const float* codebook, float scale, float offset)
      : codebook_(codebook), scale_(S::broadcast(scale)), offset_(S::broadcast(offset)) {}

  const float* codebook_;
  typename S::Floats scale_;
  typename S::Floats offset_;
};

}  // namespace
}  // namespace LOFTQ_VERSION
}  // namespace loftq
