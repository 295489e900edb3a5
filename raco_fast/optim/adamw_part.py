"""Which parameters of the groups are updated together, with their AdamW states."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from raco_fast.backends import ops
from raco_fast.backends.rounding import Rounding
from raco_fast.backends.types import AdamWOptions, Update
from raco_fast.distributed.dtensor import local
from raco_fast.distributed.shards import places_of
from raco_fast.gradients.objective_grad import ObjectiveGrad, Touched, along_p_grad, here, is_zero

RESIDUAL = "split_residual"
"""The state key of what "split" keeps beside a weight."""


def updates(
    groups: Sequence[dict[str, Any]],
    touched: Sequence[Touched],
    state: Mapping[Tensor, dict[str, Tensor]],
    rounding: str,
    seed: int,
) -> Iterator[Update]:
    """The updates of every group's touched parameters, one for each rounding in the group.

    `groups` and `state` are the optimizer's, `rounding` that of groups without one of their own.
    """
    for i, (group, of_group) in enumerate(zip(groups, touched, strict=True)):
        for name, part in by_rounding(of_group, group.get("rounding", rounding)):
            yield _update(part, state, group, name, seed + i)


def _update(
    touched: Touched,
    state: Mapping[Tensor, dict[str, Tensor]],
    group: dict[str, Any],
    rounding: str,
    seed: int,
) -> Update:
    """The update of some parameters of a group; states that are missing are made, as AdamW does.

    Of DTensors, whose states are DTensors, it is the update of the shards that lie here.
    """
    states = [state[p] for p in touched.params]
    last_made = RESIDUAL if rounding == "split" else "step"
    for p, of_p in zip(touched.params, states, strict=True):
        if last_made not in of_p:
            _make_state(p, of_p, group, rounding)
        if rounding != "split":
            of_p.pop(RESIDUAL, None)  # of a weight that this step leaves: later ones differ
    shards = here(touched)

    def every(name: str) -> list[Tensor]:
        whole = [of_p[name] for of_p in states]
        return whole if shards is touched else [local(t) for t in whole]

    return Update(
        *shards,
        every("exp_avg"),
        every("exp_avg_sq"),
        every("max_exp_avg_sq") if group["amsgrad"] else [],
        every("step"),
        AdamWOptions.of(group),
        Rounding(
            rounding,
            every(RESIDUAL) if rounding == "split" else [],
            seed,
            places_of(touched.params) if rounding == "stochastic" else [],
        ),
    )


def stepping(
    groups: Sequence[dict[str, Any]],
    state: Mapping[Tensor, dict[str, Tensor]],
    rounding: str,
    seed: int,
) -> Callable[[Tensor], None]:
    """A function that takes the AdamW step of one parameter along its p.grad; see `updates`."""
    places: dict[int, tuple[dict[str, Any], int]] = {}
    for group in groups:
        for p in group["params"]:
            # Each parameter is updated by a call of its own, which numbers its tensors from 0: with
            # one seed all would get the same random bits.
            places[id(p)] = group, seed + len(groups) + len(places)

    @torch.no_grad()
    def step(p: Tensor) -> None:
        group, own_seed = places[id(p)]
        ((name, alone),) = by_rounding(along_p_grad([p]), group.get("rounding", rounding))
        update = _update(alone, state, group, name, own_seed)
        ops.combine_adamw(update, torch.ones(1, dtype=torch.float64))

    return step


def asks_for_states(
    groups: Sequence[dict[str, Any]], state: Mapping[Tensor, dict[str, Tensor]]
) -> bool:
    """Whether a step is torch.distributed.checkpoint's, which wants states to read or write.

    It fills p.grad with zeros by hand and steps with lr = 0.
    """
    if state:
        return False
    grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    return (
        bool(grads)
        and not any(isinstance(grad, ObjectiveGrad) for grad in grads)
        and all(float(group["lr"]) == 0.0 for group in groups)
        and all(map(is_zero, grads))
    )


def make_states(
    groups: Sequence[dict[str, Any]], state: Mapping[Tensor, dict[str, Tensor]], rounding: str
) -> None:
    """Make the states of all parameters that have a gradient, as before their first step."""
    for group in groups:
        touched = along_p_grad(group["params"])
        for name, part in by_rounding(touched, group.get("rounding", rounding)):
            for p in part.params:
                _make_state(p, state[p], group, name)


def make_residuals(
    groups: Sequence[dict[str, Any]], state: Mapping[Tensor, dict[str, Tensor]], rounding: str
) -> None:
    """Make what "split" keeps, where it was chosen after the last step: the weights are exact."""
    for group in groups:
        stepped = Touched([p for p in group["params"] if p in state], [])
        for name, part in by_rounding(stepped, group.get("rounding", rounding)):
            for p in part.params if name == "split" else ():
                if RESIDUAL not in state[p]:
                    _make_state(p, state[p], group, name)


def by_rounding(touched: Touched, rounding: str) -> list[tuple[str, Touched]]:
    """Parameters that are rounded alike: bfloat16 ones as asked, others to nearest."""
    narrow = [p.dtype == torch.bfloat16 for p in touched.params] if rounding != "nearest" else []
    if not any(narrow):
        return [("nearest", touched)] if touched.params else []
    wide = [not chosen for chosen in narrow]
    parts = [(rounding, _chosen(touched, narrow)), ("nearest", _chosen(touched, wide))]
    return [(name, part) for name, part in parts if part.params]


def _chosen(touched: Touched, chosen: Sequence[bool]) -> Touched:
    grads = [list(compress(one, chosen)) for one in touched.grads]
    return Touched(list(compress(touched.params, chosen)), grads)


def _make_state(p: Tensor, state: dict[str, Tensor], group: dict[str, Any], rounding: str) -> None:
    """AdamW's state of p, made at p's first step: same keys, dtypes and devices.

    With a residual there is one key more, which a checkpoint of AdamW does not have.
    """
    if p.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"the state of a parameter of shape {list(p.shape)} would be made anew at "
            f"every replay; take a step before capturing one in a CUDA graph"
        )
    if not state:
        wide = torch.get_default_dtype() == torch.float64 and not group["fused"]
        on_device = group["capturable"] or group["fused"]
        state["step"] = torch.zeros(
            (),
            dtype=torch.float64 if wide else torch.float32,
            device=p.device if on_device else "cpu",
        )
        names = ["exp_avg", "exp_avg_sq", *["max_exp_avg_sq"] * group["amsgrad"]]
        for name in names:
            state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
    if rounding == "split":
        state[RESIDUAL] = torch.zeros_like(p, memory_format=torch.preserve_format)
