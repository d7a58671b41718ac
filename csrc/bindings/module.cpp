// The Python module loftq_kernels._C. Importing it registers the ops' kernels; what it exports is information.
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include <stdexcept>
#include <string>

#include "bindings/module.h"
#include "loftq/cpu.h"
#include "loftq/packing.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["torch"] = TORCH_VERSION;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc " __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
#if defined(_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
#if defined(LOFTQ_WITH_CUDA)
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  return info;
}

std::string cpu_isa() {
  loftq::Status status;
  const char* name = loftq::active_isa(&status);
  if (name == nullptr) throw py::value_error(status);
  return name;
}

py::tuple cpu_isas() {
  const char* names[8];
  const int count = loftq::supported_isas(names, 8);
  py::tuple result(count);
  for (int i = 0; i < count; ++i) result[i] = names[i];
  return result;
}

template <class Value, size_t kSize>
py::tuple tuple_of(const Value (&values)[kSize]) {
  py::tuple result(kSize);
  for (size_t i = 0; i < kSize; ++i) result[i] = values[i];
  return result;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled kernels of loftq_kernels";
  m.def("build_info", &build_info, "What the extension was built with: torch, compiler, openmp, cuda.");
  m.def("cpu_isa", &cpu_isa, "The CPU instruction set in use; the environment variable LOFTQ_CPU_ISA forces one.");
  m.def("cpu_isas", &cpu_isas, "The CPU instruction sets that this machine and build have, widest first.");
  m.attr("GROUP_SIZES") = tuple_of(loftq::kGroupSizes);
  m.attr("CODE_BITS") = tuple_of(loftq::kCodeBits);
  loftq::bindings::bind_loftq(m);
}
