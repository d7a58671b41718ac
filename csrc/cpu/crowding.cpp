#include "cpu/crowding.h"
#include "loftq/config.h"

#include <algorithm>

namespace loftq {
inline namespace LOFTQ_VERSION {

namespace {

using std::chrono::milliseconds;

// Threads of an idle machine wake within 100 us, and time slices are milliseconds long.
constexpr Crowding::Duration kPunctual = std::chrono::microseconds(200);
constexpr Crowding::Duration kFirstBackoff = milliseconds(20);
constexpr Crowding::Duration kLastBackoff = milliseconds(2560);  // a late try of 20 ms costs less than one percent

int64_t ticks(Crowding::Clock::time_point time) { return time.time_since_epoch().count(); }

}  // namespace

int Crowding::allowed(int threads, Clock::time_point now) const {
  if (ticks(now) >= until_.load(std::memory_order_relaxed)) return threads;
  return static_cast<int>(std::min<int64_t>(threads, limit_.load(std::memory_order_relaxed)));
}

// Callers on several threads may overwrite each other's notes: each of these is a valid state.
void Crowding::note(int used, Duration waited, Duration total, Clock::time_point now) {
  const Duration last(backoff_.load(std::memory_order_relaxed));
  if (waited <= kPunctual) {
    if (last.count() == 0) return;
    const int64_t punctual = punctual_.fetch_add(total.count(), std::memory_order_relaxed) + total.count();
    if (punctual <= last.count()) return;
    backoff_.store(last.count() / 2, std::memory_order_relaxed);
    punctual_.store(0, std::memory_order_relaxed);
    return;
  }
  if (waited <= (total - waited) / 2) return;  // A long call says little: threads that come late still do their share.
  const Duration next = std::clamp<Duration>(2 * last, kFirstBackoff, kLastBackoff);
  limit_.store(std::max(1, used / 2), std::memory_order_relaxed);
  backoff_.store(next.count(), std::memory_order_relaxed);
  punctual_.store(0, std::memory_order_relaxed);
  until_.store(ticks(now + next), std::memory_order_relaxed);
}

}  // namespace LOFTQ_VERSION
}  // namespace loftq
