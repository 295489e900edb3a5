"""What operations are given, and what a backend is."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from raco_fast.backends.rounding import NEAREST, Rounding

Gradients = Sequence[Sequence[Tensor | None]]
"""m lists of n gradients; None stands for a gradient of zeros."""

Built: TypeAlias = dict[Hashable, Any]
"""What a backend built for the tensors of one call: empty at first, and again when an address or a
layout has changed."""


@dataclass(frozen=True)
class AdamWOptions:
    """The hyper-parameters of one parameter group, as `torch.optim.AdamW` names them."""

    lr: float | Tensor = 1e-3
    beta1: float | Tensor = 0.9
    beta2: float | Tensor = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-2
    amsgrad: bool = False
    maximize: bool = False
    foreach: bool | None = None
    capturable: bool = False
    differentiable: bool = False
    fused: bool | None = None

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> "AdamWOptions":
        """Those of a parameter group of an optimizer."""
        beta1, beta2 = group["betas"]
        rest = {name: group[name] for name in cls.__dataclass_fields__ if name in group}
        return cls(beta1=beta1, beta2=beta2, **rest)


@dataclass(frozen=True)
class Update:
    """One AdamW step of n parameters, but for the coefficients of their gradients.

    Attributes:
        params: n tensors, each with at least one gradient that is not None.
        grads: m lists of n gradients of the parameters' shapes, or None.
        exp_avgs, exp_avg_sqs: n states of the parameters' shapes.
        max_exp_avg_sqs: n states with `amsgrad`, else empty.
        steps: n scalar tensors, the step counts.
        options: of the parameter group.
        rounding: of the parameters; bfloat16 ones only, unless it is "nearest".
    """

    params: Sequence[Tensor]
    grads: Gradients
    exp_avgs: Sequence[Tensor]
    exp_avg_sqs: Sequence[Tensor]
    max_exp_avg_sqs: Sequence[Tensor]
    steps: Sequence[Tensor]
    options: AdamWOptions = AdamWOptions()
    rounding: Rounding = NEAREST

    @property
    def written(self) -> list[Sequence[Tensor]]:
        """Lists of n tensors that a kernel writes: parameters, states, residuals if there are."""
        residuals = [self.rounding.residuals] if self.rounding.name == "split" else []
        return [self.params, self.exp_avgs, self.exp_avg_sqs, *residuals]


@dataclass(frozen=True)
class Metric:
    """In which the update of AdamW is a gradient step: D = factor / (√v root + eps), elementwise.

    Elements with v = 0 have D = 0, whatever eps is.

    Attributes:
        moments: n tensors v of the gradients' shapes; None: D = 0 for the whole tensor.
        numbers: [n, 3] float64 on the CPU: root, eps, factor of each tensor.
    """

    moments: Sequence[Tensor | None]
    numbers: Tensor


@dataclass(frozen=True)
class Call:
    """An operation on certain tensors, as backends are asked about it.

    Attributes:
        operation: "gram", "gram_in_metric", "products", "combine", "combine_adamw" or
            "weight_grad".
        m: the number of objectives.
        written: lists of n tensors that are written in place.
        read: lists of n tensors or None that are only read.
        beside: of "gram_in_metric", the list of second moments.
        options: of "combine_adamw".
        bounds: of "weight_grad", whose lists are [out], and [x], [dy].
        runs: False for a mere question which backend would run it: no kernel is proved for that.
    """

    operation: str
    m: int
    written: Sequence[Sequence[Tensor]]
    read: Gradients
    options: AdamWOptions | None = None
    bounds: Sequence[int] = ()
    beside: Gradients = ()
    runs: bool = True

    @property
    def lists(self) -> list[Sequence[Tensor | None]]:
        """All lists."""
        return [*self.written, *self.read, *self.beside]

    def tensors(self) -> Iterator[Tensor]:
        """All tensors."""
        return (t for one in self.lists for t in one if t is not None)

    def recorded(self) -> str | None:
        """Why a kernel that autograd cannot see must not write these tensors; None if it may."""
        watched = self.runs and torch.is_grad_enabled()
        if watched and any(t.requires_grad for one in self.written for t in one):
            return "autograd would record it (use torch.no_grad())"
        return None


class Backend(Protocol):
    """One implementation of the operations; `choose.BACKENDS` lists all of them.

    Operations have the meaning and the errors that `ops.py` describes, and are called only where
    `obstacle` is None. One that a backend lacks is an obstacle, and then need not be there.
    """

    name: str
    """For `raco_fast.backend(name)`."""
    on_device: bool
    """Whether nothing waits for the device: `gram` stays there, coefficients may be there."""
    unproved: bool
    """Whether it has to agree with `reference` before its first use on a device."""

    def missing(self) -> str | None:
        """What this machine lacks, with the cure; None if the backend can run here."""

    def obstacle(self, call: Call, forced: bool) -> str | None:
        """Why a call is not for this backend, None if it is; asked only if the tensors changed.

        What is possible but slower is no obstacle if `forced`.
        """

    def gram(self, grads: Gradients, built: Built) -> Tensor:
        """[m, m] float64, on the CPU or, not waited for, on the gradients' device."""

    def gram_in_metric(self, grads: Gradients, metric: Metric, built: Built) -> Tensor:
        """[2, m, m] float64, where `gram` leaves it: the same bits, and Σ ⟨g_i, D g_j⟩."""

    def products(self, grads: Gradients, built: Built) -> Tensor:
        """[n, m, m] float64 on the CPU: of each tensor, whatever the others are.

        Where tensors are on the CPU, `gram` is their sum as `summed` forms it.
        """

    def combine(self, grads: Gradients, coefficients: Tensor, out: Sequence[Tensor]) -> None:
        """Write Σ α_i g_i."""

    def combine_adamw(self, update: Update, coefficients: Tensor, built: Built) -> None:
        """One AdamW step along Σ α_i g_i."""

    def weight_grad(
        self,
        x: Tensor,
        dy: Tensor,
        bounds: Sequence[int],
        U: Tensor | None,
        out: Tensor,
        fresh: bool,
        products: bool = False,
        look: Callable[[Tensor], None] | None = None,
    ) -> Tensor | None:
        """Write or add the m weight gradients of a layer.

        Returns:
            With `products`, those of `out`, [m, m] float64 on its device; None where they are not
            to be had on the way. On the CPU they are what `products` gives, to the bit.
        """
