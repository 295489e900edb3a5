#pragma once

#include <pybind11/pybind11.h>

void bind_cpu(pybind11::module_& module);
