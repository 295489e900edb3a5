# ruff: noqa: N999 (the name of the extension module)
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

MAX_OBJECTIVES: int
SCALARS: int
DTYPES: tuple[str, ...]
ROUNDINGS: tuple[str, ...]
CPU_TARGETS: tuple[str, ...]
BLOCK: int
CHUNK: int

def solve(
    gram: NDArray[np.float64],
    weights: NDArray[np.float64],
    c: float,
    rule: int,
    option: float = 1.0,
) -> NDArray[np.float64]: ...
def describe(
    lists: list[list[Tensor | None]], types: tuple[type, ...], exchange: object
) -> tuple[bytes, bytes] | None: ...
def advance(
    steps: list[Tensor], types: tuple[type, ...], exchange: object
) -> NDArray[np.float64] | None: ...
def products(
    grads: NDArray[np.int64],
    lengths: NDArray[np.int64],
    dtypes: NDArray[np.uint8],
    threads: int,
    target: int = 0,
) -> NDArray[np.float64]: ...
def products_in_metric(
    grads: NDArray[np.int64],
    lengths: NDArray[np.int64],
    dtypes: NDArray[np.uint8],
    moments: NDArray[np.int64],
    moment_dtypes: NDArray[np.uint8],
    numbers: NDArray[np.float64],
    threads: int,
    target: int = 0,
) -> NDArray[np.float64]: ...
def fold(
    t: int,
    n: int,
    U: NDArray[np.float64],
    out: NDArray[np.int64],
    dtype: int,
    fresh: bool,
    sums: NDArray[np.float64] | None,
    threads: int,
    target: int = 0,
) -> None: ...
def combine(
    grads: NDArray[np.int64],
    lengths: NDArray[np.int64],
    dtypes: NDArray[np.uint8],
    alpha: NDArray[np.float64],
    out: NDArray[np.int64],
    out_dtypes: NDArray[np.uint8],
    threads: int,
    target: int = 0,
) -> None: ...
def combine_adamw(
    grads: NDArray[np.int64],
    lengths: NDArray[np.int64],
    dtypes: NDArray[np.uint8],
    alpha: NDArray[np.float64],
    params: NDArray[np.int64],
    param_dtypes: NDArray[np.uint8],
    exp_avgs: NDArray[np.int64],
    exp_avg_dtypes: NDArray[np.uint8],
    exp_avg_sqs: NDArray[np.int64],
    exp_avg_sq_dtypes: NDArray[np.uint8],
    decay: float,
    beta1: float,
    beta2: float,
    eps: float,
    step_sizes: NDArray[np.float64],
    root_corrections: NDArray[np.float64],
    rounding: int,
    steps: NDArray[np.float64],
    seed: int,
    residuals: NDArray[np.int64],
    residual_dtypes: NDArray[np.uint8],
    places: NDArray[np.int64],
    threads: int,
    target: int = 0,
) -> None: ...
