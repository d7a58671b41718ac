#include "loftq.h"

#include <ATen/core/dispatch/Dispatcher.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <utility>

#include "low_rank.h"

namespace loftq {
namespace {

using Quantized = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;  // codes, scale, offset, ||residual||^2

// Quantize weight - low_rank; low_rank becomes weight - Q. The dispatcher finds the kernel of the device.
Quantized quantize_residual(const at::Tensor& weight, at::Tensor& low_rank, const at::Tensor& codebook,
                            const LoftQOptions& options) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("loftq_kernels::quantize_residual_", "")
                             .typed<Quantized(const at::Tensor&, at::Tensor&, const at::Tensor&, int64_t,
                                              c10::string_view, at::ScalarType, bool)>();
  return op.call(weight, low_rank, codebook, options.group_size, options.scale_rule, options.scale_dtype,
                 options.scale_search);
}

at::Tensor dequantize(const at::Tensor& codes, const at::Tensor& scale, const at::Tensor& offset,
                      const at::Tensor& codebook, int64_t in_features, int64_t group_size) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("loftq_kernels::dequantize", "")
                             .typed<at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                                               const at::Tensor&, int64_t, int64_t, at::ScalarType)>();
  const std::optional<at::Tensor> affine = offset.numel() > 0 ? std::optional(offset) : std::nullopt;
  return op.call(codes, scale, affine, codebook, in_features, group_size, at::kFloat);
}

// ||matrix||^2 in float64. ATen's norm casts the whole matrix, twice its float32 size: few launches on a GPU, but on a
// CPU one block of rows at a time takes less memory.
at::Tensor squared_norm(const at::Tensor& matrix) {
  if (!matrix.is_cpu())
    return at::linalg_vector_norm(matrix, 2, at::OptionalIntArrayRef(), false, at::kDouble).square();
  constexpr int64_t kRows = 256;
  at::Tensor total = at::zeros({}, matrix.options().dtype(at::kDouble));
  for (int64_t row = 0; row < matrix.size(0); row += kRows) {
    const at::Tensor rows = matrix.narrow(0, row, std::min(kRows, matrix.size(0) - row)).to(at::kDouble);
    total += rows.square().sum();
  }
  return total;
}

// Copies scalars to host memory with one wait for the device; item() would wait once per scalar.
std::vector<double> host_values(const std::vector<at::Tensor>& scalars) {
  const at::Tensor values = at::stack(scalars).to(at::kDouble).cpu();
  return {values.const_data_ptr<double>(), values.const_data_ptr<double>() + values.numel()};
}

// Residuals are divided by this power of two, which is exact, where the squares of the weights would leave float32.
double residual_unit(double largest) {
  if (!(largest > 0) || (largest > 1e-9 && largest < 1e9) || !std::isfinite(largest)) return 1.0;
  return std::exp2(std::floor(std::log2(largest)));
}

// Stacks tensors to [B, ..]; a batch of one is a view.
at::Tensor stacked(const std::vector<at::Tensor>& tensors) {
  return tensors.size() == 1 ? tensors[0].unsqueeze(0) : at::stack(tensors);
}

class Alternation {
 public:
  Alternation(const std::vector<at::Tensor>& weights, const at::Tensor& codebook, const at::Tensor& start,
              const LoftQOptions& options)
      : weights_(weights), codebook_(codebook), start_(start), options_(options) {
    const auto count = static_cast<int64_t>(weights.size());
    const int64_t n = weights[0].size(0), k = weights[0].size(1);
    wide_ = k > n;
    residual_ = at::zeros({count, n, k}, weights[0].options().dtype(options.operand_dtype));
    current_.resize(weights.size());
    best_.resize(weights.size());
    frozen_.resize(weights.size());
    std::vector<at::Tensor> largest, norm2;
    for (const at::Tensor& weight : weights) {
      const auto [low, high] = at::aminmax(weight);
      largest.push_back(at::maximum(low.neg(), high));
      norm2.push_back(squared_norm(weight));
    }
    for (const double value : host_values(largest)) unit_.push_back(residual_unit(value));
    for (const double value : host_values(norm2)) norm_.push_back(std::sqrt(value));
  }

