#include "low_rank.h"
#include "loftq/config.h"

#include <algorithm>
#include <limits>
#include <tuple>

#include "aten/functions.h"

namespace loftq {
inline namespace LOFTQ_VERSION {

using namespace aten;

namespace {

// So many rows are copied to float64 at a time: the exact solver's extra memory does not grow with the longer side.
constexpr int64_t kGramRows = 1024;

Tensor gram_float64(const Tensor& matrix) {
  const int64_t s = matrix.size(2);
  Tensor gram = zeros({matrix.size(0), s, s}, kDouble, matrix.device());
  for (int64_t row = 0; row < matrix.size(1); row += kGramRows) {
    const Tensor rows = to(narrow(matrix, 1, row, std::min(kGramRows, matrix.size(1) - row)), kDouble);
    gram = add(gram, batched_product(mT(rows), rows));
  }
  return gram;
}

// Upper triangular R with R^T R = gram [B, w, w] float64; where that is not positive definite, of gram plus a shift.
// The second result tells which matrices [B] were shifted, so that none depends on its neighbours.
std::tuple<Tensor, Tensor> cholesky_factor(const Tensor& gram) {
  auto [factor, info] = cholesky_upper(gram);
  const Tensor failed = to(info, kBool);
  if (!is_any(failed)) return {factor, failed};
  // Eigenvalues of a float32 Gram matrix are uncertain by about w eps trace; lift all of them beyond that. A zero
  // matrix has no trace: the tiny constant makes its factor invertible, and its orthonormal block zero.
  const Tensor trace = clamp_min(sum(diagonal(gram), {-1}), std::numeric_limits<float>::min());
  const double unit = 4.0 * static_cast<double>(gram.size(-1)) * std::numeric_limits<float>::epsilon();
  const Tensor shifted = clone(gram), lifted = diagonal(shifted);
  copy_(lifted, add(lifted, unsqueeze(mul(mul(trace, unit), failed), -1)));
  return {std::get<0>(cholesky_upper(shifted)), failed};
}

// Whether an eigensolver failed, and not its memory or its device. Without torch's words (before 2.13) it counts as the
// solver: the exact one comes next, and what is not about the matrix fails there again, where it takes more memory.
bool is_of_solver(std::string_view text) {
  const auto says = [&](std::string_view part) { return text.find(part) != text.npos; };
  return text.empty() || says("linalg.eigh") || (says("cusolver error") && !says("ALLOC_FAILED"));
}

// Descending eigenvectors [B, m, count] of a symmetric matrix [B, m, m]. Here and for the Cholesky factor ATen serves
// CUDA tensors too: small_matrix.h's kernels take its place once bench/bench_small_matrix.py has shown on a GPU that
// they are faster.
std::tuple<Tensor, Tensor> leading_eigenvectors(const Tensor& symmetric, int64_t count) try {
  auto [values, vectors] = eigh(symmetric);
  const int64_t skip = symmetric.size(-1) - count;
  return {flip(narrow(values, -1, skip, count), -1), flip(narrow(vectors, -1, skip, count), -1)};
} catch (const CallFailed& error) {
  if (is_of_solver(error.text)) throw EighFailed(error);
  throw;
}

}  // namespace

Tensor batched_product(const Tensor& left, const Tensor& right) {
  return left.size(0) == 1 ? unsqueeze(mm(select(left, 0), select(right, 0)), 0) : bmm(left, right);
}

Tensor multiply_operands(const Tensor& matrix, const Tensor& block, bool transposed) {
  const Tensor operand = transposed ? mT(matrix) : matrix;
  return to(batched_product(operand, to(block, matrix.dtype())), kFloat);
}

Tensor orthonormalize(const Tensor& block) {
  // A shifted round only lowers the condition number and does not count; a zero block needs a shift every time.
  constexpr int kRounds = 2, kMaxRounds = 4;
  Tensor q = block;
  Tensor rounds = zeros({block.size(0)}, kFloat, block.device());  // that counted, by matrix
  for (int round = 0; round < kMaxRounds; ++round) {
    auto [factor, shifted] = cholesky_factor(to(batched_product(mT(q), q), kDouble));
    const int64_t width = q.size(2);
    const Tensor identity = expand(eye(width, kDouble, q.device()), {q.size(0), width, width});
    const Tensor inverse = to(solve_upper_triangular(factor, identity), kFloat);
    const Tensor open = lt(rounds, kRounds);
    const Tensor next = batched_product(q, inverse);
    q = round < kRounds ? next : where(view(open, {-1, 1, 1}), next, q);
    rounds = add(rounds, to(logical_not(shifted), kFloat));
    if (round + 1 >= kRounds && is_all(ge(rounds, kRounds))) break;
  }
  return q;
}

Space exact_space(const Tensor& matrix, int64_t rank) {
  auto [values, vectors] = leading_eigenvectors(gram_float64(matrix), rank);
  const Tensor basis = to(vectors, kFloat);
  return {basis, batched_product(matrix, basis)};
}

Space krylov_space(const Tensor& matrix, const Tensor& start, int64_t steps) {
  const int64_t width = start.size(2);
  const int64_t total = (steps + 1) * width;
  const Tensor basis = empty({matrix.size(0), matrix.size(2), total}, kFloat, start.device());
  const Tensor image = empty({matrix.size(0), matrix.size(1), total}, kFloat, start.device());
  Tensor block = orthonormalize(start);
  for (int64_t step = 0; step <= steps; ++step) {
    const int64_t done = step * width;
    if (step > 0) {
      block = multiply_operands(matrix, narrow(image, 2, done - width, width), /*transposed=*/true);
      const Tensor previous = narrow(basis, 2, 0, done);
      // Twice is enough (Kahan): the first pass leaves rounding errors of the size of what it removed.
      for (int pass = 0; pass < 2; ++pass) {
        block = orthonormalize(sub(block, batched_product(previous, batched_product(mT(previous), block))));
      }
    }
    copy_(narrow(basis, 2, done, width), block);
    copy_(narrow(image, 2, done, width), multiply_operands(matrix, block));
  }
  const Tensor ritz = std::get<1>(leading_eigenvectors(batched_product(mT(image), image), width));
  return {batched_product(basis, ritz), batched_product(image, ritz)};
}

Factors balanced_factors(const Space& space) {
  const Tensor image = to(space.image, kDouble);
  auto [values, rotation] = leading_eigenvectors(batched_product(mT(image), image), image.size(2));
  const Tensor singular = sqrt(clamp_min(values, 0));
  // A direction whose singular value is rounding noise contributes nothing: leave it out rather than divide by it.
  const Tensor kept = gt(singular, mul(narrow(singular, -1, 0, 1), 1e-7));
  const Tensor none = scalar(0, kDouble, singular.device());
  const Tensor root = where(kept, sqrt(singular), none);
  const Tensor inverse_root = where(kept, rsqrt(singular), none);
  return {batched_product(space.image, to(mul(rotation, unsqueeze(inverse_root, -2)), kFloat)),
          batched_product(space.basis, to(mul(rotation, unsqueeze(root, -2)), kFloat))};
}

}  // namespace LOFTQ_VERSION
}  // namespace loftq
