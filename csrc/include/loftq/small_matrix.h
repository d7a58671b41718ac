// Batches of small dense matrices on the GPU, one matrix per block: eigenvectors, singular vectors, orthonormalisation.
// This header does not need torch. All matrices are row-major and contiguous, all pointers device pointers, all
// launches only enqueue.
//
//   launch_jacobi_cuda      A = U diag(values) V^T, or A = V diag(values) V^T      one-sided Jacobi
//   launch_cholesky_cuda    G = R^T R, and R^-1, so that Q = Y R^-1 for G = Y^T Y   CholeskyQR
//
// Returned errors: cudaErrorInvalidValue for parameters that break this contract (nothing is enqueued), else what the
// launch returned. What goes wrong inside a matrix shows in its info entry and leaves the other matrices alone.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "loftq/config.h"

namespace loftq {
inline namespace LOFTQ_VERSION {

// One-sided Jacobi (Hestenes): plane rotations V make the columns of A V orthogonal; their norms are the singular
// values. For symmetric positive semi-definite A the singular vectors V are the eigenvectors, and the eigenvalues are
// v^T A v: V stays orthogonal to working precision whatever the rank of A, and eigenvalues err by a few eps * ||A||.
// The pairs of a sweep are visited in round-robin order, n/2 disjoint pairs at a time, one warp per pair. A sweep
// without a rotation ends the iteration: then |a_p . a_q| <= sqrt(m) * eps * |a_p| |a_q| for all pairs. Usually 6 to 10
// sweeps. Golub & Van Loan, Matrix Computations, 4th ed., 8.5.5 (parallel ordering) and 8.6.3; Demmel & Veselic,
// "Jacobi's method is more accurate than QR", SIAM J. Matrix Anal. Appl. 13 (1992).
// Matrices that do not fit in the shared memory of a block (on an H200, float32: n > 169) live in the workspace.
template <typename T>  // float or double
struct JacobiParams {
  const T* a;  // [batch, m, n], m >= n; unchanged
  int64_t batch;
  int m;
  int n;
  bool symmetric;   // a is symmetric positive semi-definite, m == n: values are its eigenvalues
  int max_sweeps;   // 0: 30
  T* values;        // [batch, n], descending
  T* u;             // [batch, m, n] or nullptr; columns u_i, zero where the singular value is. nullptr if symmetric
  T* v;             // [batch, n, n]; column i belongs to values[i]
  int* info;        // [batch]: 0; 1: not converged within max_sweeps, the outputs hold the last iterate;
                    // -1: NaN or Inf in the matrix, the outputs are NaN
  void* workspace;  // jacobi_workspace_bytes(params), aligned to 16; may be nullptr where that is 0
};

// For the current device. 0 where every matrix fits in shared memory.
template <typename T>
LOFTQ_API size_t jacobi_workspace_bytes(const JacobiParams<T>& params);

template <typename T>
LOFTQ_API cudaError_t launch_jacobi_cuda(const JacobiParams<T>& params, cudaStream_t stream);

// Cholesky factor of Gram matrices and its inverse, both computed in float64. The columns of Y are scaled to norm 1
// first (G_ij / sqrt(G_ii G_jj)), which makes the pivots comparable: one of at most `epsilon` is rounding noise, and G
// counts as not positive definite. Then shift * diag(G) is added, shift = 4 epsilon, 64 epsilon, ... until all pivots
// are above epsilon. Q = Y R^-1 is orthonormal to about cond(Y)^2 * epsilon: do it twice (CholeskyQR2), and once more
// where info > 0 (shifted CholeskyQR3). A zero column of Y becomes a zero column of Q.
// Yamamoto, Nakatsukasa, Yanagisawa, Fukaya, "Roundoff error analysis of the CholeskyQR2 algorithm", ETNA 44 (2015);
// Fukaya et al., "CholeskyQR2: a simple and communication-avoiding algorithm", ScalA 2014, and "Shifted Cholesky QR
// for computing the QR factorization of ill-conditioned matrices", SIAM J. Sci. Comput. 42 (2020).
template <typename T>  // float or double
struct CholeskyParams {
  const T* gram;  // [batch, b, b]; only the lower triangle is read
  int64_t batch;
  int b;             // at most cholesky_max_size()
  double epsilon;    // relative rounding error of gram; 0: b * 2^-24 (float), b * 2^-53 (double)
  float* r_inverse;  // [batch, b, b], upper triangular, zero below
  double* r;         // [batch, b, b], the same; or nullptr
  int* info;         // [batch]: 0; s > 0: regularised, with s shifts (at least 1 where a diagonal entry is not
                     // positive); -1: NaN or Inf in gram, -2: not positive definite at any shift; outputs are NaN
};

// Largest b that fits in the shared memory of the current device: 155 with 99 KiB (sm_86, 89, 120), 237 with 227 KiB.
LOFTQ_API int cholesky_max_size();

template <typename T>
LOFTQ_API cudaError_t launch_cholesky_cuda(const CholeskyParams<T>& params, cudaStream_t stream);

extern template size_t jacobi_workspace_bytes(const JacobiParams<float>&);
extern template size_t jacobi_workspace_bytes(const JacobiParams<double>&);
extern template cudaError_t launch_jacobi_cuda(const JacobiParams<float>&, cudaStream_t);
extern template cudaError_t launch_jacobi_cuda(const JacobiParams<double>&, cudaStream_t);
extern template cudaError_t launch_cholesky_cuda(const CholeskyParams<float>&, cudaStream_t);
extern template cudaError_t launch_cholesky_cuda(const CholeskyParams<double>&, cudaStream_t);

}  // namespace LOFTQ_VERSION
}  // namespace loftq