  // Does one alternation. Returns false when no matrix is left to go on with.
  bool step() {
    if (options_.svd_first) return step_svd_first();
    if (space_.basis.defined()) write_low_rank(residual_);
    if (!quantize()) return false;
    solve();
    const at::Tensor captured = captured_energy().cpu();
    for (size_t i = 0; i < weights_.size(); ++i) {
      const double unit = unit_[i];
      keep_if_best(i, current_[i].norm2 - captured[i].item<double>() * unit * unit);
    }
    return true;
  }

  // The best iterates with their factors and errors computed in float32 from the stored weights themselves.
  std::vector<LoftQResult> results() {
    residual_.reset();
    std::vector<LoftQResult> results;
    std::vector<size_t> done;  // indices of the matrices that have factors
    std::vector<at::Tensor> residuals, bases, images;
    for (size_t i = 0; i < weights_.size(); ++i) {
      const Iterate& best = best_[i];
      const bool overflow = std::isinf(best.error);  // of the scales: no solver can help
      results.push_back({best.codes, best.scale, best.offset, {}, {}, best.error, best.errors, overflow});
      if (!std::isfinite(best.error)) continue;
      done.push_back(i);
      residuals.push_back(stored_residual(i));
      bases.push_back(best.basis);
      images.push_back(options_.svd_first ? best.image : at::mm(tall(residuals.back()), best.basis));
    }
    if (done.empty()) return results;
    const Factors factors = balanced_factors({stacked(bases), stacked(images)});  // eigenproblems all together
    std::vector<at::Tensor> rest, flaws, outside, inside;
    const bool probed = !options_.exact && !options_.svd_first;
    for (size_t j = 0; j < done.size(); ++j) {
      const at::Tensor left = factors.left[static_cast<int64_t>(j)], right = factors.right[static_cast<int64_t>(j)];
      rest.push_back(finish(done[j], left, right, residuals[j], results[done[j]]));
      flaws.push_back(flaw_.defined() ? flaw_[static_cast<int64_t>(done[j])] : at::zeros({}, left.options()));
      outside.push_back(probed ? largest_singular2(residuals[j]) : rest.back());
      inside.push_back(squared_norm(left.narrow(1, left.size(1) - 1, 1)));  // a column of U sqrt(S)
    }
    const std::vector<double> rest2 = host_values(rest), flaw = host_values(flaws);
    const std::vector<double> largest2 = host_values(outside), smallest = host_values(inside);
    for (size_t j = 0; j < done.size(); ++j) {
      LoftQResult& result = results[done[j]];
      set_error(done[j], std::sqrt(rest2[j]), result);
      result.sound = options_.exact || flaw[j] < kMostFlaw;
      if (probed) result.sound = result.sound && is_sound(done[j], rest2[j], largest2[j], smallest[j]);
    }
    return results;
  }

 private:
  struct Iterate {
    at::Tensor codes, scale, offset;
    at::Tensor basis, image;  // [s, r] and [n, r]; of `best_` alone
    double norm2 = 0;         // of the residual
    double error = std::numeric_limits<double>::quiet_NaN();
    std::vector<double> errors;
  };

  bool step_svd_first() {
    if (!space_.basis.defined()) {
      for (size_t i = 0; i < weights_.size(); ++i) residual_[i].copy_(weights_[i]).div_(unit_[i]);
    }
    const bool first = !warm_.defined();
    solve();
    if (first && !options_.exact) note_steep_weights();
    write_low_rank(residual_);
    if (!quantize()) return false;
    std::vector<at::Tensor> norm2;
    for (size_t i = 0; i < weights_.size(); ++i) norm2.push_back(remaining_norm2(static_cast<int64_t>(i)));
    const std::vector<double> remaining2 = host_values(norm2);
    for (size_t i = 0; i < weights_.size(); ++i) keep_if_best(i, remaining2[i] * unit_[i] * unit_[i]);
    return true;
  }

