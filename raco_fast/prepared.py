"""`prepare(model)`: put a `Tap` behind every layer whose trained parameters have a rule.

Nothing else changes: outputs, parameters, state_dict and a plain `loss.backward()` stay what they
were, and `remove()` takes the taps out again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from raco_fast.layers import Rule, rule_for
from raco_fast.segments import declared
from raco_fast.tap import Site, Tap, remember_names


class Prepared:
    """What `prepare` did to a model; also a context manager that undoes it at its end.

    `without_rule`: the names of trained parameters that no rule covers.
    """

    def __init__(self, without_rule: tuple[str, ...]) -> None:
        self.without_rule = without_rule
        self._layers: list[nn.Module] = []
        self._hooks: list[RemovableHandle] = []

    def remove(self) -> None:
        """Undo it; a graph that exists already keeps its taps."""
        for layer in self._layers:
            del layer.forward
        for hook in self._hooks:
            hook.remove()
        self._layers, self._hooks = [], []

    def __enter__(self) -> Prepared:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Undo it."""
        self.remove()


def prepare(model: nn.Module, *, strict: bool = False) -> Prepared:
    """Make a model ready for `backward(losses, scores=...)`.

    Every layer that owns trained parameters gets a tap, if a rule is known for it. Call it again
    after layers were added or parameters unfrozen; layers that have their tap keep it.

    Args:
        model: any module whose outputs for one sequence depend on that sequence only. It may be
            wrapped by PEFT and use non-reentrant checkpointing, autocast and compiled blocks
            (prepare first, then compile; the tapped layers run uncompiled).
        strict: raise where a parameter has no rule. Otherwise the first `backward` with scores
            warns, names it and falls back to one backward pass per objective.
    Raises:
        TypeError: `model` is not a module.
        ValueError: `strict`, and a trained parameter has no rule.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch module, got a {type(model).__name__}")
    found: dict[str, tuple[nn.Module, Rule]] = {}
    without_rule = []
    for name, module in model.named_modules():
        trained = [n for n, p in module.named_parameters(recurse=False) if p.requires_grad]
        if not trained or isinstance(vars(module).get("forward"), _Forward):
            continue
        rule = rule_for(module)
        if rule is None:
            without_rule += [f"{name}.{n}".lstrip(".") for n in trained]
        else:
            found[name] = module, rule
    if strict and without_rule:
        raise ValueError(
            f"`model` has trained parameters in layers without a rule: {without_rule}; give their "
            f"layers one with register_rule, freeze them, or use strict=False"
        )
    remember_names(model)
    return _install(model, found, tuple(without_rule), strict)


# Not a ContextVar: on a GPU, checkpointing runs forward passes in autograd's threads.
_taps_off = 0


@contextmanager
def without_taps() -> Iterator[None]:
    """Forward passes inside the block are those of a model that was not prepared."""
    global _taps_off
    _taps_off += 1
    try:
        yield
    finally:
        _taps_off -= 1


def _install(
    model: nn.Module,
    found: Mapping[str, tuple[nn.Module, Rule]],
    without_rule: tuple[str, ...],
    strict: bool,
) -> Prepared:
    prepared = Prepared(without_rule)
    batch = _BatchSize()
    lookups = {name for name, (module, _) in found.items() if isinstance(module, nn.Embedding)}
    for name, module in model.named_modules():
        if any(lookup.startswith(f"{name}." if name else "") for lookup in lookups - {name}):
            prepared._hooks.append(module.register_forward_pre_hook(batch.enter, with_kwargs=True))
            prepared._hooks.append(module.register_forward_hook(batch.leave, always_call=True))
    for name, (module, rule) in found.items():
        # An attribute of the instance, which nn.Module.__call__ finds before the class's method.
        module.forward = _Forward(module, name, rule, batch, strict)
        prepared._layers.append(module)
    return prepared


class _BatchSize:
    """The input's shape in the modules under way that contain an embedding.

    Positions are looked up once ([1, T] or [T]) and broadcast over the batch, where autograd adds
    the sequences up; expanded before the lookup, each sequence has rows of its own.
    """

    def __init__(self) -> None:
        self._shapes: list[torch.Size] = []

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim >= 2]
        around = self._shapes[-1] if self._shapes else torch.Size()
        self._shapes.append(inputs[0].shape if inputs else around)

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._shapes.pop()

    def expanded(self, ids: Tensor, positions: bool) -> Tensor:
        """ids with a row for each sequence, if they are `positions` or cannot be anything else."""
        if not self._shapes or len(self._shapes[-1]) < 2:
            return ids
        batch, length = self._shapes[-1][:2]
        index = declared()
        if batch == 1 or (index is not None and len(index) != batch):
            return ids
        row = ids.shape == (length,) and (positions or length != batch)
        return ids.expand(batch, length) if row or ids.shape == (1, length) else ids


class _Forward:
    """Stands in for a layer's `forward`."""

    def __init__(
        self, module: nn.Module, name: str, rule: Rule, batch: _BatchSize, strict: bool
    ) -> None:
        self.module, self.name, self.rule = module, name, rule
        self.batch, self.strict = batch, strict
        self.positions = False  # whether a 1-D input was found to hold those
        # Compiled code would freeze the backward pass as it was traced, without a collector.
        # Disabled here and not by a decorator: that would load the compiler with the package.
        self._uncompiled = torch.compiler.disable(_tapped)  # type: ignore[no-untyped-call]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._uncompiled(self, args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        # A model is copied and pickled with its taps; what `disable` returns cannot be.
        return _Forward, (self.module, self.name, self.rule, self.batch, self.strict)


def _tapped(site: _Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    module = site.module
    trained = {n: p for n, p in module._parameters.items() if p is not None and p.requires_grad}
    forward = type(module).forward.__get__(module)
    if not trained or _taps_off or not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    if not args:
        bound = inspect.signature(forward).bind(**kwargs)
        args, kwargs = bound.args, bound.kwargs
    x, *others = args
    if isinstance(module, nn.Embedding):
        given, x = x, site.batch.expanded(x, site.positions)
        site.positions = x.ndim > given.ndim
    y = _with_detached(module, trained, lambda: forward(x, *others, **kwargs))
    if not isinstance(y, Tensor):
        raise TypeError(
            f"layer {site.name!r} ({type(module).__name__}) returns a {type(y).__name__}, and a "
            f"rule is for layers that return one tensor; wrap what it computes, or freeze it"
        )
    place = Site(site.name, module, site.rule, tuple(trained), declared(), site.strict)
    return Tap.apply(place, y, x.detach(), *trained.values())  # type: ignore[no-untyped-call]


def _with_detached(
    module: nn.Module, trained: Mapping[str, Tensor], call: Callable[[], Any]
) -> Any:
    own = module._parameters
    try:
        for name, p in trained.items():
            own[name] = p.detach()  # type: ignore[assignment]
        return call()
    finally:
        for name, p in trained.items():
            own[name] = p  # type: ignore[assignment]
