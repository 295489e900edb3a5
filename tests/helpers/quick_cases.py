"""Which cases of a matrix every run of the tests takes; the others are slow."""

from collections.abc import Collection, Sequence
from itertools import product
from typing import Any

import pytest


def matrix(*axes: Sequence[Any], quick: Collection[tuple[Any, ...]]) -> list[Any]:
    """Every combination of the axes' values, those not in `quick` marked slow.

    Raises:
        ValueError: `quick` has a case that is none of them, so that it would never be run.
    """
    cases = list(product(*axes))
    if strange := [case for case in quick if case not in cases]:
        raise ValueError(f"`quick` must be some of the cases, got {strange}")
    marks = [[] if case in quick else [pytest.mark.slow] for case in cases]
    return [pytest.param(*case, marks=slow) for case, slow in zip(cases, marks, strict=True)]
