// CUDA kernels of quantize.h's and packing.h's contracts, and the same bits as the CPU's. Torch-free.
//
// Every launch_* only enqueues work on `stream`: it allocates nothing, never waits, prints or throws. Device pointers
// come from the caller; codes are aligned to 4 bytes (rows are multiples of 16 bytes anyway), elements to their size.
// cudaErrorInvalidValue: a parameter breaks the contract, and nothing was enqueued. Empty matrices are fine.
#pragma once

#include <cuda_runtime_api.h>

#include "loftq/quantize.h"

namespace loftq {

// Weights to codes, scales and offsets; with low_rank, residual and residual_norm2 LoftQ's whole step in one pass.
// Deterministic: sums have a fixed order.
cudaError_t launch_quantize_cuda(const QuantizeParams& params, cudaStream_t stream);

cudaError_t launch_dequantize_cuda(const DequantizeParams& params, cudaStream_t stream);

// Between one code a byte and the storage contract; bits of a code above `bits` are ignored.
cudaError_t launch_pack_cuda(const PackParams& params, cudaStream_t stream);
cudaError_t launch_unpack_cuda(const UnpackParams& params, cudaStream_t stream);

}  // namespace loftq
