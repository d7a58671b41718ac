// Truncated SVD of a batch of matrices, as an orthonormal basis V of the dominant right space and its image E V.
// Over ATen, so that one body serves CPU and CUDA. Quantization residuals have flat, noise-like spectra: a solver is
// judged by the energy ||E V||^2 that it captures, not by vectors.
#pragma once

#include "aten/dispatcher.h"
#include "loftq/config.h"

namespace loftq {
inline namespace LOFTQ_VERSION {

using aten::Tensor;

// The eigenvalues of a small symmetric matrix could not be found.
struct EighFailed : aten::CallFailed {
  explicit EighFailed(const CallFailed& error) : CallFailed(error) {}
};

struct Space {
  Tensor basis;  // [B, s, w] float32, orthonormal columns (zero ones where the matrix has no such direction)
  Tensor image;  // [B, n, w] float32: matrix @ basis; for the fast solver as accurate as its operands
};

// The first `rank` right singular vectors of matrix [B, n, s], s <= n, from the float64 Gram matrix and eigh: float32
// would rotate vectors across the gaps of 1.001 that residuals have.
Space exact_space(const Tensor& matrix, int64_t rank);

// Rayleigh-Ritz on span{X, M X, .., M^steps X}, M = matrix^T matrix, X = start [B, s, w] (block Krylov; Musco & Musco
// 2015): w Ritz vectors, best first, from 2 steps + 1 products with the matrix [B, n, s], float32 or bfloat16.
Space krylov_space(const Tensor& matrix, const Tensor& start, int64_t steps);

// left @ right for batches; a batch of one goes through mm, which on CPUs is faster than bmm.
Tensor batched_product(const Tensor& left, const Tensor& right);

// matrix @ block or matrix^T @ block in the operand dtype of matrix (accumulated in float32), returned as float32.
Tensor multiply_operands(const Tensor& matrix, const Tensor& block, bool transposed = false);

// Orthonormal columns spanning those of block [B, s, w]: CholeskyQR2 (Fukaya et al. 2014), float32 Gram matrix, float64
// Cholesky, with a shift (Fukaya et al. 2020) where the block is rank deficient.
Tensor orthonormalize(const Tensor& block);

struct Factors {
  Tensor left;   // [B, n, r]: U sqrt(S)
  Tensor right;  // [B, s, r]: V sqrt(S)
};

// U S V^T = image @ basis^T, its SVD, split evenly; image [B, n, r], basis [B, s, r] orthonormal.
Factors balanced_factors(const Space& space);

}  // namespace LOFTQ_VERSION
}  // namespace loftq
