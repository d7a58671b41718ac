// Memory that a kernel needs while it runs, aligned to cache lines.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

#include "loftq/config.h"

namespace loftq {
inline namespace LOFTQ_VERSION {

template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<T*>(operator new(static_cast<size_t>(count) * sizeof(T), kAlignment, std::nothrow))) {}

  T* data() const { return data_.get(); }  // nullptr: out of memory

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(T* data) const { operator delete(data, kAlignment); }
  };

  std::unique_ptr<T, Free> data_;
};

constexpr const char* kOutOfMemory = "out of memory for the operands of a matrix product";

}  // namespace LOFTQ_VERSION
}  // namespace loftq
