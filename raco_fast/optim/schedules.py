"""`SettingScheduler`: c and the weights of an optimizer as functions of the step.

They are functions of nothing else, drawn weights too, so a resumed run has the values that it would
have had, on every process, whatever was skipped before.

    constant    start
    linear      (1 - x) start + x end,   x = min(step / steps, 1), steps counted from 0
    cosine      the same with (1 - cos πx) / 2 in place of x
    dirichlet   weights drawn anew at every step, with the optimizer's own as their mean
"""

import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np

from raco_fast.optim.settings import AdamWWithSettings
from raco_fast.solver.weights import check_c, weights_of

Scheduled: TypeAlias = Mapping[str, Any] | Callable[[int], Any] | None
"""A schedule by name, {"name": name, option: value}; a function of the step; none."""

_SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda x: 0.0,
    "linear": lambda x: x,
    "cosine": lambda x: 0.5 * (1.0 - math.cos(math.pi * x)),
}
_OPTIONS = {
    "constant": ("start",),
    **dict.fromkeys(("linear", "cosine"), ("start", "end", "steps")),
    "dirichlet": ("concentration", "seed"),
}


class SettingScheduler:
    """Sets an optimizer's `c` and `weights` step by step, as torch's schedulers set `lr`.

        scheduler = SettingScheduler(opt, c={"name": "linear", "start": 0.0}, steps=1000)
        ...
        opt.step(); scheduler.step()

    The values of the first step are set at once. Call `step()` after every `opt.step()`, or
    `at(step)` before it. A step that is captured in a CUDA graph keeps the values that it was
    captured with.

    Args:
        optimizer: a `ClippedCAGradAdamW`. Its `c` and `weights` as they are now are what a schedule
            by name begins or ends with where it has no `start` or `end`; they are part of the
            scheduler's state, so load that too where an optimizer's state is loaded before.
        c: {"name": "constant", "linear" or "cosine", "start": c, "end": c, "steps": n}, or a
            function of the number of steps taken, which returns a number in [0, 1).
        weights: the same with weights of all objectives as `start` and `end`; or {"name":
            "dirichlet", "concentration": a, "seed": n}, which draws weights of mean w and variance
            w (1 - w) / (a + 1) at every step (w = 0 stays 0); or a function of the number of steps
            taken, which returns weights.
        steps: of the whole training, where a schedule has no `steps` of its own.
    Raises:
        ValueError, TypeError: an unknown name or option, or a value that the setting cannot have;
            of a function's values when they are set.
    """

    def __init__(
        self,
        optimizer: AdamWWithSettings,
        *,
        c: Scheduled = None,
        weights: Scheduled = None,
        steps: int | None = None,
    ) -> None:
        self._optimizer, self._given, self._steps = optimizer, (c, weights), steps
        self._begin({"c": optimizer.c, "weights": dict(optimizer.weights)})
        self.at(0)

    def step(self) -> None:
        """Set the values of the next step."""
        self.at(self.steps_taken + 1)

    def at(self, steps_taken: int) -> None:
        """Set the values of the step that comes after so many."""
        self.steps_taken = steps_taken
        if self._c is not None:
            self._optimizer.c = self._c(steps_taken)
        if self._weights is not None:
            self._optimizer.weights = self._weights(steps_taken)

    def state_dict(self) -> dict[str, Any]:
        """The number of steps taken, and the settings of before the first."""
        return {"steps_taken": self.steps_taken, **self._own, "weights": dict(self._own["weights"])}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave; sets the values of the step that comes next."""
        self._begin({name: state_dict[name] for name in ("c", "weights")})
        self.at(state_dict["steps_taken"])

    def _begin(self, own: dict[str, Any]) -> None:
        c, weights = self._given
        self._own = own
        self._c = c_schedule(c, own["c"], self._steps)
        self._weights = weights_schedule(weights, own["weights"], self._steps)


def c_schedule(given: Scheduled, c: float, steps: int | None) -> Callable[[int], float] | None:
    """The function of the step that `given` stands for, where `c` is the optimizer's own."""
    if given is None or callable(given):
        return given
    name, options = _checked("c", given, (*_SHAPES,))
    start, end = (check_c(options.get(key, c)) for key in ("start", "end"))
    share = _share("c", name, options, steps)

    def at(step: int) -> float:
        x = share(step)
        return (1.0 - x) * start + x * end

    return at


