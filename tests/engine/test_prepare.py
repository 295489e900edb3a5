"""`prepare` changes nothing that a user can see, and can be undone."""

import copy
import gc
import pickle
import threading
import warnings
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import raco_fast
from raco_fast import prepare
from raco_fast.engine import layer_rules
from raco_fast.engine.backward import collect, sensitivities
from raco_fast.engine.contributions import vector_use
from raco_fast.engine.declaration import sequences
from raco_fast.engine.gradient_collector import GradientCollector
from raco_fast.engine.graph import ScoreGraph
from raco_fast.engine.nodes import role_of, tap_at
from raco_fast.engine.sequences import Factored
from raco_fast.gradients.accumulation import Accumulation
from raco_fast.gradients.buffer_pool import HostMemory

WORDS, WIDTH = 13, 6


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, WORDS, shape, generator=torch.Generator().manual_seed(1))


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def taps(scores: Tensor) -> int:
    """How many prepared layers the graph of `scores` has."""
    seen, stack = set(), [scores.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [following for following, _ in node.next_functions]
    return sum(tap_at(node, role_of(type(node))) is not None for node in seen)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


@pytest.mark.parametrize("adapter", [None, "lora"], ids=["full", "lora"])
def test_outputs_and_ordinary_gradients_stay_what_they_were(lm, family, adapter):
    model, batch = lm.build(family, adapter=adapter), lm.batch()

    def loss(model):
        return [lm.losses(lm.by_logits(model, batch), 1)[0]]

    truth, (plain,) = lm.in_float64(model, loss), loss(model)
    with prepare(model, strict=True):
        assert torch.equal(loss(model)[0], plain)
        by_grad = lm.by_autograd(model, loss(model))
        loss(model)[0].backward()
    by_backward = {name: p.grad[None].double() for name, p in lm.trained(model).items()}
    assert max(lm.errors(by_backward, truth).values()) <= 1e-5
    assert max(lm.errors(by_grad, truth).values()) <= 1e-5


def test_ordinary_gradients_add_up():
    model, x = mlp(), randn(5, 4)
    model(x).sum().backward()
    twice = [2 * p.grad for p in model.parameters()]
    model.zero_grad()
    prepare(model)
    for _ in range(2):
        model(x).sum().backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], twice)


def test_remove_leaves_nothing_behind():
    model, x = mlp(), randn(5, 4)
    before = [dict(module.__dict__) for module in model.modules()]
    prepared = prepare(model)
    out = model(x)
    assert taps(out) == 2
    prepared.remove()
    prepared.remove()
    assert [module.__dict__ for module in model.modules()] == before
    assert taps(model(x)) == 0
    out.sum().backward()  # a graph that exists keeps its taps
    expected = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    torch.testing.assert_close([p.grad for p in model.parameters()], list(expected))


def test_a_block_is_undone_also_by_an_exception():
    model = mlp()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), prepare(model):
        model(randn(5, 3))
    assert taps(model(randn(5, 4))) == 0


@pytest.mark.parametrize("adapter", [None, "lora"], ids=["full", "lora"])
def test_checkpoints_of_a_prepared_model(lm, tmp_path, adapter):
    model = lm.build("gpt2", adapter=adapter)
    state = copy.deepcopy(model.state_dict())
    model.save_pretrained(tmp_path / "before")
    prepare(model)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    model.load_state_dict(state)
    model.save_pretrained(tmp_path / "after")
    for file in (tmp_path / "before").glob("*.safetensors"):
        assert (tmp_path / "after" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["copy", "pickle"],
)
def test_a_copy_has_taps_of_its_own(lm, copied):
    model, batch = lm.build("gpt2"), lm.batch()
    prepared = prepare(model)
    twin = copied(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.1)
    loss = lm.losses(lm.by_logits(twin, batch), 1)[0]
    assert taps(loss) == taps(lm.by_logits(model, batch))
    loss.backward()
    assert all(p.grad is None for p in model.parameters())
    prepared.remove()
    expected = lm.build("gpt2")
    expected.load_state_dict(twin.state_dict())
    truth = lm.in_float64(expected, lambda m: [lm.losses(lm.by_logits(m, batch), 1)[0]])
    found = {name: p.grad[None].double() for name, p in twin.named_parameters()}
    assert max(lm.errors(found, truth).values()) <= 1e-5


