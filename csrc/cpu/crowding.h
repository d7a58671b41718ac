// How many threads are worth asking for, judged by how punctual they were.
//
// Beside a busy process, a thread starts or goes on only after the scheduler's time slice of some milliseconds, while a
// product may take a hundred microseconds. After a call that waited long for its threads, half as many are asked for,
// for a while. It doubles with every call that waits, and halves when punctual calls have taken as long together.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

#include "loftq/config.h"

namespace loftq {
inline namespace LOFTQ_VERSION {

class Crowding {
 public:
  using Clock = std::chrono::steady_clock;
  using Duration = Clock::duration;

  // Of `threads` threads, how many to use now.
  int allowed(int threads, Clock::time_point now) const;

  // A call on `used` threads took `total`, of which a thread without work waited `waited` for others.
  void note(int used, Duration waited, Duration total, Clock::time_point now);

 private:
  static constexpr int64_t kNoLimit = INT64_MAX;

  std::atomic<int64_t> limit_{kNoLimit};
  std::atomic<int64_t> until_{0};     // ticks of Clock at which the limit ends
  std::atomic<int64_t> backoff_{0};   // ticks that the last limit held
  std::atomic<int64_t> punctual_{0};  // ticks of punctual calls since backoff_ changed
};

}  // namespace LOFTQ_VERSION
}  // namespace loftq
