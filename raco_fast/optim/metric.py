"""The metric in which AdamW's next update is a gradient step, from the states before it.

AdamW moves parameters by -lr m̂ / (√v̂ + ε). This step's G0 enters the average m̂ with the share
1 - β1 and fades from it: over its life it moves them by -lr D G0 with D = 1 / (√v̂ + ε) of each
element. So to first order it lowers the loss of objective j by lr Σ_i α_i ⟨g_j, D g_i⟩: the
products that decide about conflict are those in the metric D. What goes into it:

    v̂         the running one, v / (1 - β2^t) after t steps, which does not know this step's
              gradients. With them D would be largest where objectives happen to cancel, and in the
              first steps independent gradients would look opposed. With amsgrad the largest v.
    lr        of a group over the largest of all groups: where a parameter moves half as far, its
              gradients count for half. Groups with lr = 0 do not count.
    ε, β2     the group's.
    not       β1 (a share that all parameters have in the end), weight decay (it moves parameters
              whatever α is), maximize (a sign that all of a group's gradients have).

An element with v = 0 has had no gradient so far, and D would be 1/ε, 10^8 instead of the reciprocal
of a gradient: rows of an embedding whose token comes for the first time, or an adapter's first
matrix in its second step, would outweigh all others. It has D = 0. In a step in which nothing has a
second moment, as the first, the metric is the Euclidean one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from raco_fast.gradients.second_moments import SecondMoment, SecondMoments


def second_moments(
    groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, Mapping[str, Tensor]]
) -> SecondMoments:
    """Those of every parameter that has taken a step.

    Args:
        groups, state: the optimizer's. Step counts on a device are waited for.
    """
    rates = [float(group["lr"]) for group in groups]
    largest = max(rates, default=0.0)
    found: dict[int, SecondMoment] = {}
    for group, lr in zip(groups, rates, strict=True):
        beta2, eps = float(group["betas"][1]), float(group["eps"])
        factor, name = lr / largest if largest > 0.0 else 1.0, _kept(group)
        states = ((id(p), state.get(p)) for p in group["params"])
        held = [(key, of_p) for key, of_p in states if of_p and name in of_p]
        counts = _numbers([of_p["step"] for _, of_p in held])
        roots = {t: (1.0 - beta2**t) ** -0.5 for t in set(counts) if t > 0.0}
        for (key, of_p), t in zip(held, counts, strict=True):
            if t in roots:
                found[key] = SecondMoment(of_p[name], roots[t], eps, factor)
    return found


def _kept(group: Mapping[str, Any]) -> str:
    return "max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"


def _numbers(steps: Sequence[Tensor]) -> list[float]:
    if len({x.device for x in steps}) != 1:
        return [float(x) for x in steps]
    values: list[float] = torch.stack(list(steps)).flatten().tolist()  # waits once
    return values
