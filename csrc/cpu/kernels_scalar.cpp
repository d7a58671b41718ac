#include "cpu/generic/adapter_grad.h"
#include "cpu/generic/dequantize.h"
#include "cpu/generic/linear.h"
#include "cpu/generic/operand_float.h"
#include "cpu/generic/quantize.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/simd_scalar.h"

namespace loftq {
inline namespace LOFTQ_VERSION {

const CpuKernels kScalarKernels = {"scalar",
                                   0,
                                   quantize_rows<Scalar>,
                                   dequantize_rows<Scalar>,
                                   linear<FloatOperand<Scalar>>,
                                   linear_grad_input<FloatOperand<Scalar>>,
                                   adapter_grad<Scalar>};

}  // namespace LOFTQ_VERSION
}  // namespace loftq