  // residual <- (W - quantize(W - low-rank term)) / unit
  bool quantize() {
    std::vector<at::Tensor> norm2(weights_.size());
    for (size_t i = 0; i < weights_.size(); ++i) {
      at::Tensor residual = residual_[i];
      if (unit_[i] != 1.0) residual.mul_(unit_[i]);
      std::tie(current_[i].codes, current_[i].scale, current_[i].offset, norm2[i]) =
          quantize_residual(weights_[i], residual, codebook_, options_);
      if (unit_[i] != 1.0) residual.div_(unit_[i]);
    }
    const std::vector<double> values = host_values(norm2);
    for (size_t i = 0; i < weights_.size(); ++i) {
      current_[i].norm2 = values[i];
      if (!std::isfinite(values[i])) freeze(i);
    }
    return !std::all_of(frozen_.begin(), frozen_.end(), [](bool frozen) { return frozen; });
  }

  // Scales of this matrix did not fit their dtype: it stays at its best iterate, and its neighbours go on.
  void freeze(size_t i) {
    if (!best_[i].codes.defined()) keep_if_best(i, std::numeric_limits<double>::infinity());
    frozen_[i] = true;
    residual_[static_cast<int64_t>(i)].zero_();
  }

  // ||E V||^2 of every matrix, in squares of its unit
  at::Tensor captured_energy() const { return space_.image.square().sum({1, 2}, false, at::kDouble); }

  // Where hardly anything of W is left besides its low-rank part, that part needs more digits than the fast solver has.
  void note_steep_weights() {
    std::vector<double> whole2;
    for (size_t i = 0; i < weights_.size(); ++i) whole2.push_back(std::pow(norm_[i] / unit_[i], 2));
    const at::Tensor whole = at::tensor(whole2, at::kDouble).to(residual_.device());
    note_flaw(captured_energy().ge(whole * (1 - kSteep * kSteep)).logical_and(whole.gt(0)).to(at::kFloat));
  }

  void note_flaw(const at::Tensor& flaw) { flaw_ = flaw_.defined() ? at::maximum(flaw_, flaw) : flaw; }

  // ||E - E' V V^T||^2 for the residual E after and E' before this quantization, by blocks of rows to bound memory.
  at::Tensor remaining_norm2(int64_t i) const {
    constexpr int64_t kRows = 256;
    const at::Tensor rows = wide_ ? space_.basis[i] : space_.image[i],
                     columns = wide_ ? space_.image[i] : space_.basis[i];
    at::Tensor total = at::zeros({}, rows.options().dtype(at::kDouble));
    for (int64_t row = 0; row < rows.size(0); row += kRows) {
      const int64_t count = std::min(kRows, rows.size(0) - row);
      const at::Tensor low_rank = at::mm(rows.narrow(0, row, count), columns.mT());
      total += (residual_[i].narrow(0, row, count) - low_rank).to(at::kDouble).square().sum();
    }
    return total;
  }

  void solve() {
    const at::Tensor matrix = tall(residual_);
    if (options_.exact) {
      space_ = exact_space(matrix.to(at::kFloat), options_.rank);
      return;
    }
    const bool cold = !warm_.defined();
    const at::Tensor start = cold ? multiply_operands(matrix, start_.expand({matrix.size(0), -1, -1}), true) : warm_;
    const int64_t most = matrix.size(2) / start.size(2) - 1;
    const Space space = krylov_space(matrix, start, std::min(cold ? options_.cold_steps : options_.warm_steps, most));
    warm_ = space.basis;
    const at::Tensor gram = batched_product(warm_.mT(), warm_), identity = at::eye(gram.size(2), gram.options());
    note_flaw((gram * (gram - identity)).abs().amax({1, 2}));  // columns may be zero
    space_ = {space.basis.narrow(2, 0, options_.rank), space.image.narrow(2, 0, options_.rank)};
  }

