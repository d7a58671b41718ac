// Calls of torch's ops by name, and the conversions that kernels need to be called by torch. Every argument and result
// travels in 64 bits: a number, or a pointer of which the receiver becomes the owner.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "aten/tensor.h"

namespace loftq::aten {

static_assert(std::endian::native == std::endian::little, "small values are in the low bytes");

// An op of torch failed. `text` is what torch says; nothing where this version of torch does not tell.
struct CallFailed : std::runtime_error {
  CallFailed(const std::string& message, std::string text) : std::runtime_error(message), text(std::move(text)) {}

  std::string text;
};

// How a T travels: take() receives one, give() hands one over.
template <class T>
struct Travel {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(StableIValue));

  static T take(StableIValue value) {
    T result;
    std::memcpy(&result, &value, sizeof(T));
    return result;
  }
  static StableIValue give(T value) {
    StableIValue result = 0;
    std::memcpy(&result, &value, sizeof(T));
    return result;
  }
};

template <>
struct Travel<Tensor> {
  static Tensor take(StableIValue value) { return Tensor(Travel<AtenTensorHandle>::take(value)); }
  static StableIValue give(Tensor value) { return Travel<AtenTensorHandle>::give(value.release()); }
};

template <>
struct Travel<Device> {
  static StableIValue give(Device value) {
    return static_cast<uint64_t>(static_cast<uint32_t>(value.type)) << 32 | static_cast<uint32_t>(value.index);
  }
};

template <>
struct Travel<std::string> {
  struct Delete {
    void operator()(StringHandle handle) const { torch_delete_string(handle); }
  };

  static std::string take(StableIValue value) {
    const std::unique_ptr<StringOpaque, Delete> owned(Travel<StringHandle>::take(value));
    const char* text = nullptr;
    size_t length = 0;
    require(torch_string_c_str(owned.get(), &text), "reading a string");
    require(torch_string_length(owned.get(), &length), "reading a string");
    return {text, length};
  }
  static StableIValue give(const std::string& value) {
    StringHandle made = nullptr;
    require(torch_new_string_handle(value.data(), value.size(), &made), "making a string");
    return Travel<StringHandle>::give(made);
  }
};

template <class T>
struct Travel<std::optional<T>> {
  static std::optional<T> take(StableIValue value) {
    const std::unique_ptr<StableIValue> owned(Travel<StableIValue*>::take(value));
    return owned == nullptr ? std::nullopt : std::optional<T>(Travel<T>::take(*owned));
  }
  static StableIValue give(std::optional<T> value) {
    return value ? Travel<StableIValue*>::give(new StableIValue(Travel<T>::give(*std::move(value)))) : 0;
  }
};

template <class T>
struct Travel<std::vector<T>> {
  struct Delete {
    void operator()(StableListHandle handle) const { torch_delete_list(handle); }
  };
  using Owned = std::unique_ptr<StableListOpaque, Delete>;

  static std::vector<T> take(StableIValue value) {
    const Owned list(Travel<StableListHandle>::take(value));
    size_t size = 0;
    require(torch_list_size(list.get(), &size), "reading a list");
    std::vector<T> result;
    for (size_t i = 0; i < size; ++i) {
      StableIValue element = 0;
      require(torch_list_get_item(list.get(), i, &element), "reading a list");
      result.push_back(Travel<T>::take(element));
    }
    return result;
  }
  static StableIValue give(const std::vector<T>& values) {
    StableListHandle made = nullptr;
    require(torch_new_list_reserve_size(values.size(), &made), "making a list");
    Owned list(made);
    for (const T& value : values) require(torch_list_push_back(made, Travel<T>::give(value)), "making a list");
    return Travel<StableListHandle>::give(list.release());
  }
};

// Several results of an op.
template <class... T>
struct Travel<std::tuple<T...>> {
  static std::tuple<T...> take_all(const StableIValue* stack) {
    return [&]<size_t... kIndex>(std::index_sequence<kIndex...>) {
      return std::tuple<T...>{Travel<T>::take(stack[kIndex])...};
    }(std::index_sequence_for<T...>());
  }
  static void give_all(StableIValue* stack, std::tuple<T...> values) {
    std::apply([&](T&... value) { ((*stack++ = Travel<T>::give(std::move(value))), ...); }, values);
  }
};

namespace detail {

template <class Result>
struct Returned {
  using Tuple = std::tuple<Result>;
};

template <class... T>
struct Returned<std::tuple<T...>> {
  using Tuple = std::tuple<T...>;
};

}  // namespace detail

// Calls the op `name` with all arguments of its schema, those with defaults too. `Scalar` is the one type that torch
// does not take this way.
template <class Result, class... Args>
Result call(const char* name, const char* overload, const Args&... args) {
  using Tuple = typename detail::Returned<Result>::Tuple;
  std::array<StableIValue, std::max(sizeof...(Args), std::tuple_size_v<Tuple>)> stack{Travel<Args>::give(args)...};
  require(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION), name);
  if constexpr (std::is_same_v<Tuple, Result>) {
    return Travel<Tuple>::take_all(stack.data());
  } else {
    return Travel<Result>::take(stack[0]);
  }
}

}  // namespace loftq::aten
