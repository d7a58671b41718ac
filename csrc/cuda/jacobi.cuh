// One-sided Jacobi, one matrix per block. The matrix is held transposed, so that its columns are contiguous: a warp
// reads a pair of columns with neighbouring lanes on neighbouring elements. A lane touches the same elements of a
// column in the dot products and in the rotation, and a column belongs to one warp per round: only rounds need a block
// barrier.
#pragma once

#include <math.h>

#include <cfloat>

#include "loftq/small_matrix.h"
#include "loftq/types.h"
#include "reduce.cuh"

namespace loftq {
inline namespace LOFTQ_VERSION {

constexpr int kJacobiSharedThreads = 512;  // two blocks of small matrices share a multiprocessor
// One block per multiprocessor, whose columns come from L2; it has as many warps as fit without spilling registers.
template <typename T>
constexpr int kJacobiGlobalThreads = sizeof(T) == sizeof(float) ? 1024 : 640;

// std::numeric_limits is host code to nvcc.
template <typename T>
struct Limits;
template <>
struct Limits<float> {
  static constexpr float kEpsilon = FLT_EPSILON, kMin = FLT_MIN;
  static constexpr int kMinExponent = FLT_MIN_EXP;
};
template <>
struct Limits<double> {
  static constexpr double kEpsilon = DBL_EPSILON, kMin = DBL_MIN;
  static constexpr int kMinExponent = DBL_MIN_EXP;
};

// What a block needs besides the two matrices: sorted values and reductions.
template <typename T>
struct JacobiScratch {
  T* reduce;   // [32]
  T* value;    // [n], in the order of the columns
  int* order;  // [n]: column of the i-th largest value

  __device__ JacobiScratch(unsigned char* memory, int n) {
    reduce = reinterpret_cast<T*>(memory);
    value = reduce + kWarpSize;
    order = reinterpret_cast<int*>(value + n);
  }
  static constexpr LOFTQ_HD size_t bytes(int n) {  // a multiple of 16: the matrices follow
    return (kWarpSize * sizeof(T) + static_cast<size_t>(n) * (sizeof(T) + sizeof(int)) + 15) / 16 * 16;
  }
};

template <typename T>
constexpr LOFTQ_HD size_t jacobi_matrix_bytes(int m, int n) {
  return sizeof(T) * static_cast<size_t>(n) * (static_cast<size_t>(m) + n);
}

// Pair `index` of `round` among players 0 .. players-1 (an even number): any two meet once in players - 1 rounds.
__device__ inline void round_robin(int players, int round, int index, int& first, int& second) {
  const int ring = players - 1;
  first = index == 0 ? ring : (round + index) % ring;
  second = (round + ring - index) % ring;
}

// Rotates columns p, q of `work` (length m) to be orthogonal, and columns p, q of `v` (length n) by the same angle.
// Whole warps must call it. Returns false where the columns are orthogonal already. Norms are computed anew each time:
// updated norms lose all accuracy when columns cancel.
template <typename T>
__device__ bool orthogonalize_pair(T* work_p, T* work_q, int m, T* v_p, T* v_q, int n, T tolerance) {
  // Below this the square of a norm has lost its accuracy to underflow; the largest entry of the matrix is near 1.
  constexpr T kTiny = Limits<T>::kMin / Limits<T>::kEpsilon;
  constexpr T kLarge = 1 / Limits<T>::kEpsilon;
  T pp = 0, qq = 0, pq = 0;
#pragma unroll 2
  for (int i = lane_index(); i < m; i += kWarpSize) {
    const T a = work_p[i], b = work_q[i];
    pp += a * a;
    qq += b * b;
    pq += a * b;
  }
  pp = reduce_warp(pp, Sum());
  qq = reduce_warp(qq, Sum());
  pq = reduce_warp(pq, Sum());
  if (pp < kTiny || qq < kTiny || !(fabs(pq) > tolerance * sqrt(pp) * sqrt(qq))) return false;

  const T tau = (qq - pp) / (2 * pq);
  const T t = fabs(tau) > kLarge ? T(0.5) / tau : copysign(1 / (fabs(tau) + sqrt(1 + tau * tau)), tau);
  // With tan(angle / 2) instead of c = 1 - s * half: c rounds to 1 for the many small angles of the last sweeps, and
  // the columns would grow. Rutishauser, "The Jacobi method for real symmetric matrices", Numer. Math. 9 (1966).
  const T c = 1 / sqrt(1 + t * t), s = t * c, half = s / (1 + c);
#pragma unroll 2
  for (int i = lane_index(); i < m; i += kWarpSize) {
    const T a = work_p[i], b = work_q[i];
    work_p[i] = a - s * (b + half * a);
    work_q[i] = b + s * (a - half * b);
  }
#pragma unroll 2
  for (int i = lane_index(); i < n; i += kWarpSize) {
    const T a = v_p[i], b = v_q[i];
    v_p[i] = a - s * (b + half * a);
    v_q[i] = b + s * (a - half * b);
  }
  return true;
}

// True when a whole sweep passed without a rotation.
template <typename T>
__device__ bool sweep_until_orthogonal(T* work, T* v, int m, int n, int max_sweeps) {
  const T tolerance = sqrt(static_cast<T>(m)) * Limits<T>::kEpsilon;
  const int players = n + n % 2;  // column n, where n is odd, is a bye
  for (int sweep = 0; sweep < max_sweeps; ++sweep) {
    int rotated = 0;
    for (int round = 0; round < players - 1; ++round) {
      for (int index = warp_index(); index < players / 2; index += warp_count()) {
        int p, q;
        round_robin(players, round, index, p, q);
        if (p >= n || q >= n) continue;
        rotated |= orthogonalize_pair(work + static_cast<int64_t>(p) * m, work + static_cast<int64_t>(q) * m, m,
                                      v + static_cast<int64_t>(p) * n, v + static_cast<int64_t>(q) * n, n, tolerance);
      }
      __syncthreads();
    }
    if (!__syncthreads_or(rotated)) return true;
  }
  return false;
}

// work [n, m] = scale * a^T [m, n]; v [n, n] = 1. The power of two `scale` brings the largest entry into [1/2, 1], so
// that squares neither overflow nor vanish. Returns 0 for a NaN or Inf in a.
template <typename T>
__device__ T load_columns(const T* a, int m, int n, T* work, T* v, T* scratch) {
  const int64_t entries = static_cast<int64_t>(m) * n;
  T largest = 0;
  int bad = 0;
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < entries; i += blockDim.x) {
    largest = fmax(largest, fabs(a[i]));
    bad |= !isfinite(a[i]);
  }
  largest = reduce_block(largest, scratch, Max());
  if (__syncthreads_or(bad)) return 0;
  int exponent = 0;
  frexp(largest, &exponent);
  constexpr int kLeast = Limits<T>::kMinExponent;  // 2^-exponent must not overflow
  const T scale = ldexp(T(1), -(exponent > kLeast ? exponent : kLeast));
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < entries; i += blockDim.x) work[i % n * m + i / n] = scale * a[i];
#pragma unroll 1
  for (int i = threadIdx.x; i < n * n; i += blockDim.x) v[i] = i % (n + 1) == 0 ? T(1) : T(0);
  __syncthreads();
  return scale;
}

