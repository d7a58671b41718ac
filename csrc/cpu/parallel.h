// Divides work among threads: in parts, which whoever is free takes next, and in phases, which follow one another.
//
// A machine that is also busy with something else takes processors away for milliseconds. So no thread has work of its
// own that others would wait for, a thread that comes late finds everything done, and while threads do come late, fewer
// are asked for. What a part is depends on the work and on `threads` alone, never on who computes it: results do not
// depend on how busy the machine is.
#pragma once

#include <algorithm>
#include <cstdint>

#include "loftq/types.h"

namespace loftq {
inline namespace LOFTQ_VERSION {

// Starting a thread costs microseconds, so each gets at least this many elements (about 4 us of quantization).
constexpr int64_t kMinElementsPerThread = 1 << 14;

inline int useful_threads(int num_threads, int64_t n, int64_t k) {
  const int64_t most = std::min<int64_t>(n, n * k / kMinElementsPerThread);
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(num_threads, most)));
}

// Parts per thread: so many that the last one to end is a small share of the work.
constexpr int64_t kPartsPerThread = 8;

// How many parts to divide work into that has at most `most`.
inline int64_t parts_for(int threads, int64_t most) {
  return std::max<int64_t>(1, std::min<int64_t>(threads > 1 ? threads * kPartsPerThread : 1, most));
}

class Phases {
 public:
  explicit Phases(int64_t phase_count) : count(phase_count) {}

  // How many parts a phase has; 0 skips it.
  virtual int64_t parts(int64_t phase) const = 0;
  // Does one part. All parts of earlier phases are done. No two calls at the same time have the same slot, which is
  // below `threads`: it selects the caller's scratch memory.
  virtual void run(int64_t phase, int64_t part, int slot) const = 0;

  const int64_t count;

 protected:
  ~Phases() = default;
};

// Runs all phases on at most `threads` threads, the calling one among them.
void run_phases(int threads, const Phases& phases);

// body(phase, part, slot) for the parts_of(phase) parts of phases [0, count)
template <class PartsOf, class Body>
void parallel_phases(int threads, int64_t count, const PartsOf& parts_of, const Body& body) {
  struct Bound final : Phases {
    Bound(int64_t phase_count, const PartsOf& function_of_parts, const Body& function)
        : Phases(phase_count), parts_of_(function_of_parts), body_(function) {}
    int64_t parts(int64_t phase) const override { return parts_of_(phase); }
    void run(int64_t phase, int64_t part, int slot) const override { body_(phase, part, slot); }
    const PartsOf& parts_of_;
    const Body& body_;
  };
  run_phases(threads, Bound(count, parts_of, body));
}

// body(slot, begin, end) for rows [0, n) in contiguous parts
template <class Body>
void parallel_rows(int threads, int64_t n, const Body& body) {
  const int64_t parts = parts_for(threads, n);
  parallel_phases(
      threads, 1, [&](int64_t) { return parts; },
      [&](int64_t, int64_t part, int slot) { body(slot, n * part / parts, n * (part + 1) / parts); });
}

// Part `index` of `parts` nearly equal parts of [0, count), in whole units.
struct Range {
  int64_t begin, end;
};

inline Range part_of(int64_t count, int64_t unit, int64_t index, int64_t parts) {
  const int64_t units = ceil_div(count, unit);
  return {std::min(count, units * index / parts * unit), std::min(count, units * (index + 1) / parts * unit)};
}

}  // namespace LOFTQ_VERSION
}  // namespace loftq
