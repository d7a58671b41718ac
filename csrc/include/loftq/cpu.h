// The CPU kernels. Each picks, at run time, the widest instruction set that this machine has; all give the same bits.
#pragma once

#include "loftq/linear.h"
#include "loftq/quantize.h"

namespace loftq {
inline namespace LOFTQ_VERSION {

// Rows are divided among at most num_threads threads; results do not depend on how many.
LOFTQ_API Status launch_quantize_cpu(const QuantizeParams& params, int num_threads);
LOFTQ_API Status launch_dequantize_cpu(const DequantizeParams& params, int num_threads);

// The products of linear.h. Results depend on num_threads only where the columns of a row are divided among threads
// (at most 8 rows of x, and fewer than 4 rows of the weight per thread).
LOFTQ_API Status launch_linear_cpu(const LinearParams& params, int num_threads);
LOFTQ_API Status launch_linear_grad_input_cpu(const LinearParams& params, int num_threads);

// The gradients of linear.h; results do not depend on num_threads.
LOFTQ_API Status launch_adapter_grad_cpu(const AdapterGradParams& params, int num_threads);

LOFTQ_API Status launch_pack_cpu(const PackParams& params, int num_threads);
LOFTQ_API Status launch_unpack_cpu(const UnpackParams& params, int num_threads);

// Returns the name of the instruction set in use: the first of supported_isas(), or the one that the environment
// variable LOFTQ_CPU_ISA names (it is read at every launch). If the variable names none of them, the result is nullptr,
// the reason is stored in `status` unless that is null, and every launch_* fails with the same reason. The text of the
// reason is valid until this thread's next call.
LOFTQ_API const char* active_isa(Status* status = nullptr);

// Names of the instruction sets that this build and this machine have, widest first; "scalar" is always the last.
// Returns how many there are and stores the first `capacity` of them.
LOFTQ_API int supported_isas(const char** names, int capacity);

}  // namespace LOFTQ_VERSION
}  // namespace loftq