def test_preparing_again_covers_what_is_new_and_keeps_what_is_there():
    model, x = mlp(), randn(5, 4)
    model[2].requires_grad_(False)
    first = prepare(model)
    hooks = dict(model[0]._forward_hooks)
    model.append(nn.Linear(3, 3))
    model[2].requires_grad_(True)
    assert taps(model(x)) == 1
    second = prepare(model)
    assert taps(model(x)) == 3
    assert model[0]._forward_hooks == hooks
    second.remove()
    assert taps(model(x)) == 1
    first.remove()
    assert taps(model(x)) == 0


def test_frozen_parameters_cost_nothing_and_get_nothing():
    model, x = mlp(), randn(5, 4)
    model[0].weight.requires_grad_(False)
    model[2].requires_grad_(False)
    prepare(model, strict=True)
    out = model(x)
    assert taps(out) == 1
    out.sum().backward()
    assert [p.grad is None for p in model.parameters()] == [True, False, True, True]
    (expected,) = torch.autograd.grad(
        (F.linear(torch.tanh(F.linear(x, model[0].weight, model[0].bias)), model[2].weight)).sum(),
        model[0].bias,
    )
    torch.testing.assert_close(model[0].bias.grad, expected)
    model[0].requires_grad_(False)
    assert not model(x).requires_grad


def test_without_grad_mode_there_is_no_tap():
    model, x = mlp(), randn(5, 4)
    expected = model(x)
    prepare(model)
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    with torch.inference_mode():
        assert torch.equal(model(x), expected)


class WithOptions(nn.Linear):
    """A layer with an argument that changes what it computes."""

    def forward(self, x: Tensor, shift: float | None = None, *, scale=None) -> Tensor:
        return (scale or 1.0) * super().forward(x) + (shift or 0.0)


@pytest.mark.parametrize(
    "call",
    [
        lambda layer, x: layer(x, 0.5, scale=3.0),
        lambda layer, x: layer(x, shift=0.5, scale=3.0),
        lambda layer, x: layer(scale=3.0, shift=0.5, x=x),
        lambda layer, x: layer(scale=3.0, x=x),
        lambda layer, x: layer(x),
        lambda layer, x: layer(x=x),
        lambda layer, x: layer(x, None),
        lambda layer, x: layer(x=x, scale=None, shift=None),
    ],
)
def test_only_calls_with_one_argument_are_tapped(monkeypatch, call):
    monkeypatch.setattr(
        layer_rules, "_RULES", {**layer_rules._RULES, WithOptions: layer_rules.linear}
    )
    layer, x = WithOptions(4, 3), randn(5, 4)
    expected = call(layer, x)
    further = not torch.equal(expected, layer(x))
    grads = torch.autograd.grad(expected.square().sum(), list(layer.parameters()))
    with prepare(layer, strict=True):
        found = call(layer, x)
        assert taps(found) == (not further)
        assert torch.equal(found, expected)
        assert_served(layer, further, lambda: call(layer, x))
        layer.zero_grad()
        call(layer, x).square().sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(layer.parameters(), grads, strict=True))


def assert_served(model, falls_back: bool, output, match="was called with further arguments"):
    """m gradients of a model of any kind are right, and a fallback names a layer."""
    params = list(model.parameters())
    gradients = raco_fast.ObjectiveGradients(params, [0.5, 0.5])
    prepare(model)
    scores = output().flatten(1).sum(1)
    losses = [scores.sin().sum(), scores.square().sum()]
    truth = [torch.autograd.grad(loss, params, retain_graph=True) for loss in losses]
    with pytest.warns(UserWarning, match=match) if falls_back else nullcontext():
        gradients.backward(losses, scores=scores)
    for i, grads in enumerate(truth):
        for p, grad in zip(params, grads, strict=True):
            torch.testing.assert_close(gradients.of(p)[str(i)], grad)
    gradients.zero()


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.scale, x


