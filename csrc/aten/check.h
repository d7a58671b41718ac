// Exceptions that reach Python under their own names through torch's bindings, which translate those of the standard
// library: std::invalid_argument is a ValueError, std::runtime_error a RuntimeError.
#pragma once

#include <cstdint>
#include <ostream>
#include <span>
#include <sstream>
#include <stdexcept>

namespace loftq::aten {

template <class T>
void write(std::ostream& out, const T& value) {
  out << value;
}

template <class T, size_t kExtent>
void write(std::ostream& out, std::span<T, kExtent> values) {
  out << '[';
  for (size_t i = 0; i < values.size(); ++i) out << (i ? ", " : "") << values[i];
  out << ']';
}

template <class... Parts>
[[noreturn, gnu::noinline, gnu::cold]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  (write(message, parts), ...);
  throw std::invalid_argument(message.str());
}

}  // namespace loftq::aten

// ValueError with the other arguments as its message, which are not evaluated where the condition holds.
#define LOFTQ_CHECK(condition, ...)       \
  do {                                    \
    if (!(condition)) [[unlikely]]        \
      ::loftq::aten::refuse(__VA_ARGS__); \
  } while (0)