def weights_schedule(
    given: Scheduled, weights: Mapping[str, float], steps: int | None
) -> Callable[[int], Any] | None:
    """The function of the step that `given` stands for, where `weights` are the optimizer's own."""
    if given is None or callable(given):
        return given
    name, options = _checked("weights", given, (*_OPTIONS,))
    if name == "dirichlet":
        return _dirichlet(weights, **options)
    names = tuple(weights)
    start, end = (weights_of(names, options.get(key, weights)) for key in ("start", "end"))
    share = _share("weights", name, options, steps)

    def at(step: int) -> dict[str, float]:
        x = share(step)
        return {name: (1.0 - x) * start[name] + x * end[name] for name in names}

    return at


def _checked(
    setting: str, given: Mapping[str, Any], names: tuple[str, ...]
) -> tuple[str, dict[str, Any]]:
    """The name of a schedule and its options."""
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
        raise TypeError(
            f"the schedule of `{setting}` must be {{'name': name, option: value}} or a function of "
            f"the step, got {given!r}; names are {', '.join(names)}"
        )
    options = dict(given)
    name = options.pop("name")
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        raise ValueError(
            f"the schedule of `{setting}` must be one of {', '.join(names)}, got {name!r}"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )
    if unknown := sorted(options.keys() - set(_OPTIONS[name])):
        raise ValueError(
            f"the schedule {name!r} of `{setting}` has the options {list(_OPTIONS[name])}, got "
            f"{options}: unknown {unknown}"
        )
    return name, options


def _share(
    setting: str, name: str, options: Mapping[str, Any], steps: int | None
) -> Callable[[int], float]:
    """How much of the way from `start` to `end` is gone, by the step."""
    shape = _SHAPES[name]
    if name == "constant":
        return shape
    if not {"start", "end"} & options.keys():
        raise ValueError(
            f"the schedule {name!r} of `{setting}` must have a `start` or an `end` (the other one "
            f"is `{setting}`), got {dict(options)}: nothing would change"
        )
    total = options.get("steps", steps)
    if total is None:
        raise ValueError(
            f"the schedule {name!r} of `{setting}` needs `steps`, the number of steps from `start` "
            f"to `end`"
        )
    if isinstance(total, bool) or not isinstance(total, int):
        raise TypeError(f"`steps` of the schedule of `{setting}` must be a whole number: {total!r}")
    if total < 1:
        raise ValueError(f"`steps` of the schedule of `{setting}` must be at least 1, got {total}")
    return lambda step: shape(min(step / total, 1.0))


def _dirichlet(
    weights: Mapping[str, float], concentration: Any = None, seed: Any = 0
) -> Callable[[int], dict[str, float]]:
    """Weights of Dirichlet(concentration · weights), by seed and step."""
    if isinstance(concentration, bool) or not isinstance(concentration, int | float):
        raise TypeError(
            f"the schedule 'dirichlet' of `weights` needs `concentration`, a positive number, got "
            f"{concentration!r}; with equal weights the number of objectives draws evenly from all "
            f"weights there are, more stays closer to `weights`"
        )
    if not (0.0 < concentration <= 1e9):
        raise ValueError(
            f"`concentration` of the schedule of `weights` must be in (0, 1e9], got "
            f"{concentration}; the number of objectives draws evenly where weights are equal"
        )
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"`seed` of the schedule of `weights` must be a whole number, got {seed!r}")
    weighed = {name: weight for name, weight in weights.items() if weight > 0.0}
    alpha = concentration * np.array([*weighed.values()])

    def at(step: int) -> dict[str, float]:
        # numpy keeps the streams of RandomState as they are; the counter sets steps far apart.
        bits = np.random.Philox(key=seed % 2**64, counter=[0, 0, step, 0])
        random = np.random.RandomState(bits)
        # The logarithm of a gamma variable of shape alpha, which itself may be below 1e-308.
        uniform = 1.0 - random.random_sample(len(alpha))
        logarithm = np.log(random.standard_gamma(alpha + 1.0)) + np.log(uniform) / alpha
        share = np.exp(logarithm - logarithm.max())
        drawn = zip(weighed, (share / share.sum()).tolist(), strict=True)
        return {**dict.fromkeys(weights, 0.0), **dict(drawn)}

    return at