  // out <- E V V^T. It only decides which codes are chosen next, so the operands' precision is enough.
  void write_low_rank(at::Tensor& out) const {
    const at::Tensor image = space_.image.to(out.scalar_type()), basis = space_.basis.to(out.scalar_type());
    const at::Tensor left = wide_ ? basis : image, right = (wide_ ? image : basis).mT();
    if (out.size(0) > 1) {
      at::bmm_out(out, left, right);
    } else {
      at::Tensor target = out[0];
      at::mm_out(target, left[0], right[0]);  // on CPUs faster than bmm
    }
  }

  void keep_if_best(size_t i, double remaining2) {
    if (frozen_[i]) return;
    const double error = norm_[i] > 0 ? std::sqrt(std::max(remaining2, 0.0)) / norm_[i] : 0.0;
    Iterate& best = best_[i];
    best.errors.push_back(error);
    if (best.codes.defined() && !(error < best.error)) return;
    best.codes = current_[i].codes;
    best.scale = current_[i].scale;
    best.offset = current_[i].offset;
    best.error = error;
    best.norm2 = current_[i].norm2;
    if (!space_.basis.defined()) return;
    best.basis = space_.basis[static_cast<int64_t>(i)].clone();
    // With svd_first the factors belong to the residual before this quantization; otherwise `result` finds them anew.
    if (options_.svd_first) best.image = space_.image[static_cast<int64_t>(i)].clone();
  }

  // The matrix with its shorter side last.
  at::Tensor tall(const at::Tensor& matrix) const { return wide_ ? matrix.mT() : matrix; }

  // (W - Q) / unit of the best iterate, from its codes.
  at::Tensor stored_residual(size_t i) const {
    const Iterate& best = best_[i];
    const at::Tensor& weight = weights_[i];
    at::Tensor residual =
        dequantize(best.codes, best.scale, best.offset, codebook_, weight.size(1), options_.group_size);
    at::sub_out(residual, weight, residual);
    return unit_[i] == 1.0 ? residual : residual.div_(unit_[i]);
  }

  // Stores the factors in the result, subtracts left right^T from the residual, and returns the squared norm of that.
  at::Tensor finish(size_t i, const at::Tensor& left, const at::Tensor& right, at::Tensor& residual,
                    LoftQResult& result) const {
    const double root = std::sqrt(unit_[i] / options_.scaling);
    const at::Tensor rows = wide_ ? right : left, columns = wide_ ? left : right;
    result.lora_A = columns.mT().mul(root).contiguous();
    result.lora_B = rows.mul(root).contiguous();
    residual.addmm_(rows, columns.mT(), 1, -1);
    return squared_norm(residual);
  }

  // A lower bound of the largest squared singular value of R: (||R R^T g|| / ||R^T g||)^2 for a random g, and a close
  // one where a single direction stands out, as where E is of low rank and the Krylov blocks are mostly rounding noise.
  at::Tensor largest_singular2(const at::Tensor& residual) const {
    const at::Tensor rest = tall(residual), once = at::mm(rest.mT(), start_.narrow(1, 0, 1));
    return squared_norm(at::mm(rest, once)) / squared_norm(once).clamp_min(1e-300);
  }

  // Whether R = E - E V V^T lacks what V should hold: its norm may not exceed that of E, nor its largest singular value
  // the smallest one that V holds. Where V holds nearly all of E, a low-rank term rounded to bfloat16 is no longer
  // harmless either.
  bool is_sound(size_t i, double rest2, double largest2, double smallest) const {
    const double whole = best_[i].norm2 / unit_[i] / unit_[i];
    if (rest2 < kSteep * kSteep * whole && options_.operand_dtype != at::kFloat) return false;
    return rest2 <= whole * (1 + 1e-4) && std::sqrt(largest2) <= 1.5 * smallest + 1e-6 * std::sqrt(whole);
  }

