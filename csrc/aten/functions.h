// The ops of torch that this library computes with, typed. An argument of the schema type `Scalar` cannot be passed
// (dispatcher.h), so numbers become tensors without dimensions and sums go through torch's stable `subtract`.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>

#include <optional>
#include <tuple>
#include <vector>

#include "aten/dispatcher.h"

namespace loftq::aten {

using Ints = std::vector<int64_t>;
using Layout = std::optional<int32_t>;
using MemoryFormat = std::optional<int32_t>;

// ---- new tensors

inline Tensor zeros(const Ints& sizes, ScalarType type, Device device) {
  return call<Tensor>("aten::zeros", "", sizes, std::optional(type), Layout(), std::optional(device),
                      std::optional(false));
}

inline Tensor eye(int64_t n, ScalarType type, Device device) {
  return call<Tensor>("aten::eye", "", n, std::optional(type), Layout(), std::optional(device), std::optional(false));
}

// A tensor without dimensions, which does not change the type of what it is combined with.
inline Tensor scalar(double value, ScalarType type, Device device) {
  int32_t code = type.code, device_type = device.type;
  AtenTensorHandle made = nullptr;
  require(aoti_torch_aten_full(nullptr, 0, value, &code, nullptr, &device_type, device.index, nullptr, &made),
          "aten::full");
  return Tensor(made);
}

inline Tensor number(double value, const Tensor& like) { return scalar(value, kDouble, like.device()); }

// ---- copies

inline Tensor to(const Tensor& self, ScalarType type) {
  if (self.dtype() == type) return self;
  return call<Tensor>("aten::to", "dtype", self, type, false, false, MemoryFormat());
}

inline Tensor to(const Tensor& self, Device device) {
  if (self.device() == device) return self;
  return call<Tensor>("aten::to", "device", self, device, self.dtype(), false, false, MemoryFormat());
}

inline Tensor cpu(const Tensor& self) { return to(self, Device{kCpu, -1}); }

inline Tensor contiguous(const Tensor& self) {
  if (self.is_contiguous()) return self;
  return call<Tensor>("aten::contiguous", "", self, aoti_torch_memory_format_contiguous_format());
}

inline Tensor clone(const Tensor& self) { return call<Tensor>("aten::clone", "", self, MemoryFormat()); }

inline void copy_(const Tensor& self, const Tensor& from) { call<Tensor>("aten::copy_", "", self, from, false); }

inline void zero_(const Tensor& self) { call<Tensor>("aten::zero_", "", self); }

inline Tensor stack(const std::vector<Tensor>& tensors) { return call<Tensor>("aten::stack", "", tensors, int64_t{0}); }

inline Tensor index_select(const Tensor& self, int64_t dim, const Tensor& index) {
  return call<Tensor>("aten::index_select", "", self, dim, index);
}

inline Tensor repeat_interleave(const Tensor& self, int64_t repeats, int64_t dim) {
  return call<Tensor>("aten::repeat_interleave", "self_int", self, repeats, std::optional(dim),
                      std::optional<int64_t>());
}

inline Tensor flip(const Tensor& self, int64_t dim) { return call<Tensor>("aten::flip", "", self, Ints{dim}); }

// ---- views

inline Tensor view(const Tensor& self, const Ints& sizes) { return call<Tensor>("aten::view", "", self, sizes); }
inline Tensor reshape(const Tensor& self, const Ints& sizes) { return call<Tensor>("aten::reshape", "", self, sizes); }
inline Tensor unsqueeze(const Tensor& self, int64_t dim) { return call<Tensor>("aten::unsqueeze", "", self, dim); }

inline Tensor expand(const Tensor& self, const Ints& sizes) {
  return call<Tensor>("aten::expand", "", self, sizes, false);
}

inline Tensor select(const Tensor& self, int64_t index) {
  return call<Tensor>("aten::select", "int", self, int64_t{0}, index);
}

inline Tensor narrow(const Tensor& self, int64_t dim, int64_t start, int64_t length) {
  return call<Tensor>("aten::narrow", "", self, dim, start, length);
}

// The last two dimensions exchanged.
inline Tensor mT(const Tensor& self) { return call<Tensor>("aten::transpose", "int", self, int64_t{-2}, int64_t{-1}); }

inline Tensor diagonal(const Tensor& self) {
  return call<Tensor>("aten::diagonal", "", self, int64_t{0}, int64_t{-2}, int64_t{-1});
}

// ---- arithmetic

inline Tensor sub(const Tensor& self, const Tensor& other, double alpha = 1) {
  AtenTensorHandle made = nullptr;
  require(aoti_torch_aten_subtract_Tensor(self.get(), other.get(), alpha, &made), "aten::subtract");
  return Tensor(made);
}

inline Tensor add(const Tensor& self, const Tensor& other) { return sub(self, other, -1); }
inline Tensor mul(const Tensor& self, const Tensor& other) { return call<Tensor>("aten::mul", "Tensor", self, other); }
inline Tensor mul(const Tensor& self, double other) { return mul(self, number(other, self)); }
inline Tensor div(const Tensor& self, const Tensor& other) { return call<Tensor>("aten::div", "Tensor", self, other); }

inline void mul_(const Tensor& self, const Tensor& other) { call<Tensor>("aten::mul_", "Tensor", self, other); }
inline void mul_(const Tensor& self, double other) { mul_(self, number(other, self)); }
inline void div_(const Tensor& self, double other) { call<Tensor>("aten::div_", "Tensor", self, number(other, self)); }

inline Tensor neg(const Tensor& self) { return call<Tensor>("aten::neg", "", self); }
inline Tensor abs(const Tensor& self) { return call<Tensor>("aten::abs", "", self); }
inline Tensor square(const Tensor& self) { return mul(self, self); }
inline Tensor sqrt(const Tensor& self) { return call<Tensor>("aten::sqrt", "", self); }
inline Tensor rsqrt(const Tensor& self) { return call<Tensor>("aten::rsqrt", "", self); }

inline Tensor maximum(const Tensor& self, const Tensor& other) {
  return call<Tensor>("aten::maximum", "", self, other);
}

inline Tensor clamp_min(const Tensor& self, double least) {
  return call<Tensor>("aten::clamp_min", "Tensor", self, scalar(least, self.dtype(), self.device()));
}

// ---- comparisons

inline Tensor gt(const Tensor& self, const Tensor& other) { return call<Tensor>("aten::gt", "Tensor", self, other); }
inline Tensor ge(const Tensor& self, const Tensor& other) { return call<Tensor>("aten::ge", "Tensor", self, other); }
inline Tensor lt(const Tensor& self, const Tensor& other) { return call<Tensor>("aten::lt", "Tensor", self, other); }
inline Tensor gt(const Tensor& self, double other) { return gt(self, number(other, self)); }
inline Tensor ge(const Tensor& self, double other) { return ge(self, number(other, self)); }
inline Tensor lt(const Tensor& self, double other) { return lt(self, number(other, self)); }

inline Tensor logical_not(const Tensor& self) { return call<Tensor>("aten::logical_not", "", self); }

inline Tensor logical_and(const Tensor& self, const Tensor& other) {
  return call<Tensor>("aten::logical_and", "", self, other);
}

inline Tensor where(const Tensor& condition, const Tensor& self, const Tensor& other) {
  return call<Tensor>("aten::where", "self", condition, self, other);
}

// Waits for the device.
inline bool is_any(const Tensor& self) {
  bool result = false;
  require(aoti_torch_item_bool(call<Tensor>("aten::any", "", self).get(), &result), "aten::item");
  return result;
}

inline bool is_all(const Tensor& self) { return !is_any(logical_not(self)); }

// ---- reductions

inline Tensor sum(const Tensor& self, const Ints& dims, std::optional<ScalarType> type = std::nullopt) {
  return call<Tensor>("aten::sum", "dim_IntList", self, std::optional(dims), false, type);
}

inline Tensor sum(const Tensor& self) { return call<Tensor>("aten::sum", "", self, std::optional<ScalarType>()); }

inline Tensor amax(const Tensor& self, const Ints& dims) { return call<Tensor>("aten::amax", "", self, dims, false); }

inline std::tuple<Tensor, Tensor> aminmax(const Tensor& self) {
  return call<std::tuple<Tensor, Tensor>>("aten::aminmax", "", self, std::optional<int64_t>(), false);
}

// ||self||_F in the given type
inline Tensor norm(const Tensor& self, ScalarType type) {
  return call<Tensor>("aten::linalg_norm", "", self, std::optional<double>(), std::optional<Ints>(), false,
                      std::optional(type));
}

// ---- linear algebra

inline Tensor mm(const Tensor& self, const Tensor& other) { return call<Tensor>("aten::mm", "", self, other); }
inline Tensor bmm(const Tensor& self, const Tensor& other) { return call<Tensor>("aten::bmm", "", self, other); }
inline Tensor matmul(const Tensor& self, const Tensor& other) { return call<Tensor>("aten::matmul", "", self, other); }

inline void mm_out(const Tensor& out, const Tensor& self, const Tensor& other) {
  call<Tensor>("aten::mm", "out", self, other, out);
}

inline void bmm_out(const Tensor& out, const Tensor& self, const Tensor& other) {
  call<Tensor>("aten::bmm", "out", self, other, out);
}

// The upper triangular factor and the matrices for which there is none (not 0).
inline std::tuple<Tensor, Tensor> cholesky_upper(const Tensor& self) {
  return call<std::tuple<Tensor, Tensor>>("aten::linalg_cholesky_ex", "", self, true, false);
}

inline Tensor solve_upper_triangular(const Tensor& self, const Tensor& right) {
  return call<Tensor>("aten::linalg_solve_triangular", "", self, right, true, true, false);
}

// Ascending eigenvalues and their eigenvectors.
inline std::tuple<Tensor, Tensor> eigh(const Tensor& self) {
  return call<std::tuple<Tensor, Tensor>>("aten::linalg_eigh", "", self, std::string("L"));
}

}  // namespace loftq::aten
