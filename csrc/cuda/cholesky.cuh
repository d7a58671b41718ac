// The Cholesky factor of a small matrix and the inverse of that factor, in one sweep over the columns, in shared
// memory.
#pragma once

#include <math.h>

#include "loftq/small_matrix.h"
#include "loftq/types.h"
#include "reduce.cuh"

namespace loftq {
inline namespace LOFTQ_VERSION {

constexpr int kCholeskyThreads = 256;
constexpr int kCholeskyBlocks = 3;    // blocks per multiprocessor: b = 136 takes 77 KB of its 228 KB
constexpr int kCholeskyAttempts = 9;  // the last shift is 4 * 16^7 * epsilon: above 1 even for a float64 Gram matrix

constexpr LOFTQ_HD int packed_row(int i) { return i * (i + 1) / 2; }

// The lower triangle by rows, followed by three vectors.
struct CholeskyShared {
  double* lower;         // [b * (b + 1) / 2]
  double* column;        // [b]: the column of L in work
  double* norm;          // [b]: of the columns of Y
  double* inverse_norm;  // [b]: 0 where the norm is 0

  __device__ CholeskyShared(unsigned char* memory, int b) {
    lower = reinterpret_cast<double*>(memory);
    column = lower + packed_row(b);
    norm = column + b;
    inverse_norm = norm + b;
  }
  static constexpr size_t bytes(int b) {
    return sizeof(double) * (static_cast<size_t>(b) * (b + 1) / 2 + 3 * static_cast<size_t>(b));
  }
};

// Whether the whole lower triangle is finite; all threads get the same answer.
template <typename T>
__device__ bool all_finite(const T* gram, int b) {
  int bad = 0;
  for (int i = warp_index(); i < b; i += warp_count()) {
    for (int j = lane_index(); j <= i; j += kWarpSize) bad |= !isfinite(gram[static_cast<int64_t>(i) * b + j]);
  }
  return !__syncthreads_or(bad);
}

template <typename T>
__device__ void load_scaled(const T* gram, int b, double shift, const CholeskyShared& shared) {
  for (int i = warp_index(); i < b; i += warp_count()) {
    for (int j = lane_index(); j < i; j += kWarpSize) {
      const double entry = static_cast<double>(gram[static_cast<int64_t>(i) * b + j]);
      shared.lower[packed_row(i) + j] = entry * shared.inverse_norm[i] * shared.inverse_norm[j];
    }
    if (lane_index() == 0) shared.lower[packed_row(i) + i] = 1.0 + shift;
  }
}

// Replaces the scaled Gram matrix in `lower` by L^-1; L goes to r, transposed and with the scale undone. Returns false
// at a pivot <= epsilon.
//
// Step k knows column k of L and so finishes row k of X = L^-1. Then, for all rows i below,
//   A_ij -= l_ik l_jk (j > k: Cholesky)    and    X_ij -= l_ik x_kj (j <= k: forward substitution, X_ik from 0),
// and X_ik takes the place that l_ik no longer needs.
__device__ inline bool factor_and_invert(int b, double epsilon, double* r, const CholeskyShared& shared) {
  for (int k = 0; k < b; ++k) {
    double* row_k = shared.lower + packed_row(k);
    const double pivot = row_k[k];
    if (!(pivot > epsilon)) return false;  // all threads agree
    const double root = sqrt(pivot), inverse = 1.0 / root;
    for (int i = threadIdx.x; i < b; i += blockDim.x) {
      if (i < k) row_k[i] *= inverse;
      if (i > k) shared.column[i] = shared.lower[packed_row(i) + k] * inverse;
      if (r != nullptr) {
        const double entry = i == k ? root : i > k ? shared.column[i] : 0.0;
        r[static_cast<int64_t>(k) * b + i] = entry * shared.norm[i];
      }
    }
    __syncthreads();
    for (int i = k + 1 + warp_index(); i < b; i += warp_count()) {
      double* row_i = shared.lower + packed_row(i);
      const double l_ik = shared.column[i];
      for (int j = lane_index(); j <= i; j += kWarpSize) {
        if (j == k) {
          row_i[j] = -l_ik * inverse;
        } else {
          row_i[j] -= l_ik * (j < k ? row_k[j] : shared.column[j]);
        }
      }
    }
    if (threadIdx.x == 0) row_k[k] = inverse;
    __syncthreads();
  }
  return true;
}

template <typename T>
__global__ void __launch_bounds__(kCholeskyThreads, kCholeskyBlocks) _cholesky_kernel(const CholeskyParams<T> p) {
  const int b = p.b;
  const int64_t entries = static_cast<int64_t>(b) * b;
  const CholeskyShared shared(dynamic_shared(), b);
  for (int64_t matrix = blockIdx.x; matrix < p.batch; matrix += gridDim.x) {
    const T* gram = p.gram + matrix * entries;
    double* r = p.r == nullptr ? nullptr : p.r + matrix * entries;
    int info = all_finite(gram, b) ? 0 : -1;
    if (info == 0) {
      int zero_columns = 0;
      for (int i = threadIdx.x; i < b; i += blockDim.x) {
        const double square = static_cast<double>(gram[static_cast<int64_t>(i) * b + i]);
        shared.norm[i] = square > 0.0 ? sqrt(square) : 0.0;
        shared.inverse_norm[i] = square > 0.0 ? 1.0 / shared.norm[i] : 0.0;
        zero_columns |= !(square > 0.0);
      }
      zero_columns = __syncthreads_or(zero_columns);
      double shift = 0.0;
      bool done = false;
      int attempt = 0;
      for (; attempt < kCholeskyAttempts && !done; ++attempt) {
        load_scaled(gram, b, shift, shared);
        __syncthreads();
        done = factor_and_invert(b, p.epsilon, r, shared);
        __syncthreads();
        shift = attempt == 0 ? 4.0 * p.epsilon : 16.0 * shift;
      }
      info = !done ? -2 : attempt > 1 ? attempt - 1 : zero_columns != 0;
    }
    float* r_inverse = p.r_inverse + matrix * entries;
    for (int j = warp_index(); j < b; j += warp_count()) {
      for (int i = lane_index(); i < b; i += kWarpSize) {
        const int64_t at = static_cast<int64_t>(j) * b + i;
        if (info < 0) {
          r_inverse[at] = NAN;
          if (r != nullptr) r[at] = NAN;
        } else {
          r_inverse[at] = i < j ? 0.0f : static_cast<float>(shared.lower[packed_row(i) + j] * shared.inverse_norm[j]);
        }
      }
    }
    if (threadIdx.x == 0) p.info[matrix] = info;
    __syncthreads();  // the next matrix reuses the shared memory
  }
}

}  // namespace LOFTQ_VERSION
}  // namespace loftq