  void set_error(size_t i, double remaining, LoftQResult& result) const {
    result.error = norm_[i] > 0 ? remaining * unit_[i] / norm_[i] : 0.0;
    // ||E||^2 - ||E V||^2 cannot resolve an error far below ||E||: no estimate is better than the one measured.
    const auto kept = std::min_element(result.errors.begin(), result.errors.end());
    *kept = result.error;
    for (double& error : result.errors) error = std::max(error, result.error);
  }

  static constexpr double kSteep = 0.05;     // share of the norm: a matrix of which less is left counts as steep
  static constexpr double kMostFlaw = 1e-3;  // rounding leaves about 1e-6

  const std::vector<at::Tensor>& weights_;
  const at::Tensor& codebook_;
  const at::Tensor& start_;
  const LoftQOptions& options_;
  bool wide_;
  at::Tensor residual_;  // [B, N, K] in the operand dtype; receives the low-rank term before each quantization
  at::Tensor warm_;      // [B, s, w]: the last Ritz vectors, the surplus ones included
  Space space_;          // their first r
  at::Tensor flaw_;      // [B]: how far the fast solver's columns were from orthonormal or zero; 1: do not trust it
  std::vector<double> unit_, norm_;
  std::vector<bool> frozen_;  // matrices that are done: scales of a later iterate did not fit their dtype
  std::vector<Iterate> current_, best_;
};

void check(const std::vector<at::Tensor>& weights, const at::Tensor& start, const LoftQOptions& options) {
  TORCH_CHECK_VALUE(weights[0].dim() == 2 && weights[0].numel() > 0, "weights[0] has shape ", weights[0].sizes());
  for (const at::Tensor& weight : weights) {
    TORCH_CHECK_VALUE(weight.sizes() == weights[0].sizes() && weight.device() == weights[0].device(),
                      "a batch must agree in shape and device");
  }
  const int64_t shorter = std::min(weights[0].size(0), weights[0].size(1));
  const int64_t longer = std::max(weights[0].size(0), weights[0].size(1));
  TORCH_CHECK_VALUE(options.rank >= 1 && options.rank <= shorter, "rank=", options.rank, " is outside 1..", shorter);
  TORCH_CHECK_VALUE(options.num_iter >= 1, "num_iter=", options.num_iter, " must be >= 1");
  TORCH_CHECK_VALUE(options.scaling > 0, "scaling=", options.scaling, " must be > 0");
  TORCH_CHECK_VALUE(start.dim() == 2 && start.size(0) == longer && start.size(1) >= options.rank &&
                        start.size(1) <= shorter && start.scalar_type() == at::kFloat,
                    "start has shape ", start.sizes(), ", expected float32 [", longer, ", rank..", shorter, "]");
}

std::vector<LoftQResult> alternate(const std::vector<at::Tensor>& weights, const at::Tensor& codebook,
                                   const at::Tensor& start, const LoftQOptions& options,
                                   const std::function<void()>& poll) {
  Alternation alternation(weights, codebook, start, options);
  for (int64_t t = 0; t < options.num_iter && alternation.step(); ++t) poll();
  return alternation.results();
}

}  // namespace

std::vector<LoftQResult> loftq_batch(const std::vector<at::Tensor>& weights, const at::Tensor& codebook,
                                     const at::Tensor& start, const LoftQOptions& options,
                                     const std::function<void()>& poll) {
  if (weights.empty()) return {};
  check(weights, start, options);
  const at::NoGradGuard no_grad;
  std::vector<LoftQResult> results(weights.size());
  try {
    results = alternate(weights, codebook, start, options, poll);
  } catch (const c10::LinAlgError&) {  // not even the small eigenproblems could be solved
    if (options.exact) throw;
  }
  LoftQOptions exact = options;
  exact.exact = true;
  exact.operand_dtype = at::kFloat;
  for (size_t i = 0; i < weights.size() && !options.exact; ++i) {
    if (!results[i].sound) results[i] = alternate({weights[i]}, codebook, start, exact, poll)[0];
  }
  return results;
}

}  // namespace loftq
