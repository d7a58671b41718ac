// The CUDA kernels for the contracts of quantize.h and packing.h. They give the same bits as the CPU kernels.
// This header does not need torch.
//
// Every launch_* only enqueues work on `stream`: it allocates nothing, never waits, prints or throws. Device pointers
// come from the caller; codes are aligned to 4 bytes (rows are multiples of 16 bytes anyway), elements to their size.
// The result is cudaErrorInvalidValue if a parameter breaks the contract; then nothing is enqueued. Empty matrices are
// accepted.
#pragma once

#include <cuda_runtime_api.h>

#include "loftq/quantize.h"

namespace loftq {
inline namespace LOFTQ_VERSION {

// Turns weights into codes, scales and offsets. With low_rank, residual and residual_norm2 it does LoftQ's whole step
// in one pass. Results are deterministic: sums have a fixed order.
LOFTQ_API cudaError_t launch_quantize_cuda(const QuantizeParams& params, cudaStream_t stream);

LOFTQ_API cudaError_t launch_dequantize_cuda(const DequantizeParams& params, cudaStream_t stream);

// Convert between one code per byte and the storage contract; bits of a code above `bits` are ignored.
LOFTQ_API cudaError_t launch_pack_cuda(const PackParams& params, cudaStream_t stream);
LOFTQ_API cudaError_t launch_unpack_cuda(const UnpackParams& params, cudaStream_t stream);

}  // namespace LOFTQ_VERSION
}  // namespace loftq
