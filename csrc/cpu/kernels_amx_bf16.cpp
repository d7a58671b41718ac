// AVX-512 with AMX (Sapphire Rapids): products of bfloat16 with more than a few rows. The rest is kAvx512Bf16Kernels'.
#include "cpu/target.h"

#if LOFTQ_X86

#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns of its own _mm512_undefined_ps()
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/simd_avx512.h"
#include "loftq/half.h"

LOFTQ_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")

#include "cpu/generic/linear.h"
#include "cpu/operand_amx.h"

namespace loftq {
inline namespace LOFTQ_VERSION {
namespace {

Status linear_amx(const LinearParams& p, int threads) {
  const bool many = p.x.dtype == DType::kBFloat16 && p.x.rows > kMostSmallRows;
  return many ? linear<AmxOperand>(p, threads) : kAvx512Bf16Kernels.linear(p, threads);
}

Status linear_grad_input_amx(const LinearParams& p, int threads) {
  return p.x.dtype == DType::kBFloat16 ? linear_grad_input<AmxOperand>(p, threads)
                                       : kAvx512Bf16Kernels.linear_grad_input(p, threads);
}

}  // namespace
}  // namespace LOFTQ_VERSION
}  // namespace loftq

LOFTQ_TARGET_END

namespace loftq {
inline namespace LOFTQ_VERSION {

const CpuKernels kAmxBf16Kernels = {"amx_bf16",           kAmxBf16 | kAvx512Bf16 | kAvx512 | kAvx2 | kF16c,
                                    quantize_rows_avx512, dequantize_rows_avx512,
                                    linear_amx,           linear_grad_input_amx,
                                    adapter_grad_avx512};

}  // namespace LOFTQ_VERSION
}  // namespace loftq

#endif
