#include "cpu/generic/dequantize.h"
#include "cpu/generic/quantize.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/simd_scalar.h"

namespace loftq {

const CpuKernels kScalarKernels = {"scalar", 0, quantize_rows<Scalar>, dequantize_rows<Scalar>};

}  // namespace loftq