def test_a_layer_that_returns_more_than_a_tensor_is_named(monkeypatch):
    rule = lambda module, x, dy, segments: {"scale": vector_use(x * dy, segments)}  # noqa: E731
    monkeypatch.setattr(layer_rules, "_RULES", {**layer_rules._RULES, Pair: rule})
    model = nn.Sequential(Pair())
    prepare(model)
    message = "layer '0' returned something else than one tensor"
    assert_served(model, True, lambda: model(randn(5, 4))[0], message)


def test_outputs_may_be_changed_in_place():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)), randn(5, 4)
    expected = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    prepare(model)
    model(x).add_(1.0).sum().backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], list(expected))


def test_inputs_changed_in_place_are_noticed_as_in_torch():
    prepared = prepare(model := nn.Linear(4, 3))
    for _ in range(2):  # prepared, then plain
        x = randn(5, 4)
        out = model(x)
        x.add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()
        prepared.remove()


class Positions(nn.Module):
    """Looks positions up once, in one of the usual ways, and labels of whole sequences."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(20, WIDTH)
        self.kinds, self.out = nn.Embedding(3, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, ids: Tensor, kinds: Tensor | None = None) -> Tensor:
        place = torch.arange(ids.shape[-1])
        if self.way == "row":
            x = self.words(ids) + self.places(place)
        elif self.way == "batch of one":
            x = self.words(ids) + self.places(place[None])
        else:
            x = self.words(ids) + self.places(place.expand(ids.shape))
        if kinds is not None:
            x = x + self.kinds(kinds)[:, None]
        return self.out(x.tanh())


WAYS = ["row", "batch of one", "every sequence"]


def losses_of(model: nn.Module, *inputs: Tensor) -> tuple[list[Tensor], Tensor]:
    scores = model(*inputs).square().sum((1, 2))
    return [scores[0::2].sin().sum(), scores[1::2].cos().sum()], scores


def assert_exact(model: nn.Module, *inputs: Tensor) -> None:
    params = [p for p in model.parameters() if p.requires_grad]
    gradients = raco_fast.ObjectiveGradients(params, [0.5, 0.5])
    losses, scores = losses_of(model, *inputs)
    gradients.backward(losses, scores=scores)
    losses, _ = losses_of(model, *inputs)
    for i, loss in enumerate(losses):
        expected = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
        for p, grad in zip(params, expected, strict=True):
            held = gradients.of(p)[str(i)]
            assert (held is None) == (grad is None)
            if grad is not None:
                torch.testing.assert_close(held, grad)
    gradients.zero()


@pytest.mark.parametrize("way", WAYS)
def test_positions_that_are_looked_up_once_are_the_sequences_own(way):
    model = Positions(way)
    expected = model(tokens(4, 7))
    prepare(model, strict=True)
    assert torch.equal(model(tokens(4, 7)), expected)
    assert_exact(model, tokens(4, 7), torch.tensor([0, 2, 1, 1]))


@pytest.mark.parametrize("way", WAYS)
def test_as_many_positions_as_sequences_are_still_positions(way):
    model, kinds = Positions(way), torch.tensor([0, 2, 1, 1])
    prepare(model, strict=True)
    gradients = raco_fast.ObjectiveGradients(model.parameters(), [0.5, 0.5])
    for length in (7, 4):  # what is decided with 7 positions holds for 4
        losses, scores = losses_of(model, tokens(4, length), kinds)
        truth = [
            torch.autograd.grad(x, list(model.parameters()), retain_graph=True) for x in losses
        ]
        gradients.zero()
        gradients.backward(losses, scores=scores)
        for i, grads in enumerate(truth):
            for p, grad in zip(model.parameters(), grads, strict=True):
                torch.testing.assert_close(gradients.of(p)[str(i)], grad)


@pytest.mark.parametrize("way", WAYS)
def test_as_many_positions_as_sequences_at_first_are_positions(way):
    model = Positions(way)
    prepare(model, strict=True)
    assert_exact(model, tokens(4, 4), torch.tensor([0, 2, 1, 1]))


def test_a_lookup_that_is_no_position_keeps_its_shape():
    model = Positions("row")
    prepare(model)
    model(tokens(4, 7))
    for shape in [(7,), (1, 7), (4, 7), (1, 5)]:  # outside of the model there is no batch
        assert model.places(tokens(*shape)).shape == (*shape, WIDTH)
        assert model(tokens(*shape)).shape == (*shape, 2)

    def fail(*_) -> None:
        raise KeyError

    hook = model.out.register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        model(tokens(4, 7))
    hook.remove()
    assert model.places(tokens(7)).shape == (7, WIDTH)


def test_an_index_of_whole_sequences_leaves_positions_positions():
    model, ids = Positions("batch of one"), tokens(4, 7)
    prepare(model, strict=True)
    gradients = raco_fast.ObjectiveGradients(model.parameters(), [0.5, 0.5])
    order = [2, 0, 3, 1]
    with sequences(order):
        rows = model(ids).square().sum((1, 2))
    scores = rows.new_zeros(4).index_copy(0, torch.tensor(order), rows)
    losses = [scores[0::2].sin().sum(), scores[1::2].cos().sum()]
    truth = [torch.autograd.grad(x, model.places.weight, retain_graph=True)[0] for x in losses]
    gradients.backward(losses, scores=scores)
    for i, grad in enumerate(truth):
        torch.testing.assert_close(gradients.of(model.places.weight)[str(i)], grad)


def test_what_has_no_rule_is_listed_or_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.PReLU(), nn.Bilinear(4, 4, 2))
    names = ("1.weight", "2.weight", "2.bias")
    assert prepare(model).without_rule == names
    assert taps(model[:2](randn(5, 4))) == 1
    with pytest.raises(ValueError, match=r"without a rule: \['1.weight', '2.weight', '2.bias'\]"):
        prepare(copy.deepcopy(model), strict=True)
    model[1].requires_grad_(False)
    model[2].requires_grad_(False)
    assert prepare(model, strict=True).without_rule == ()


def test_a_refused_model_is_left_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.PReLU())
    with pytest.raises(
        ValueError, match=r"\['1.weight'\]; give their layers one with register_layer_rule"
    ):
        prepare(model, strict=True)
    assert taps(model(randn(5, 4))) == 0


def test_only_modules_can_be_prepared():
    with pytest.raises(TypeError, match="`model` must be a torch module, got a function"):
        prepare(mlp)


class Lookup(nn.Module):
    """Positions [T], put to some use."""

    def __init__(self, use) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.use, self.words, self.places = use, nn.Embedding(WORDS, WIDTH), nn.Embedding(9, WIDTH)
        self.out = nn.Linear(WIDTH, 1)

    def forward(self, ids: Tensor) -> Tensor:
        place = torch.arange(ids.shape[1])
        return self.out(self.use(self.words(ids), self.places(place)).tanh()).square().sum((1, 2))


def recomputed(h: Tensor, p: Tensor) -> Tensor:
    return checkpoint(lambda h, p: h + p.sin(), h, p, use_reentrant=False)


USES = {
    "added": (lambda h, p: h + p, True),
    "added first": (lambda h, p: p + h, True),
    "added in a batch of one": (lambda h, p: h + p[None], False),
    "added twice": (lambda h, p: h + p + p, False),
    "added after a factor": (lambda h, p: torch.add(h, p, alpha=2), False),
    "added to a factor": (lambda h, p: torch.add(p, h, alpha=2), True),
    "subtracted": (lambda h, p: h - p, False),
    "multiplied": (lambda h, p: h * p, False),
    "averaged": (lambda h, p: h + p.mean(0), False),
    "softmax": (lambda h, p: h * p.softmax(0), False),
    "normed": (lambda h, p: h + p / p.norm(), False),
    "one of them": (lambda h, p: h + p[0], False),
    "time first": (lambda h, p: (h.transpose(0, 1) + p[:, None]).transpose(0, 1), False),
    "einsum": (lambda h, p: torch.einsum("btd,sd,se->bte", h, p, p), False),
    "recomputed": (recomputed, False),
    "in place": (lambda h, p: (h * 1).add_(p), True),
}


@pytest.mark.parametrize("length", [7, 4], ids=["", "as many as sequences"])
@pytest.mark.parametrize("use", USES)
def test_every_use_of_a_lookup_computes_what_it_did_and_is_exact(use, length):
    how, served = USES[use]
    model, ids = Lookup(how), tokens(4, length)
    params = list(model.parameters())
    expected = model(ids)
    plain = torch.autograd.grad(expected.sin().sum(), params)
    prepare(model)
    scores = model(ids)
    assert torch.equal(scores, expected)
    found = torch.autograd.grad(scores.sin().sum(), params, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    assert_served(model, not served, lambda: model(ids)[:, None], "wrong here: .*'places")


class Dropping(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return F.dropout(super().forward(ids), 0.5, self.training)


class Gated(nn.Module):
    """An RMSNorm with a gate, as in Mamba-2."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.linspace(0.5, 2.0, d)), 1e-6
        self.kept: Tensor | None = None

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        gate = self.kept if gate is None else gate
        x = x if gate is None else x * F.silu(gate)
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x)