// scratch.value: singular values, or eigenvalues v^T A v; scratch.order: their columns, largest first.
template <typename T>
__device__ void sort_values(const T* work, const T* v, int m, int n, bool symmetric, const JacobiScratch<T>& scratch) {
  for (int j = warp_index(); j < n; j += warp_count()) {
    const T* column = work + static_cast<int64_t>(j) * m;
    const T* other = symmetric ? v + static_cast<int64_t>(j) * n : column;
    T sum = 0;
    for (int i = lane_index(); i < m; i += kWarpSize) sum += column[i] * other[i];
    sum = reduce_warp(sum, Sum());
    if (lane_index() == 0) scratch.value[j] = symmetric ? sum : sqrt(sum);
  }
  __syncthreads();
  for (int j = threadIdx.x; j < n; j += blockDim.x) {
    const T value = scratch.value[j];
    int larger = 0;
#pragma unroll 1
    for (int i = 0; i < n; ++i) larger += scratch.value[i] > value || (scratch.value[i] == value && i < j);
    scratch.order[larger] = j;
  }
  __syncthreads();
}

template <typename T>
__device__ void store_result(const JacobiParams<T>& p, int64_t matrix, const T* work, const T* v, T scale,
                             const JacobiScratch<T>& scratch) {
  const int m = p.m, n = p.n;
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    p.values[matrix * n + i] = scratch.value[scratch.order[i]] / scale;
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < n * n; i += blockDim.x) {
    p.v[matrix * n * n + i] = v[static_cast<int64_t>(scratch.order[i % n]) * n + i / n];
  }
  if (p.u == nullptr) return;
  const int64_t entries = static_cast<int64_t>(m) * n;
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < entries; i += blockDim.x) {
    const int column = scratch.order[i % n];
    const T norm = scratch.value[column];
    p.u[matrix * entries + i] = norm > 0 ? work[static_cast<int64_t>(column) * m + i / n] / norm : T(0);
  }
}

template <typename T>
__device__ void store_nan(const JacobiParams<T>& p, int64_t matrix) {
  const int64_t n = p.n, entries = n * p.m;
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) p.values[matrix * n + i] = NAN;
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < n * n; i += blockDim.x) p.v[matrix * n * n + i] = NAN;
  if (p.u == nullptr) return;
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < entries; i += blockDim.x) p.u[matrix * entries + i] = NAN;
}

template <typename T, bool kInShared>
__global__ void __launch_bounds__(kInShared ? kJacobiSharedThreads : kJacobiGlobalThreads<T>, kInShared ? 2 : 1)
    _jacobi_kernel(const JacobiParams<T> p) {
  const int m = p.m, n = p.n;
  const JacobiScratch<T> scratch(dynamic_shared(), n);
  T* work = kInShared ? reinterpret_cast<T*>(dynamic_shared() + JacobiScratch<T>::bytes(n))
                      : static_cast<T*>(p.workspace) + blockIdx.x * (jacobi_matrix_bytes<T>(m, n) / sizeof(T));
  T* v = work + static_cast<int64_t>(m) * n;
  for (int64_t matrix = blockIdx.x; matrix < p.batch; matrix += gridDim.x) {
    const T scale = load_columns(p.a + matrix * m * n, m, n, work, v, scratch.reduce);
    int info = -1;
    if (scale != 0) {
      info = sweep_until_orthogonal(work, v, m, n, p.max_sweeps) ? 0 : 1;
      sort_values(work, v, m, n, p.symmetric, scratch);
      store_result(p, matrix, work, v, scale, scratch);
    } else {
      store_nan(p, matrix);
    }
    if (threadIdx.x == 0) p.info[matrix] = info;
    __syncthreads();  // the next matrix reuses the memory
  }
}

}  // namespace LOFTQ_VERSION
}  // namespace loftq
