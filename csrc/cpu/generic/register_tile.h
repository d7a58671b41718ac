// The innermost product: a tile of accumulators that stay in registers.
//
//   c[r][v * kLanes + lane] (+)= sum over s, i of  a[r][s * kStep + i] * b[v][s][lane * kStep + i]
//
// a: the left panel, rows kPanelStride elements apart, read by broadcast. b: the right panel, blocks of kLanes outputs
// b_stride elements apart, each [steps][kWidth]. steps counts groups of kStep products.
#pragma once

#include "cpu/target.h"
#include "loftq/config.h"

namespace loftq {
inline namespace LOFTQ_VERSION {
namespace {

// A left panel has this many columns, and its rows are one cache line further apart than that: at a power of two all
// rows would fall into the same few sets of the first-level cache.
template <class O>
constexpr int kPanelColumns = 1024 / sizeof(typename O::Element);
template <class O>
constexpr int kPanelStride = kPanelColumns<O> + 64 / sizeof(typename O::Element);

template <class O, int kRows, int kVectors>
void register_tile(const typename O::Element* a, const typename O::Element* b, int64_t b_stride, int64_t steps,
                   float* c, int64_t c_stride, bool accumulate) {
  using S = typename O::Simd;
  typename O::Floats sums[kRows][kVectors];
  LOFTQ_UNROLL
  for (int r = 0; r < kRows; ++r) {
    LOFTQ_UNROLL
    for (int v = 0; v < kVectors; ++v) sums[r][v] = S::broadcast(0.0f);
  }
  for (int64_t step = 0; step < steps; ++step, a += O::kStep, b += O::kWidth) {
    typename O::Vector right[kVectors];
    LOFTQ_UNROLL
    for (int v = 0; v < kVectors; ++v) right[v] = O::load(b + v * b_stride);
    LOFTQ_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const typename O::Vector left = O::broadcast(a + r * kPanelStride<O>);
      LOFTQ_UNROLL
      for (int v = 0; v < kVectors; ++v) sums[r][v] = O::dot(left, right[v], sums[r][v]);
    }
  }
  LOFTQ_UNROLL
  for (int r = 0; r < kRows; ++r) {
    LOFTQ_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      float* const sum = c + r * c_stride + v * O::kLanes;
      // Sums of sums: the rounding errors of one sum over all of k would be larger.
      S::store(sum, accumulate ? S::add(S::load(sum), sums[r][v]) : sums[r][v]);
    }
  }
}

// The tile of exactly `rows` rows.
template <class O, int kVectors, int kRows = O::rows(kVectors)>
void register_tile_of(int rows, const typename O::Element* a, const typename O::Element* b, int64_t b_stride,
                      int64_t steps, float* c, int64_t c_stride, bool accumulate) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      return register_tile_of<O, kVectors, kRows - 1>(rows, a, b, b_stride, steps, c, c_stride, accumulate);
    }
  }
  register_tile<O, kRows, kVectors>(a, b, b_stride, steps, c, c_stride, accumulate);
}

// rows x vectors with rows <= O::rows(vectors); may compute, read and write up to that many rows.
template <class O, int kVectors = O::kVectors>
void multiply_tile(int rows, int vectors, const typename O::Element* a, const typename O::Element* b, int64_t b_stride,
                   int64_t steps, float* c, int64_t c_stride, bool accumulate) {
  if constexpr (kVectors > 1) {
    if (vectors < kVectors) {
      return multiply_tile<O, kVectors - 1>(rows, vectors, a, b, b_stride, steps, c, c_stride, accumulate);
    }
  }
  if constexpr (kVectors == O::kVectors) {  // few rows at a time: a tile for each number of rows is worthwhile
    register_tile_of<O, kVectors>(rows, a, b, b_stride, steps, c, c_stride, accumulate);
  } else {
    register_tile<O, O::rows(kVectors), kVectors>(a, b, b_stride, steps, c, c_stride, accumulate);
  }
}

}  // namespace
}  // namespace LOFTQ_VERSION
}  // namespace loftq
