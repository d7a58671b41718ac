// Parts of rows between memory and float32, sums in a fixed order, and tiles of codes.
#pragma once

#include <cstring>

#include "cpu/generic/codec.h"
#include "cpu/kernels.h"
#include "cpu/target.h"
#include "loftq/half.h"

namespace loftq {
inline namespace LOFTQ_VERSION {
namespace {

// count values of `type` at src become float32.
template <class S>
void to_float(DType type, const void* src, int64_t count, float* out) {
  int64_t i = 0;
  if (type == DType::kFloat32) {
    if (count > 0) std::memcpy(out, src, count * sizeof(float));
    return;
  }
  const uint16_t* words = static_cast<const uint16_t*>(src);
  if (type == DType::kFloat16) {
    for (; i + S::kLanes <= count; i += S::kLanes) S::store(out + i, S::load_half(words + i));
    S::load_half_rest(words + i, count - i, out + i);
  } else {
    for (; i + S::kLanes <= count; i += S::kLanes) S::store(out + i, S::load_bfloat(words + i));
    for (; i < count; ++i) out[i] = bfloat_to_float(words[i]);
  }
}

// count float32 values become `type` at dst.
template <class S>
void from_float(DType type, const float* in, int64_t count, void* dst) {
  int64_t i = 0;
  if (type == DType::kFloat32) {
    std::memcpy(dst, in, count * sizeof(float));
    return;
  }
  uint16_t* words = static_cast<uint16_t*>(dst);
  if (type == DType::kFloat16) {
    for (; i + S::kLanes <= count; i += S::kLanes) S::store_half(words + i, S::load(in + i));
    for (; i < count; ++i) words[i] = float_to_half(in[i]);
  } else {
    for (; i + S::kLanes <= count; i += S::kLanes) S::store_bfloat(words + i, S::load(in + i));
    for (; i < count; ++i) words[i] = float_to_bfloat(in[i]);
  }
}

const void* advance(const void* base, DType type, int64_t elements) {
  return static_cast<const char*>(base) + elements * size_of(type);
}

void* advance(void* base, DType type, int64_t elements) { return static_cast<char*>(base) + elements * size_of(type); }

// column >> group_shift is the group of a column: group sizes are powers of two, and a division takes longer than
// decoding a tile.
inline int group_shift(int64_t group_size) {
  if (group_size == kWholeRow) return 62;
  int shift = 0;
  while (int64_t{1} << shift < group_size) ++shift;
  return shift;
}

// One value, such as the scale of a group.
template <class S>
inline float load_one(DType type, const void* src, int64_t index) {
  if (type == DType::kFloat32) return static_cast<const float*>(src)[index];
  const uint16_t word = static_cast<const uint16_t*>(src)[index];
  return type == DType::kFloat16 ? S::from_half(word) : bfloat_to_float(word);
}

// 32 interleaved partial sums in float64, so that every vector width gives the same bits (quantize.h).
template <class S>
class Sums {
 public:
  Sums() {
    for (auto& part : parts_) part = S::zero_doubles();
  }

  // Vector `index` of a block of 32 columns.
  void add(int index, typename S::Doubles terms) { parts_[index] = S::add(parts_[index], terms); }

  double total() const {
    typename S::Doubles parts[kParts];
    for (int i = 0; i < kParts; ++i) parts[i] = parts_[i];
    for (int half = kParts / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) parts[i] = S::add(parts[i], parts[i + half]);
    }
    return S::fold(parts[0]);
  }

  static constexpr int kParts = 32 / S::kLanes;

 private:
  typename S::Doubles parts_[kParts];
};

// The sum of term(column) over columns [0, count), where term gives S::kLanes of them.
template <class S, class Term>
inline double sum_columns(int64_t count, const Term& term) {
  Sums<S> sums;
  int64_t column = 0;
  for (; column + 32 <= count; column += 32) {
    for (int i = 0; i < Sums<S>::kParts; ++i) sums.add(i, term(column + i * S::kLanes));
  }
  for (int i = 0; column < count; ++i, column += S::kLanes) sums.add(i, S::first(term(column), count - column));
  return sums.total();
}

// visit(column, float32 lanes) for one tile of bytes [64 * kBits / 8]; first and second decode columns 0..31
// and 32..63.
template <class S, int kBits, class Decode, class Visit>
LOFTQ_INLINE void decode_fields(const Decode& first, const Decode& second, const uint8_t* bytes, const Visit& visit) {
  constexpr int kRun = kTile * kBits / 8;
  for (int j = 0; j < kRun; j += S::kLanes) {
    const auto fields = S::load_bytes(bytes + j);
    LOFTQ_UNROLL
    for (int i = 0; i < 8 / kBits; ++i) {
      const int column = i * kRun + j;
      visit(column, (column < 32 ? first : second)(S::shift_right(fields, i * kBits)));
    }
  }
}

// The codes of a row for linear_small.h, which scales the products of a step. A step is one tile, in column order.
// O is an operand type (operand_float.h).
template <class O, int kBits, bool kInteger>
class TileSteps {
  using Weights = typename O::template Weights<kBits, kInteger>;

 public:
  static constexpr int kTiles = 1;

  // group_shift: column >> group_shift is the group of a column, all of a tile in one.
  TileSteps(const float* codebook, int /*group_shift*/) : table_(Weights(codebook).group(1.0f, kNoOffset)) {}

  // visit(position, vector) for all kWidth-wide slices of a step, unscaled. tiles: how many the row still has.
  template <class Visit>
  LOFTQ_INLINE void visit(const uint8_t* bytes, int64_t /*tiles*/, const Visit& visit) const {
    Weights::visit_tile(table_, table_, bytes, visit);
  }

  // The factors of the lanes of the products; groups: the scales from the step's first group on.
  typename O::Floats scales(const float* groups) const { return O::Simd::broadcast(*groups); }

 private:
  typename Weights::Group table_;
};

// One tile to float32 [64].
template <class S, int kBits, class Decode>
inline void decode_tile(const Decode& first, const Decode& second, const uint8_t* bytes, float* out) {
  decode_fields<S, kBits>(first, second, bytes, [&](int column, typename S::Floats v) { S::store(out + column, v); });
}

}  // namespace
}  // namespace LOFTQ_VERSION
}  // namespace loftq
