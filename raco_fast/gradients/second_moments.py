"""`SecondMoment`: what AdamW knows of a parameter's gradients before a step, for a metric."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from raco_fast.backends.types import Metric
from raco_fast.distributed.dtensor import local


class SecondMoment(NamedTuple):
    """D = factor / (√v root + eps) of one parameter, elementwise, and 0 where v is."""

    v: Tensor
    root: float
    eps: float
    factor: float


SecondMoments = Mapping[int, SecondMoment]
"""By `id` of the parameter (Tensor's own hash is Python code); one that is not there has D = 0."""


def metric_of(params: Sequence[Tensor], moments: SecondMoments) -> Metric:
    """The metric of gradients of these parameters; of DTensors, of the shards that lie here."""
    found = [moments.get(id(p)) for p in params]
    return Metric([None if one is None else local(one.v) for one in found], numbers_of(found))


def numbers_of(moments: Sequence[SecondMoment | None]) -> Tensor:
    """[n, 3] as `Metric` has them."""
    rows = [(1.0, 1.0, 0.0) if one is None else one[1:] for one in moments]
    return torch.from_numpy(np.array(rows, dtype=np.float64).reshape(-1, 3))
