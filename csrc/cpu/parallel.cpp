#include "cpu/parallel.h"

#include <atomic>
#include <climits>
#include <thread>

#include "cpu/crowding.h"
#include "cpu/target.h"
#include "loftq/parallel.h"

namespace loftq {
inline namespace LOFTQ_VERSION {

namespace {

using Clock = Crowding::Clock;

void run_by_default(int count, void (*task)(void* context), void* context) {
#if defined(_OPENMP)
#pragma omp parallel num_threads(count)
#else
  (void)count;
#endif
  task(context);
}

std::atomic<ParallelRunner> installed_runner{&run_by_default};
std::atomic<int> installed_limit{INT_MAX};
Crowding crowding;

void store_smaller(std::atomic<int64_t>& least, int64_t value) {
  int64_t known = least.load(std::memory_order_relaxed);
  while (value < known && !least.compare_exchange_weak(known, value, std::memory_order_relaxed)) {
  }
}

// Waits for something that usually takes microseconds: first awake, then by offering the processor to others, then
// asleep, so that the system moves a thread here that waits behind another process.
class Patience {
 public:
  void wait() {
    ++tries_;
    if (tries_ < kAwake) return pause();
    if (tries_ < kAwake + kYielding) return std::this_thread::yield();
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }

 private:
  static constexpr int kAwake = 1000, kYielding = 20;

  static void pause() {
#if LOFTQ_X86
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
  }

  int tries_ = 0;
};

// One call of run_phases, seen by all its threads.
class Call {
 public:
  explicit Call(const Phases& phases) : phases_(phases) {}

  static void take_part(void* call) { static_cast<Call*>(call)->work(); }

  // From when the first thread ran out of work.
  Clock::duration waited_until(Clock::time_point end) const {
    const int64_t idle = first_idle_.load(std::memory_order_relaxed);
    return end - Clock::time_point(Clock::duration(std::min(idle, end.time_since_epoch().count())));
  }

 private:
  void work() {
    const int slot = slots_.fetch_add(1, std::memory_order_relaxed);
    int64_t end = 0;  // parts of the phases up to this one
    for (int64_t phase = 0; phase < phases_.count; ++phase) {
      const int64_t begin = end;
      end += phases_.parts(phase);
      for (int64_t part = claim(end); part >= 0; part = claim(end)) {
        phases_.run(phase, part - begin, slot);
        done_.fetch_add(1, std::memory_order_release);
      }
      const bool last = phase + 1 == phases_.count;
      if (last) store_smaller(first_idle_, Clock::now().time_since_epoch().count());
      for (Patience patience; done_.load(std::memory_order_acquire) < end;) patience.wait();
    }
  }

  // The next part below `end` that nobody has, counted over all phases; -1 where there is none.
  int64_t claim(int64_t end) {
    int64_t part = next_.load(std::memory_order_relaxed);
    while (part < end) {
      if (next_.compare_exchange_weak(part, part + 1, std::memory_order_relaxed)) return part;
    }
    return -1;
  }

  const Phases& phases_;
  std::atomic<int> slots_{0};
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  std::atomic<int64_t> first_idle_{INT64_MAX};
};

void run_alone(const Phases& phases) {
  for (int64_t phase = 0; phase < phases.count; ++phase) {
    const int64_t parts = phases.parts(phase);
    for (int64_t part = 0; part < parts; ++part) phases.run(phase, part, 0);
  }
}

}  // namespace

void run_phases(int threads, const Phases& phases) {
  if (threads <= 1) return run_alone(phases);
  const Clock::time_point begin = Clock::now();
  const int used = crowding.allowed(std::min(threads, thread_limit()), begin);
  if (used <= 1) return run_alone(phases);
  Call call(phases);
  installed_runner.load(std::memory_order_acquire)(used, &Call::take_part, &call);
  const Clock::time_point end = Clock::now();
  crowding.note(used, call.waited_until(end), end - begin, end);
}

void set_parallel_runner(ParallelRunner runner) {
  installed_runner.store(runner != nullptr ? runner : &run_by_default, std::memory_order_release);
}

void set_thread_limit(int threads) { installed_limit.store(threads < 1 ? INT_MAX : threads); }

int thread_limit() { return installed_limit.load(std::memory_order_relaxed); }

}  // namespace LOFTQ_VERSION
}  // namespace loftq
