// The LoftQ driver as ops. An alternation in progress lives here under a number, and its caller takes the steps: Python
// gets to run between them, to deliver Ctrl-C among other things. Nothing of torch is held while a step runs.
#include "loftq/loftq.h"

#include <limits>
#include <map>
#include <mutex>
#include <optional>
#include <tuple>

#include "aten/library.h"

namespace loftq::bindings {

using namespace aten;

namespace {

class Sessions {
 public:
  int64_t add(std::shared_ptr<LoftQ> session) {
    const std::lock_guard lock(mutex_);
    sessions_.emplace(++last_, std::move(session));
    return last_;
  }

  std::shared_ptr<LoftQ> find(int64_t number) {
    const std::lock_guard lock(mutex_);
    const auto found = sessions_.find(number);
    LOFTQ_CHECK(found != sessions_.end(), "there is no alternation ", number, "; loftq_begin returns their numbers");
    return found->second;
  }

  void remove(int64_t number) {
    const std::shared_ptr<LoftQ> last_reference = find(number);
    const std::lock_guard lock(mutex_);
    sessions_.erase(number);
  }

 private:
  std::mutex mutex_;
  std::map<int64_t, std::shared_ptr<LoftQ>> sessions_;
  int64_t last_ = 0;
};

Sessions& sessions() {
  static Sessions all;
  return all;
}

int64_t begin(const std::vector<Tensor>& weights, const Tensor& codebook, const Tensor& start, int64_t rank,
              double scaling, bool exact, bool svd_first, ScalarType operand_dtype, int64_t cold_steps,
              int64_t warm_steps, int64_t group_size, const std::string& scale_rule, ScalarType scale_dtype,
              bool scale_search) {
  const NoGrad no_grad;
  return sessions().add(LoftQ::begin(weights, codebook, start,
                                     {.rank = rank,
                                      .scaling = scaling,
                                      .exact = exact,
                                      .svd_first = svd_first,
                                      .operand_dtype = operand_dtype,
                                      .cold_steps = cold_steps,
                                      .warm_steps = warm_steps,
                                      .group_size = group_size,
                                      .scale_rule = scale_rule,
                                      .scale_dtype = scale_dtype,
                                      .scale_search = scale_search}));
}

bool step(int64_t number) {
  const NoGrad no_grad;
  return sessions().find(number)->step();
}

// Lists by matrix: codes, scale, offset, lora_A, lora_B, and numbers: error, sound (0 or 1), the errors of the steps.
using Results = std::tuple<std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>,
                           std::vector<Tensor>, std::vector<Tensor>>;

Tensor numbers_of(const LoftQResult& result) {
  const Tensor numbers = empty({2 + static_cast<int64_t>(result.errors.size())}, kDouble, Device{kCpu, -1});
  double* next = numbers.mutable_data<double>();
  *next++ = result.error;
  *next++ = result.sound;
  std::copy(result.errors.begin(), result.errors.end(), next);
  return numbers;
}

// A matrix without factors has some without elements.
Tensor given(const Tensor& factor) { return factor.defined() ? factor : empty({0}, kFloat, Device{kCpu, -1}); }

Results results(int64_t number) {
  const NoGrad no_grad;
  Results all;
  auto& [codes, scale, offset, lora_A, lora_B, numbers] = all;
  for (const LoftQResult& result : sessions().find(number)->results()) {
    codes.push_back(result.codes);
    scale.push_back(result.scale);
    offset.push_back(result.offset);
    lora_A.push_back(given(result.lora_A));
    lora_B.push_back(given(result.lora_B));
    numbers.push_back(numbers_of(result));
  }
  return all;
}

void end(int64_t number) { sessions().remove(number); }

Library defined() {
  Library library = Library::ops();
  library.define(
      "loftq_begin(Tensor[] weights, Tensor codebook, Tensor start, int rank, float scaling, bool exact, bool "
      "svd_first, ScalarType operand_dtype, int cold_steps, int warm_steps, int group_size, str scale_rule, ScalarType "
      "scale_dtype, bool scale_search) -> int");
  library.define("loftq_step(int number) -> bool");
  library.define(
      "loftq_results(int number) -> (Tensor[] codes, Tensor[] scale, Tensor[] offset, Tensor[] lora_A, Tensor[] "
      "lora_B, Tensor[] numbers)");
  library.define("loftq_end(int number) -> ()");
  return library;
}

Library registered() {
  Library library = Library::kernels("CompositeExplicitAutograd");
  library.add<begin>("loftq_begin");
  library.add<step>("loftq_step");
  library.add<results>("loftq_results");
  library.add<end>("loftq_end");
  return library;
}

const Library definitions = defined(), kernels = registered();

}  // namespace

}  // namespace loftq::bindings
