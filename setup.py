"""Builds `raco_fast._C`; everything else is declared in pyproject.toml."""

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

setup(
    ext_modules=[
        Pybind11Extension(
            "raco_fast._C",
            ["csrc/bindings.cpp", "csrc/dual.cpp", "csrc/minimise.cpp", "csrc/projection.cpp"],
            depends=[
                "csrc/corral.hpp",
                "csrc/double_double.hpp",
                "csrc/dual.hpp",
                "csrc/minimise.hpp",
                "csrc/problem.hpp",
                "csrc/projection.hpp",
            ],
            cxx_std=17,
            # No -ffast-math: the solver's error-free sums rely on IEEE rounding.
            extra_compile_args=["-O3", "-ffp-contract=off"],
        )
    ],
    cmdclass={"build_ext": build_ext},
)
