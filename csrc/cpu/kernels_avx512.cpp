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

LOFTQ_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

#include "cpu/generic/adapter_grad.h"
#include "cpu/generic/dequantize.h"
#include "cpu/generic/linear.h"
#include "cpu/generic/operand_float.h"
#include "cpu/generic/quantize.h"

LOFTQ_TARGET_END

namespace loftq {
inline namespace LOFTQ_VERSION {

void quantize_rows_avx512(const QuantizeParams& params, int64_t begin, int64_t end, float* scratch) {
  quantize_rows<Avx512>(params, begin, end, scratch);
}

void dequantize_rows_avx512(const DequantizeParams& params, int64_t begin, int64_t end, float* scratch) {
  dequantize_rows<Avx512>(params, begin, end, scratch);
}

Status adapter_grad_avx512(const AdapterGradParams& params, int threads) {
  return adapter_grad<Avx512>(params, threads);
}

const CpuKernels kAvx512Kernels = {"avx512",
                                   kAvx512 | kAvx2 | kF16c,
                                   quantize_rows_avx512,
                                   dequantize_rows_avx512,
                                   linear<FloatOperand<Avx512>>,
                                   linear_grad_input<FloatOperand<Avx512>>,
                                   adapter_grad_avx512};

}  // namespace LOFTQ_VERSION
}  // namespace loftq

#endif
