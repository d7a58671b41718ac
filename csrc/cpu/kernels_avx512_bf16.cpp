// AVX-512 with VDPBF16PS (Zen 4, Cooper Lake, Sapphire Rapids): products of bfloat16. The rest is kAvx512Kernels'.
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
#include "cpu/operand_bfloat.h"

namespace loftq {
inline namespace LOFTQ_VERSION {
namespace {

Status linear_bf16(const LinearParams& p, int threads) {
  return p.x.dtype == DType::kBFloat16 ? linear<BfloatOperand>(p, threads) : kAvx512Kernels.linear(p, threads);
}

Status linear_grad_input_bf16(const LinearParams& p, int threads) {
  return p.x.dtype == DType::kBFloat16 ? linear_grad_input<BfloatOperand>(p, threads)
                                       : kAvx512Kernels.linear_grad_input(p, threads);
}

}  // namespace
}  // namespace LOFTQ_VERSION
}  // namespace loftq

LOFTQ_TARGET_END

namespace loftq {
inline namespace LOFTQ_VERSION {

const CpuKernels kAvx512Bf16Kernels = {"avx512_bf16",        kAvx512Bf16 | kAvx512 | kAvx2 | kF16c,
                                       quantize_rows_avx512, dequantize_rows_avx512,
                                       linear_bf16,          linear_grad_input_bf16,
                                       adapter_grad_avx512};

}  // namespace LOFTQ_VERSION
}  // namespace loftq

#endif
