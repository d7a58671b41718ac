// The gradients of an adapter (loftq/linear.h), in float32.
//
// Either one is a projection, which leaves few columns, followed by a contraction over the rows:
//   hidden [m, r] = scaling * from [m, c] factor [c, r]     grad [r, columns] = hidden^T onto [m, columns]
// with factor = B, from = grad_y, onto = x for A; and factor = A^T, from = x, onto = grad_y for B, whose gradient is
// written transposed. Rounding errors grow with the length of a sum: contractions add 128 rows, then eight such sums,
// then those. Each sum has one order, whoever computes it.
#pragma once

#include <algorithm>
#include <cstring>

#include "cpu/generic/rows.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/target.h"
#include "loftq/linear.h"

namespace loftq {
inline namespace LOFTQ_VERSION {
namespace {

constexpr int64_t kGradRows = 16;      // of a part of the projection
constexpr int64_t kGradColumns = 128;  // of a part of the contraction
constexpr int64_t kProjectSteps = 256;
constexpr int64_t kProjectStride = kProjectSteps + 16;  // rows a power of two apart would share sets of the cache
constexpr int64_t kContractSteps = 128;
constexpr int64_t kRecentSteps = 8 * kContractSteps;
constexpr int64_t kFactorRows = 128;  // of a part of the conversion of a factor
constexpr int64_t kGradBlock = std::max(kGradRows * kProjectStride, kContractSteps* kGradColumns);

// out[i][j] += sum over steps s of left[i * left_row + s * left_step] * right[s * right_step + j]
template <class S, int kRows, int kVectors>
void add_product_tile(const float* left, int64_t left_row, int64_t left_step, const float* right, int64_t right_step,
                      int64_t steps, float* out, int64_t out_stride) {
  typename S::Floats sums[kRows][kVectors];
  LOFTQ_UNROLL
  for (int i = 0; i < kRows; ++i) {
    LOFTQ_UNROLL
    for (int v = 0; v < kVectors; ++v) sums[i][v] = S::broadcast(0.0f);
  }
  for (int64_t s = 0; s < steps; ++s, left += left_step, right += right_step) {
    typename S::Floats values[kVectors];
    LOFTQ_UNROLL
    for (int v = 0; v < kVectors; ++v) values[v] = S::load(right + v * S::kLanes);
    LOFTQ_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const typename S::Floats factor = S::broadcast(left[i * left_row]);
      LOFTQ_UNROLL
      for (int v = 0; v < kVectors; ++v) sums[i][v] = S::fma(factor, values[v], sums[i][v]);
    }
  }
  LOFTQ_UNROLL
  for (int i = 0; i < kRows; ++i) {
    LOFTQ_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      float* const sum = out + i * out_stride + v * S::kLanes;
      S::store(sum, S::add(S::load(sum), sums[i][v]));
    }
  }
}

// The same for whole matrices: rows in multiples of 8, columns in multiples of kLanes.
template <class S>
void add_product(int64_t rows, int64_t columns, const float* left, int64_t left_row, int64_t left_step,
                 const float* right, int64_t right_step, int64_t steps, float* out, int64_t out_stride) {
  constexpr int kRows = S::kLanes == 16 ? 8 : 4;
  for (int64_t j = 0; j < columns;) {
    const bool two = columns - j >= 2 * S::kLanes;
    const auto tile = two ? add_product_tile<S, kRows, 2> : add_product_tile<S, kRows, 1>;
    for (int64_t i = 0; i < rows; i += kRows) {
      tile(left + i * left_row, left_row, left_step, right + j, right_step, steps, out + i * out_stride + j,
           out_stride);
    }
    j += (two ? 2 : 1) * S::kLanes;
  }
}

template <class S>
class AdapterGrad {
 public:
  explicit AdapterGrad(const AdapterGradParams& p)
      : p_(p), rank_(p.lora_A.rows), padded_rank_(ceil_div(rank_, kRankUnit) * kRankUnit) {
    if (p.grad_A != nullptr) sides_[count_++] = {p.lora_B, false, p.grad_y, p.x, p.grad_A, p.grad_A_dtype, false};
    if (p.grad_B != nullptr) sides_[count_++] = {p.lora_A, true, p.x, p.grad_y, p.grad_B, p.grad_B_dtype, true};
  }

  Status run(int threads) {
    const int64_t m = p_.x.rows, padded_m = ceil_div(m, kGradRows) * kGradRows;
    int64_t floats = 0;
    for (int i = 0; i < count_; ++i) floats += (sides_[i].from.columns + padded_m) * padded_rank_;
    const int64_t own = kGradBlock + padded_rank_ * (2 * kGradColumns + 1);
    const Scratch<float> shared(floats), blocks(threads * own);
    if (shared.data() == nullptr || blocks.data() == nullptr) return kOutOfMemory;
    float* next = shared.data();
    for (int i = 0; i < count_; ++i) {
      sides_[i].converted = next;
      sides_[i].hidden = next += sides_[i].from.columns * padded_rank_;
      next += padded_m * padded_rank_;
    }
    parallel_phases(
        threads, 3, [&](int64_t phase) { return parts(phase, 0) + (count_ > 1 ? parts(phase, 1) : 0); },
        [&](int64_t phase, int64_t part, int slot) {
          const bool second = part >= parts(phase, 0);
          const Side& side = sides_[second];
          part -= second ? parts(phase, 0) : 0;
          float* const block = blocks.data() + slot * own;
          if (phase == 0) convert(side, part, block);
          if (phase == 1) project(side, part, block);
          if (phase == 2) contract(side, part, block);
        });
    return nullptr;
  }

