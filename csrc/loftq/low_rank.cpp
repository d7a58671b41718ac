#include "low_rank.h"

#include <algorithm>
#include <limits>
#include <tuple>

namespace loftq {
namespace {

// So many rows are copied to float64 at a time: the exact solver's extra memory does not grow with the longer side.
constexpr int64_t kGramRows = 1024;

at::Tensor gram_float64(const at::Tensor& matrix) {
  const int64_t s = matrix.size(2);
  at::Tensor gram = at::zeros({matrix.size(0), s, s}, matrix.options().dtype(at::kDouble));
  for (int64_t row = 0; row < matrix.size(1); row += kGramRows) {
    const at::Tensor rows = matrix.narrow(1, row, std::min(kGramRows, matrix.size(1) - row)).to(at::kDouble);
    gram.baddbmm_(rows.mT(), rows);
  }
  return gram;
}

// Upper triangular R with R^T R = gram [B, w, w] float64; where that is not positive definite, of gram plus a shift.
// The second result tells which matrices [B] were shifted, so that none depends on its neighbours.
std::tuple<at::Tensor, at::Tensor> cholesky_factor(const at::Tensor& gram) {
  auto [factor, info] = at::linalg_cholesky_ex(gram, /*upper=*/true);
  const at::Tensor failed = info.ne(0);
  if (!failed.any().item<bool>()) return {factor, failed};
  // Eigenvalues of a float32 Gram matrix are uncertain by about w eps trace; lift all of them beyond that. A zero
  // matrix has no trace: the tiny constant makes its factor invertible, and its orthonormal block zero.
  const at::Tensor trace = gram.diagonal(0, -2, -1).sum(-1).clamp_min(std::numeric_limits<float>::min());
  const double unit = 4.0 * static_cast<double>(gram.size(-1)) * std::numeric_limits<float>::epsilon();
  at::Tensor shifted = gram.clone();
  shifted.diagonal(0, -2, -1).add_(trace.mul(unit).mul(failed).unsqueeze(-1));
  return {std::get<0>(at::linalg_cholesky_ex(shifted, /*upper=*/true)), failed};
}

// Descending eigenvectors [B, m, count] of a symmetric matrix [B, m, m]. Here and for the Cholesky factor ATen serves
// CUDA tensors too: small_matrix.h's kernels take its place once bench/bench_small_matrix.py has shown on a GPU that
// they are faster.
std::tuple<at::Tensor, at::Tensor> leading_eigenvectors(const at::Tensor& symmetric, int64_t count) {
  auto [values, vectors] = at::linalg_eigh(symmetric);
  const int64_t skip = symmetric.size(-1) - count;
  return {values.narrow(-1, skip, count).flip(-1), vectors.narrow(-1, skip, count).flip(-1)};
}

}  // namespace

at::Tensor batched_product(const at::Tensor& left, const at::Tensor& right) {
  return left.size(0) == 1 ? at::mm(left[0], right[0]).unsqueeze(0) : at::bmm(left, right);
}

at::Tensor multiply_operands(const at::Tensor& matrix, const at::Tensor& block, bool transposed) {
  const at::Tensor operand = transposed ? matrix.mT() : matrix;
  return batched_product(operand, block.to(matrix.scalar_type())).to(at::kFloat);
}

at::Tensor orthonormalize(const at::Tensor& block) {
  // A shifted round only lowers the condition number and does not count; a zero block needs a shift every time.
  constexpr int kRounds = 2, kMaxRounds = 4;
  at::Tensor q = block;
  at::Tensor rounds = at::zeros({block.size(0)}, block.options().dtype(at::kInt));  // that counted, by matrix
  for (int round = 0; round < kMaxRounds; ++round) {
    auto [factor, shifted] = cholesky_factor(batched_product(q.mT(), q).to(at::kDouble));
    const at::Tensor identity = at::eye(q.size(2), factor.options()).expand_as(factor);
    const at::Tensor inverse = at::linalg_solve_triangular(factor, identity, /*upper=*/true).to(at::kFloat);
    const at::Tensor open = rounds.lt(kRounds);
    q = round < kRounds ? batched_product(q, inverse)
                        : at::where(open.view({-1, 1, 1}), batched_product(q, inverse), q);
    rounds += shifted.logical_not();
    if (round + 1 >= kRounds && rounds.ge(kRounds).all().item<bool>()) break;
  }
  return q;
}

Space exact_space(const at::Tensor& matrix, int64_t rank) {
  auto [values, vectors] = leading_eigenvectors(gram_float64(matrix), rank);
  const at::Tensor basis = vectors.to(at::kFloat);
  return {basis, batched_product(matrix, basis)};
}

Space krylov_space(const at::Tensor& matrix, const at::Tensor& start, int64_t steps) {
  const int64_t width = start.size(2);
  const int64_t total = (steps + 1) * width;
  at::Tensor basis = at::empty({matrix.size(0), matrix.size(2), total}, start.options());
  at::Tensor image = at::empty({matrix.size(0), matrix.size(1), total}, start.options());
  at::Tensor block = orthonormalize(start);
  for (int64_t step = 0; step <= steps; ++step) {
    const int64_t done = step * width;
    if (step > 0) {
      block = multiply_operands(matrix, image.narrow(2, done - width, width), /*transposed=*/true);
      const at::Tensor previous = basis.narrow(2, 0, done);
      // Twice is enough (Kahan): the first pass leaves rounding errors of the size of what it removed.
      for (int pass = 0; pass < 2; ++pass) {
        block = orthonormalize(block.sub_(batched_product(previous, batched_product(previous.mT(), block))));
      }
    }
    basis.narrow(2, done, width).copy_(block);
    image.narrow(2, done, width).copy_(multiply_operands(matrix, block));
  }
  const at::Tensor ritz = std::get<1>(leading_eigenvectors(batched_product(image.mT(), image), width));
  return {batched_product(basis, ritz), batched_product(image, ritz)};
}

Factors balanced_factors(const Space& space) {
  const at::Tensor image = space.image.to(at::kDouble);
  auto [values, rotation] = leading_eigenvectors(batched_product(image.mT(), image), image.size(2));
  const at::Tensor singular = values.clamp_min(0).sqrt();
  // A direction whose singular value is rounding noise contributes nothing: leave it out rather than divide by it.
  const at::Tensor kept = singular.gt(singular.narrow(-1, 0, 1) * 1e-7);
  const at::Tensor root = at::where(kept, singular.sqrt(), 0.0);
  const at::Tensor inverse_root = at::where(kept, singular.rsqrt(), 0.0);
  return {batched_product(space.image, (rotation * inverse_root.unsqueeze(-2)).to(at::kFloat)),
          batched_product(space.basis, (rotation * root.unsqueeze(-2)).to(at::kFloat))};
}

}  // namespace loftq
