// The CUDA kernels of the ops on small matrices, compiled where torch has CUDA. Schemas: loftq_kernels/ops/schemas.py.
#include "bindings/cuda.h"

#include <tuple>

#include "aten/functions.h"
#include "aten/library.h"
#include "loftq/small_matrix.h"

namespace loftq::bindings {

using namespace aten;

namespace {

constexpr int64_t kMaxSize = 1 << 15;  // n * n is an int in the kernels

void check_batch(const Tensor& tensor, const char* what) {
  LOFTQ_CHECK(tensor.is_cuda(), what, " is on ", tensor.device(), ", expected a CUDA device");
  const bool real = tensor.dtype() == kFloat || tensor.dtype() == kDouble;
  LOFTQ_CHECK(tensor.dim() == 3 && real, what, " has shape ", tensor.sizes(), " and dtype ", tensor.dtype(),
              ", expected a batch of matrices in float32 or float64");
  LOFTQ_CHECK(tensor.size(1) >= tensor.size(2) && tensor.size(1) <= kMaxSize, what, " has shape ", tensor.sizes(),
              ", expected no more columns than rows, and at most ", kMaxSize, " of either");
}

void check_square(const Tensor& tensor, const char* what) {
  check_batch(tensor, what);
  LOFTQ_CHECK(tensor.size(1) == tensor.size(2), what, " has shape ", tensor.sizes(), ", expected [B, n, n]");
}

// u is undefined for a symmetric positive semi-definite matrix.
struct Jacobi {
  Tensor values, u, v, info;
};

template <typename T>
void launch_jacobi(const Tensor& a, Jacobi& result, const OnDevice& device) {
  const bool symmetric = !result.u.defined();
  JacobiParams<T> p = {.a = a.const_data<T>(),
                       .batch = a.size(0),
                       .m = static_cast<int>(a.size(1)),
                       .n = static_cast<int>(a.size(2)),
                       .symmetric = symmetric,
                       .max_sweeps = 0,
                       .values = result.values.mutable_data<T>(),
                       .u = symmetric ? nullptr : result.u.mutable_data<T>(),
                       .v = result.v.mutable_data<T>(),
                       .info = result.info.mutable_data<int>(),
                       .workspace = nullptr};
  const auto bytes = static_cast<int64_t>(jacobi_workspace_bytes(p));
  const Tensor workspace = empty({bytes}, kByte, a.device());
  if (bytes > 0) p.workspace = workspace.mutable_data();
  require_cuda(launch_jacobi_cuda(p, device.stream()));
}

Jacobi jacobi(const Tensor& input, bool symmetric) {
  const OnDevice device(input);
  const Tensor a = contiguous(input);
  const int64_t batch = a.size(0), n = a.size(2);
  Jacobi result;
  result.values = empty({batch, n}, a.dtype(), a.device());
  if (!symmetric) result.u = empty(a.sizes(), a.dtype(), a.device());
  result.v = empty({batch, n, n}, a.dtype(), a.device());
  result.info = zeros({batch}, kInt, a.device());  // matrices without entries have no launch
  if (a.dtype() == kFloat) {
    launch_jacobi<float>(a, result, device);
  } else {
    launch_jacobi<double>(a, result, device);
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
void launch_cholesky(const Tensor& gram, const Tensor& r_inverse, const Tensor& info, const OnDevice& device) {
  const CholeskyParams<T> p = {.gram = gram.const_data<T>(),
                               .batch = gram.size(0),
                               .b = static_cast<int>(gram.size(1)),
                               .epsilon = 0.0,
                               .r_inverse = r_inverse.mutable_data<float>(),
                               .r = nullptr,
                               .info = info.mutable_data<int>()};
  require_cuda(launch_cholesky_cuda(p, device.stream()));
}

std::tuple<Tensor, Tensor> cholesky_inverse_factor_cuda(const Tensor& input) {
  check_square(input, "gram");
  const OnDevice device(input);
  const int most = cholesky_max_size();
  LOFTQ_CHECK(input.size(1) <= most, "gram has shape ", input.sizes(), "; this device takes at most ", most,
              " columns");
  const Tensor gram = contiguous(input);
  const Tensor r_inverse = empty(gram.sizes(), kFloat, gram.device());
  const Tensor info = zeros({gram.size(0)}, kInt, gram.device());
  if (gram.dtype() == kFloat) {
    launch_cholesky<float>(gram, r_inverse, info, device);
  } else {
    launch_cholesky<double>(gram, r_inverse, info, device);
  }
  return {r_inverse, info};
}

Library registered() {
  Library library = Library::kernels("CUDA");
  library.add<jacobi_eigh_cuda>("jacobi_eigh");
  library.add<jacobi_svd_cuda>("jacobi_svd");
  library.add<cholesky_inverse_factor_cuda>("cholesky_inverse_factor");
  return library;
}

const Registration registration(registered);

}  // namespace

}  // namespace loftq::bindings
