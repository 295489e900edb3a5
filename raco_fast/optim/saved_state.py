"""Whether a saved state of AdamW fits the parameters that it is loaded for.

torch compares the lengths of parameter groups and nothing else. A state that is missing, or lies
over the processes in another way than its parameter, would then train wrongly without a word: two
shards of a square matrix have one shape whichever way it is cut.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from raco_fast.distributed.dtensor import is_dtensor, same_layout
from raco_fast.optim.adamw_part import RESIDUAL


def fitting(
    state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], rounding: str | None
) -> dict[str, Any]:
    """The state_dict without entries that stand for nothing.

    Args:
        state_dict: of an optimizer with AdamW's state.
        groups: the param_groups that it is to be loaded into.
        rounding: the saved optimizer's; None: it is of `torch.optim.AdamW`, without residuals.
    Raises:
        ValueError: a state is missing, or has another shape or layout than its parameter.
    """
    states = {
        # torch.distributed.checkpoint has {} for what a flattened state_dict lacks.
        key: {name: x for name, x in of_p.items() if not (isinstance(x, dict) and not x)}
        for key, of_p in state_dict["state"].items()
    }
    for p, key, group in _pairs(state_dict["param_groups"], groups):
        if of_p := states.get(key):
            needed = ["exp_avg", "exp_avg_sq", *["max_exp_avg_sq"] * bool(group.get("amsgrad"))]
            split = rounding is not None and group.get("rounding", rounding) == "split"
            needed += [RESIDUAL] * (split and p.dtype == torch.bfloat16)
            _check(key, of_p, p, needed)
    return {**state_dict, "state": states}


def _pairs(
    saved: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[Tensor, Any, Mapping[str, Any]]]:
    """(parameter, its key among the saved states, saved group) as far as the groups correspond."""
    for of_saved, own in zip(saved, groups, strict=False):  # torch says where lengths differ
        for key, p in zip(of_saved["params"], own["params"], strict=False):
            yield p, key, of_saved


def _check(key: Any, of_p: Mapping[str, Any], p: Tensor, needed: Sequence[str]) -> None:
    where = f"`state_dict` for parameter {key} of shape {list(p.shape)}"
    if missing := [name for name in needed if name not in of_p]:
        raise ValueError(
            f"{where} must have {missing}, got only {list(of_p)}; torch.distributed.checkpoint "
            f"reads what the optimizer has already: build it with the checkpoint's `amsgrad` and "
            f"`rounding`"
        )
    for name in needed:
        value = of_p[name]
        if value.shape != p.shape:
            raise ValueError(
                f"{where} must have an {name!r} of that shape, got {list(value.shape)}; give the "
                f"optimizer its parameters in the checkpoint's order"
            )
        if not same_layout(value, p):
            raise ValueError(
                f"{where} must have an {name!r} that lies over the processes as the parameter, got "
                f"{_layout(value)} for {_layout(p)}; load it with set_optimizer_state_dict of "
                f"torch.distributed.checkpoint.state_dict (whole tensors: with "
                f"StateDictOptions(full_state_dict=True)) into an optimizer that is built with the "
                f"checkpoint's `amsgrad` and `rounding`"
            )


def _layout(t: Tensor) -> str:
    return f"a DTensor {t.placements}" if is_dtensor(t) else "a whole tensor"
