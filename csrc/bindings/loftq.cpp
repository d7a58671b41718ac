// The LoftQ driver for Python: loftq_kernels._C.loftq_batch.
#include "loftq/loftq.h"

#include <pybind11/stl.h>
#include <torch/extension.h>

#include "bindings/module.h"

namespace loftq::bindings {

namespace py = pybind11;

namespace {

std::vector<LoftQResult> run(const std::vector<at::Tensor>& weights, const at::Tensor& codebook,
                             const at::Tensor& start, const LoftQOptions& options) {
  const py::gil_scoped_release release;
  return loftq_batch(weights, codebook, start, options, [] {
    const py::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();  // Ctrl-C between alternations
  });
}

}  // namespace

void bind_loftq(py::module_& m) {
  py::class_<LoftQResult>(m, "LoftQResult")
      .def_readonly("codes", &LoftQResult::codes)
      .def_readonly("scale", &LoftQResult::scale)
      .def_readonly("offset", &LoftQResult::offset)
      .def_readonly("lora_A", &LoftQResult::lora_A)
      .def_readonly("lora_B", &LoftQResult::lora_B)
      .def_readonly("error", &LoftQResult::error)
      .def_readonly("errors", &LoftQResult::errors);
  m.def(
      "loftq_batch",
      [](const std::vector<at::Tensor>& weights, const at::Tensor& codebook, const at::Tensor& start, int64_t rank,
         int64_t num_iter, double scaling, bool exact, bool svd_first, const py::object& operand_dtype,
         int64_t cold_steps, int64_t warm_steps, int64_t group_size, const std::string& scale_rule,
         const py::object& scale_dtype, bool scale_search) {
        const LoftQOptions options{.rank = rank,
                                   .num_iter = num_iter,
                                   .scaling = scaling,
                                   .exact = exact,
                                   .svd_first = svd_first,
                                   .operand_dtype = torch::python::detail::py_object_to_dtype(operand_dtype),
                                   .cold_steps = cold_steps,
                                   .warm_steps = warm_steps,
                                   .group_size = group_size,
                                   .scale_rule = scale_rule,
                                   .scale_dtype = torch::python::detail::py_object_to_dtype(scale_dtype),
                                   .scale_search = scale_search};
        return run(weights, codebook, start, options);
      },
      py::kw_only(), py::arg("weights"), py::arg("codebook"), py::arg("start"), py::arg("rank"), py::arg("num_iter"),
      py::arg("scaling"), py::arg("exact"), py::arg("svd_first"), py::arg("operand_dtype"), py::arg("cold_steps"),
      py::arg("warm_steps"), py::arg("group_size"), py::arg("scale_rule"), py::arg("scale_dtype"),
      py::arg("scale_search"));
}

}  // namespace loftq::bindings
