"""What a user asks of the direction: the objectives' weights, the radius c, the rule, the clip.

The checks are made here once, and say which rule was broken and what to do.
"""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NoReturn, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from raco_fast import _C

Weights: TypeAlias = Mapping[str, float] | Sequence[float] | NDArray[Any] | torch.Tensor
Checked: TypeAlias = tuple[tuple[str, ...], tuple[float, ...], NDArray[np.float64]]


def check_weights(weights: Weights) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Names and values of the objectives' weights, checked.

    Args:
        weights: a mapping from objective name to weight, or a sequence, array or tensor of m
            weights (named "0", "1", ...). Non-negative, finite, 1 to 32 of them, sum 1 within 1e-6.
    Returns:
        (names, values), both of length m, in the order given. The values are not renormalised.
    Raises:
        TypeError: not a mapping or a sequence of numbers, or a name that is not a string.
        ValueError: a rule above is broken; the message shows the weights and the cure.
    """
    names, values, _ = checked_weights(weights)
    return names, values


class ReadOnlyWeights(dict[str, float]):
    """Objective name -> weight, read-only; other weights are set all at once.

    Weights mean something together (they sum to 1), so one cannot be edited alone, and a copy
    would take the edit without a word. Copies and pickles are plain dicts.
    """

    def _refuse(self, *args: object, **kwargs: object) -> NoReturn:
        raise TypeError(
            f"`weights` cannot be edited in place, got an edit of {dict(self)}; set all of them: "
            f"weights = {{**weights, name: value, ...}}, with sum 1"
        )

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[type[dict[str, float]], tuple[dict[str, float]]]:
        return dict, (dict(self),)


def weights_of(names: tuple[str, ...], weights: Weights) -> dict[str, float]:
    """New weights of the objectives `names`, in their order.

    Args:
        names: of the objectives, which stay the same.
        weights: a mapping from these names, in any order, or m weights in the order of `names`.
    Raises:
        TypeError, ValueError: as `check_weights`, or other objectives.
    """
    given, values = check_weights(weights)
    if not isinstance(weights, Mapping) and len(values) == len(names):
        given = names
    found = dict(zip(given, values, strict=True))
    missing = [name for name in names if name not in found]
    unknown = [name for name in found if name not in names]
    if missing or unknown:
        raise ValueError(
            f"`weights` must be of the objectives {names}, got {found}: missing {missing}, unknown "
            f"{unknown}; a weight of 0 leaves an objective out, new ones need a new optimizer"
        )
    return {name: found[name] for name in names}


def check_max_grad_norm(max_grad_norm: float | None) -> float | None:
    """The limit of the gradient's norm; an error unless it is None or a positive number."""
    if max_grad_norm is None:
        return None
    try:
        value = math.fsum((max_grad_norm,))  # refuses strings, which float() would read
    except (TypeError, ValueError):
        raise TypeError(
            f"`max_grad_norm` must be a number or None, got {max_grad_norm!r}; 1.0 is usual"
        ) from None
    if not value > 0.0:
        raise ValueError(
            f"`max_grad_norm` must be a positive number, got {max_grad_norm}; "
            f"None switches clipping off"
        )
    return value


def check_c(c: float) -> float:
    """The radius c as a float; ValueError unless 0 <= c < 1, TypeError unless a number."""
    try:
        value = math.fsum((c,))  # refuses strings, which float() would read
    except (TypeError, ValueError):
        raise TypeError(f"`c` must be a number, got {c!r}; c = 0.4 is the usual choice") from None
    if not 0.0 <= value < 1.0:
        raise ValueError(
            f"`c` must be in [0, 1), got {value}; c = 0 is plain weighting, 0.4 the usual choice"
        )
    return value


def checked_weights(weights: Weights) -> Checked:
    """`check_weights`, and the values as a read-only array [m]."""
    if type(weights) is dict or isinstance(weights, Mapping):  # `type` spares a microsecond
        return _check_items(tuple(weights), _hashable(tuple(weights.values()), weights))
    if isinstance(weights, (np.ndarray, torch.Tensor)):
        if weights.ndim != 1:
            raise ValueError(
                f"`weights` must have one dimension, got shape {tuple(weights.shape)}; pass [m]"
            )
        return _check_items(None, tuple(weights.tolist()))
    if isinstance(weights, Sequence) and not isinstance(weights, (str, bytes)):
        return _check_items(None, _hashable(tuple(weights), weights))
    raise TypeError(
        "`weights` must be a mapping from name to number or a sequence of numbers, "
        f"got {weights!r}; for example "
        "{'helpful': 0.5, 'harmless': 0.5}"
    )


def _hashable(values: tuple[Any, ...], shown: object) -> tuple[float, ...]:
    try:
        math.fsum(values)  # refuses strings, which float() would read
        return tuple(map(float, values))
    except (TypeError, ValueError):
        raise TypeError(f"`weights` must be numbers, got {shown!r}; pass one float each") from None


@lru_cache(maxsize=256)
def _check_items(names: tuple[str, ...] | None, values: tuple[float, ...]) -> Checked:
    m = len(values)
    shown = list(values) if names is None else dict(zip(names, values, strict=True))
    if not 1 <= m <= _C.MAX_OBJECTIVES:
        raise ValueError(
            f"`weights` must hold 1 to {_C.MAX_OBJECTIVES} objectives, got {m}; "
            "merge or leave out objectives"
        )
    for name in names or ():
        if not isinstance(name, str):
            raise TypeError(f"`weights` must have strings as names, got {name!r}; write str(name)")
    if not all(map(math.isfinite, values)):
        raise ValueError(f"`weights` must be finite, got {shown}; replace NaN and infinity")
    if min(values) < 0.0:
        raise ValueError(
            f"`weights` must not be negative, got {shown}; a weight of 0 leaves an objective out"
        )
    total = math.fsum(values)
    if abs(total - 1.0) > 1e-6:
        raise ValueError(f"`weights` must sum to 1, got {total:g} for {shown}; divide by the sum")
    array = np.array(values, dtype=np.float64)
    array.flags.writeable = False
    return names or tuple(map(str, range(m))), values, array
