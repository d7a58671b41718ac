// launch_cholesky_cuda
#include "cholesky.cuh"
#include "loftq/packing.h"

namespace loftq {
inline namespace LOFTQ_VERSION {

int cholesky_max_size() {
  const size_t limit = max_shared_bytes();
  int b = 0;
  while (CholeskyShared::bytes(b + 1) <= limit) ++b;
  return b;
}

template <typename T>
cudaError_t launch_cholesky_cuda(const CholeskyParams<T>& params, cudaStream_t stream) {
  if (params.batch < 0 || params.b < 0 || !(params.epsilon >= 0.0)) return cudaErrorInvalidValue;
  if (params.batch == 0 || params.b == 0) return cudaSuccess;
  if (params.gram == nullptr || params.r_inverse == nullptr || params.info == nullptr) return cudaErrorInvalidValue;
  if (params.b > cholesky_max_size() || !fits(params.batch, int64_t{params.b} * params.b)) return cudaErrorInvalidValue;
  CholeskyParams<T> args = params;
  if (args.epsilon == 0.0) args.epsilon = args.b * (sizeof(T) == sizeof(float) ? 0x1p-24 : 0x1p-53);
  return launch(_cholesky_kernel<T>, args.batch, kCholeskyThreads, CholeskyShared::bytes(args.b), stream, args);
}

template cudaError_t launch_cholesky_cuda(const CholeskyParams<float>&, cudaStream_t);
template cudaError_t launch_cholesky_cuda(const CholeskyParams<double>&, cudaStream_t);

}  // namespace LOFTQ_VERSION
}  // namespace loftq