class Layers(nn.Module):
    """Words, a norm and a layer; the norm is called by `call`."""

    def __init__(self, call=lambda norm, h: norm(h)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.norm = Dropping(WORDS, WIDTH), Gated(WIDTH)
        self.call, self.out = call, nn.Linear(WIDTH, 1)

    def forward(self, ids: Tensor) -> Tensor:
        torch.manual_seed(5)
        return self.out(self.call(self.norm, self.words(ids)).tanh())[..., 0].sum(1)


def changed_class(model: Layers) -> None:
    model.out.__class__ = Doubled


def changed_forward(model: Layers) -> None:
    own = model.out.forward
    model.out.forward = lambda x: own(2 * x)


def hooked_first(model: Layers) -> None:
    model.out.register_forward_hook(lambda module, args, y: 2 * y, prepend=True)


def normed_weight(model: Layers) -> None:
    nn.utils.parametrizations.weight_norm(model.out)


def normed_weight_by_hook(model: Layers) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(model.out)


def wrapped_by_accelerate(model: Layers) -> None:
    class Twice(ModelHook):
        def post_forward(self, module, output):
            return 2 * output

    add_hook_to_module(model.out, Twice())


CHANGES = {
    "none": (lambda model: None, False),
    "train": (lambda model: model.train(), True),
    "class": (changed_class, True),
    "forward": (changed_forward, True),
    "an earlier hook": (hooked_first, True),
    "a later hook": (lambda m: m.out.register_forward_hook(lambda layer, args, y: 2 * y), False),
    "an earlier pre-hook": (
        lambda m: m.out.register_forward_pre_hook(lambda m, x: 2 * x[0]),
        False,
    ),
    "parametrized": (normed_weight, True),
    "weight norm": (normed_weight_by_hook, True),
    "wrapper": (wrapped_by_accelerate, True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_that_becomes_another_one_is_not_taken_for_what_it_was(change):
    """An ordinary backward pass is torch's to the bit, and m gradients are exact."""
    apply, falls_back = CHANGES[change]
    model, plain, ids = Layers().eval(), Layers().eval(), tokens(4, 6)
    assert prepare(model).without_rule == ()
    for one in (model, plain):
        apply(one)
        one(ids).square().sum().backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    model.zero_grad()
    assert_served(model, falls_back, lambda: model(ids)[:, None], "parameter '.*' reaches the scor")


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        # The graph shows it where the layer's part of it ends elsewhere than at its argument ...
        (lambda h: h.detach().requires_grad_(), "layer 'norm' depends on more than its first arg"),
        # ... and a spot check where it comes from there as well.
        (lambda h: h, "in layer 'norm' differ from .* the rule of that layer does not describe"),
    ],
)
def test_a_layer_that_depends_on_what_it_keeps_falls_back(kept, message):
    def call(norm, h):
        norm.kept = kept(h).tanh()
        return norm(h)

    model, ids = Layers(call).eval(), tokens(4, 6)
    prepare(model)
    assert_served(model, True, lambda: model(ids)[:, None], message)


@pytest.mark.parametrize(
    ("call", "falls_back"),
    [
        (lambda norm, h: norm(h), False),
        (lambda norm, h: norm(h, None), False),
        (lambda norm, h: norm(h, h.tanh()), True),
        (lambda norm, h: norm(h, gate=h.tanh()), True),
        (lambda norm, h: norm(gate=h.tanh(), x=h), True),
    ],
)
def test_a_norm_with_a_gate_falls_back(call, falls_back):
    model, ids = Layers(call).eval(), tokens(4, 6)
    prepare(model)
    assert_served(model, falls_back, lambda: model(ids)[:, None], "layer 'norm' was called with fu")


def test_a_complex_layer_has_torchs_gradient():
    torch.manual_seed(0)
    model, x = nn.Linear(4, 6, dtype=torch.complex64), torch.randn(5, 3, 4, dtype=torch.complex64)
    expected = torch.autograd.grad(model(x).abs().pow(3).sum(), list(model.parameters()))
    assert prepare(model).without_rule == ("weight", "bias")
    assert_served(model, True, lambda: model(x).abs(), "parameter '(weight|bias)' reaches the sco")
    model(x).abs().pow(3).sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))


