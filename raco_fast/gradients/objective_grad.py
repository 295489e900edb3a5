"""`ObjectiveGrad`: what p.grad holds between backward passes when there are several objectives.

Why a stand-in in p.grad rather than a dictionary in the optimizer: clearing p.grad
(`model.zero_grad()`, a trainer, `opt.zero_grad()`) clears every objective's gradient, `GradScaler`
finds and unscales all m buffers, and code that reads p.grad as if there were only one gradient
(`clip_grad_norm_`, a forgotten plain `loss.backward()`) gets an error instead of a wrong number.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain, compress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raco_fast.distributed.dtensor import any_dtensor, local
from raco_fast.distributed.processes import Processes
from raco_fast.gradients.buffer_pool import HostMemory, empty
from raco_fast.gradients.norm_clip import plain
from raco_fast.gradients.products import Products

_aten = torch.ops.aten
_UNSCALE = _aten._amp_foreach_non_finite_check_and_unscale_.default
_IN_PLACE_ON_LISTS = (_UNSCALE, _aten._foreach_zero_.default)
# What `model.to`, `half`, `cuda`, `to_empty` ... make of a gradient.
_CONVERSIONS = (
    _aten._to_copy.default,
    _aten.empty_like.default,
    _aten.clone.default,
    _aten._pin_memory.default,
)


class ObjectiveGrad(torch.Tensor):
    """The gradients of several objectives at one parameter.

    A tensor of p's shape, dtype and device without storage; `buffers` are the m real gradients
    (None: that objective did not touch p). Where `unreduced` is not None they are this process's
    own, and are to be averaged over those processes when a step is taken. `products` are those of
    the buffers where a pass has taken them, and only as long as nobody else has `escaped` buffers,
    whose writes torch need not count. `unscaled` is what GradScaler has
    multiplied them by, None where nothing; `handed_out` are the buffers' versions when somebody got
    them who may not write. Zeroing, GradScaler's unscaling and the conversions of a module
    (`model.to`, ...) reach every buffer; any other operation raises RuntimeError.
    """

    objectives: tuple[str, ...]  # not `names`: torch 2.11's named tensors own that attribute
    buffers: list[Tensor | None]
    unreduced: Processes | None
    products: Products | None
    escaped: bool
    unscaled: Tensor | None
    handed_out: tuple[int, ...] | None

    # Attribute reads (shape, device, is_sparse) need no override and stay fast.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, p: Tensor, objectives: tuple[str, ...]) -> "ObjectiveGrad":
        """A stand-in for gradients at p, all of them still None."""
        grad: ObjectiveGrad = torch.Tensor._make_wrapper_subclass(
            cls, p.shape, dtype=p.dtype, device=p.device
        )
        grad.objectives = objectives
        grad.buffers = [None] * len(objectives)
        grad.unreduced = grad.products = grad.unscaled = grad.handed_out = None
        grad.escaped = False
        return grad

    @property
    def data(self) -> Tensor:
        """As torch's. `model.to` sets it to a converted gradient, whose buffers count then."""
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined,no-any-return]

    @data.setter
    def data(self, converted: Tensor) -> None:
        if not isinstance(converted, ObjectiveGrad):
            raise TypeError(
                f"p.grad holds one gradient per objective {self.objectives}, so its `data` cannot "
                f"be one gradient, got a {type(converted).__name__}; set p.grad itself"
            )
        torch.Tensor.data.__set__(self, converted)  # type: ignore[attr-defined]
        self.buffers, self.products = converted.buffers, None

    def share_memory_(self) -> "ObjectiveGrad":
        """As torch's, for every buffer, to which other processes may write from now on."""
        self.escape()
        for buffer in self.present:
            buffer.share_memory_()  # type: ignore[no-untyped-call]
        return self

    @property
    def present(self) -> list[Tensor]:
        """The buffers of the objectives that touched p."""
        return [g for g in self.buffers if g is not None]

    def escape(self) -> None:
        """Note that somebody else has the buffers, and may write to them in ways nobody counts."""
        self.products, self.escaped = None, True

    @property
    def versions(self) -> tuple[int, ...]:
        """What changes when somebody writes to the buffers in a way that torch counts."""
        return tuple(local(g)._version for g in self.present)

    def allocate(self, host_memory: HostMemory) -> Tensor:
        """Fresh memory [m, *shape] for all objectives, whose slices become the buffers."""
        shape = (len(self.objectives), *self.shape)
        memory = empty(shape, self.dtype, self.device, host_memory)
        self.buffers, self.products, self.escaped = list(memory.unbind()), None, False
        return memory

    def stacked(self, host_memory: HostMemory) -> Tensor:
        """The buffers as one tensor [m, *shape]; missing ones become zeros."""
        if (memory := in_one(self.buffers)) is not None:
            return memory
        buffers = self.buffers
        memory = self.allocate(host_memory)
        for target, g in zip(memory, buffers, strict=True):
            target.zero_() if g is None else target.copy_(g)
        return memory

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        # Below autograd, and unscaling anywhere, nothing counts that a buffer was written.
        if func is _aten.zero_.default:
            args[0].products = args[0].unscaled = args[0].handed_out = None
            for buffer in args[0].present:
                buffer.zero_()
            return args[0]
        if func in _IN_PLACE_ON_LISTS:
            # GradScaler looks for overflows with a factor of 1.
            if func is not _UNSCALE or not args[2].is_cpu or float(args[2]) != 1.0:
                for g in args[0]:
                    if isinstance(g, ObjectiveGrad):
                        g.products = None
                        g.unscaled = None if func is not _UNSCALE else _times(g.unscaled, args[2])
            nested = [g.present if isinstance(g, ObjectiveGrad) else [g] for g in args[0]]
            flat = [buffer for buffers in nested for buffer in buffers]
            if flat:
                func(flat, *args[1:], **(kwargs or {}))
            unreduced = [g.unreduced for g in args[0] if isinstance(g, ObjectiveGrad)]
            processes = next((found for found in unreduced if found is not None), None)
            if func is _UNSCALE and processes is not None:
                # One process's overflow is everybody's: scales that differ would never meet again.
                args[1].copy_(processes.largest(args[1]))
            return None
        if func in _CONVERSIONS:
            return args[0]._converted(lambda g: func(g, *args[1:], **(kwargs or {})))
        names = next((a.objectives for a in args if isinstance(a, ObjectiveGrad)), ())
        raise RuntimeError(
            f"p.grad holds one gradient per objective {names}, so {func} is not defined on it; "
            f"call loss.backward() inside `with opt.objective(name):`, clip with max_grad_norm=, "
            f"read the gradients with opt.gradients.of(p), and call zero_grad() before a model is "
            f"converted in such a way"
        )

    def _converted(self, convert: Callable[[Tensor], Tensor]) -> "ObjectiveGrad":
        buffers = [None if g is None else convert(g) for g in self.buffers]
        like = next((g for g in buffers if g is not None), None)
        if like is None:
            like = convert(torch.empty(self.shape, dtype=self.dtype, device=self.device))
        converted = ObjectiveGrad(like, self.objectives)
        converted.buffers, converted.unreduced = buffers, self.unreduced
        converted.unscaled = self.unscaled
        return converted

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        touched = [n for n, g in zip(self.objectives, self.buffers, strict=True) if g is not None]
        return f"ObjectiveGrad(shape={list(self.shape)}, objectives={touched})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "ObjectiveGrad":
        memo[id(self)] = copy = self._converted(torch.clone)
        return copy


