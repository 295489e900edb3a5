"""Builds `raco_fast._C`; everything else is declared in pyproject.toml."""

from glob import glob

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

setup(
    ext_modules=[
        Pybind11Extension(
            "raco_fast._C",
            sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.hpp")),
            cxx_std=17,
            # No -ffast-math: the solver's error-free sums rely on IEEE rounding, and the kernels
            # give the same bits on every target. errno and trap flags, which nobody reads, would
            # keep sqrt and the float16 conversions from being vectorised.
            extra_compile_args=[
                "-O3",
                "-ffp-contract=off",
                "-fno-math-errno",
                "-fno-trapping-math",
                "-pthread",
            ],
            extra_link_args=["-pthread"],
        )
    ],
    cmdclass={"build_ext": build_ext},
)
