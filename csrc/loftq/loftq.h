// LoftQ (Li et al., ICLR 2024) for a batch of same-shape matrices, over ATen:
//
//   Q_t = quantize(W - s B_{t-1} A_{t-1});   s B_t A_t = SVD_r(W - Q_t);   B_0 A_0 = 0
//
// The low-rank term of a residual E = W - Q is held as V, an orthonormal basis on its shorter side, and E V; then
// ||E - E V V^T||^2 = ||E||^2 - ||E V||^2, so an adapter never makes the error worse than none. The best iterate is
// kept. Memory per matrix, besides the weight: one residual in the operand dtype, which also receives the low-rank term
// (at the end, one in float32 instead), and the codes and factors of the best and the current iterate; nothing of size
// N x K x 2^bits. The host waits for the device a number of times that does not grow with the batch, as long as the
// fast solver can be trusted: matrices for which it cannot (see `sound`) go through the exact one, one by one.
#pragma once

#include <ATen/ATen.h>

#include <functional>
#include <string>
#include <vector>

namespace loftq {

struct LoftQOptions {
  int64_t rank;
  int64_t num_iter;
  double scaling;  // the factors are divided by its square root
  bool exact;      // the solver: float64 Gram matrix and eigh if true; else block Krylov, then warm starts
  bool svd_first;  // take the SVD of W - Q_{t-1} (Q_0 = 0) before quantizing
  at::ScalarType operand_dtype;  // of the residual and of the power steps: float32 or bfloat16
  int64_t cold_steps;            // Krylov steps of the first alternation
  int64_t warm_steps;            // and of the later ones, which start from the last space
  int64_t group_size;
  std::string scale_rule;  // "absmax", "minmax" or "mean_std"
  at::ScalarType scale_dtype;
  bool scale_search;
};

struct LoftQResult {
  at::Tensor codes, scale, offset;  // [N, K_pad * b / 8], [N, G], [N, G] or [0]
  at::Tensor lora_A, lora_B;        // [r, K], [N, r] float32
  double error;                     // ||W - Q - scaling B A||_F / ||W||_F of this, the best iterate
  std::vector<double> errors;       // the same after every alternation
  bool sound = false;               // the factors hold the dominant part of W - Q, as far as a cheap test can tell
};

// weights: B of [N, K] on one device. start: [longer side, w] Gaussian, for the fast solver. poll is called after every
// alternation and may throw to interrupt. Where a scale does not fit scale_dtype, that matrix stays at the best of its
// iterates before; if there is none, it shows as a non-finite scale in the result.
std::vector<LoftQResult> loftq_batch(const std::vector<at::Tensor>& weights, const at::Tensor& codebook,
                                     const at::Tensor& start, const LoftQOptions& options,
                                     const std::function<void()>& poll);

}  // namespace loftq
