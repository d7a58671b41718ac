// The CPU kernels of the ops. Their schemas are defined in loftq_kernels/ops/schemas.py.
#include <tuple>

#include "aten/functions.h"
#include "aten/library.h"
#include "bindings/ops.h"
#include "loftq/cpu.h"
#include "loftq/parallel.h"

namespace loftq::bindings {

namespace {

// Runs the kernels on torch's own threads. Inside a parallel region of torch everything runs on the calling thread.
void run_on_threads_of_torch(int count, void (*task)(void* context), void* context) {
  struct Work {
    void (*task)(void*);
    void* context;
  } work{task, context};
  const auto run = [](int64_t begin, int64_t end, void* opaque) {
    const Work& own = *static_cast<const Work*>(opaque);
    for (; begin < end; ++begin) own.task(own.context);
  };
  require(torch_parallel_for(0, count, 1, run, &work), "running threads");
}

int num_threads() {
  uint32_t count = 1;
  require(torch_get_num_threads(&count), "counting threads");
  return static_cast<int>(count);
}

std::tuple<Tensor, Tensor, Tensor> quantize_cpu(const Tensor& weight, const Tensor& codebook, int64_t group_size,
                                                const std::string& scale_rule, ScalarType scale_dtype,
                                                bool scale_search) {
  QuantizeCall call = prepare_quantize(weight, codebook, group_size, scale_rule, scale_dtype, scale_search);
  raise_if(launch_quantize_cpu(call.params, num_threads()));
  return {std::move(call.codes), std::move(call.scale), std::move(call.offset)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_residual_cpu(const Tensor& weight, Tensor& low_rank,
                                                                 const Tensor& codebook, int64_t group_size,
                                                                 const std::string& scale_rule, ScalarType scale_dtype,
                                                                 bool scale_search) {
  const Tensor norms = empty({weight.dim() > 0 ? weight.size(0) : 0}, kDouble, weight.device());
  QuantizeCall call =
      prepare_quantize_residual(weight, low_rank, codebook, group_size, scale_rule, scale_dtype, scale_search, norms);
  raise_if(launch_quantize_cpu(call.params, num_threads()));
  double total = 0;  // in the order of the rows, so that it does not depend on the number of threads
  for (int64_t row = 0; row < call.params.n; ++row) total += call.params.residual_norm2[row];
  return {call.codes, call.scale, call.offset, scalar(total, kDouble, norms.device())};
}

Tensor unpack_codes_cpu(const Tensor& packed, int64_t bits, int64_t in_features) {
  UnpackCall call = prepare_unpack(packed, bits, in_features);
  raise_if(launch_unpack_cpu(call.params, num_threads()));
  return call.codes;
}

Tensor pack_codes_cpu(const Tensor& codes, int64_t bits) {
  PackCall call = prepare_pack(codes, bits);
  raise_if(launch_pack_cpu(call.params, num_threads()));
  return call.packed;
}

Tensor dequantize_cpu(const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& offset,
                      const Tensor& codebook, int64_t in_features, int64_t group_size, ScalarType dtype) {
  const ScalarType computed = dtype == kDouble ? kFloat : dtype;
  DequantizeCall call = prepare_dequantize(codes, scale, offset, codebook, in_features, group_size, computed);
  if (dtype == kDouble) {
    const Tensor unpacked = unpack_codes_cpu(codes, call.params.bits, in_features);
    return dequantize_float64(unpacked, scale, offset, codebook, group_size);
  }
  raise_if(launch_dequantize_cpu(call.params, num_threads()));
  return call.out;
}

// Float64, for checking other results: the dense weight, by ATen.
Tensor dense_float64(const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& offset,
                     const Tensor& codebook, int64_t in_features, int64_t group_size,
                     const std::optional<Tensor>& lora_A, const std::optional<Tensor>& lora_B, double scaling,
                     const std::optional<Tensor>& bias) {
  const Tensor dense = dequantize_cpu(codes, scale, offset, codebook, in_features, group_size, kDouble);
  check_adapter_and_bias(dense.size(0), in_features, codes, lora_A, lora_B, bias);
  if (!lora_A) return dense;
  return add(dense, mm(mul(to(*lora_B, kDouble), scaling), to(*lora_A, kDouble)));
}

Tensor qlora_linear_cpu(const Tensor& x, const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& offset,
                        const Tensor& codebook, int64_t group_size, const std::optional<Tensor>& lora_A,
                        const std::optional<Tensor>& lora_B, double scaling, const std::optional<Tensor>& bias) {
  LOFTQ_CHECK(x.dim() > 0, "x has no dimensions");
  const int64_t k = x.size(-1);
  if (x.dtype() == kDouble) {
    const Tensor dense = dense_float64(codes, scale, offset, codebook, k, group_size, lora_A, lora_B, scaling, bias);
    const Tensor y = matmul(x, mT(dense));
    return bias ? add(y, to(*bias, kDouble)) : y;
  }
  LinearCall call =
      prepare_linear(x, codes, scale, offset, codebook, k, group_size, lora_A, lora_B, scaling, bias, false);
  raise_if(launch_linear_cpu(call.params, num_threads()));
  return call.y;
}

Tensor qlora_linear_grad_input_cpu(const Tensor& grad_y, const Tensor& codes, const Tensor& scale,
                                   const std::optional<Tensor>& offset, const Tensor& codebook, int64_t in_features,
                                   int64_t group_size, const std::optional<Tensor>& lora_A,
                                   const std::optional<Tensor>& lora_B, double scaling) {
  if (grad_y.dtype() == kDouble) {
    LOFTQ_CHECK(grad_y.dim() > 0 && grad_y.size(-1) == codes.size(0), "grad_y has shape ", grad_y.sizes(),
                ": its last dimension must be ", codes.size(0));
    return matmul(grad_y, dense_float64(codes, scale, offset, codebook, in_features, group_size, lora_A, lora_B,
                                        scaling, std::nullopt));
  }
  LinearCall call = prepare_linear(grad_y, codes, scale, offset, codebook, in_features, group_size, lora_A, lora_B,
                                   scaling, std::nullopt, true);
  raise_if(launch_linear_grad_input_cpu(call.params, num_threads()));
  return call.y;
}

// Float64, for checking other results.
std::tuple<Tensor, Tensor> adapter_grad_float64(const Tensor& x, const Tensor& grad_y, const Tensor& lora_A,
                                                const Tensor& lora_B, double scaling, bool need_A, bool need_B) {
  check_adapter_grad(x, grad_y, lora_A, lora_B);
  const int64_t n = lora_B.size(0), k = lora_A.size(1);
  int64_t m = 1;
  for (const int64_t size : x.sizes().first(x.sizes().size() - 1)) m *= size;
  const Tensor rows = reshape(to(x, kDouble), {m, k}), grads = reshape(to(grad_y, kDouble), {m, n});
  const Tensor grad_A =
      need_A ? mm(mT(mul(mm(grads, to(lora_B, kDouble)), scaling)), rows) : empty({0}, kDouble, x.device());
  const Tensor grad_B =
      need_B ? mm(mT(grads), mul(mm(rows, mT(to(lora_A, kDouble))), scaling)) : empty({0}, kDouble, x.device());
  return {to(grad_A, lora_A.dtype()), to(grad_B, lora_B.dtype())};
}

std::tuple<Tensor, Tensor> adapter_grad_cpu(const Tensor& x, const Tensor& grad_y, const Tensor& lora_A,
                                            const Tensor& lora_B, double scaling, bool need_A, bool need_B) {
  if (x.dtype() == kDouble || grad_y.dtype() == kDouble) {
    return adapter_grad_float64(x, grad_y, lora_A, lora_B, scaling, need_A, need_B);
  }
  AdapterGradCall call = prepare_adapter_grad(x, grad_y, lora_A, lora_B, scaling, need_A, need_B);
  raise_if(launch_adapter_grad_cpu(call.params, num_threads()));
  return {to(call.grad_A, lora_A.dtype()), to(call.grad_B, lora_B.dtype())};
}

Library registered() {
  set_parallel_runner(run_on_threads_of_torch);
  Library library = Library::kernels("CPU");
  library.add<quantize_cpu>("quantize");
  library.add<quantize_residual_cpu>("quantize_residual_");
  library.add<dequantize_cpu>("dequantize");
  library.add<pack_codes_cpu>("pack_codes");
  library.add<unpack_codes_cpu>("unpack_codes");
  library.add<qlora_linear_cpu>("qlora_linear");
  library.add<qlora_linear_grad_input_cpu>("qlora_linear_grad_input");
  library.add<adapter_grad_cpu>("adapter_grad");
  return library;
}

const Registration registration(registered);

}  // namespace

}  // namespace loftq::bindings
