// Who runs the threads of the CPU kernels, and how many there are at most. By default OpenMP runs them, where this
// library is built with it. A host with a thread pool of its own hands that over here, so that two pools do not compete
// for the same processors. Both settings hold for every later call of a kernel, in any thread.
#pragma once

#include "loftq/config.h"

namespace loftq {
inline namespace LOFTQ_VERSION {

// Calls task(context) `count` times, on as many threads as it likes, the calling thread among them, and returns when
// all calls have returned. Calls need not overlap: the first one to come does all the work that it finds, and late ones
// find none left.
using ParallelRunner = void (*)(int count, void (*task)(void* context), void* context);

LOFTQ_API void set_parallel_runner(ParallelRunner runner);  // nullptr restores the default

// Kernels use at most so many threads, whatever their callers ask for: the processors that a container's quota allows,
// for example. A number below 1 removes the limit.
LOFTQ_API void set_thread_limit(int threads);
LOFTQ_API int thread_limit();  // INT_MAX where there is none

}  // namespace LOFTQ_VERSION
}  // namespace loftq
