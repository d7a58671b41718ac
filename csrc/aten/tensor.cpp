#include "aten/tensor.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <string>

#include "aten/dispatcher.h"

namespace loftq::aten {

namespace {

struct NamedType {
  ScalarType type;
  std::string_view name;
  bool floating = false;
};

const std::array kNames{
    NamedType{kFloat, "float32", true},
    NamedType{kDouble, "float64", true},
    NamedType{kHalf, "float16", true},
    NamedType{kBFloat16, "bfloat16", true},
    NamedType{{aoti_torch_dtype_float8_e4m3fn()}, "float8_e4m3fn", true},
    NamedType{{aoti_torch_dtype_float8_e5m2()}, "float8_e5m2", true},
    NamedType{{aoti_torch_dtype_float8_e4m3fnuz()}, "float8_e4m3fnuz", true},
    NamedType{{aoti_torch_dtype_float8_e5m2fnuz()}, "float8_e5m2fnuz", true},
    NamedType{kByte, "uint8"},
    NamedType{kInt, "int32"},
    NamedType{kBool, "bool"},
    NamedType{{aoti_torch_dtype_int8()}, "int8"},
    NamedType{{aoti_torch_dtype_int16()}, "int16"},
    NamedType{{aoti_torch_dtype_int64()}, "int64"},
    NamedType{{aoti_torch_dtype_uint16()}, "uint16"},
    NamedType{{aoti_torch_dtype_uint32()}, "uint32"},
    NamedType{{aoti_torch_dtype_uint64()}, "uint64"},
    NamedType{{aoti_torch_dtype_complex32()}, "complex32"},
    NamedType{{aoti_torch_dtype_complex64()}, "complex64"},
    NamedType{{aoti_torch_dtype_complex128()}, "complex128"},
};

const NamedType* find(ScalarType type) {
  for (const NamedType& named : kNames) {
    if (named.type == type) return &named;
  }
  return nullptr;
}

// The message of the last failure in this thread: torch has the function since 2.13; before, it writes the message to
// stderr, and this is empty.
std::string last_message() {
  using Message = const char* (*)();
  static const auto message =
      reinterpret_cast<Message>(dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
  return message == nullptr ? "" : message();
}

}  // namespace

void require(AOTITorchError error, const char* what) {
  if (error == 0) [[likely]]
    return;
  const std::string text = last_message();
  throw CallFailed(std::string(what) + " failed: " + (text.empty() ? "see the message of torch on stderr" : text),
                   text);
}

std::string_view name_of(ScalarType type) {
  const NamedType* named = find(type);
  return named == nullptr ? "another type" : named->name;
}

bool is_floating(ScalarType type) {
  const NamedType* named = find(type);
  return named != nullptr && named->floating;
}

std::ostream& operator<<(std::ostream& out, ScalarType type) { return out << name_of(type); }

std::ostream& operator<<(std::ostream& out, Device device) {
  if (device.type == kCpu) return out << "cpu";
  if (device.type == aoti_torch_device_type_meta()) return out << "meta";
  return out << (device.type == kCuda ? "cuda:" : "an accelerator:") << device.index;
}

Tensor empty(Sizes sizes, ScalarType type, Device device) {
  constexpr size_t kMostDims = 64;
  LOFTQ_CHECK(sizes.size() <= kMostDims, "a tensor has ", sizes.size(), " dimensions, expected at most ", kMostDims);
  std::array<int64_t, kMostDims> strides;
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  AtenTensorHandle made = nullptr;
  require(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), type.code,
                                   device.type, device.index, &made),
          "allocating a tensor");
  return Tensor(made);
}

}  // namespace loftq::aten
