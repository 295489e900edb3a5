#pragma once

#include <pybind11/pybind11.h>

void bind_layout(pybind11::module_& module);