def test_remove_leaves_what_others_have_wrapped():
    model, x = mlp(), randn(5, 4)
    prepared = prepare(model)
    wrapped = SimpleNamespace(out=model[2])
    wrapped_by_accelerate(wrapped)
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    expected = model(x)
    prepared.remove()
    assert torch.equal(model(x), expected)
    assert len(seen) == 2
    assert taps(model(x)) == 0


def test_memory_is_freed_without_the_garbage_collector():
    gc.collect()
    gc.disable()
    try:
        model = mlp()
        prepare(model)
        out = model(randn(5, 4)).sum(1)
        gradients = raco_fast.ObjectiveGradients(model.parameters(), [0.5, 0.5])
        gradients.backward([out.sum(), out.square().sum()], scores=out)
        gone = [weakref.ref(p) for p in model.parameters()]
        del model, out, gradients
        assert [ref() for ref in gone] == [None] * 4
    finally:
        gc.enable()


def in_threads(work, n: int = 4) -> None:
    errors = []

    def guarded(k: int) -> None:
        try:
            work(k)
        except BaseException as error:  # noqa: BLE001 - handed to the thread that joins
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(k,)) for k in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_threads_share_a_prepared_model():
    """Ordinary passes beside passes for all objectives: everybody gets what belongs to them."""
    model, inputs = mlp(), [randn(7, 4) + k for k in range(4)]
    params = list(model.parameters())

    def losses_of(k: int) -> tuple[list[Tensor], Tensor]:
        scores = model(inputs[k]).square().sum(1)
        return [scores.sin().sum(), scores.square().sum()], scores

    truth = [[torch.autograd.grad(losses_of(k)[0][i], params) for i in (0, 1)] for k in range(4)]
    prepare(model, strict=True, check_every=7)

    def work(k: int) -> None:
        for _ in range(40):
            losses, scores = losses_of(k)
            if k % 2:
                found = [torch.autograd.grad(loss, params, retain_graph=True) for loss in losses]
            else:
                # Gradients of one thread's own, for p.grad belongs to all of them.
                graph = ScoreGraph(dict(zip("ab", losses, strict=True)), scores, params, (), set())
                into = Accumulation([], ("a", "b"), HostMemory())
                factored = Factored.of(sensitivities(losses, scores))
                collector = GradientCollector(factored, into, params)
                collect(collector.collect, graph, factored.seeds)
                collector.finish()
                made = into.gradients()
                found = [[made[p][i] for p in params] for i in (0, 1)]
            for i in (0, 1):
                torch.testing.assert_close(list(found[i]), list(truth[k][i]))

    in_threads(work)
    assert all(p.grad is None for p in params)


def test_copies_of_a_layer_use_their_own_weights():
    model, x = mlp(), randn(5, 4)
    prepare(model, strict=True)
    for copied in (copy.copy, lambda layer: layer._replicate_for_data_parallel()):
        layer = copied(model[0])
        layer._parameters = {
            name: nn.Parameter(2 * p.detach()) for name, p in model[0].named_parameters()
        }
        expected = F.linear(x, 2 * model[0].weight, 2 * model[0].bias)
        params = list(layer.parameters())
        assert torch.equal(layer(x), expected)
        assert_served(layer, False, lambda layer=layer: layer(x))
        assert all(p.grad is None for p in [*model.parameters(), *params])
