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

// In float64, a block of rows at a time: ATen's norm would cast the whole matrix, twice its float32 size.
double frobenius_norm(const at::Tensor& matrix) {
  constexpr int64_t kRows = 256;
  at::Tensor total = at::zeros({}, matrix.options().dtype(at::kDouble));
  for (int64_t row = 0; row < matrix.size(0); row += kRows) {
    const at::Tensor rows = matrix.narrow(0, row, std::min(kRows, matrix.size(0) - row)).to(at::kDouble);
    total += rows.square().sum();
  }
  return std::sqrt(total.item<double>());
}

// Residuals are divided by this power of two, which is exact, where the squares of the weights would leave float32.
double residual_unit(const at::Tensor& weight) {
  const auto [low, high] = at::aminmax(weight);
  const double largest = std::max(-low.item<double>(), high.item<double>());
  if (!(largest > 0) || (largest > 1e-9 && largest < 1e9) || !std::isfinite(largest)) return 1.0;
  return std::exp2(std::floor(std::log2(largest)));
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
    for (const at::Tensor& weight : weights) {
      unit_.push_back(residual_unit(weight));
      norm_.push_back(frobenius_norm(weight));
    }
  }

  // One alternation; false when scales do not fit their dtype, so that there is nothing to go on with.
  bool step() {
    if (options_.svd_first) return step_svd_first();
    if (space_.basis.defined()) write_low_rank(residual_);
    if (!quantize()) return false;
    solve();
    const at::Tensor captured = space_.image.square().sum({1, 2}, false, at::kDouble).cpu();
    for (size_t i = 0; i < weights_.size(); ++i) {
      const double unit = unit_[i];
      keep_if_best(i, current_[i].norm2 - captured[i].item<double>() * unit * unit);
    }
    return true;
  }

  std::vector<LoftQResult> results() {
    std::vector<LoftQResult> results;
    for (size_t i = 0; i < weights_.size(); ++i) results.push_back(result(i));
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
    solve();
    at::Tensor low_rank = at::empty_like(residual_);
    write_low_rank(low_rank);
    residual_.copy_(low_rank);
    if (!quantize()) return false;
    for (size_t i = 0; i < weights_.size(); ++i) {
      const double remaining = frobenius_norm(residual_[i] - low_rank[i]) * unit_[i];
      keep_if_best(i, remaining * remaining);
    }
    return true;
  }

  // residual <- (W - quantize(W - low-rank term)) / unit
  bool quantize() {
    bool finite = true;
    for (size_t i = 0; i < weights_.size(); ++i) {
      at::Tensor residual = residual_[i];
      if (unit_[i] != 1.0) residual.mul_(unit_[i]);
      at::Tensor norm2;
      std::tie(current_[i].codes, current_[i].scale, current_[i].offset, norm2) =
          quantize_residual(weights_[i], residual, codebook_, options_);
      if (unit_[i] != 1.0) residual.div_(unit_[i]);
      current_[i].norm2 = norm2.item<double>();
      finite = finite && std::isfinite(current_[i].norm2);
    }
    for (size_t i = 0; i < weights_.size() && !finite; ++i) keep_if_best(i, std::numeric_limits<double>::infinity());
    return finite;
  }

  void solve() {
    const at::Tensor matrix = wide_ ? residual_.mT() : residual_;
    if (options_.exact) {
      space_ = exact_space(matrix.to(at::kFloat), options_.rank);
      return;
    }
    const bool cold = !warm_.defined();
    const at::Tensor start = cold ? multiply_operands(matrix, start_.expand({matrix.size(0), -1, -1}), true) : warm_;
    const int64_t most = matrix.size(2) / start.size(2) - 1;
    const Space space = krylov_space(matrix, start, std::min(cold ? options_.cold_steps : options_.warm_steps, most));
    warm_ = space.basis;
    space_ = {space.basis.narrow(2, 0, options_.rank), space.image.narrow(2, 0, options_.rank)};
  }

  // out <- E V V^T. It only decides which codes are chosen next, so the operands' precision is enough.
  void write_low_rank(at::Tensor& out) const {
    const at::Tensor image = space_.image.to(out.scalar_type()), basis = space_.basis.to(out.scalar_type());
    for (int64_t i = 0; i < out.size(0); ++i) {
      at::Tensor target = out[i];
      at::mm_out(target, wide_ ? basis[i] : image[i], (wide_ ? image[i] : basis[i]).mT());
    }
  }

  void keep_if_best(size_t i, double remaining2) {
    const double error = norm_[i] > 0 ? std::sqrt(std::max(remaining2, 0.0)) / norm_[i] : 0.0;
    Iterate& best = best_[i];
    best.errors.push_back(error);
    if (best.codes.defined() && !(error < best.error)) return;
    best.codes = current_[i].codes;
    best.scale = current_[i].scale;
    best.offset = current_[i].offset;
    best.error = error;
    if (!space_.basis.defined()) return;
    best.basis = space_.basis[static_cast<int64_t>(i)].clone();
    // With svd_first the factors belong to the residual before this quantization; otherwise `result` finds them anew.
    if (options_.svd_first) best.image = space_.image[static_cast<int64_t>(i)].clone();
  }

  // The best iterate with its factors and error computed in float32 from the stored weight itself.
  LoftQResult result(size_t i) {
    Iterate& best = best_[i];
    LoftQResult result{best.codes, best.scale, best.offset, {}, {}, best.error, best.errors};
    if (!std::isfinite(best.error)) return result;
    const at::Tensor& weight = weights_[i];
    at::Tensor residual =
        dequantize(best.codes, best.scale, best.offset, codebook_, weight.size(1), options_.group_size);
    residual.neg_().add_(weight).div_(unit_[i]);
    const at::Tensor matrix = wide_ ? residual.mT() : residual;
    const at::Tensor image = options_.svd_first ? best.image : at::mm(matrix, best.basis);
    const Space space{best.basis.unsqueeze(0), image.unsqueeze(0)};
    const Factors factors = balanced_factors(space);
    const double root = std::sqrt(unit_[i] / options_.scaling);
    const at::Tensor left = factors.left[0], right = factors.right[0];
    result.lora_A = (wide_ ? left : right).mT().mul(root).contiguous();
    result.lora_B = (wide_ ? right : left).mul(root).contiguous();
    residual.addmm_(wide_ ? right : left, (wide_ ? left : right).mT(), 1, -1);
    const double norm = frobenius_norm(residual);
    result.error = norm_[i] > 0 ? norm * unit_[i] / norm_[i] : 0.0;
    // ||E||^2 - ||E V||^2 cannot resolve an error far below ||E||: no estimate is better than the one measured.
    const auto kept = std::min_element(result.errors.begin(), result.errors.end());
    *kept = result.error;
    for (double& error : result.errors) error = std::max(error, result.error);
    return result;
  }

  const std::vector<at::Tensor>& weights_;
  const at::Tensor& codebook_;
  const at::Tensor& start_;
  const LoftQOptions& options_;
  bool wide_;
  at::Tensor residual_;  // [B, N, K] in the operand dtype; receives the low-rank term before each quantization
  at::Tensor warm_;      // [B, s, w]: the last Ritz vectors, the surplus ones included
  Space space_;          // their first r
  std::vector<double> unit_, norm_;
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

}  // namespace

std::vector<LoftQResult> loftq_batch(const std::vector<at::Tensor>& weights, const at::Tensor& codebook,
                                     const at::Tensor& start, const LoftQOptions& options,
                                     const std::function<void()>& poll) {
  if (weights.empty()) return {};
  check(weights, start, options);
  const at::NoGradGuard no_grad;
  Alternation alternation(weights, codebook, start, options);
  for (int64_t t = 0; t < options.num_iter && alternation.step(); ++t) poll();
  return alternation.results();
}

}  // namespace loftq
