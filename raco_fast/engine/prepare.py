"""`prepare(model)`: put a `Tap` behind every layer whose trained parameters have a rule.

A tap is a forward hook. It changes nothing that a model computes, and nothing that the model's
modules hold; `remove()` takes the hooks away again. Whether a call may be tapped is decided at the
call: the layer's class, mode or arguments may have changed since `prepare`.
"""

import gc
import inspect
from collections.abc import Callable, Hashable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from raco_fast.distributed.dtensor import any_dtensor
from raco_fast.distributed.fsdp2 import watch
from raco_fast.engine.declaration import declared
from raco_fast.engine.layer_rules import rule_for
from raco_fast.engine.light_tap import left
from raco_fast.engine.tap import (
    ANCHOR,
    Checks,
    NotExactError,
    Site,
    remember_names,
    remember_reason,
    tapped,
)

CHECK_EVERY = 128
"""At this distance a spot check, one more backward pass, costs a run less than 1 % of its time."""


class Prepared:
    """What `prepare` did to a model; also a context manager that undoes it at its end.

    `without_rule`: the names of trained parameters that no rule covers.
    """

    def __init__(self, without_rule: tuple[str, ...]) -> None:
        self.without_rule = without_rule
        self._hooks: list[RemovableHandle] = []

    def remove(self) -> None:
        """Undo it; a graph that exists already keeps its taps."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> "Prepared":
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def prepare(
    model: nn.Module, *, strict: bool = False, check_every: int | None = CHECK_EVERY
) -> Prepared:
    """Make a model ready for `backward(losses, scores=...)`.

    Every layer that owns trained parameters gets a tap, if a rule is known for it. Neither its
    outputs nor its ordinary gradients change. Call it again after layers were added or
    parameters unfrozen; layers that have their tap keep it, with the options it was given.

    Args:
        model: any module. It may be wrapped by PEFT and use non-reentrant checkpointing, autocast
            and compiled blocks (prepare first, then compile; the tapped layers run uncompiled).
        strict: raise where one backward pass would not be exact: here, where a parameter has no
            rule, and in `backward`. Otherwise `backward` warns, says why, and takes one backward
            pass per objective.
        check_every: compare the gradients of one backward pass with those of an ordinary one at the
            calls 1, 2, 4, 8 ... and then at every `check_every`-th, and where a layer or the graph
            looks new; None: never. A check costs one more backward pass.
    Raises:
        TypeError: `model` is not a module.
        NotExactError: `strict`, and a trained parameter has no rule; a ValueError.
        ValueError: `check_every` is not a number of calls.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch module, got a {type(model).__name__}")
    if check_every is not None and not (isinstance(check_every, int) and check_every >= 1):
        raise ValueError(
            f"`check_every` must be a number of calls, at least 1, got {check_every}; None "
            f"switches the checks off"
        )
    checks, found, without_rule = Checks(strict, check_every), {}, []
    for name, module in model.named_modules():
        trained = [n for n, p in module.named_parameters(recurse=False) if p.requires_grad]
        if not trained or any(isinstance(h, _TapBehind) for h in module._forward_hooks.values()):
            continue
        tap = _TapBehind(name, checks)
        site = tap.site(module)
        if site is None or site.rule is None:
            without_rule += [f"{name}.{n}".lstrip(".") for n in trained]
        else:
            found[module] = tap
    if strict and without_rule:
        raise NotExactError(
            f"`model` has trained parameters in layers without a rule: {without_rule}; give their "
            f"layers one with register_layer_rule, freeze them, or use strict=False"
        )
    remember_names(model)
    watch(model)
    prepared = Prepared(tuple(without_rule))
    for module, tap in found.items():
        # First of the hooks: it has to see what the layer itself gave.
        hook = module.register_forward_hook(tap, prepend=True, with_kwargs=True)
        prepared._hooks.append(hook)
    return prepared