def _times(factor: Tensor | None, another: Tensor) -> Tensor:
    return another.clone() if factor is None else factor * another


def in_one(buffers: Sequence[Tensor | None]) -> Tensor | None:
    """[m, *shape] over m contiguous buffers that lie at equal distances in one block, else None."""
    first = buffers[0]
    if first is None or not first.is_contiguous():
        return None
    block, start = first.untyped_storage().data_ptr(), first.storage_offset()
    starts = []
    for g in buffers:
        # Converted in place (`model.half()`, ...) they may have become unlike each other.
        if g is None or g.dtype != first.dtype or not g.is_contiguous():
            return None
        if g.untyped_storage().data_ptr() != block:
            return None
        starts.append(g.storage_offset())
    step = starts[1] - start if len(starts) > 1 else first.numel()
    if step < first.numel() or starts != [start + k * step for k in range(len(starts))]:
        return None
    return first.as_strided((len(starts), *first.shape), (step, *first.stride()), start)


class Touched(NamedTuple):
    """Parameters that some objective has a gradient for, and m lists of those gradients."""

    params: list[Tensor]
    grads: list[list[Tensor | None]]


def stand_in_of(p: Tensor, names: tuple[str, ...]) -> ObjectiveGrad | None:
    """p's gradients of the objectives `names`, or None where p has no gradient.

    Raises:
        RuntimeError: p.grad was filled outside of any objective, or belongs to other ones.
    """
    grad = p.grad
    if grad is None:
        return None
    if not isinstance(grad, ObjectiveGrad) and is_zero(grad):
        # Zeros are the same gradient whichever objective they belong to.
        p.grad = held = ObjectiveGrad(p, names)
        held.buffers[0] = plain(grad)
        return held
    if not isinstance(grad, ObjectiveGrad):
        raise RuntimeError(
            f"p.grad of a parameter of shape {list(p.shape)} was filled outside of an objective "
            f"(by a plain loss.backward(), or it is the direction of combine or gram_first), so it "
            f"is not known which of {names} it belongs to; use backward(losses) or "
            f"`with objective(name): loss.backward()`, and zero_grad() before the next step"
        )
    if grad.objectives != names:
        raise RuntimeError(
            f"p.grad of a parameter of shape {list(p.shape)} holds gradients of the objectives "
            f"{grad.objectives}, not of {names}; call zero_grad() of their owner first"
        )
    return grad


