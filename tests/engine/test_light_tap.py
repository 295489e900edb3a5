"""Light taps: what they are left at, and that nobody can tell them from taps with a function."""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

import raco_fast
from raco_fast.engine import layer_rules, light_tap
from raco_fast.engine.light_tap import LightTap
from raco_fast.engine.nodes import role_of, tap_at
from raco_fast.gradients.objective_gradients import ObjectiveGradients

WEIGHTS = {"a": 0.5, "b": 0.5}


@pytest.fixture(autouse=True)
def _few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(light_tap, "_FEW_ROWS", 1 << 15)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


class Layers(nn.Module):
    """Layers one after the other; `between` is done to what each gives."""

    def __init__(self, *layers: nn.Module, between: Callable[[Tensor], Tensor] = torch.tanh):
        super().__init__()
        self.layers, self.between = nn.ModuleList(layers), between

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.between(layer(x))
        return x


class First(nn.Linear):
    """A layer that gives one of the two outputs of its last node."""

    def forward(self, x: Tensor) -> Tensor:
        self.second: Tensor
        first, self.second = torch.var_mean(super().forward(x), -1, keepdim=True)
        return first


class Doubled(nn.Linear):
    """A layer that gives a part of what it computes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.cat([x, x]))[: len(x)]


@contextmanager
def layer_rule(kind: type[nn.Module]) -> Iterator[None]:
    raco_fast.register_layer_rule(kind, layer_rules.linear)
    yield
    del layer_rules._RULES[kind]


def linears(*sizes: int, bias: bool = False) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Linear(d_in, d_out, bias=bias) for d_in, d_out in pairwise(sizes)]


def kinds(scores: Tensor) -> list[bool]:
    """Of each tapped layer below the scores, whether its tap is a light one."""
    seen, stack, found = set(), [scores.grad_fn], []
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += [below for below, _ in node.next_functions]
        tap = tap_at(node, role_of(type(node)))
        found += [] if tap is None else [isinstance(tap, LightTap)]
    return found


def losses_of(scores: Tensor) -> dict[str, Tensor]:
    return {"a": scores.sin().sum(), "b": scores.square().sum()}


def check(model: nn.Module, x: Tensor, light: list[bool]) -> None:
    """m gradients and p.grad of an ordinary pass are as before the model was prepared."""
    params = list(model.parameters())
    truth = []
    for name in WEIGHTS:
        loss = losses_of(model(x).flatten(1).sum(1))[name]
        truth.append(torch.autograd.grad(loss, params))
    with raco_fast.prepare(model, strict=True, check_every=None):
        scores = model(x).flatten(1).sum(1)
        assert sorted(kinds(scores)) == sorted(light)
        losses = losses_of(scores)
        found = ObjectiveGradients(model.parameters(), weights=WEIGHTS)
        found.backward(losses, scores=scores)
        for p, *of_p in zip(params, *truth, strict=True):
            for g, expected in zip(p.grad.buffers, of_p, strict=True):
                torch.testing.assert_close(g, expected)
        found.zero()
        losses_of(model(x).flatten(1).sum(1))["b"].backward()
        for p, expected in zip(params, truth[1], strict=True):
            torch.testing.assert_close(p.grad, expected)
            p.grad = None


@pytest.mark.parametrize("rows", [(5,), (5, 3), (5, 3, 2)], ids=len)
@pytest.mark.parametrize("wants", [False, True], ids=["data", "input wants a gradient"])
def test_gradients_of_few_rows(rows, wants):
    x = randn(*rows, 4).requires_grad_(wants)
    check(Layers(*linears(4, 6, 3)), x, [True, True])


def test_layers_of_both_kinds_in_one_pass(monkeypatch):
    monkeypatch.setattr(light_tap, "_FEW_ROWS", 5 * 3 * 30)
    check(Layers(*linears(4, 6, 40, 8, 3)), randn(5, 3, 4), [True, False, False, True])


def test_norms_and_repeated_layers():
    (layer,) = linears(4, 4)
    norm = nn.LayerNorm(4)
    check(Layers(norm, layer, norm, layer), randn(5, 3, 4), [True] * 4)


def test_outputs_may_be_changed_in_place():
    check(Layers(*linears(4, 6, 3), between=lambda y: y.mul_(2.0)), randn(5, 3, 4), [True, True])


def test_a_product_in_another_shape_may_be_changed_in_place():
    """A biased product of three dimensions is a view of what was computed."""
    model = Layers(*linears(4, 6, 3, bias=True), between=lambda y: y.mul_(2.0))
    check(model, randn(5, 3, 4), [True, True])


def test_a_part_of_what_was_computed_has_a_function():
    torch.manual_seed(0)
    with layer_rule(Doubled):
        check(
            Layers(Doubled(4, 3, bias=False), between=lambda y: y.mul_(2.0)), randn(5, 4), [False]
        )


@pytest.mark.parametrize(
    "around",
    [
        lambda model, x: checkpoint(model, x, use_reentrant=False),
        lambda model, x: _saved_on_cpu(model, x),
    ],
    ids=["checkpoint", "save_on_cpu"],
)
def test_what_keeps_activations_elsewhere_is_left_its_way(around):
    model = Layers(*linears(4, 6, 3))

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return around(self.model, x)

    check(Around(), randn(5, 3, 4), [False, False])


def _saved_on_cpu(model: nn.Module, x: Tensor) -> Tensor:
    with save_on_cpu():
        return model(x)


class Same(torch.autograd.Function):
    """A function in Python that gives what it gets."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy


