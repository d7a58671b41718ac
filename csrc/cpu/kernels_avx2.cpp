#include "cpu/target.h"

#if LOFTQ_X86

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/simd_avx2.h"
#include "loftq/half.h"

LOFTQ_TARGET_BEGIN("avx2,fma,f16c")

#include "cpu/generic/adapter_grad.h"
#include "cpu/generic/dequantize.h"
#include "cpu/generic/linear.h"
#include "cpu/generic/operand_float.h"
#include "cpu/generic/quantize.h"

LOFTQ_TARGET_END

namespace loftq {
inline namespace LOFTQ_VERSION {

const CpuKernels kAvx2Kernels = {"avx2",
                                 kAvx2 | kF16c,
                                 quantize_rows<Avx2>,
                                 dequantize_rows<Avx2>,
                                 linear<FloatOperand<Avx2>>,
                                 linear_grad_input<FloatOperand<Avx2>>,
                                 adapter_grad<Avx2>};

}  // namespace LOFTQ_VERSION
}  // namespace loftq

#endif
