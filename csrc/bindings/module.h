// What the parts of the Python module add to it.
#pragma once

#include <pybind11/pybind11.h>

namespace loftq::bindings {

void bind_loftq(pybind11::module_& m);  // loftq_batch: the LoftQ driver

}  // namespace loftq::bindings
