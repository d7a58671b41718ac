// A tensor as torch's stable C interface shows it. Nothing here depends on the version of torch beyond version.h, on
// its C++ types, or on Python, and it compiles in a second where torch's own headers take half a minute.
#pragma once

#include "aten/version.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <utility>

#include "aten/check.h"

namespace loftq::aten {

using Sizes = std::span<const int64_t>;

// Throws with torch's own words, where this version of torch hands them over, if the C function `what` failed.
void require(AOTITorchError error, const char* what);

struct ScalarType {
  int32_t code;

  bool operator==(const ScalarType&) const = default;
};

// The numbers of the types are torch's secret: they are asked for once, when the library is loaded.
inline const ScalarType kFloat{aoti_torch_dtype_float32()}, kDouble{aoti_torch_dtype_float64()},
    kHalf{aoti_torch_dtype_float16()}, kBFloat16{aoti_torch_dtype_bfloat16()}, kByte{aoti_torch_dtype_uint8()},
    kInt{aoti_torch_dtype_int32()}, kBool{aoti_torch_dtype_bool()};

std::string_view name_of(ScalarType type);
bool is_floating(ScalarType type);

struct Device {
  int32_t type, index;

  bool operator==(const Device&) const = default;
};

inline const int32_t kCpu = aoti_torch_device_type_cpu(), kCuda = aoti_torch_device_type_cuda();

std::ostream& operator<<(std::ostream& out, ScalarType type);
std::ostream& operator<<(std::ostream& out, Device device);

// A reference to a tensor of torch, or none. A copy is one more reference to the same tensor.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorHandle owned) : handle_(owned) {}
  Tensor(const Tensor& other) : handle_(other.share()) {}
  Tensor(Tensor&&) noexcept = default;
  Tensor& operator=(const Tensor& other) {
    handle_.reset(other.share());
    return *this;
  }
  Tensor& operator=(Tensor&&) noexcept = default;
  ~Tensor() = default;

  bool defined() const { return handle_ != nullptr; }
  AtenTensorHandle get() const { return handle_.get(); }
  AtenTensorHandle release() { return handle_.release(); }
  void reset() { handle_.reset(); }

  int64_t dim() const { return ask<int64_t>(aoti_torch_get_dim); }
  int64_t numel() const { return ask<int64_t>(aoti_torch_get_numel); }
  Sizes sizes() const { return {ask<int64_t*>(aoti_torch_get_sizes), static_cast<size_t>(dim())}; }
  Sizes strides() const { return {ask<int64_t*>(aoti_torch_get_strides), static_cast<size_t>(dim())}; }
  int64_t size(int64_t dim) const { return at(sizes(), dim); }
  int64_t stride(int64_t dim) const { return at(strides(), dim); }
  ScalarType dtype() const { return {ask<int32_t>(aoti_torch_get_dtype)}; }
  Device device() const {
    return {ask<int32_t>(aoti_torch_get_device_type), ask<int32_t>(aoti_torch_get_device_index)};
  }
  bool is_cpu() const { return ask<int32_t>(aoti_torch_get_device_type) == kCpu; }
  bool is_cuda() const { return ask<int32_t>(aoti_torch_get_device_type) == kCuda; }
  bool is_contiguous() const { return ask<bool>(aoti_torch_is_contiguous); }

  // The caller has checked the type of the elements.
  template <class T = void>
  const T* const_data() const {
    return static_cast<const T*>(ask<const void*>(torch_get_const_data_ptr));
  }
  template <class T = void>
  T* mutable_data() const {
    return static_cast<T*>(ask<void*>(torch_get_mutable_data_ptr));
  }

 private:
  struct Delete {
    void operator()(AtenTensorHandle handle) const { aoti_torch_delete_tensor_object(handle); }
  };

  static int64_t at(Sizes values, int64_t dim) { return values[dim < 0 ? values.size() + dim : dim]; }

  template <class T>
  T ask(AOTITorchError (*function)(AtenTensorHandle, T*)) const {
    T value;
    require(function(get(), &value), "reading a tensor");
    return value;
  }

  AtenTensorHandle share() const {
    AtenTensorHandle shared = nullptr;
    if (defined()) require(aoti_torch_new_tensor_handle(get(), &shared), "sharing a tensor");
    return shared;
  }

  std::unique_ptr<AtenTensorOpaque, Delete> handle_;
};

// Uninitialized and contiguous.
Tensor empty(Sizes sizes, ScalarType type, Device device);

inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type, Device device) {
  return empty(Sizes(sizes.begin(), sizes.size()), type, device);
}

// Switches gradients off for this thread while it lives.
class NoGrad {
 public:
  NoGrad() : before_(aoti_torch_grad_mode_is_enabled()) { aoti_torch_grad_mode_set_enabled(false); }
  ~NoGrad() { aoti_torch_grad_mode_set_enabled(before_); }
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;

 private:
  const bool before_;
};

}  // namespace loftq::aten
