// The product with a packed weight, its adapter and its bias, and the product with the transposed weight.
//
//   y[m, n]      = sum_k x[m, k] * D[n, k] + scaling * sum_r (sum_k x[m, k] * A[r, k]) * B[n, r] + bias[n]
//   grad_x[m, k] = sum_n grad_y[m, n] * D[n, k] + scaling * sum_r (sum_n grad_y[m, n] * B[n, r]) * A[r, k]
//   D[n, k]      = codebook[code(n, k)] * scale[n, k / g] + offset[n, k / g]
//
// Sums are float32. Operands are float32; where the instruction set multiplies bfloat16 and x is bfloat16, they are
// bfloat16: D is rounded to it (for up to 8 rows of x the code book, two ways whose errors cancel), and so is scaling *
// x A^T. Results depend on the instruction set and, where a row is split among threads, on their number. Sums of up to
// 8 rows may be scaled after they are formed: x near the largest float32 can overflow there.
#pragma once

#include "loftq/packing.h"

namespace loftq {
inline namespace LOFTQ_VERSION {

// A row-major matrix, whose elements of a row are contiguous. data == nullptr means that there is no matrix.
struct Matrix {
  const void* data;
  DType dtype;
  int64_t rows;
  int64_t columns;
  int64_t stride;  // elements from one row to the next
};

struct PackedWeight {
  const uint8_t* codes;  // [n, row_bytes(k, bits)]
  const void* scale;     // [n, num_groups] of scale_dtype
  const void* offset;    // the same, or nullptr
  DType scale_dtype;
  const float* codebook;  // [2^bits]
  int64_t n;
  int64_t k;
  int bits;            // 2, 4 or 8
  int64_t group_size;  // 32, 64, 128, 256 or -1: the whole row
};

struct LinearParams {
  Matrix x;  // [m, k]; for the transposed product grad_y [m, n]
  PackedWeight weight;
  Matrix lora_A;  // [r, k], any dtype
  Matrix lora_B;  // [n, r], any dtype
  float scaling;
  const void* bias;  // [n] or nullptr; the transposed product has none
  DType bias_dtype;
  void* y;  // [m, n] contiguous, of x.dtype; for the transposed product grad_x [m, k]
};

// The gradients of the adapter, given that of y:
//
//   grad_A[r, k] = scaling * sum_m (sum_n grad_y[m, n] * B[n, r]) * x[m, k]
//   grad_B[n, r] = scaling * sum_m grad_y[m, n] * (sum_k x[m, k] * A[r, k])
//
// Operands and sums are float32. Results depend on the instruction set, and not on the number of threads.
struct AdapterGradParams {
  Matrix x;       // [m, k]
  Matrix grad_y;  // [m, n]
  Matrix lora_A;  // [r, k], any dtype
  Matrix lora_B;  // [n, r], any dtype
  float scaling;
  void* grad_A;  // [r, k] contiguous, or nullptr: not wanted
  DType grad_A_dtype;
  void* grad_B;  // [n, r] contiguous, or nullptr: not wanted
  DType grad_B_dtype;
};

}  // namespace LOFTQ_VERSION
}  // namespace loftq