class _TapBehind:
    """The forward hook of one layer."""

    def __init__(self, layer: str, checks: Checks) -> None:
        self.layer, self.checks = layer, checks
        self._sites: dict[Hashable, Site | None] = {}
        self._state: list[Any] = []
        self._site: Site | None = None
        self._uncompiled = _uncompiled()

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        # The switch that keeps code from being compiled costs as much as all that is asked here.
        run = self._uncompiled if torch.compiler.is_compiling() else _tapped
        return run(self, module, args, kwargs, output)

    def __reduce__(self) -> tuple[Any, ...]:
        # A model is copied and pickled with its taps, but a rule may be a lambda.
        return _TapBehind, (self.layer, self.checks)

    def site(self, module: nn.Module) -> Site | None:
        """What the module is now, decided once for each thing it has been; None: nothing trained.

        Nothing of it holds the module or a parameter, which would live as long as the hook.
        """
        kind: Any = type(module)
        state: list[Any] = []
        for name, p in module._parameters.items():
            if p is not None:
                state += name, type(p), p.requires_grad
        # "forward" among what is the module's own: it was replaced.
        state += kind, kind.forward, module.training, "forward" in module.__dict__
        if state != self._state:
            self._state, key = state, tuple(state)
            if key not in self._sites:
                self._sites[key] = self._decide(module)
            self._site = self._sites[key]
        return self._site

    def _decide(self, module: nn.Module) -> Site | None:
        own = module._parameters.items()
        trained = {name: p for name, p in own if p is not None and p.requires_grad}
        if not trained:
            return None
        rule, obstacle = rule_for(module), None
        if any_dtensor(trained.values()):
            obstacle = "is tensor-parallel"
        elif rule is None:
            obstacle = "was changed after it was prepared, to something without a rule"
        look = (type(module).__name__, module.training, *trained)
        return Site(self.layer, tuple(trained), rule, look, obstacle)


@cache
def _uncompiled() -> Callable[..., Any]:
    """`_tapped`, kept out of compiled code, which would freeze the backward pass as it was traced.

    Not by a decorator, which would load torch's compiler with the package.
    """
    disabled: Callable[..., Any] = torch.compiler.disable(_tapped)  # type: ignore[no-untyped-call]
    # Graphs of prepared models are passed through more than once; the compiler would reuse their
    # memory in the first pass, and then refuse the second.
    torch._functorch.config.donated_buffer = False
    # The compiler, loaded just now, leaves frames in a cycle, and through them their callers'
    # models: on a GPU that is memory of the size of a model.
    gc.collect()
    return disabled


def _tapped(
    tap: _TapBehind, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    if not torch.is_grad_enabled():
        return output
    site = tap.site(module)
    if site is None:
        return output
    obstacle, x = _only_argument(module, args, kwargs)
    if obstacle is None and not (isinstance(output, Tensor) and output.requires_grad):
        obstacle = "returned something else than one tensor with a gradient"
    if obstacle is None and next(iter(module._forward_hooks.values())) is not tap:
        obstacle = "has another hook that came before its tap"
    own: dict[str, Any] = module._parameters
    leaves = tuple([own[name] for name in site.names])
    obstacle = obstacle or site.obstacle
    if obstacle is not None:
        remember_reason(leaves, f"layer {tap.layer!r} {obstacle}")
        return output
    of_call = site, tap.checks, module, leaves, declared()
    return output if left(of_call, output, x) else tapped(of_call, output, x, ANCHOR)


def _only_argument(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[str | None, Any]:
    """(why a call with these arguments cannot be tapped, its argument)."""
    alone = len(args) == 1 and not kwargs  # as nearly always
    if alone or (args and all(value is None for value in (*args[1:], *kwargs.values()))):
        x = args[0]
    else:
        given = [name for name, value in kwargs.items() if value is not None]
        first = list(inspect.signature(type(module).forward).parameters)[1:2]
        if args or given != first:
            return "was called with further arguments, which its rule does not see", None
        x = kwargs[first[0]]
    return (None, x) if isinstance(x, Tensor) else ("was not called with a tensor", None)