def test_what_a_layer_only_passes_on_is_not_its_own():
    z = randn(2, 6).requires_grad_().exp()
    x = z.view(3, 4)
    of_call: Any = None
    assert not light_tap.left(of_call, z, z)
    assert not light_tap.left(of_call, x, x)
    assert not light_tap.left(of_call, x.view(4, 3), x)
    assert not light_tap.left(of_call, Same.apply(x), x)


def test_a_layer_of_which_more_than_its_output_is_used_is_not_exact():
    torch.manual_seed(0)
    layer = First(4, 3, bias=False)
    with layer_rule(First):
        raco_fast.prepare(layer, strict=True)
        scores = (layer(randn(5, 4)) + layer.second).sum(1)
        found = ObjectiveGradients(layer.parameters(), weights=WEIGHTS)
        with pytest.raises(ValueError, match="has given more than its output"):
            found.backward(losses_of(scores), scores=scores)


def test_an_input_that_was_changed_is_noticed():
    model = Layers(*linears(4, 6), between=lambda y: y)
    raco_fast.prepare(model, strict=True, check_every=None)
    x = randn(5, 4)
    scores = model(x).sum(1)
    x.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ObjectiveGradients(model.parameters(), weights=WEIGHTS).backward(
            losses_of(scores), scores=scores
        )


def test_a_graph_that_is_used_up_says_so():
    model = Layers(*linears(4, 6), between=lambda y: y)
    raco_fast.prepare(model, strict=True, check_every=None)
    found = ObjectiveGradients(model.parameters(), weights=WEIGHTS)
    scores = model(randn(5, 4)).sum(1)
    found.backward(losses_of(scores), scores=scores)
    with pytest.raises(RuntimeError, match="earlier backward pass has freed"):
        found.backward(losses_of(scores), scores=scores)


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
def test_neither_a_pass_nor_a_graph_leaves_anything():
    """Without Python's collector of cycles, which sees nothing of autograd's graph."""
    model = Layers(*linears(4, 6, 3))
    raco_fast.prepare(model, strict=True, check_every=None)
    found = ObjectiveGradients(model.parameters(), weights=WEIGHTS)
    inputs: list[Any] = []

    def note(layer: nn.Module, args: tuple[Tensor]) -> None:
        inputs.append(weakref.ref(args[0]))

    model.layers[1].register_forward_pre_hook(note)
    for used in (True, False):
        scores = model(randn(5, 4)).sum(1)
        losses = losses_of(scores)
        if used:
            found.backward(losses, scores=scores)
            found.zero()
        else:
            del scores, losses
        assert inputs.pop()() is None
