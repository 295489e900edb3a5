"""What `weight_grad.py` is called with, and the rules that it relies on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

MAX_UNROLLED = 8
FORMS = ("direct", "running")
INPUTS = (torch.bfloat16, torch.float16)
OUTPUTS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Arguments:
    """Of `weight_grad.weight_grad`, which describes them."""

    x: Tensor
    dy: Tensor
    segments: Sequence[int]
    coefficients: Tensor
    out: Sequence[Tensor] | None
    accumulate: bool
    form: str

    def check(self) -> None:
        """Raise ValueError if they break a rule."""
        broken = self._broken_rule()
        if broken is not None:
            raise ValueError(broken)

    def _broken_rule(self) -> str | None:
        """The rule, with the cure; None if none is broken."""
        return self._rule_of_rows() or self._rule_of_coefficients() or self._rule_of_out()

    def _rule_of_rows(self) -> str | None:
        x, dy, segments = self.x, self.dy, self.segments
        if x.dtype not in INPUTS or dy.dtype != x.dtype:
            return f"`x` and `dy` must be bfloat16 or float16, got {x.dtype} and {dy.dtype}; cast"
        for name, rows in (("x", x), ("dy", dy)):
            if rows.dim() != 2 or len(rows) != len(x) or not rows.is_contiguous():
                return (
                    f"`{name}` must be [{len(x)} tokens, features] and contiguous, got shape "
                    f"{list(rows.shape)}, strides {rows.stride()}; "
                    f"pass {name}.flatten(0, -2).contiguous()"
                )
        if segments[0] != 0 or segments[-1] != len(x) or any(a > b for a, b in pairwise(segments)):
            return (
                f"`segments` must rise from 0 to {len(x)}, the number of rows, got "
                f"{list(segments)}; make rows of no sequence a segment with coefficients 0"
            )
        return None

    def _rule_of_coefficients(self) -> str | None:
        coefficients, host = self.coefficients, torch.device("cpu")
        m, S = len(coefficients), len(self.segments) - 1
        if coefficients.dtype != torch.float32 or coefficients.shape != (m, S) or m == 0:
            return (
                f"`coefficients` must be float32 [m, {S}], a column per segment, got "
                f"{coefficients.dtype} {list(coefficients.shape)}; pass coefficients.float()"
            )
        if coefficients.device not in (self.x.device, host):
            return (
                f"`coefficients` must be on {self.x.device} or cpu, got {coefficients.device}; "
                f"move them"
            )
        if self.form not in FORMS:
            return f"`form` must be one of {FORMS}, got {self.form!r}; ask weight_grad_plan.choose"
        if self.form == "running" and (coefficients.device != host or (coefficients[0] != 1).any()):
            return (
                "`coefficients` of the form 'running' must be ratios on the CPU with a first row "
                f"of ones, got {coefficients[0].tolist()}; use running_ratios, or the form 'direct'"
            )
        return None

    def _rule_of_out(self) -> str | None:
        m, out, device = len(self.coefficients), self.out, self.x.device
        if out is None:
            if m > MAX_UNROLLED or self.accumulate:
                return (
                    f"`out` must be given for more than {MAX_UNROLLED} objectives and to "
                    f"accumulate, got None, m = {m}, accumulate={self.accumulate}; pass m tensors"
                )
            return None
        if len(out) != m:
            return (
                f"`out` must be {m} tensors, one per objective, got {len(out)}; pass one for each"
            )
        shape = (self.dy.shape[1], self.x.shape[1])
        for i, g in enumerate(out):
            of_one_kind = g.dtype in OUTPUTS and g.dtype == out[0].dtype and g.device == device
            if not of_one_kind or g.shape != shape or not g.is_contiguous():
                return (
                    f"`out` must be contiguous {list(shape)} tensors on {device}, all bfloat16, "
                    f"float16 or float32, got number {i}: {g.dtype} {list(g.shape)}, strides "
                    f"{g.stride()}, on {g.device}; pass torch.empty{shape} for each"
                )
        return None