 private:
  static constexpr int64_t kRankUnit = S::kLanes > 8 ? S::kLanes : 8;

  struct Side {
    Matrix factor;
    bool factor_is_transposed;  // [r, c]
    Matrix from, onto;
    void* grad;
    DType grad_dtype;
    bool grad_is_transposed;     // [columns, r]
    float* converted = nullptr;  // the factor [c, padded rank]
    float* hidden = nullptr;     // [padded m, padded rank]
  };

  int64_t parts(int64_t phase, int side) const {
    const Side& s = sides_[side];
    if (phase == 0) return ceil_div(s.from.columns, kFactorRows);
    return phase == 1 ? ceil_div(s.from.rows, kGradRows) : ceil_div(s.onto.columns, kGradColumns);
  }

  // Rows of `matrix` from (row, column) on, as float32, with zeros up to `padded` columns.
  static void read(const Matrix& matrix, int64_t row, int64_t rows, int64_t column, int64_t columns, int64_t padded,
                   float* out, int64_t out_stride) {
    for (int64_t i = 0; i < rows; ++i, out += out_stride) {
      to_float<S>(matrix.dtype, advance(matrix.data, matrix.dtype, (row + i) * matrix.stride + column), columns, out);
      std::fill(out + columns, out + padded, 0.0f);
    }
  }

  void convert(const Side& side, int64_t part, float* block) const {
    const int64_t first = part * kFactorRows, rows = std::min(kFactorRows, side.from.columns - first);
    float* const out = side.converted + first * padded_rank_;
    if (!side.factor_is_transposed) return read(side.factor, first, rows, 0, rank_, padded_rank_, out, padded_rank_);
    std::fill(out, out + rows * padded_rank_, 0.0f);
    for (int64_t r = 0; r < rank_; ++r) {
      read(side.factor, r, 1, first, rows, rows, block, 0);
      for (int64_t i = 0; i < rows; ++i) out[i * padded_rank_ + r] = block[i];
    }
  }

  void project(const Side& side, int64_t part, float* block) const {
    const int64_t first = part * kGradRows, rows = std::min(kGradRows, side.from.rows - first);
    float* const out = side.hidden + first * padded_rank_;
    std::fill(out, out + kGradRows * padded_rank_, 0.0f);
    const int64_t padded_rows = ceil_div(rows, 8) * 8;
    for (int64_t column = 0; column < side.from.columns; column += kProjectSteps) {
      const int64_t steps = std::min(kProjectSteps, side.from.columns - column);
      read(side.from, first, rows, column, steps, steps, block, kProjectStride);
      for (int64_t i = rows; i < padded_rows; ++i) {
        std::fill(block + i * kProjectStride, block + i * kProjectStride + steps, 0.0f);
      }
      add_product<S>(padded_rows, padded_rank_, block, kProjectStride, 1, side.converted + column * padded_rank_,
                     padded_rank_, steps, out, padded_rank_);
    }
    const typename S::Floats scaling = S::broadcast(p_.scaling);
    for (int64_t i = 0; i < rows * padded_rank_; i += S::kLanes) S::store(out + i, S::mul(S::load(out + i), scaling));
  }

  void contract(const Side& side, int64_t part, float* block) const {
    const int64_t first = part * kGradColumns, columns = std::min(kGradColumns, side.onto.columns - first);
    const int64_t padded = ceil_div(columns, S::kLanes) * S::kLanes;
    float* const sums = block + kGradBlock;  // [padded rank, kGradColumns]
    float* const recent = sums + padded_rank_ * kGradColumns;
    std::fill(sums, sums + 2 * padded_rank_ * kGradColumns, 0.0f);
    for (int64_t row = 0; row < side.onto.rows; row += kContractSteps) {
      const int64_t steps = std::min(kContractSteps, side.onto.rows - row);
      read(side.onto, row, steps, first, columns, padded, block, kGradColumns);
      add_product<S>(padded_rank_, padded, side.hidden + row * padded_rank_, 1, padded_rank_, block, kGradColumns,
                     steps, recent, kGradColumns);
      if ((row + steps) % kRecentSteps == 0 || row + steps == side.onto.rows) move(recent, sums);
    }
    if (side.grad_is_transposed) return write_transposed(side, first, columns, sums);
    for (int64_t r = 0; r < rank_; ++r) {
      from_float<S>(side.grad_dtype, sums + r * kGradColumns, columns,
                    advance(side.grad, side.grad_dtype, r * side.onto.columns + first));
    }
  }

  // to += from; from = 0
  void move(float* from, float* to) const {
    for (int64_t i = 0; i < padded_rank_ * kGradColumns; i += S::kLanes) {
      S::store(to + i, S::add(S::load(to + i), S::load(from + i)));
      S::store(from + i, S::broadcast(0.0f));
    }
  }

  void write_transposed(const Side& side, int64_t first, int64_t columns, float* sums) const {
    float* const row = sums + 2 * padded_rank_ * kGradColumns;
    for (int64_t i = 0; i < columns; ++i) {
      for (int64_t r = 0; r < rank_; ++r) row[r] = sums[r * kGradColumns + i];
      from_float<S>(side.grad_dtype, row, rank_, advance(side.grad, side.grad_dtype, (first + i) * rank_));
    }
  }

  const AdapterGradParams& p_;
  const int64_t rank_, padded_rank_;
  Side sides_[2];
  int count_ = 0;
};

template <class S>
Status adapter_grad(const AdapterGradParams& p, int threads) {
  return AdapterGrad<S>(p).run(threads);
}

}  // namespace
}  // namespace LOFTQ_VERSION
}  // namespace loftq
