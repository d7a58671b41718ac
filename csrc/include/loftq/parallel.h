// Who runs the threads of the CPU kernels. By default OpenMP, where this library is built with it; a host with a thread
// pool of its own hands it over here, so that two pools do not compete for the same processors.
#pragma once

#include "loftq/config.h"

namespace loftq {

// Calls task(context) `count` times, on as many threads as it likes, the calling thread among them, and returns when
// all calls have returned. Calls need not overlap: the first one to come does all the work that it finds, and late ones
// find none left.
using ParallelRunner = void (*)(int count, void (*task)(void* context), void* context);

// For every later call of a kernel, in any thread. nullptr restores the default.
LOFTQ_API void set_parallel_runner(ParallelRunner runner);

}  // namespace loftq
