"""A common direction in p.grad, where GradScaler's factor may still be in the gradients.

The norm ‖G0‖ is known from the Gram, so clipping needs no pass of its own. But losses that a
GradScaler has scaled give a norm that is too large by its factor, which is known only when the
gradients are unscaled. `ClippedGrad` is a gradient that corrects its clip factor then. The
coefficients of some rules change with that factor: their direction had to be found from unscaled
gradients, so to unscale it afterwards is an error.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from raco_fast.distributed.dtensor import from_local, is_dtensor, local
from raco_fast.solver.registry import label_of
from raco_fast.solver.rule import Rule

_UNSCALE = torch._amp_foreach_non_finite_check_and_unscale_
_UNSCALES = (_UNSCALE, torch.ops.aten._amp_foreach_non_finite_check_and_unscale_.default)
_FUSED = (torch._fused_adam_, torch._fused_adamw_, torch._fused_sgd_, torch._fused_adagrad_)
_REPLACE = (Tensor.zero_, Tensor.fill_, Tensor.copy_, torch._foreach_zero_, torch._foreach_copy_)


def clip_factor(norm: float, max_grad_norm: float | None) -> float:
    """The factor of `torch.nn.utils.clip_grad_norm_` for a gradient whose norm is known."""
    return 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / (norm + 1e-6))


def along(
    grad: Tensor, norm: float, limit: float | None, rule: Rule, *, unbiased: bool = False
) -> Tensor:
    """One parameter's part of a common direction, as p.grad holds it until it is unscaled.

    Args:
        grad: times `clip_factor(norm, limit)` already; its memory is shared.
        norm: of the whole direction, over all parameters, before it was clipped.
        limit: max_grad_norm.
        rule: that gave the coefficients.
        unbiased: they are of gram="unbiased", which goes on from the gradients of steps before.
    """
    invariant = rule.scale_invariant and not unbiased
    if limit is None and invariant:
        return grad
    name = label_of(rule) + " with gram='unbiased'" * unbiased
    if is_dtensor(grad):
        return from_local(ScaledShard.of(local(grad), name), grad)
    return ClippedGrad.of(grad, norm, limit, None if invariant else name)


class ClippedGrad(torch.Tensor):
    """p.grad, clipped as if it were not scaled; unscaling it clips it anew by its true norm.

    A tensor like any other, with memory of its own. Its norm, its limit and the name of a rule that
    forbids unscaling are dropped when it is overwritten; results of operations and pickles are
    plain tensors.
    """

    _norm: float | Tensor
    _limit: float | None
    _rule: str | None

    @classmethod
    def of(
        cls, grad: Tensor, norm: float | Tensor, limit: float | None, rule: str | None = None
    ) -> "ClippedGrad":
        """As `along`; `rule`: the name of one whose coefficients change with the scale."""
        clipped = grad.as_subclass(cls)
        clipped._norm, clipped._limit, clipped._rule = norm, limit, rule
        return clipped

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            if func in _FUSED and kwargs.get("grad_scale") is not None:
                inverse = kwargs["grad_scale"].double().reciprocal()
                refuse_unscaling(args[1], inverse)
                torch._foreach_mul_(args[1], inverse)
                _clip_anew(args[1], inverse)
                kwargs["grad_scale"] = None
            if func is _UNSCALE:
                refuse_unscaling(args[0], args[2])
            result = func(*args, **kwargs)
            if func is _UNSCALE:
                _clip_anew(args[0], args[2])
            elif func in _REPLACE:
                for grad in args[0] if isinstance(args[0], list | tuple) else args[:1]:
                    if isinstance(grad, ClippedGrad):
                        grad._limit = grad._rule = None
            return result

    def __deepcopy__(self, memo: dict[int, Any]) -> "ClippedGrad":
        kept = self._norm, self._limit, self._rule
        memo[id(self)] = copy = ClippedGrad.of(plain(self).clone(), *kept)
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        return plain(self).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


class ScaledShard(torch.Tensor):
    """The shard of a DTensor's p.grad that had to be unscaled before: to do it now is an error.

    What a DTensor's shards are told of an operation does not suffice to clip them anew.
    """

    _rule: str

    @classmethod
    def of(cls, part: Tensor, rule: str) -> "ScaledShard":
        """A part of a direction, whose memory is shared."""
        shard = part.as_subclass(cls)
        shard._rule = rule
        return shard

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in _UNSCALES and float(args[2]) != 1.0:
                raise RuntimeError(
                    "a direction of DTensors that was clipped, or found by a rule whose "
                    "coefficients change with the scale of the gradients, cannot be unscaled "
                    "afterwards; call scaler.unscale_(optimizer) before combine, or use "
                    "ClippedCAGradAdamW"
                )
            result = func(*args, **dict(kwargs or {}))
            # DTensor.from_local takes a view.
            return cls.of(result, args[0]._rule) if func is Tensor.view_as else result


def plain(grad: Tensor) -> Tensor:
    """The gradient as an ordinary tensor, with the same memory."""
    if is_dtensor(grad):
        part = local(grad)
        return from_local(part.as_subclass(Tensor), grad) if _is_scaled(part) else grad
    return grad.as_subclass(Tensor) if isinstance(grad, ClippedGrad) else grad


def _is_scaled(part: Tensor) -> bool:
    return isinstance(part, ScaledShard)


def refuse_unscaling(grads: Iterable[Tensor | None], inverse: Tensor) -> None:
    """Raise RuntimeError where a direction would be multiplied by `inverse` that forbids it.

    Waits for the device where there is one. GradScaler looks for overflows with a factor of 1.
    """
    shards = (g if g is None else local(g) for g in grads)
    known = (g._rule for g in shards if isinstance(g, ClippedGrad | ScaledShard))
    rule = next((name for name in known if name is not None), None)
    if rule is not None and float(inverse) != 1.0:
        raise RuntimeError(
            f"the direction of the rule {rule} was found from gradients times {1 / inverse:g}, a "
            f"GradScaler's factor, with which its coefficients change: unscaled now, it would have "
            f"the wrong length. Call scaler.unscale_(optimizer) before combine, or use "
            f"ClippedCAGradAdamW, and not mode 'gram_first' (a rule of your own whose coefficients "
            f"do not change says so: scale_invariant = True)"
        )


@torch.no_grad()
def _clip_anew(grads: Sequence[Tensor], inverse: Tensor) -> None:
    """After a multiplication by `inverse`, without waiting for the device."""
    inverse = inverse.double()
    known: dict[int, tuple[float | Tensor, Tensor, Tensor]] = {}  # one norm, many gradients
    for grad in grads:
        if isinstance(grad, ClippedGrad) and grad._limit is not None:
            before = grad._norm
            if id(before) not in known:
                after = inverse * before
                was, is_now = (_factor(n, grad._limit) for n in (after / inverse, after))
                known[id(before)] = before, is_now / was, after
            _, ratio, grad._norm = known[id(before)]
            grad.mul_(ratio)


def _factor(norm: Tensor, limit: float) -> Tensor:
    """`clip_factor` on the device."""
    return (limit / (norm + 1e-6)).clamp(max=1.0)
