// What the tests of kernels share: buffers that fault when a kernel leaves them, the orders of threads, the summary.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "../check.h"
#include "emulation.h"

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kSanitized = true;  // a switch of fibers then takes some 30 times longer: leave out what is large
#else
constexpr bool kSanitized = false;
#endif

inline int report() {
  if (!emulation::device.failure.empty())
    std::printf("the last launch failed: %s\n", emulation::device.failure.c_str());
  std::printf("%ld emulated launches\n", emulation::device.launches);
  return loftq::testing::test_result();
}

// Memory that ends at an unreadable page, so that an access beyond the end (rounded up to `alignment`) is a crash.
template <typename T>
class Guarded {
 public:
  explicit Guarded(size_t count, size_t shift = 0) : count_(count) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t bytes = ((count + shift) * sizeof(T) + 15) / 16 * 16;
    total_ = (bytes + page - 1) / page * page + page;
    void* base = mmap(nullptr, total_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED || mprotect(static_cast<char*>(base) + total_ - page, page, PROT_NONE) != 0) std::abort();
    base_ = static_cast<char*>(base);
    std::memset(base_, 0xa5, total_ - page);
    data_ = reinterpret_cast<T*>(base_ + total_ - page - bytes) + shift;  // 16-byte aligned unless shifted
  }
  ~Guarded() { munmap(base_, total_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  T* data() { return data_; }
  T& operator[](size_t i) { return data_[i]; }
  size_t size() const { return count_; }
  bool equals(const Guarded& other) const { return std::memcmp(data_, other.data_, count_ * sizeof(T)) == 0; }

 private:
  char* base_;
  size_t total_, count_;
  T* data_;
};

inline constexpr emulation::Order kOrders[] = {emulation::Order::kForward, emulation::Order::kReverse,
                                               emulation::Order::kShuffled};
