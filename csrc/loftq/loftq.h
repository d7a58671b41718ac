// LoftQ (Li et al., ICLR 2024) for a batch of same-shape matrices, over ATen:
//
//   Q_t = quantize(W - s B_{t-1} A_{t-1});   s B_t A_t = SVD_r(W - Q_t);   B_0 A_0 = 0
//
// The low-rank term of a residual E = W - Q is held as V, an orthonormal basis on its shorter side, and E V; then
// ||E - E V V^T||^2 = ||E||^2 - ||E V||^2, so an adapter never makes the error worse than none. The best iterate is
// kept. Memory per matrix, besides the weight: one residual in the operand dtype, which also receives the low-rank term
// (at the end, one in float32 instead), and the codes and factors of the best and the current iterate; nothing of size
// N x K x 2^bits. The host waits for the device a number of times that does not grow with the batch, as long as the
// fast solver can be trusted: matrices for which it cannot (see `sound`) should go through the exact one, one by one.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "aten/tensor.h"
#include "loftq/config.h"

namespace loftq {
inline namespace LOFTQ_VERSION {

using aten::Tensor;

struct LoftQOptions {
  int64_t rank;
  double scaling;  // the factors are divided by its square root
  bool exact;      // the solver: float64 Gram matrix and eigh if true; else block Krylov, then warm starts
  bool svd_first;  // take the SVD of W - Q_{t-1} (Q_0 = 0) before quantizing
  aten::ScalarType operand_dtype;  // of the residual and of the power steps: float32 or bfloat16
  int64_t cold_steps;              // Krylov steps of the first alternation
  int64_t warm_steps;              // and of the later ones, which start from the last space
  int64_t group_size;
  std::string scale_rule;  // "absmax", "minmax" or "mean_std"
  aten::ScalarType scale_dtype;
  bool scale_search;
};

struct LoftQResult {
  Tensor codes, scale, offset;  // [N, K_pad * b / 8], [N, G], [N, G] or [0]
  Tensor lora_A, lora_B;        // [r, K], [N, r] float32
  double error;                 // ||W - Q - scaling B A||_F / ||W||_F of this, the best iterate
  std::vector<double> errors;   // the same after every alternation
  bool sound = false;           // the factors hold the dominant part of W - Q, as far as a cheap test can tell
};

// An alternation in progress: the caller takes the steps and may stop after any but the first.
class LoftQ {
 public:
  // weights: B of [N, K] on one device. start: [longer side, w] Gaussian, for the fast solver.
  static std::unique_ptr<LoftQ> begin(std::vector<Tensor> weights, Tensor codebook, Tensor start, LoftQOptions options);

  virtual ~LoftQ() = default;

  // Does one alternation. Returns false when no matrix is left to go on with.
  virtual bool step() = 0;

  // The best iterates. Where a scale does not fit scale_dtype, that matrix stays at the best of its iterates before; if
  // there is none, it shows as a non-finite scale and has no factors. Without a single result where the fast solver
  // failed altogether. Ends the alternation.
  virtual std::vector<LoftQResult> results() = 0;
};

}  // namespace LOFTQ_VERSION
}  // namespace loftq
