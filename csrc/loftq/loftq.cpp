#include "loftq.h"
#include "loftq/config.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <utility>

#include "aten/functions.h"
#include "loftq/packing.h"
#include "low_rank.h"

namespace loftq {
inline namespace LOFTQ_VERSION {

using namespace aten;

namespace {

using Quantized = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // codes, scale, offset, ||residual||^2

// Quantize weight - low_rank; low_rank becomes weight - Q. The dispatcher finds the kernel of the device.
Quantized quantize_residual(const Tensor& weight, const Tensor& low_rank, const Tensor& codebook,
                            const LoftQOptions& options) {
  return call<Quantized>("loftq_kernels::quantize_residual_", "", weight, low_rank, codebook, options.group_size,
                         options.scale_rule, options.scale_dtype, options.scale_search);
}

Tensor dequantize(const Tensor& codes, const Tensor& scale, const Tensor& offset, const Tensor& codebook,
                  int64_t in_features, int64_t group_size) {
  std::optional<Tensor> affine;
  if (offset.numel() > 0) affine = offset;
  return call<Tensor>("loftq_kernels::dequantize", "", codes, scale, affine, codebook, in_features, group_size, kFloat);
}

// What is computed for a whole matrix goes by blocks of so many rows: temporary tensors stay small.
constexpr int64_t kBlockRows = 256;

// Calls body(first row, rows) for the blocks of a matrix with that many rows; a GPU takes all of them at once.
template <class Body>
void by_blocks(const Tensor& matrix, const Body& body) {
  const int64_t rows = matrix.size(0), most = matrix.is_cpu() ? kBlockRows : std::max<int64_t>(rows, 1);
  for (int64_t row = 0; row < rows; row += most) body(row, std::min(most, rows - row));
}

// ||matrix||^2 in float64. ATen's norm casts the whole matrix, twice its float32 size: few launches on a GPU, but on a
// CPU one block of rows at a time takes less memory.
Tensor squared_norm(const Tensor& matrix) {
  if (!matrix.is_cpu()) return square(norm(matrix, kDouble));
  Tensor total = zeros({}, kDouble, matrix.device());
  by_blocks(matrix, [&](int64_t row, int64_t count) {
    total = add(total, sum(square(to(narrow(matrix, 0, row, count), kDouble))));
  });
  return total;
}

// matrix <- matrix - left right^T
void subtract_product_(const Tensor& matrix, const Tensor& left, const Tensor& right) {
  const Tensor columns = mT(right);
  by_blocks(matrix, [&](int64_t row, int64_t count) {
    const Tensor rows = narrow(matrix, 0, row, count);
    copy_(rows, sub(rows, mm(narrow(left, 0, row, count), columns)));
  });
}

// matrix <- minuend - matrix
void subtract_from_(const Tensor& matrix, const Tensor& minuend) {
  by_blocks(matrix, [&](int64_t row, int64_t count) {
    const Tensor rows = narrow(matrix, 0, row, count);
    copy_(rows, sub(narrow(minuend, 0, row, count), rows));
  });
}

// A vector in float64 as host memory.
std::vector<double> host_vector(const Tensor& vector) {
  const Tensor values = cpu(vector);
  return {values.const_data<double>(), values.const_data<double>() + values.numel()};
}

// Copies scalars to host memory with one wait for the device; item() would wait once per scalar.
std::vector<double> host_values(const std::vector<Tensor>& scalars) { return host_vector(to(stack(scalars), kDouble)); }

// Numbers as a vector on a device.
Tensor vector_of(const std::vector<double>& values, Device device) {
  const Tensor host = empty({static_cast<int64_t>(values.size())}, kDouble, Device{kCpu, -1});
  std::memcpy(host.mutable_data(), values.data(), values.size() * sizeof(double));
  return to(host, device);
}

// Residuals are divided by this power of two, which is exact, where the squares of the weights would leave float32.
double residual_unit(double largest) {
  if (!(largest > 0) || (largest > 1e-9 && largest < 1e9) || !std::isfinite(largest)) return 1.0;
  return std::exp2(std::floor(std::log2(largest)));
}

// Stacks tensors to [B, ..]; a batch of one is a view.
Tensor stacked(const std::vector<Tensor>& tensors) {
  return tensors.size() == 1 ? unsqueeze(tensors[0], 0) : stack(tensors);
}

class Alternation : public LoftQ {
 public:
  Alternation(std::vector<Tensor> weights, Tensor codebook, Tensor start, LoftQOptions options)
      : weights_(std::move(weights)),
        codebook_(std::move(codebook)),
        start_(std::move(start)),
        options_(std::move(options)) {
    const auto count = static_cast<int64_t>(weights_.size());
    const int64_t n = weights_[0].size(0), k = weights_[0].size(1);
    wide_ = k > n;
    residual_ = zeros({count, n, k}, options_.operand_dtype, weights_[0].device());
    current_.resize(weights_.size());
    best_.resize(weights_.size());
    frozen_.resize(weights_.size());
    std::vector<Tensor> largest, norm2;
    for (const Tensor& weight : weights_) {
      const auto [low, high] = aminmax(weight);
      largest.push_back(maximum(neg(low), high));
      norm2.push_back(squared_norm(weight));
    }
    for (const double value : host_values(largest)) unit_.push_back(residual_unit(value));
    for (const double value : host_values(norm2)) norm_.push_back(std::sqrt(value));
  }

  bool step() override try {
    return options_.svd_first ? step_svd_first() : step_quantize_first();
  } catch (const EighFailed&) {
    return give_up();
  }

  std::vector<LoftQResult> results() override try {
    if (failed_) return {};
    return best_results();
  } catch (const EighFailed&) {
    give_up();
    return {};
  }

 private:
  // Not even the small eigenproblems could be solved: that ends the fast solver.
  bool give_up() {
    if (options_.exact) throw;
    failed_ = true;
    return false;
  }

  bool step_quantize_first() {
    if (space_.basis.defined()) write_low_rank(residual_);
    if (!quantize()) return false;
    solve();
    const std::vector<double> captured = host_vector(captured_energy());
    for (size_t i = 0; i < weights_.size(); ++i) {
      keep_if_best(i, current_[i].norm2 - captured[i] * unit_[i] * unit_[i]);
    }
    return true;
  }

  // The best iterates with their factors and errors computed in float32 from the stored weights themselves.
  std::vector<LoftQResult> best_results() {
    residual_.reset();
    std::vector<LoftQResult> results;
    std::vector<size_t> done;  // indices of the matrices that have factors
    std::vector<Tensor> residuals, bases, images;
    for (size_t i = 0; i < weights_.size(); ++i) {
      const Iterate& best = best_[i];
      const bool overflow = std::isinf(best.error);  // of the scales: no solver can help
      results.push_back({best.codes, best.scale, best.offset, {}, {}, best.error, best.errors, overflow});
      if (!std::isfinite(best.error)) continue;
      done.push_back(i);
      residuals.push_back(stored_residual(i));
      bases.push_back(best.basis);
      images.push_back(options_.svd_first ? best.image : mm(tall(residuals.back()), best.basis));
    }
    if (done.empty()) return results;
    const Factors factors = balanced_factors({stacked(bases), stacked(images)});  // eigenproblems all together
    std::vector<Tensor> rest, flaws, outside, inside;
    const bool probed = !options_.exact && !options_.svd_first;
    for (size_t j = 0; j < done.size(); ++j) {
      const auto index = static_cast<int64_t>(j);
      const Tensor left = select(factors.left, index), right = select(factors.right, index);
      rest.push_back(finish(done[j], left, right, residuals[j], results[done[j]]));
      flaws.push_back(flaw_.defined() ? select(flaw_, static_cast<int64_t>(done[j]))
                                      : zeros({}, kFloat, left.device()));
      outside.push_back(probed ? largest_singular2(residuals[j]) : rest.back());
      inside.push_back(squared_norm(narrow(left, 1, left.size(1) - 1, 1)));  // a column of U sqrt(S)
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

  struct Iterate {
    Tensor codes, scale, offset;
    Tensor basis, image;  // [s, r] and [n, r]; of `best_` alone
    double norm2 = 0;     // of the residual
    double error = std::numeric_limits<double>::quiet_NaN();
    std::vector<double> errors;
  };

  bool step_svd_first() {
    if (!space_.basis.defined()) {
      for (size_t i = 0; i < weights_.size(); ++i) {
        const Tensor residual = residual_of(i);
        copy_(residual, weights_[i]);
        if (unit_[i] != 1.0) div_(residual, unit_[i]);
      }
    }
    const bool first = !warm_.defined();
    solve();
    if (first && !options_.exact) note_steep_weights();
    write_low_rank(residual_);
    if (!quantize()) return false;
    std::vector<Tensor> norm2;
    for (size_t i = 0; i < weights_.size(); ++i) norm2.push_back(remaining_norm2(static_cast<int64_t>(i)));
    const std::vector<double> remaining2 = host_values(norm2);
    for (size_t i = 0; i < weights_.size(); ++i) keep_if_best(i, remaining2[i] * unit_[i] * unit_[i]);
    return true;
  }

  // residual <- (W - quantize(W - low-rank term)) / unit
  bool quantize() {
    std::vector<Tensor> norm2(weights_.size());
    for (size_t i = 0; i < weights_.size(); ++i) {
      const Tensor residual = residual_of(i);
      if (unit_[i] != 1.0) mul_(residual, unit_[i]);
      std::tie(current_[i].codes, current_[i].scale, current_[i].offset, norm2[i]) =
          quantize_residual(weights_[i], residual, codebook_, options_);
      if (unit_[i] != 1.0) div_(residual, unit_[i]);
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
    zero_(residual_of(i));
  }

  Tensor residual_of(size_t i) const { return select(residual_, static_cast<int64_t>(i)); }

  // ||E V||^2 of every matrix, in squares of its unit
  Tensor captured_energy() const { return sum(square(space_.image), {1, 2}, kDouble); }

  // Where hardly anything of W is left besides its low-rank part, that part needs more digits than the fast solver has.
  void note_steep_weights() {
    std::vector<double> whole2;
    for (size_t i = 0; i < weights_.size(); ++i) whole2.push_back(std::pow(norm_[i] / unit_[i], 2));
    const Tensor whole = vector_of(whole2, residual_.device());
    const Tensor steep = ge(captured_energy(), mul(whole, 1 - kSteep * kSteep));
    note_flaw(to(logical_and(steep, gt(whole, 0)), kFloat));
  }

  void note_flaw(const Tensor& flaw) { flaw_ = flaw_.defined() ? maximum(flaw_, flaw) : flaw; }

  // ||E - E' V V^T||^2 for the residual E after and E' before this quantization, by blocks of rows to bound memory.
  Tensor remaining_norm2(int64_t i) const {
    const Tensor basis = select(space_.basis, i), image = select(space_.image, i), residual = select(residual_, i);
    const Tensor left = wide_ ? basis : image, right = mT(wide_ ? image : basis);
    Tensor total = zeros({}, kDouble, left.device());
    by_blocks(residual, [&](int64_t row, int64_t count) {
      const Tensor low_rank = mm(narrow(left, 0, row, count), right);
      total = add(total, sum(square(to(sub(narrow(residual, 0, row, count), low_rank), kDouble))));
    });
    return total;
  }

  void solve() {
    const Tensor matrix = tall(residual_);
    if (options_.exact) {
      space_ = exact_space(to(matrix, kFloat), options_.rank);
      return;
    }
    const bool cold = !warm_.defined();
    const Tensor start = cold ? multiply_operands(matrix, expand(start_, {matrix.size(0), -1, -1}), true) : warm_;
    const int64_t most = matrix.size(2) / start.size(2) - 1;
    const Space space = krylov_space(matrix, start, std::min(cold ? options_.cold_steps : options_.warm_steps, most));
    warm_ = space.basis;
    const Tensor gram = batched_product(mT(warm_), warm_), identity = eye(gram.size(2), kFloat, gram.device());
    note_flaw(amax(abs(mul(gram, sub(gram, identity))), {1, 2}));  // columns may be zero
    space_ = {narrow(space.basis, 2, 0, options_.rank), narrow(space.image, 2, 0, options_.rank)};
  }

  // out <- E V V^T. It only decides which codes are chosen next, so the operands' precision is enough.
  void write_low_rank(const Tensor& out) const {
    const Tensor image = to(space_.image, out.dtype()), basis = to(space_.basis, out.dtype());
    const Tensor left = wide_ ? basis : image, right = mT(wide_ ? image : basis);
    if (out.size(0) > 1) {
      bmm_out(out, left, right);
    } else {
      mm_out(select(out, 0), select(left, 0), select(right, 0));  // on CPUs faster than bmm
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
    best.basis = clone(select(space_.basis, static_cast<int64_t>(i)));
    // With svd_first the factors belong to the residual before this quantization; otherwise `result` finds them anew.
    if (options_.svd_first) best.image = clone(select(space_.image, static_cast<int64_t>(i)));
  }

  // The matrix with its shorter side last.
  Tensor tall(const Tensor& matrix) const { return wide_ ? mT(matrix) : matrix; }

  // (W - Q) / unit of the best iterate, from its codes.
  Tensor stored_residual(size_t i) const {
    const Iterate& best = best_[i];
    const Tensor& weight = weights_[i];
    const Tensor residual =
        dequantize(best.codes, best.scale, best.offset, codebook_, weight.size(1), options_.group_size);
    subtract_from_(residual, weight);
    if (unit_[i] != 1.0) div_(residual, unit_[i]);
    return residual;
  }

  // Stores the factors in the result, subtracts left right^T from the residual, and returns the squared norm of that.
  Tensor finish(size_t i, const Tensor& left, const Tensor& right, const Tensor& residual, LoftQResult& result) const {
    const double root = std::sqrt(unit_[i] / options_.scaling);
    const Tensor rows = wide_ ? right : left, columns = wide_ ? left : right;
    result.lora_A = contiguous(mul(mT(columns), root));
    result.lora_B = contiguous(mul(rows, root));
    subtract_product_(residual, rows, columns);
    return squared_norm(residual);
  }

  // A lower bound of the largest squared singular value of R: (||R R^T g|| / ||R^T g||)^2 for a random g, and a close
  // one where a single direction stands out, as where E is of low rank and the Krylov blocks are mostly rounding noise.
  Tensor largest_singular2(const Tensor& residual) const {
    const Tensor rest = tall(residual), once = mm(mT(rest), narrow(start_, 1, 0, 1));
    return div(squared_norm(mm(rest, once)), clamp_min(squared_norm(once), 1e-300));
  }

  // Whether R = E - E V V^T lacks what V should hold: its norm may not exceed that of E, nor its largest singular value
  // the smallest one that V holds. Where V holds nearly all of E, a low-rank term rounded to bfloat16 is no longer
  // harmless either.
  bool is_sound(size_t i, double rest2, double largest2, double smallest) const {
    const double whole = best_[i].norm2 / unit_[i] / unit_[i];
    if (rest2 < kSteep * kSteep * whole && !(options_.operand_dtype == kFloat)) return false;
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

  const std::vector<Tensor> weights_;
  const Tensor codebook_, start_;
  const LoftQOptions options_;
  bool wide_ = false, failed_ = false;
  Tensor residual_;  // [B, N, K] in the operand dtype; receives the low-rank term before each quantization
  Tensor warm_;      // [B, s, w]: the last Ritz vectors, the surplus ones included
  Space space_;      // their first r
  Tensor flaw_;      // [B]: how far the fast solver's columns were from orthonormal or zero; 1: do not trust it
  std::vector<double> unit_, norm_;
  std::vector<bool> frozen_;  // matrices that are done: scales of a later iterate did not fit their dtype
  std::vector<Iterate> current_, best_;
};

void check(const std::vector<Tensor>& weights, const Tensor& start, const LoftQOptions& options) {
  LOFTQ_CHECK(!weights.empty(), "there are no weights");
  LOFTQ_CHECK(weights[0].dim() == 2 && weights[0].numel() > 0, "weights[0] has shape ", weights[0].sizes());
  for (const Tensor& weight : weights) {
    LOFTQ_CHECK(std::ranges::equal(weight.sizes(), weights[0].sizes()) && weight.device() == weights[0].device(),
                "a batch must agree in shape and device");
  }
  LOFTQ_CHECK(std::ranges::find(kGroupSizes, options.group_size) != std::end(kGroupSizes),
              "group_size=", options.group_size, " is not supported");
  LOFTQ_CHECK(options.cold_steps >= 0 && options.warm_steps >= 0, "cold_steps=", options.cold_steps,
              " and warm_steps=", options.warm_steps, " must be >= 0");
  LOFTQ_CHECK(options.operand_dtype == kFloat || options.operand_dtype == kBFloat16,
              "operand_dtype=", options.operand_dtype, " is neither float32 nor bfloat16");
  const int64_t shorter = std::min(weights[0].size(0), weights[0].size(1));
  const int64_t longer = std::max(weights[0].size(0), weights[0].size(1));
  LOFTQ_CHECK(options.rank >= 1 && options.rank <= shorter, "rank=", options.rank, " is outside 1..", shorter);
  LOFTQ_CHECK(options.scaling > 0, "scaling=", options.scaling, " must be > 0");
  LOFTQ_CHECK(start.dim() == 2 && start.size(0) == longer && start.size(1) >= options.rank &&
                  start.size(1) <= shorter && start.dtype() == kFloat,
              "start has shape ", start.sizes(), ", expected float32 [", longer, ", rank..", shorter, "]");
}

}  // namespace

std::unique_ptr<LoftQ> LoftQ::begin(std::vector<Tensor> weights, Tensor codebook, Tensor start, LoftQOptions options) {
  check(weights, start, options);
  return std::make_unique<Alternation>(std::move(weights), std::move(codebook), std::move(start), std::move(options));
}

}  // namespace LOFTQ_VERSION
}  // namespace loftq
