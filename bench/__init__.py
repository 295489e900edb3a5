"""Benchmarks, run from a checkout as `python -m bench`; not installed with the package.

A package with an `__init__.py`, because a folder without one loses to any installed package of the
name `bench`.
"""
