// The division of work among threads: every part once, phases in order, whoever comes and however late.
#include "cpu/parallel.h"

#include <atomic>
#include <chrono>
#include <climits>
#include <thread>
#include <vector>

#include "check.h"
#include "cpu/crowding.h"
#include "loftq/parallel.h"

namespace {

using namespace std::chrono_literals;
using loftq::Crowding;

// The ways in which a host may run the calls: all at once, one after another, and with threads that come late.
void run_at_once(int count, void (*task)(void*), void* context) {
  std::vector<std::thread> others;
  for (int i = 1; i < count; ++i) others.emplace_back(task, context);
  task(context);
  for (std::thread& other : others) other.join();
}

void run_in_turn(int count, void (*task)(void*), void* context) {
  for (int i = 0; i < count; ++i) task(context);
}

void run_late(int count, void (*task)(void*), void* context) {
  std::vector<std::thread> others;
  for (int i = 1; i < count; ++i) {
    others.emplace_back([=] {
      std::this_thread::sleep_for(i * 300us);
      task(context);
    });
  }
  task(context);
  for (std::thread& other : others) other.join();
}

void run_elsewhere(int count, void (*task)(void*), void* context) {  // never on the calling thread
  std::thread([=] { run_at_once(count, task, context); }).join();
}

// Phase p has sizes[p] parts. Checks that a part sees all of the phases before, none of those after, and its own slot.
void check_phases(const char* name, int threads, const std::vector<int64_t>& sizes) {
  std::vector<std::vector<std::atomic<int>>> runs;
  for (int64_t size : sizes) runs.emplace_back(size);
  std::vector<std::atomic<int>> slots(threads);
  std::atomic<int> done{0}, disorder{0}, shared{0};
  std::vector<int> before(sizes.size() + 1, 0);
  for (size_t p = 0; p < sizes.size(); ++p) before[p + 1] = before[p] + static_cast<int>(sizes[p]);
  loftq::parallel_phases(
      threads, static_cast<int64_t>(sizes.size()), [&](int64_t phase) { return sizes[phase]; },
      [&](int64_t phase, int64_t part, int slot) {
        if (done < before[phase] || done >= before[phase + 1]) ++disorder;
        if (slot < 0 || slot >= threads || slots[slot].fetch_add(1) != 0) ++shared;
        ++runs[phase][part];
        if (part % 7 == 3) std::this_thread::sleep_for(20us);
        --slots[slot];
        ++done;
      });
  CHECK(done == before.back(), "%s, %d threads: %d of %d parts", name, threads, done.load(), before.back());
  CHECK(disorder == 0 && shared == 0, "%s, %d threads: %d out of order, %d in a slot taken", name, threads,
        disorder.load(), shared.load());
  for (const auto& phase : runs) {
    for (const auto& run : phase)
      CHECK(run == 1, "%s, %d threads: a part was done %d times", name, threads, run.load());
  }
}

void check_runners() {
  const struct {
    const char* name;
    loftq::ParallelRunner runner;
  } runners[] = {{"default", nullptr},
                 {"at once", run_at_once},
                 {"in turn", run_in_turn},
                 {"late", run_late},
                 {"elsewhere", run_elsewhere}};
  for (const auto& [name, runner] : runners) {
    loftq::set_parallel_runner(runner);
    for (int threads : {1, 2, 3, 8}) {
      check_phases(name, threads, {});
      check_phases(name, threads, {0, 0});
      check_phases(name, threads, {1});
      check_phases(name, threads, {5, 0, 40, 1, 3});
      check_phases(name, threads, {100, 100, 100, 100});
    }
  }
  loftq::set_parallel_runner(nullptr);
}

int largest_request = 0;

void note_request(int count, void (*task)(void*), void* context) {
  largest_request = std::max(largest_request, count);
  run_in_turn(count, task, context);
}

void check_limit() {
  loftq::set_parallel_runner(note_request);
  const int limits[] = {0, -5, 1, 3, 100}, most[] = {8, 8, 0, 3, 8};  // one thread needs no runner
  for (int i = 0; i < 5; ++i) {
    largest_request = 0;
    loftq::set_thread_limit(limits[i]);
    for (int again = 0; again < 3; ++again) check_phases("limit", 8, {20});
    CHECK(largest_request <= most[i], "limit %d: %d threads", limits[i], largest_request);
    if (limits[i] < 1) CHECK(loftq::thread_limit() == INT_MAX, "limit %d", limits[i]);
  }
  loftq::set_thread_limit(0);
  loftq::set_parallel_runner(nullptr);
}

// Fewer threads after calls that waited, for longer each time, and all of them again once calls are punctual.
void check_crowding() {
  Crowding crowding;
  Crowding::Clock::time_point now{};
  CHECK(crowding.allowed(8, now) == 8, "at first");
  crowding.note(8, 150us, 160us, now);
  CHECK(crowding.allowed(8, now) == 8, "threads that wake after 150 us are punctual");
  crowding.note(8, 3ms, 40ms, now);
  CHECK(crowding.allowed(8, now) == 8, "3 of 40 ms are no reason");
  crowding.note(8, 3ms, 4ms, now);
  CHECK(crowding.allowed(8, now) == 4 && crowding.allowed(2, now) == 2, "half as many");
  crowding.note(4, 3ms, 4ms, now);
  crowding.note(2, 3ms, 4ms, now);
  CHECK(crowding.allowed(8, now) == 1, "and half of those");
  Crowding::Duration longest{0};
  for (int i = 0; i < 12; ++i) {  // every try ends late
    Crowding::Duration held{0};
    while (crowding.allowed(8, now) < 8) {
      now += 1ms;
      held += 1ms;
    }
    CHECK(held >= longest, "the limit holds as long as before, at least");
    longest = std::max(longest, held);
    crowding.note(8, 3ms, 4ms, now);
  }
  CHECK(longest >= 2400ms && longest <= 2700ms, "the limit ends");
  for (int i = 0; i < 3; ++i) crowding.note(8, 0us, 1ms, now + 2600ms);
  crowding.note(8, 3ms, 4ms, now + 2600ms);
  CHECK(crowding.allowed(8, now + 5100ms) == 4, "a few punctual calls change nothing");
  for (int i = 0; i < 16; ++i) crowding.note(8, 3ms, 1s, now += 6s);
  crowding.note(8, 3ms, 4ms, now);
  CHECK(crowding.allowed(8, now + 2500ms) == 4, "nor do long calls, whatever they wait");
  for (int i = 0; i < 16; ++i) crowding.note(8, 0us, 3s, now += 6s);
  crowding.note(8, 3ms, 4ms, now);
  CHECK(crowding.allowed(8, now + 19ms) == 4 && crowding.allowed(8, now + 21ms) == 8, "a punctual time is forgotten");
}

}  // namespace

int main() {
  check_runners();
  check_limit();
  check_crowding();
  return loftq::testing::test_result();
}
