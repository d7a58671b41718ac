// Chooses the instruction set, has the arguments checked, divides the rows among threads.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>

#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/target.h"
#include "loftq/check.h"
#include "loftq/cpu.h"
#include "loftq/half.h"

namespace loftq {
inline namespace LOFTQ_VERSION {

namespace {

// In order of preference: the first one that the machine can run is used.
const CpuKernels* const kImplementations[] = {
#if LOFTQ_X86
    &kAmxBf16Kernels, &kAvx512Bf16Kernels, &kAvx512Kernels, &kAvx2Kernels,
#endif
    &kScalarKernels,
};

bool runs_here(const CpuKernels& kernels) {
  if ((kernels.required & ~cpu_features()) != 0) return false;
  return (kernels.required & kAmxBf16) == 0 || tiles_permitted();
}

Status unknown_isa(const char* name) {
  thread_local std::string message;
  message = std::string("LOFTQ_CPU_ISA=") + name + " is not an instruction set of this machine and build; valid here:";
  for (const CpuKernels* kernels : kImplementations) {
    if (runs_here(*kernels)) message += std::string(" ") + kernels->name;
  }
  return message.c_str();
}

Status select(const CpuKernels** chosen) {
  const char* forced = std::getenv("LOFTQ_CPU_ISA");
  const bool any = forced == nullptr || *forced == '\0';
  for (const CpuKernels* kernels : kImplementations) {
    if (!(any || std::string(forced) == kernels->name) || !runs_here(*kernels)) continue;
    *chosen = kernels;
    return nullptr;
  }
  return unknown_isa(forced);
}

float value_of(DType type, const void* values, int64_t index) {
  if (type == DType::kFloat32) return static_cast<const float*>(values)[index];
  const uint16_t word = static_cast<const uint16_t*>(values)[index];
  return type == DType::kFloat16 ? half_to_float(word) : bfloat_to_float(word);
}

void store(DType type, float value, void* values, int64_t index) {
  if (type == DType::kFloat32) {
    static_cast<float*>(values)[index] = value;
  } else {
    static_cast<uint16_t*>(values)[index] = type == DType::kFloat16 ? float_to_half(value) : float_to_bfloat(value);
  }
}

// The product where there are no terms to sum. The adapter has no effect, and one of its matrices may be null.
Status bias_alone(const LinearParams& p, int64_t columns) {
  for (int64_t i = 0; i < p.x.rows * columns; ++i) {
    store(p.x.dtype, p.bias ? value_of(p.bias_dtype, p.bias, i % columns) : 0.0f, p.y, i);
  }
  return nullptr;
}

// So few threads that each has something to do.
int threads_for(const LinearParams& p, int num_threads) {
  const int64_t work = ceil_div(p.x.rows, 4);  // decoding a weight takes about as long as four products with it
  return useful_threads(num_threads, std::max(p.weight.n, p.weight.k / kTile), p.weight.k * work);
}

// body(thread, begin, end, scratch of `floats` floats)
template <class Body>
Status parallel_rows_with_scratch(int num_threads, int64_t n, int64_t k, int64_t floats, const Body& body) {
  const int threads = useful_threads(num_threads, n, k);
  const std::unique_ptr<float[]> scratch(new (std::nothrow) float[threads * floats]);
  if (scratch == nullptr) return "out of memory for one row per thread";
  parallel_rows(threads, n,
                [&](int thread, int64_t begin, int64_t end) { body(begin, end, scratch.get() + thread * floats); });
  return nullptr;
}

}  // namespace

Status launch_quantize_cpu(const QuantizeParams& p, int num_threads) {
  if (Status error = check_launch(num_threads, p)) return error;
  const CpuKernels* kernels;
  if (Status error = select(&kernels)) return error;
  if (p.n == 0) return nullptr;
  return parallel_rows_with_scratch(
      num_threads, p.n, p.k, quantize_scratch(p),
      [&](int64_t begin, int64_t end, float* scratch) { kernels->quantize_rows(p, begin, end, scratch); });
}

Status launch_dequantize_cpu(const DequantizeParams& p, int num_threads) {
  if (Status error = check_launch(num_threads, p)) return error;
  const CpuKernels* kernels;
  if (Status error = select(&kernels)) return error;
  if (p.n == 0) return nullptr;
  return parallel_rows_with_scratch(
      num_threads, p.n, p.k, dequantize_scratch(p),
      [&](int64_t begin, int64_t end, float* scratch) { kernels->dequantize_rows(p, begin, end, scratch); });
}

Status launch_linear_cpu(const LinearParams& p, int num_threads) {
  if (Status error = check_launch(num_threads, p, false)) return error;
  const CpuKernels* kernels;
  if (Status error = select(&kernels)) return error;
  if (p.x.rows == 0 || p.weight.n == 0) return nullptr;
  if (p.weight.k == 0) return bias_alone(p, p.weight.n);
  return kernels->linear(p, threads_for(p, num_threads));
}

Status launch_linear_grad_input_cpu(const LinearParams& p, int num_threads) {
  if (Status error = check_launch(num_threads, p, true)) return error;
  const CpuKernels* kernels;
  if (Status error = select(&kernels)) return error;
  if (p.x.rows == 0 || p.weight.k == 0) return nullptr;
  if (p.weight.n == 0) return bias_alone(p, p.weight.k);
  return kernels->linear_grad_input(p, threads_for(p, num_threads));
}

Status launch_adapter_grad_cpu(const AdapterGradParams& p, int num_threads) {
  if (Status error = check_launch(num_threads, p)) return error;
  const CpuKernels* kernels;
  if (Status error = select(&kernels)) return error;
  if (p.lora_A.rows == 0 || (p.grad_A == nullptr && p.grad_B == nullptr)) return nullptr;
  const int64_t columns = p.x.columns + p.grad_y.columns;
  return kernels->adapter_grad(p, useful_threads(num_threads, std::max(p.x.rows, columns / kTile), columns));
}

const char* active_isa(Status* status) {
  const CpuKernels* kernels = nullptr;
  const Status error = select(&kernels);
  if (status != nullptr) *status = error;
  return error == nullptr ? kernels->name : nullptr;
}

int supported_isas(const char** names, int capacity) {
  int count = 0;
  for (const CpuKernels* kernels : kImplementations) {
    if (!runs_here(*kernels)) continue;
    if (count < capacity) names[count] = kernels->name;
    ++count;
  }
  return count;
}

}  // namespace LOFTQ_VERSION
}  // namespace loftq
