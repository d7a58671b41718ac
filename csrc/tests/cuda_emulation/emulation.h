// Runs CUDA kernels on the CPU, from their unchanged source, so that tests need neither a GPU nor nvcc.
//
// A test includes a .cu file with this folder first on the include path: <cuda_runtime.h> is then the one here.
// Blocks run one after the other. The threads of a block are fibers (cooperating contexts with their own stacks)
// of one CPU thread; a fiber runs until it meets a barrier or a warp exchange. Which fiber goes first is the test's
// choice (Order): first to last, last to first, or shuffled; a kernel that races on shared memory gives different
// results in different orders, so tests run every launch in all orders and demand identical bits. A barrier that not
// every thread reaches, a warp exchange with missing lanes, and a write beyond the dynamic shared memory asked for are
// reported as launch failures.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "loftq/config.h"

// This is _longjmp itself: under _FORTIFY_SOURCE the name stands for a check that forbids going to another stack.
extern "C" [[noreturn]] void emulation_longjmp(jmp_buf to, int value) __asm__("_longjmp");

namespace loftq {
inline namespace LOFTQ_VERSION {
// What `extern __shared__` in a kernel refers to. Filled with NaN bytes before every block.
alignas(128) inline unsigned char dynamic_shared_memory[512 << 10];
}  // namespace LOFTQ_VERSION
}  // namespace loftq

namespace emulation {

enum class Order { kForward, kReverse, kShuffled };

struct Index3 {
  unsigned x = 1, y = 1, z = 1;
};

}  // namespace emulation

inline emulation::Index3 threadIdx, blockIdx, blockDim, gridDim;  // of the running fiber

namespace emulation {

struct Device {  // what tests may choose
  Order order = Order::kForward;
  int max_shared_bytes = 227 << 10;  // opt-in limit per block on sm_90
  int max_grid = 2;                  // small, so that blocks meet the loops that a grid too large for a device needs
  int multiprocessors = 2;
  std::string failure;  // what went wrong in the last launch, for the test's message
  long launches = 0;
};
inline Device device;

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 128 << 10;
constexpr size_t kCanaryBytes = 1024;

// Where a fiber, or the scheduler, goes on when it is switched to.
struct Context {
  jmp_buf at;
  ucontext_t start;
  void* fake_stack;  // the address sanitizer's
};

enum class State { kReady, kWaiting, kDone };

struct Fiber {
  Context context;
  char* stack;
  State state;
  Index3 thread;
  int warp_phase;    // counts this lane's warp exchanges
  int barrier_line;  // source line of the block barrier it waits at
};

struct Warp {
  int arrived = 0;
  unsigned mask = 0;
  uint64_t slot[2][kWarp];  // double buffered: a lane is at most one exchange ahead of its warp
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<std::unique_ptr<char[]>> stacks;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  std::vector<int> warp_order, lane_order;
  Fiber* current = nullptr;
  Context scheduler;
  int at_barrier = 0;
  int votes[2] = {0, 0};  // of __syncthreads_or, double buffered by barrier count
  int barriers = 0;
  const std::function<void()>* body = nullptr;
};
inline Block block;

inline void fail(const std::string& what) {
  if (device.failure.empty()) device.failure = what;
}

#if defined(__SANITIZE_ADDRESS__)
// The sanitizer must be told of every switch of stacks, and knows nothing of longjmp between them.
inline void switch_context(Context& from, Context& to, const void* stack, size_t stack_bytes, bool leaves_for_good) {
  __sanitizer_start_switch_fiber(leaves_for_good ? nullptr : &from.fake_stack, stack, stack_bytes);
  swapcontext(&from.start, &to.start);
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
}
inline void finish_first_switch() {
  __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_stack, &block.scheduler_stack_bytes);
}
#else
// Ten times faster than swapcontext, which asks the kernel for the signal mask each time.
// Not inlined: setjmp in a kernel's own frame would keep its locals out of registers.
__attribute__((noinline)) inline void switch_context(Context& from, Context& to, const void*, size_t, bool) {
  if (_setjmp(from.at) == 0) emulation_longjmp(to.at, 1);
}
inline void finish_first_switch() {}
#endif

inline void yield_to_scheduler(bool for_good = false) {
  switch_context(block.current->context, block.scheduler, block.scheduler_stack, block.scheduler_stack_bytes, for_good);
}

inline void fiber_main() {
  finish_first_switch();
  (*block.body)();
  block.current->state = State::kDone;
  yield_to_scheduler(true);
}

inline int linear_thread(const Fiber& fiber) { return static_cast<int>(&fiber - block.fibers.data()); }

// All threads of the block must come here, at the same source line.
inline int block_barrier(int line, int vote) {
  Fiber& self = *block.current;
  const int buffer = block.barriers & 1;
  block.votes[buffer] |= vote;
  self.barrier_line = line;
  self.state = State::kWaiting;
  if (++block.at_barrier == static_cast<int>(block.fibers.size())) {
    block.at_barrier = 0;
    block.votes[++block.barriers & 1] = 0;
    for (Fiber& fiber : block.fibers) {
      if (fiber.barrier_line != line) fail("block barriers of different source lines met");
      fiber.state = State::kReady;
    }
  }
  yield_to_scheduler();
  return block.votes[buffer];
}

