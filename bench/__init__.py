"""Benchmarks, run from a checkout; without this file an installed package `bench` would win."""
