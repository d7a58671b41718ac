#include "cpu/target.h"

#if LOFTQ_X86

#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns of its own _mm512_undefined_ps()
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <cmath>
#include <cstring>

#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/simd_avx512.h"
#include "loftq/half.h"

LOFTQ_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c")

#include "cpu/generic/dequantize.h"
#include "cpu/generic/quantize.h"

LOFTQ_TARGET_END

namespace loftq {

const CpuKernels kAvx512Kernels = {"avx512", kAvx512 | kAvx2 | kF16c, quantize_rows<Avx512>, dequantize_rows<Avx512>};

}  // namespace loftq

#endif
