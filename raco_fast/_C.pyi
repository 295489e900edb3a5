# ruff: noqa: N999 (the name of the extension module)
import numpy as np
from numpy.typing import NDArray

MAX_OBJECTIVES: int
SCALARS: int

def solve(
    gram: NDArray[np.float64], weights: NDArray[np.float64], c: float, rule: int
) -> NDArray[np.float64]: ...
