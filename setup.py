"""Builds `raco_fast._C`; what is not here is declared in pyproject.toml."""

from glob import glob
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup


def pybind11_headers() -> str:
    """Those of the package pybind11, else those that torch ships.

    `pip install` builds with the package. A machine that has torch but neither the package nor a
    network can still run `python setup.py build_ext --inplace`.
    """
    places = [("pybind11", "include"), ("torch", "include")]
    for name, folder in places:
        spec = find_spec(name)
        if spec is not None and spec.origin is not None:
            headers = Path(spec.origin).parent / folder
            if (headers / "pybind11" / "pybind11.h").exists():
                return str(headers)
    raise RuntimeError("pybind11's headers are missing; pip install pybind11, or torch")


setup(
    license="Apache-2.0",
    ext_modules=[
        Extension(
            "raco_fast._C",
            sorted(glob("csrc/*/*.cpp")),
            depends=sorted(glob("csrc/*/*.hpp")),
            include_dirs=["csrc", pybind11_headers()],
            language="c++",
            # No -ffast-math: the solver's error-free sums rely on IEEE rounding, and the kernels
            # give the same bits on every target. errno and trap flags, which nobody reads, would
            # keep sqrt and the float16 conversions from being vectorised.
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-g0",
                "-fvisibility=hidden",
                "-ffp-contract=off",
                "-fno-math-errno",
                "-fno-trapping-math",
                "-pthread",
            ],
            extra_link_args=["-pthread"],
        )
    ],
)
