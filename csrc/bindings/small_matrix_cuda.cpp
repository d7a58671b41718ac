// The CUDA kernels of the ops on small matrices, compiled where torch has CUDA. Schemas: loftq_kernels/ops/schemas.py.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

#include "loftq/small_matrix.h"

namespace loftq::bindings {

namespace {

using at::Tensor;

constexpr int64_t kMaxSize = 1 << 15;  // n * n is an int in the kernels

void check_batch(const Tensor& tensor, const char* what) {
  TORCH_CHECK_VALUE(tensor.is_cuda(), what, " is on ", tensor.device(), ", expected a CUDA device");
  const bool real = tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble;
  TORCH_CHECK_VALUE(tensor.dim() == 3 && real, what, " has shape ", tensor.sizes(), " and dtype ", tensor.scalar_type(),
                    ", expected a batch of matrices in float32 or float64");
  TORCH_CHECK_VALUE(tensor.size(1) >= tensor.size(2) && tensor.size(1) <= kMaxSize, what, " has shape ", tensor.sizes(),
                    ", expected no more columns than rows, and at most ", kMaxSize, " of either");
}

void check_square(const Tensor& tensor, const char* what) {
  check_batch(tensor, what);
  TORCH_CHECK_VALUE(tensor.size(1) == tensor.size(2), what, " has shape ", tensor.sizes(), ", expected [B, n, n]");
}

// u is undefined for a symmetric positive semi-definite matrix.
struct Jacobi {
  Tensor values, u, v, info;
};

template <typename T>
void launch_jacobi(const Tensor& a, Jacobi& result) {
  const bool symmetric = !result.u.defined();
  JacobiParams<T> p = {.a = a.const_data_ptr<T>(),
                       .batch = a.size(0),
                       .m = static_cast<int>(a.size(1)),
                       .n = static_cast<int>(a.size(2)),
                       .symmetric = symmetric,
                       .max_sweeps = 0,
                       .values = result.values.mutable_data_ptr<T>(),
                       .u = symmetric ? nullptr : result.u.mutable_data_ptr<T>(),
                       .v = result.v.mutable_data_ptr<T>(),
                       .info = result.info.mutable_data_ptr<int>(),
                       .workspace = nullptr};
  const auto bytes = static_cast<int64_t>(jacobi_workspace_bytes(p));
  const Tensor workspace = at::empty({bytes}, a.options().dtype(at::kByte));
  if (bytes > 0) p.workspace = workspace.mutable_data_ptr();
  C10_CUDA_CHECK(launch_jacobi_cuda(p, c10::cuda::getCurrentCUDAStream()));
}

Jacobi jacobi(const Tensor& input, bool symmetric) {
  const c10::cuda::CUDAGuard device(input.device());
  const Tensor a = input.contiguous();
  const int64_t batch = a.size(0), n = a.size(2);
  Jacobi result;
  result.values = at::empty({batch, n}, a.options());
  if (!symmetric) result.u = at::empty_like(a);
  result.v = at::empty({batch, n, n}, a.options());
  result.info = at::zeros({batch}, a.options().dtype(at::kInt));  // matrices without entries have no launch
  if (a.scalar_type() == at::kFloat) {
    launch_jacobi<float>(a, result);
  } else {
    launch_jacobi<double>(a, result);
  }
  return result;
}

std::tuple<Tensor, Tensor, Tensor> jacobi_eigh_cuda(const Tensor& a) {
  check_square(a, "a");
  const Jacobi result = jacobi(a, /*symmetric=*/true);
  return {result.values, result.v, result.info};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> jacobi_svd_cuda(const Tensor& a) {
  check_batch(a, "a");
  const Jacobi result = jacobi(a, /*symmetric=*/false);
  return {result.u, result.values, result.v, result.info};
}

template <typename T>
void launch_cholesky(const Tensor& gram, Tensor& r_inverse, Tensor& info) {
  const CholeskyParams<T> p = {.gram = gram.const_data_ptr<T>(),
                               .batch = gram.size(0),
                               .b = static_cast<int>(gram.size(1)),
                               .epsilon = 0.0,
                               .r_inverse = r_inverse.mutable_data_ptr<float>(),
                               .r = nullptr,
                               .info = info.mutable_data_ptr<int>()};
  C10_CUDA_CHECK(launch_cholesky_cuda(p, c10::cuda::getCurrentCUDAStream()));
}

std::tuple<Tensor, Tensor> cholesky_inverse_factor_cuda(const Tensor& input) {
  check_square(input, "gram");
  const c10::cuda::CUDAGuard device(input.device());
  const int most = cholesky_max_size();
  TORCH_CHECK_VALUE(input.size(1) <= most, "gram has shape ", input.sizes(), "; this device takes at most ", most,
                    " columns");
  const Tensor gram = input.contiguous();
  Tensor r_inverse = at::empty(gram.sizes(), gram.options().dtype(at::kFloat));
  Tensor info = at::zeros({gram.size(0)}, gram.options().dtype(at::kInt));
  if (gram.scalar_type() == at::kFloat) {
    launch_cholesky<float>(gram, r_inverse, info);
  } else {
    launch_cholesky<double>(gram, r_inverse, info);
  }
  return {r_inverse, info};
}

}  // namespace

TORCH_LIBRARY_IMPL(loftq_kernels, CUDA, m) {
  m.impl("jacobi_eigh", jacobi_eigh_cuda);
  m.impl("jacobi_svd", jacobi_svd_cuda);
  m.impl("cholesky_inverse_factor", cholesky_inverse_factor_cuda);
}

}  // namespace loftq::bindings
