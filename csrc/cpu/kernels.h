// What an instruction set implements. To add one, write a file that defines a CpuKernels (one file per instruction set)
// and add a line to the list in dispatch.cpp.
#pragma once

#include "loftq/linear.h"
#include "loftq/quantize.h"

namespace loftq {
inline namespace LOFTQ_VERSION {

struct CpuKernels {
  const char* name;   // as LOFTQ_CPU_ISA spells it
  uint32_t required;  // mask of Feature that the machine must have

  // Process rows [begin, end). scratch: quantize_scratch(params) or dequantize_scratch(params) floats that belong to
  // the calling thread.
  void (*quantize_rows)(const QuantizeParams& params, int64_t begin, int64_t end, float* scratch);
  void (*dequantize_rows)(const DequantizeParams& params, int64_t begin, int64_t end, float* scratch);

  // The products of linear.h, on at most `threads` threads.
  Status (*linear)(const LinearParams& params, int threads);
  Status (*linear_grad_input)(const LinearParams& params, int threads);
  Status (*adapter_grad)(const AdapterGradParams& params, int threads);
};

// The functions of kAvx512Kernels, which the instruction sets that extend AVX-512 use as well.
void quantize_rows_avx512(const QuantizeParams& params, int64_t begin, int64_t end, float* scratch);
void dequantize_rows_avx512(const DequantizeParams& params, int64_t begin, int64_t end, float* scratch);
Status adapter_grad_avx512(const AdapterGradParams& params, int threads);

extern const CpuKernels kScalarKernels;
extern const CpuKernels kAvx2Kernels;
extern const CpuKernels kAvx512Kernels;
extern const CpuKernels kAvx512Bf16Kernels;
extern const CpuKernels kAmxBf16Kernels;

// Columns that are processed together: whole groups and whole tiles.
constexpr int64_t span_columns(int64_t k, int64_t group_size) { return padded_k(group_width(k, group_size)); }

// Two spans in float32: the weights, and the weights less the low-rank term.
constexpr int64_t quantize_scratch(const QuantizeParams& params) {
  return 2 * span_columns(params.k, params.group_size);
}

// One row of scales and offsets in float32.
constexpr int64_t dequantize_scratch(const DequantizeParams& params) {
  return 2 * num_groups(params.k, params.group_size);
}

}  // namespace LOFTQ_VERSION
}  // namespace loftq