def is_zero(grad: Tensor) -> bool:
    """Whether a gradient, or each of a stand-in's, is dense and zero; waits for the device.

    Of a DTensor, the shard that lies here.
    """
    if isinstance(grad, ObjectiveGrad):
        return all(map(is_zero, grad.present))
    grad = local(plain(grad))
    return type(grad) is Tensor and grad.layout == torch.strided and not grad.any()


def touched(params: Sequence[Tensor], names: tuple[str, ...]) -> Touched | None:
    """What the stand-ins of `params` hold; None if some p.grad is no stand-in for `names`."""
    held, columns = [], []
    for p in params:
        grad = p.grad
        if grad is None:
            continue
        if type(grad) is not ObjectiveGrad or grad.objectives != names:
            return None
        held.append(p)
        columns.append(grad.buffers)
    return Touched(held, [list(one) for one in zip(*columns, strict=True)] or [[] for _ in names])


def known_products(touched: Touched) -> list[Tensor | None]:
    """The products [m, m] of each parameter's gradients where they were kept and still fit."""
    found: list[Tensor | None] = []
    for p, column in zip(touched.params, zip(*touched.grads, strict=True), strict=True):
        kept = p.grad.products if type(p.grad) is ObjectiveGrad else None
        found.append(kept.values if kept is not None and kept.are_of(column) else None)
    return found


def along_p_grad(params: Sequence[Tensor]) -> Touched:
    """What p.grad itself holds, as the gradients of one objective."""
    held = [p for p in params if p.grad is not None]
    return Touched(held, [[plain(p.grad) for p in held]])  # type: ignore[arg-type]


def of_objectives(touched: Touched, chosen: Sequence[bool]) -> Touched:
    """The same without the gradients of the other objectives, and what only those touch."""
    chosen_lists = compress(touched.grads, chosen)
    held = [any(g is not None for g in column) for column in zip(*chosen_lists, strict=True)]
    grads = [
        [g if kept else None for g in compress(one, held)]
        for one, kept in zip(touched.grads, chosen, strict=True)
    ]
    return Touched(list(compress(touched.params, held)), grads)


def here(touched: Touched) -> Touched:
    """The parts that lie on this process: shards of DTensors, all of other tensors."""
    if not any_dtensor(touched.params):
        return touched
    grads = [[None if g is None else local(g) for g in one] for one in touched.grads]
    return Touched([local(p) for p in touched.params], grads)


def joined(groups: Sequence[Touched]) -> Touched:
    """Several groups as one."""
    if len(groups) == 1:
        return groups[0]
    lists = zip(*(group.grads for group in groups), strict=True)
    params = [p for group in groups for p in group.params]
    return Touched(params, [list(chain.from_iterable(parts)) for parts in lists])
