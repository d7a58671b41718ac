// What the CUDA kernels need of torch besides tensors.
#pragma once

#define USE_CUDA  // declares the functions of torch's CUDA part; before the other headers
#include "aten/tensor.h"

#include <cuda_runtime_api.h>

#include <memory>
#include <stdexcept>
#include <string>

namespace loftq::bindings {

// Makes the device of a tensor the current one while it lives.
class OnDevice {
 public:
  explicit OnDevice(const aten::Tensor& tensor) : index_(tensor.device().index) {
    DeviceGuardHandle made = nullptr;
    aten::require(aoti_torch_create_device_guard(index_, &made), "changing the device");
    guard_.reset(made);
  }

  // The stream that torch computes on.
  cudaStream_t stream() const {
    void* current = nullptr;
    aten::require(aoti_torch_get_current_cuda_stream(index_, &current), "asking for the stream");
    return static_cast<cudaStream_t>(current);
  }

 private:
  struct Delete {
    void operator()(DeviceGuardHandle guard) const { aoti_torch_delete_device_guard(guard); }
  };

  int32_t index_;
  std::unique_ptr<DeviceGuardOpaque, Delete> guard_;
};

// Throws RuntimeError if a launch failed.
inline void require_cuda(cudaError_t error) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("CUDA error: ") + cudaGetErrorString(error));
}

}  // namespace loftq::bindings
