// The LoftQ driver as ops. An alternation in progress lives here under a number, and its caller takes the steps: Python
// gets to run between them, to deliver Ctrl-C among other things. Nothing of torch is held while a step runs.
#include "loftq/loftq.h"

#include <atomic>
#include <map>
#include <mutex>
#include <optional>
#include <tuple>

#include "aten/library.h"

namespace loftq::bindings {

using namespace aten;

namespace {

// An alternation for callers in any order and in several threads: one of them at a time.
class Session {
 public:
  explicit Session(std::unique_ptr<LoftQ> alternation) : alternation_(std::move(alternation)) {}

  bool step() {
    const std::lock_guard lock(mutex_);
    LOFTQ_CHECK(!ended_, "the alternation ended with its results");
    const bool goes_on = alternation_->step();
    stepped_ = true;
    return goes_on;
  }

  std::vector<LoftQResult> results() {
    const std::lock_guard lock(mutex_);
    LOFTQ_CHECK(stepped_, "the alternation has no result before its first step: call loftq_step");
    ended_ = true;
    return alternation_->results();
  }

 private:
  std::mutex mutex_;
  std::unique_ptr<LoftQ> alternation_;
  bool stepped_ = false, ended_ = false;
};

class Sessions {
 public:
  int64_t unused_number() { return ++last_; }

  void add(int64_t number, std::shared_ptr<Session> session) {
    const std::lock_guard lock(mutex_);
    LOFTQ_CHECK(number >= 1 && number <= last_, "number=", number, " is not one that loftq_number returned");
    LOFTQ_CHECK(sessions_.emplace(number, std::move(session)).second, "alternation ", number, " is in progress");
  }

  std::shared_ptr<Session> find(int64_t number) {
    const std::lock_guard lock(mutex_);
    const auto found = sessions_.find(number);
    LOFTQ_CHECK(found != sessions_.end(), "there is no alternation ", number, "; loftq_begin begins them");
    return found->second;
  }

  // The tensors of the session are freed after the map is free for others.
  void remove(int64_t number) {
    std::shared_ptr<Session> last_reference;
    const std::lock_guard lock(mutex_);
    const auto found = sessions_.find(number);
    if (found == sessions_.end()) return;
    last_reference = std::move(found->second);
    sessions_.erase(found);
  }

 private:
  std::mutex mutex_;
  std::map<int64_t, std::shared_ptr<Session>> sessions_;
  std::atomic<int64_t> last_ = 0;
};

Sessions& sessions() {
  static Sessions all;
  return all;
}

// Callers get a number first, and begin under it then: whatever interrupts them, they can end what they may have begun.
int64_t number() { return sessions().unused_number(); }

void begin(int64_t number, const std::vector<Tensor>& weights, const Tensor& codebook, const Tensor& start,
           int64_t rank, double scaling, bool exact, bool svd_first, ScalarType operand_dtype, int64_t cold_steps,
           int64_t warm_steps, int64_t group_size, const std::string& scale_rule, ScalarType scale_dtype,
           bool scale_search) {
  const NoGrad no_grad;
  sessions().add(number, std::make_shared<Session>(LoftQ::begin(weights, codebook, start,
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
                                                                 .scale_search = scale_search})));
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

// Does nothing where there is none.
void end(int64_t number) { sessions().remove(number); }

Library defined() {
  Library library = Library::ops();
  library.define("loftq_number() -> int");
  library.define(
      "loftq_begin(int number, Tensor[] weights, Tensor codebook, Tensor start, int rank, float scaling, bool exact, "
      "bool "
      "svd_first, ScalarType operand_dtype, int cold_steps, int warm_steps, int group_size, str scale_rule, ScalarType "
      "scale_dtype, bool scale_search) -> ()");
  library.define("loftq_step(int number) -> bool");
  library.define(
      "loftq_results(int number) -> (Tensor[] codes, Tensor[] scale, Tensor[] offset, Tensor[] lora_A, Tensor[] "
      "lora_B, Tensor[] numbers)");
  library.define("loftq_end(int number) -> ()");
  return library;
}

Library registered() {
  Library library = Library::kernels("CompositeExplicitAutograd");
  library.add<number>("loftq_number");
  library.add<begin>("loftq_begin");
  library.add<step>("loftq_step");
  library.add<results>("loftq_results");
  library.add<end>("loftq_end");
  return library;
}

const Registration definitions(defined), kernels(registered);

}  // namespace

}  // namespace loftq::bindings
