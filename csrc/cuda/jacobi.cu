// launch_jacobi_cuda: small matrices in shared memory, larger ones in a workspace that L2 caches.
#include "jacobi.cuh"
#include "loftq/packing.h"

namespace loftq {
inline namespace LOFTQ_VERSION {
namespace {

constexpr int kDefaultSweeps = 30;

template <typename T>
bool fits_in_shared(const JacobiParams<T>& p) {
  return JacobiScratch<T>::bytes(p.n) + jacobi_matrix_bytes<T>(p.m, p.n) <= max_shared_bytes();
}

// One matrix per multiprocessor is in progress at a time; more would only spread the L2 cache thinner.
int64_t matrices_in_flight(int64_t batch) {
  const int count = device_attribute(cudaDevAttrMultiProcessorCount);
  return batch < count ? batch : count;
}

template <typename T>
bool valid(const JacobiParams<T>& p) {
  if (p.batch < 0 || p.n < 0 || p.m < p.n || p.max_sweeps < 0) return false;
  if (p.symmetric && (p.m != p.n || p.u != nullptr)) return false;
  if (p.batch == 0 || p.n == 0) return true;
  if (!fits(p.batch, int64_t{p.m} * p.n)) return false;
  return p.a != nullptr && p.values != nullptr && p.v != nullptr && p.info != nullptr;
}

}  // namespace

template <typename T>
size_t jacobi_workspace_bytes(const JacobiParams<T>& params) {
  if (!valid(params) || params.batch == 0 || params.n == 0 || fits_in_shared(params)) return 0;
  return matrices_in_flight(params.batch) * jacobi_matrix_bytes<T>(params.m, params.n);
}

template <typename T>
cudaError_t launch_jacobi_cuda(const JacobiParams<T>& params, cudaStream_t stream) {
  if (!valid(params)) return cudaErrorInvalidValue;
  if (params.batch == 0 || params.n == 0) return cudaSuccess;
  JacobiParams<T> args = params;
  if (args.max_sweeps == 0) args.max_sweeps = kDefaultSweeps;
  const bool in_shared = fits_in_shared(args);
  const int pairs = (args.n + 1) / 2;
  const int limit = (in_shared ? kJacobiSharedThreads : kJacobiGlobalThreads<T>) / kWarpSize;
  const int threads = kWarpSize * (pairs < limit ? pairs : limit);
  const size_t scratch = JacobiScratch<T>::bytes(args.n);
  if (in_shared) {
    const size_t shared = scratch + jacobi_matrix_bytes<T>(args.m, args.n);
    return launch(_jacobi_kernel<T, true>, args.batch, threads, shared, stream, args);
  }
  if (args.workspace == nullptr) return cudaErrorInvalidValue;
  return launch(_jacobi_kernel<T, false>, matrices_in_flight(args.batch), threads, scratch, stream, args);
}

template size_t jacobi_workspace_bytes(const JacobiParams<float>&);
template size_t jacobi_workspace_bytes(const JacobiParams<double>&);
template cudaError_t launch_jacobi_cuda(const JacobiParams<float>&, cudaStream_t);
template cudaError_t launch_jacobi_cuda(const JacobiParams<double>&, cudaStream_t);

}  // namespace LOFTQ_VERSION
}  // namespace loftq
