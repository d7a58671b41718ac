// Panels of operands: where their elements come from, and how they are laid out for the register tile.
#pragma once

#include <algorithm>

#include "cpu/generic/register_tile.h"
#include "cpu/generic/rows.h"
#include "loftq/linear.h"

namespace loftq {
inline namespace LOFTQ_VERSION {
namespace {

// The most rows and tiles that fill() is asked for at once.
constexpr int64_t kMostRows = 96, kMostTiles = 8;

// Rows of a packed weight, decoded.
template <class O, int kBits, bool kInteger>
class PackedRows {
 public:
  using Weights = typename O::template Weights<kBits, kInteger>;

  explicit PackedRows(const PackedWeight& weight)
      : weight_(weight),
        decoder_(weight.codebook),
        groups_(num_groups(weight.k, weight.group_size)),
        row_bytes_(row_bytes(weight.k, kBits)),
        shift_(group_shift(weight.group_size)) {}

  int64_t rows() const { return weight_.n; }

  // Rows [row, row + rows) of columns [64 * tile, 64 * (tile + tiles)), `stride` elements apart; at most kMostRows and
  // kMostTiles. Columns beyond k hold finite values if the scales are finite.
  void fill(int64_t row, int64_t rows, int64_t tile, int64_t tiles, typename O::Element* out, int64_t stride) const {
    const int64_t first = tile * kTile >> shift_;
    const int64_t count = std::min(groups_, (((tile + tiles) * kTile - 1) >> shift_) + 1) - first;
    // Prefetch all rows before the first is decoded, so that no row waits for its own codes.
    alignas(64) float scale[kMostRows][kMostGroups], offset[kMostRows][kMostGroups];
    for (int64_t r = 0; r < rows; ++r) load_groups((row + r) * groups_ + first, count, scale[r], offset[r]);
    const uint8_t* bytes = weight_.codes + row * row_bytes_ + tile * kTileBytes;
    for (int64_t r = 0; r < rows; ++r, bytes += row_bytes_, out += stride) {
      decode_row(bytes, tile * kTile - (first << shift_), tiles, scale[r], offset[r], count - 1, out);
    }
  }

  // Prefetches the codes of tiles that will be decoded soon: processors do not prefetch short pieces of many rows by
  // themselves. It is inline because GCC drops calls of a function that only prefetches, as if they had no effect.
  LOFTQ_INLINE void prefetch(int64_t row, int64_t rows, int64_t tile, int64_t tiles) const {
    constexpr int64_t kLine = 64;
    for (int64_t r = row; r < std::min(row + rows, weight_.n); ++r) {
      const uint8_t* const bytes = weight_.codes + r * row_bytes_ + tile * kTileBytes;
      for (int64_t i = 0; i < tiles * kTileBytes; i += kLine) __builtin_prefetch(bytes + i, 0, 2);
      const int64_t group = r * groups_ + (tile * kTile >> shift_);
      __builtin_prefetch(advance(weight_.scale, weight_.scale_dtype, group), 0, 2);
      if (weight_.offset) __builtin_prefetch(advance(weight_.offset, weight_.scale_dtype, group), 0, 2);
    }
  }

 private:
  static constexpr int64_t kTileBytes = kTile * kBits / 8;
  static constexpr int64_t kMostGroups = kMostTiles * 2;

  // Tiles from `column` of the first group on.
  LOFTQ_INLINE void decode_row(const uint8_t* bytes, int64_t column, int64_t tiles, const float* scale,
                               const float* offset, int64_t last_group, typename O::Element* out) const {
    const Weights decoder = decoder_;  // a local copy, which no store can change
    const int shift = shift_;
    const auto group = [&](int64_t at) LOFTQ_LAMBDA {
      const int64_t g = std::min(at >> shift, last_group);
      return decoder.group(scale[g], offset[g]);
    };
    for (int64_t t = 0; t < tiles; ++t, bytes += kTileBytes, out += kTile, column += kTile) {
      const auto first = group(column);
      const auto second = shift < 6 ? group(column + 32) : first;
      Weights::visit_tile(first, second, bytes,
                          [&](int i, typename O::Vector v) LOFTQ_LAMBDA { O::store(out + i, v); });
    }
  }

  void load_groups(int64_t index, int64_t count, float* scale, float* offset) const {
    const DType type = weight_.scale_dtype;
    to_float<typename O::Simd>(type, advance(weight_.scale, type, index), count, scale);
    if (weight_.offset) {
      to_float<typename O::Simd>(type, advance(weight_.offset, type, index), count, offset);
    } else {
      std::fill(offset, offset + count, kNoOffset);
    }
  }

  const PackedWeight& weight_;
  const Weights decoder_;
  const int64_t groups_, row_bytes_;
  const int shift_;
};

// Rows of a dense matrix, converted; zero beyond its columns.
template <class O>
class DenseRows {
 public:
  explicit DenseRows(const Matrix& matrix) : matrix_(matrix) {}

  int64_t rows() const { return matrix_.rows; }

  void fill(int64_t row, int64_t rows, int64_t tile, int64_t tiles, typename O::Element* out, int64_t stride) const {
    const int64_t column = tile * kTile;
    const int64_t real = std::max<int64_t>(0, std::min(tiles * kTile, matrix_.columns - column));
    for (int64_t r = row; r < row + rows; ++r, out += stride) {
      O::convert(matrix_.dtype, advance(matrix_.data, matrix_.dtype, r * matrix_.stride + column), real, out);
      std::fill(out + real, out + tiles * kTile, typename O::Element(0));
    }
  }

  void prefetch(int64_t, int64_t, int64_t, int64_t) const {}  // nothing to do: the matrix is small and in the caches

 private:
  const Matrix& matrix_;
};

// The rows of two sources side by side: those of `second` follow after `tiles` tiles of `first`.
template <class O, class First, class Second>
class SideBySide {
 public:
  SideBySide(const First& first, int64_t tiles, const Second& second) : first_(first), second_(second), tiles_(tiles) {}

  void fill(int64_t row, int64_t rows, int64_t tile, int64_t tiles, typename O::Element* out, int64_t stride) const {
    const int64_t of_first = std::max<int64_t>(0, std::min(tiles, tiles_ - tile));
    if (of_first > 0) first_.fill(row, rows, tile, of_first, out, stride);
    if (of_first == tiles) return;
    const int64_t skip = tile + of_first - tiles_;
    second_.fill(row, rows, skip, tiles - of_first, out + of_first * kTile, stride);
  }

  LOFTQ_INLINE void prefetch(int64_t row, int64_t rows, int64_t tile, int64_t tiles) const {
    if (tile < tiles_) first_.prefetch(row, rows, tile, std::min(tiles, tiles_ - tile));
  }

 private:
  const First& first_;
  const Second& second_;
  const int64_t tiles_;
};

// Right panel whose outputs are the columns of tiles [tile, tile + tiles); products run over rows [row, row + rows), a
// multiple of kTile; rows that the source does not have are zero. out: a block of kLanes columns every block_stride
// elements.
template <class O, class Rows>
void fill_right(const Rows& source, int64_t row, int64_t rows, int64_t tile, int64_t tiles, int64_t block_stride,
                typename O::Element* out) {
  constexpr int64_t kRows = 16;  // rows per step
  constexpr int64_t kStride = kMostTiles * kTile;
  alignas(64) typename O::Element decoded[kRows * kStride];
  for (int64_t r = 0; r < rows; r += kRows) {
    const int64_t real = std::max<int64_t>(0, std::min(kRows, source.rows() - row - r));
    source.fill(row + r, real, tile, tiles, decoded, kStride);
    std::fill(decoded + real * kStride, decoded + kRows * kStride, typename O::Element(0));
    for (int64_t i = 0; i < kRows; i += O::kStep, out += O::kWidth) {
      for (int64_t column = 0; column < tiles * kTile; column += O::kLanes) {
        O::interleave(decoded + i * kStride + column, kStride, out + column / O::kLanes * block_stride);
      }
    }
  }
}

// Right panel whose outputs are rows [row, row + kLanes) of a dense matrix, products running over its columns, padded
// to tiles with zeros: out [tiles * 64 / kStep][kWidth]. A lane of kStep elements is moved as one 32-bit value.
template <class O>
void fill_right_transposed(const Matrix& matrix, int64_t row, int64_t tiles, typename O::Element* out) {
  const DenseRows<O> source(matrix);
  alignas(64) typename O::Element rows[O::kLanes][kTile];
  const int64_t real = std::min<int64_t>(O::kLanes, matrix.rows - row);
  std::fill(rows[0] + real * kTile, rows[0] + O::kLanes * kTile, typename O::Element(0));
  for (int64_t tile = 0; tile < tiles; ++tile, out += kTile * O::kLanes) {
    source.fill(row, real, tile, 1, rows[0], kTile);
    for (int64_t step = 0; step < kTile / O::kStep; step += O::kLanes) {
      O::Simd::transpose(reinterpret_cast<const float*>(rows[0]) + step, kTile / O::kStep,
                         reinterpret_cast<float*>(out) + step * O::kLanes, O::kLanes);
    }
  }
}

}  // namespace
}  // namespace LOFTQ_VERSION
}  // namespace loftq
