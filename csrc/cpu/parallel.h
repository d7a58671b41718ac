// Rows divided among threads. Without OpenMP all of them run on the calling thread.
#pragma once

#include <algorithm>
#include <cstdint>

namespace loftq {

// Starting a thread costs microseconds: give each at least this many elements (about 4 us of quantization).
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

}  // namespace loftq
