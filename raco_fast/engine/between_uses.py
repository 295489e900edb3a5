"""What two uses of one parameter have between them: products of their t_g (`contributions.py`)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from raco_fast.backends.weight_grad import blocks
from raco_fast.engine.contributions import LookupUse, Rows
from raco_fast.engine.inner_products import products, products_within

# Rows of a tied weight whose t_g exist at one time while its two uses are multiplied.
_CROSS_ROWS = 1024


def cross(a: Rows, b: Rows, parameter: Tensor, groups: int) -> Tensor:
    """⟨t_g, t'_h⟩ between two uses of one parameter, [groups, groups] float64 on its device."""
    K = torch.zeros(groups, groups, dtype=torch.float64, device=parameter.device)
    for t, other in _rows_of_both(a, b, parameter):
        K += products(t, other)
    return K


def cross_within(a: Rows, b: Rows, parameter: Tensor, groups: int, each: int) -> Tensor:
    """The blocks of `cross` of so many consecutive groups: [groups / each, each, each]."""
    shape = (groups // each, each, each)
    K = torch.zeros(shape, dtype=torch.float64, device=parameter.device)
    for t, other in _rows_of_both(a, b, parameter):
        K += products_within(t, each, other)
    return K


def _rows_of_both(a: Rows, b: Rows, parameter: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """t_g and t'_g [groups, n], some rows of the parameter at a time.

    A lookup has few rows that are not zero, and only those are formed of the other use.
    """
    lookup = next((use for use in (a, b) if isinstance(use, LookupUse)), None)
    ids = torch.arange(len(parameter), device=parameter.device) if lookup is None else lookup.ids
    for start, stop in blocks(len(ids), _CROSS_ROWS):
        here = ids[start:stop]
        yield a.at(here).flatten(1), b.at(here).flatten(1)
