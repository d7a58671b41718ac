#include "aten/library.h"

#include <optional>
#include <string>
#include <vector>

namespace loftq::aten {

namespace {

struct Registered {
  std::vector<Library> libraries;
  std::optional<std::string> error;

  void fail(const char* text) {
    error = text;
    libraries.clear();
  }
};

Registered& registered() {
  static Registered all;
  return all;
}

}  // namespace

Registration::Registration(Library (*make)()) noexcept {
  if (registered().error) return;
  try {
    registered().libraries.push_back(make());
  } catch (const std::exception& error) {
    registered().fail(error.what());
  } catch (...) {
    registered().fail("an exception of an unknown type");
  }
}

const char* load_error() noexcept { return registered().error ? registered().error->c_str() : nullptr; }

}  // namespace loftq::aten
