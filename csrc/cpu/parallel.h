// Divides rows among threads. Without OpenMP all rows run on the calling thread.
#pragma once

#if defined(_OPENMP)
#include <omp.h>
#endif

#include <algorithm>
#include <cstdint>

#include "loftq/types.h"

namespace loftq {

// Starting a thread costs microseconds, so each gets at least this many elements (about 4 us of quantization).
constexpr int64_t kMinElementsPerThread = 1 << 14;

inline int useful_threads(int num_threads, int64_t n, int64_t k) {
  const int64_t most = std::min<int64_t>(n, n * k / kMinElementsPerThread);
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(num_threads, most)));
}

// Calls body(thread, begin, end) for every thread in [0, threads), rows [0, n) in contiguous parts.
template <class Body>
void parallel_rows(int threads, int64_t n, const Body& body) {
#if defined(_OPENMP)
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
#endif
  for (int thread = 0; thread < threads; ++thread) {
    body(thread, n * thread / threads, n * (thread + 1) / threads);
  }
}

// Calls body(thread, team) on every thread of a team of at most `threads`; all of them may meet at team_barrier().
template <class Body>
void parallel_team(int threads, const Body& body) {
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads) if (threads > 1)
  body(omp_get_thread_num(), omp_get_num_threads());
#else
  (void)threads;
  body(0, 1);
#endif
}

inline void team_barrier() {
#if defined(_OPENMP)
#pragma omp barrier
#endif
}

// Part `index` of `parts` nearly equal parts of [0, count), in whole units.
struct Range {
  int64_t begin, end;
};

inline Range part_of(int64_t count, int64_t unit, int64_t index, int64_t parts) {
  const int64_t units = ceil_div(count, unit);
  return {std::min(count, units * index / parts * unit), std::min(count, units * (index + 1) / parts * unit)};
}

}  // namespace loftq
