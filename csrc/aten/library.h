// Registration of kernels with torch's dispatcher.
#pragma once

#include "aten/dispatcher.h"

namespace loftq::aten {

// `Boxed<kFunction>::call` is kFunction as torch calls it. The arguments live until it has returned.
template <auto kFunction>
struct Boxed;

template <class Result, class... Args, Result (*kFunction)(Args...)>
struct Boxed<kFunction> {
  static void call(StableIValue* stack, uint64_t num_args, uint64_t /*num_returns*/) {
    auto args = Travel<std::tuple<std::decay_t<Args>...>>::take_all(stack);
    if (num_args != sizeof...(Args)) throw std::runtime_error("the kernel does not fit the schema of its op");
    if constexpr (std::is_void_v<Result>) {
      std::apply(kFunction, args);
    } else {
      using Tuple = typename detail::Returned<Result>::Tuple;
      Travel<Tuple>::give_all(stack, Tuple(std::apply(kFunction, args)));
    }
  }
};

// What is registered stays so while this object lives.
class Library {
 public:
  // Kernels for the dispatch key.
  static Library kernels(const char* key) {
    TorchLibraryHandle made = nullptr;
    require(aoti_torch_library_init_impl("loftq_kernels", key, "loftq_kernels", 0, &made), "registering kernels");
    return Library(made);
  }

  // New ops.
  static Library ops() {
    TorchLibraryHandle made = nullptr;
    require(aoti_torch_library_init_fragment("loftq_kernels", "loftq_kernels", 0, &made), "defining ops");
    return Library(made);
  }

  void define(const char* schema) { require(aoti_torch_library_def(library_.get(), schema), schema); }

  template <auto kFunction>
  void add(const char* name) {
    require(torch_library_impl(library_.get(), name, Boxed<kFunction>::call, TORCH_ABI_VERSION), name);
  }

 private:
  struct Delete {
    void operator()(TorchLibraryHandle handle) const { aoti_torch_delete_library_object(handle); }
  };

  explicit Library(TorchLibraryHandle owned) : library_(owned) {}

  std::unique_ptr<TorchLibraryOpaque, Delete> library_;
};

// Registers what `make` returns while this shared library is loaded. An exception would end the process there: the
// first one is kept for `load_error`, what was registered before it is withdrawn, and the rest is left out.
struct Registration {
  explicit Registration(Library (*make)()) noexcept;
};

// Why this shared library registered nothing; null if it registered all it has.
const char* load_error() noexcept;

}  // namespace loftq::aten
