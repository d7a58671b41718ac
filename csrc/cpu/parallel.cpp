#include "loftq/parallel.h"

#include <atomic>

namespace loftq {

namespace {

std::atomic<ParallelRunner> installed_runner{nullptr};

}  // namespace

void set_parallel_runner(ParallelRunner runner) { installed_runner.store(runner); }

}  // namespace loftq
