// Panels of operands: where their elements come from, and how they are laid out for the register tile.
#pragma once

#include <algorithm>

#include "cpu/generic/register_tile.h"
#include "cpu/generic/rows.h"
#include "loftq/linear.h"

namespace loftq {
namespace {

// Rows of a packed weight, decoded a tile at a time.
template <class O, int kBits, bool kInteger>
class PackedRows {
 public:
  using Weights = typename O::template Weights<kBits, kInteger>;

  explicit PackedRows(const PackedWeight& weight)
      : weight_(weight), decoder_(weight.codebook), groups_(num_groups(weight.k, weight.group_size)) {}

  int64_t rows() const { return weight_.n; }

  // Columns [64 * tile, 64 * tile + 64) of a row; those beyond k hold finite values if the scales are finite.
  LOFTQ_INLINE void tile(int64_t row, int64_t tile, typename O::Element* out) const {
    const auto first = group(row, tile * kTile);
    const auto second = weight_.group_size == 32 ? group(row, tile * kTile + 32) : first;
    const uint8_t* bytes = weight_.codes + row * row_bytes(weight_.k, kBits) + tile * (kTile * kBits / 8);
    Weights::visit_tile(first, second, bytes, [&](int column, typename O::Vector v) { O::store(out + column, v); });
  }

 private:
  LOFTQ_INLINE auto group(int64_t row, int64_t column) const {
    const int64_t of_row = weight_.group_size < 0 ? 0 : std::min(column / weight_.group_size, groups_ - 1);
    const int64_t index = row * groups_ + of_row;
    const float scale = load_one<typename O::Simd>(weight_.scale_dtype, weight_.scale, index);
    const float offset =
        weight_.offset ? load_one<typename O::Simd>(weight_.scale_dtype, weight_.offset, index) : kNoOffset;
    return decoder_.group(scale, offset);
  }

  const PackedWeight& weight_;
  Weights decoder_;
  int64_t groups_;
};

// Rows of a dense matrix, converted; zero beyond its columns.
template <class O>
class DenseRows {
 public:
  explicit DenseRows(const Matrix& matrix) : matrix_(matrix) {}

  int64_t rows() const { return matrix_.rows; }

  void tile(int64_t row, int64_t tile, typename O::Element* out) const {
    const int64_t column = tile * kTile;
    const int64_t count = std::max<int64_t>(0, std::min(kTile, matrix_.columns - column));
    O::convert(matrix_.dtype, advance(matrix_.data, matrix_.dtype, row * matrix_.stride + column), count, out);
    std::fill(out + count, out + kTile, typename O::Element(0));
  }

 private:
  const Matrix& matrix_;
};

// Left panel: rows [row, row + rows) of tiles [tile, tile + tiles).
template <class O, class Rows>
void fill_left(const Rows& source, int64_t row, int64_t rows, int64_t tile, int64_t tiles, typename O::Element* out) {
  for (int64_t r = 0; r < rows; ++r, out += kPanelStride<O>) {
    for (int64_t t = 0; t < tiles; ++t) source.tile(row + r, tile + t, out + t * kTile);
  }
}

// Right panel whose outputs are the columns of tiles [tile, tile + tiles), products running over rows
// [row, row + rows), a multiple of kStep; rows that the source does not have are zero. out: a block of kLanes columns
// every block_stride elements.
template <class O, class Rows>
void fill_right(const Rows& source, int64_t row, int64_t rows, int64_t tile, int64_t tiles, int64_t block_stride,
                typename O::Element* out) {
  alignas(64) typename O::Element decoded[O::kStep][kTile];
  for (int64_t r = 0; r < rows; r += O::kStep, out += O::kWidth) {
    for (int64_t t = 0; t < tiles; ++t) {
      for (int i = 0; i < O::kStep; ++i) {
        if (row + r + i < source.rows()) {
          source.tile(row + r + i, tile + t, decoded[i]);
        } else {
          std::fill(decoded[i], decoded[i] + kTile, typename O::Element(0));
        }
      }
      for (int64_t column = 0; column < kTile; column += O::kLanes) {
        const typename O::Element* rows_of_step[O::kStep];
        for (int i = 0; i < O::kStep; ++i) rows_of_step[i] = decoded[i] + column;
        O::interleave(rows_of_step, out + (t * kTile + column) / O::kLanes * block_stride);
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
  for (int64_t tile = 0; tile < tiles; ++tile, out += kTile * O::kLanes) {
    for (int lane = 0; lane < O::kLanes; ++lane) {
      if (row + lane < matrix.rows) {
        source.tile(row + lane, tile, rows[lane]);
      } else {
        std::fill(rows[lane], rows[lane] + kTile, typename O::Element(0));
      }
    }
    for (int64_t step = 0; step < kTile / O::kStep; step += O::kLanes) {
      O::Simd::transpose(reinterpret_cast<const float*>(rows[0]) + step, kTile / O::kStep,
                         reinterpret_cast<float*>(out) + step * O::kLanes, O::kLanes);
    }
  }
}

}  // namespace
}  // namespace loftq