// All lanes of the warp deposit a word; returns the 32 words.
inline const uint64_t* warp_exchange(unsigned mask, uint64_t word) {
  Fiber& self = *block.current;
  const int index = linear_thread(self);
  Warp& warp = block.warps[index / kWarp];
  if (mask != 0xffffffffu) fail("warp exchange with a partial mask");
  const int buffer = self.warp_phase++ & 1;
  warp.slot[buffer][index % kWarp] = word;
  self.state = State::kWaiting;
  if (++warp.arrived == kWarp) {
    warp.arrived = 0;
    Fiber* lanes = &block.fibers[index / kWarp * kWarp];
    for (int lane = 0; lane < kWarp; ++lane) {
      if (lanes[lane].warp_phase != self.warp_phase) fail("lanes of a warp disagree about its exchanges");
      lanes[lane].state = State::kReady;
    }
  }
  yield_to_scheduler();
  return warp.slot[buffer];
}

inline void prepare_fiber(int index) {
  Fiber& fiber = block.fibers[index];
  fiber.state = State::kReady;
  fiber.warp_phase = 0;
  fiber.barrier_line = 0;
}

// Runs a fiber from its beginning until it first waits.
__attribute__((noinline)) inline void start(Fiber& fiber) {
  getcontext(&fiber.context.start);
  fiber.context.start.uc_stack.ss_sp = fiber.stack;
  fiber.context.start.uc_stack.ss_size = kStackBytes;
  fiber.context.start.uc_link = nullptr;
  makecontext(&fiber.context.start, fiber_main, 0);
#if defined(__SANITIZE_ADDRESS__)
  switch_context(block.scheduler, fiber.context, fiber.stack, kStackBytes, false);
#else
  if (_setjmp(block.scheduler.at) == 0) setcontext(&fiber.context.start);
#endif
}

inline void enter(Fiber& fiber, bool first) {
  block.current = &fiber;
  threadIdx = fiber.thread;
  if (first) return start(fiber);
  switch_context(block.scheduler, fiber.context, fiber.stack, kStackBytes, false);
}

inline void run_block(size_t shared_bytes) {
  const int threads = static_cast<int>(block.fibers.size());
  std::memset(loftq::dynamic_shared_memory, 0xff, shared_bytes + kCanaryBytes);
  for (int i = 0; i < threads; ++i) prepare_fiber(i);
  for (Warp& warp : block.warps) warp.arrived = 0;
  block.at_barrier = block.barriers = block.votes[0] = block.votes[1] = 0;
  std::vector<char> entered(threads, 0);
  int done = 0;
  const auto run_lanes = [&](int first) {  // each ready lane of a warp once; whether there was one
    bool progress = false;
    for (const int lane : block.lane_order) {
      Fiber& fiber = block.fibers[first + lane];
      if (fiber.state != State::kReady) continue;
      progress = true;
      enter(fiber, !entered[first + lane]);
      entered[first + lane] = 1;
      done += fiber.state == State::kDone;
    }
    return progress;
  };
  while (done < threads && device.failure.empty()) {
    bool progress = false;
    for (const int warp : block.warp_order) {  // a warp runs until all its lanes are done or at the block's barrier
      while (run_lanes(warp * kWarp)) progress = true;
    }
    if (!progress) fail("deadlock: some threads wait where others never come");
  }
  for (size_t i = 0; i < kCanaryBytes; ++i) {
    if (loftq::dynamic_shared_memory[shared_bytes + i] != 0xff) return fail("write beyond the dynamic shared memory");
  }
}

// Runs `body` once for every thread of the grid; false (and device.failure) when something was wrong.
inline bool run_grid(Index3 grid, Index3 threads, size_t shared_bytes, const std::function<void()>& body) {
  device.failure.clear();
  ++device.launches;
  const int count = static_cast<int>(threads.x * threads.y * threads.z);
  if (count < 1 || count > 1024 || count % kWarp != 0) fail("threads a block must be a multiple of 32, at most 1024");
  if (static_cast<int>(shared_bytes) > device.max_shared_bytes) fail("more shared memory than a block may have");
  if (grid.y > 65535 || grid.z > 65535 || grid.x > static_cast<unsigned>(device.max_grid)) fail("grid too large");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) fail("empty grid");
  if (!device.failure.empty()) return false;

  block.fibers.resize(count);
  block.warps.resize(count / kWarp);
  while (static_cast<int>(block.stacks.size()) < count) block.stacks.emplace_back(new char[kStackBytes]);
  block.warp_order.resize(count / kWarp);
  block.lane_order.resize(kWarp);
  for (std::vector<int>* order : {&block.warp_order, &block.lane_order}) {
    std::iota(order->begin(), order->end(), 0);
    if (device.order == Order::kReverse) std::reverse(order->begin(), order->end());
  }
  std::mt19937 random(20240);
  block.body = &body;
  blockDim = threads;
  gridDim = grid;
  for (int i = 0; i < count; ++i) {
    const unsigned index = static_cast<unsigned>(i);
    block.fibers[i].stack = block.stacks[i].get();
    block.fibers[i].thread = {index % threads.x, index / threads.x % threads.y, index / threads.x / threads.y};
  }
  const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks && device.failure.empty(); ++i) {
    const uint64_t b = device.order == Order::kReverse ? blocks - 1 - i : i;
    if (device.order == Order::kShuffled) {
      std::shuffle(block.warp_order.begin(), block.warp_order.end(), random);
      std::shuffle(block.lane_order.begin(), block.lane_order.end(), random);
    }
    blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                static_cast<unsigned>(b / grid.x / grid.y)};
    run_block(shared_bytes);
  }
  return device.failure.empty();
}

}  // namespace emulation
