"""What would make one backward pass wrong is found out, named, and done by autograd instead."""

import warnings
from itertools import combinations, permutations

import pytest
import torch
from process_group import process_group_of_one
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import raco_fast
from raco_fast import ObjectiveGradients
from raco_fast.spot_check import _codes
from raco_fast.tap import Checks

D, B = 4, 5


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


class Scorer(nn.Module):
    """[B, D] -> scores [B]; a subclass spoils it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x).tanh()))[:, 0].sin()

    def between(self, x: Tensor) -> Tensor:
        return x


def losses_of(scores: Tensor) -> list[Tensor]:
    return [(scores * torch.arange(len(scores))).sum(), scores.square().sum()]


class Trial:
    """Backward passes of one model, held against autograd's gradients."""

    def __init__(self, model: nn.Module, strict: bool = False) -> None:
        self.model = model
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.gradients = ObjectiveGradients(self.params, [0.4, 0.6])
        raco_fast.prepare(model, strict=strict)

    def check(self, x: Tensor, losses=losses_of) -> None:
        scores = self.model(x)
        made = losses(scores)
        truth = [
            torch.autograd.grad(loss, self.params, retain_graph=True, allow_unused=True)
            for loss in made
        ]
        self.gradients.zero()
        self.gradients.backward(made, scores=scores)
        for i, grads in enumerate(truth):
            for p, grad in zip(self.params, grads, strict=True):
                held = self.gradients.of(p)[str(i)]
                expected = torch.zeros_like(p) if grad is None else grad
                torch.testing.assert_close(torch.zeros_like(p) if held is None else held, expected)


def assert_falls_back(model: nn.Module, message: str, losses=losses_of, x: Tensor | None = None):
    """One warning, autograd's gradients then and later; ValueError where it is strict."""
    x = randn(B, D) if x is None else x
    trial = Trial(model)
    with pytest.warns(UserWarning, match=f"{message}.*; taking one pass per objective") as seen:
        trial.check(x, losses)
    assert [w.filename for w in seen] == [__file__]  # the line of the caller
    trial.check(x, losses)  # without another warning, which would be an error


class Dependent(Scorer):
    """One score depends on the rows of one other sequence as well."""

    def __init__(self, reader: int, read: int) -> None:
        super().__init__()
        self.reader, self.read = reader, read

    def between(self, x: Tensor) -> Tensor:
        more = torch.zeros_like(x).index_add(
            0, torch.tensor([self.reader]), x[self.read : self.read + 1].square()
        )
        return x + more


@pytest.mark.parametrize(("reader", "read"), list(permutations(range(B), 2)))
def test_a_score_that_depends_on_any_other_sequence_is_found(reader, read):
    assert_falls_back(
        Dependent(reader, read), "in layer 'first' a score depends on rows of another sequence"
    )


@pytest.mark.parametrize("n", [1, 2, 3, 6, 7, 20, 21, 70])
def test_codes_of_the_probes(n):
    codes = _codes(n)
    assert len(codes) == {1: 0, 2: 2, 3: 3, 6: 4, 7: 5, 20: 6, 21: 7, 70: 8}[n]
    for a, b in combinations(codes.T, 2):
        assert bool((a & ~b).any())
        assert bool((b & ~a).any())


class Reordered(Scorer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[[0, 1, 3, 2, 4]]


class Normalised(Scorer):
    def __init__(self, affine: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(D, affine=affine)

    def between(self, x: Tensor) -> Tensor:
        return self.norm(x)


def test_sequences_that_meet():
    message = "a score depends on rows of another sequence"
    assert_falls_back(Reordered(), f"{message}.* `scores` are in another order than the rows")
    assert_falls_back(Centred(), message)


class Centred(Scorer):
    def between(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


@pytest.mark.parametrize("affine", [False, True])
def test_batch_normalisation_is_exact_as_long_as_it_is_off(affine):
    model = Normalised(affine).eval()
    model.norm.requires_grad_(False)
    trial = Trial(model, strict=True)
    trial.check(randn(B, D))
    model.train()
    with pytest.raises(ValueError, match=r"batch normalisation in training mode mixes sequences"):
        trial.check(randn(B, D))
    model.eval()
    trial.check(randn(B, D))


class Shifted(Scorer):
    """A parameter of the model itself, used directly."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(randn(D))

    def between(self, x: Tensor) -> Tensor:
        return x + self.shift


class Functional(Scorer):
    """A prepared layer's parameter, used past the layer."""

    def between(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.first.weight)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Shifted, "parameter 'shift' reaches the scores past every rule, in AddBackward0"),
        (Functional, "parameter 'first.weight' reaches the scores past every rule"),
        (
            lambda: Normalised(affine=True),
            r"parameter 'norm.(weight|bias)' reaches the scores past|batch normalisation in trai",
        ),
        (lambda: nn.Sequential(nn.Linear(D, 1), nn.PReLU(), nn.Flatten(0)), "parameter '1.weight'"),
    ],
)
def test_a_parameter_that_no_rule_sees_is_named(model, message):
    assert_falls_back(model(), message)


class Routed(Scorer):
    """Keeps what an auxiliary loss would be computed from."""

    def between(self, x: Tensor) -> Tensor:
        self.load = x.softmax(-1).mean(0)
        return x


def test_an_auxiliary_loss_is_found():
    model = Routed()
    assert_falls_back(
        model,
        r"'first\.(weight|bias)' reaches a loss other than through `scores`, as in an auxiliary",
        lambda scores: [scores.sum() + model.load.square().sum(), scores.square().sum()],
    )


def test_a_penalty_on_the_weights_is_found():
    model = Scorer()
    assert_falls_back(
        model,
        "parameter 'last.weight' reaches a loss other than through `scores`, in PowBackward0",
        lambda scores: [scores.sum(), scores.sum() + model.last.weight.square().sum()],
    )


def test_the_other_output_of_the_node_that_scores_come_from_is_found():
    class Two(Scorer):
        def forward(self, x: Tensor) -> Tensor:
            scores, self.other = torch.stack([super().forward(x), x.sum(1)]).unbind(0)
            return scores

    class Both(Scorer):
        def forward(self, x: Tensor) -> Tensor:
            both = self.first(x)[:, :2]
            scores, self.other = both.unbind(1)
            return scores

    model = Two()
    Trial(model, strict=True).check(randn(B, D))  # nothing uses the other one
    model = Both()
    assert_falls_back(
        model,
        "reaches a loss other than through `scores`",
        lambda scores: [scores.sum() + model.other.square().sum(), scores.square().sum()],
    )


@pytest.mark.parametrize("how", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_a_parameter_are_run(how):
    model, seen = Scorer(), []
    trial = Trial(model)
    getattr(model.last.weight, how)(lambda _: seen.append(1))
    with pytest.warns(UserWarning, match="parameter 'last.weight' has a hook"):
        trial.gradients.backward(losses_of(scores := model(randn(B, D))), scores=scores)
    assert seen == [1, 1]


@pytest.mark.parametrize("reentrant", [False, True])
def test_only_reentrant_checkpointing_hides_layers(reentrant):
    class Checkpointed(Scorer):
        def between(self, x: Tensor) -> Tensor:
            return checkpoint(self.inside, x, use_reentrant=reentrant)

        def inside(self, x: Tensor) -> Tensor:
            return self.first(x).tanh()

    model, x = Checkpointed(), randn(B, D)
    if not reentrant:
        Trial(model, strict=True).check(x)
        return
    raco_fast.prepare(model)
    gradients = ObjectiveGradients(model.parameters(), [0.4, 0.6])
    with pytest.warns(UserWarning, match="reentrant checkpointing hides layers; use use_reentrant"):
        gradients.backward(losses_of(scores := model(x)), scores=scores)
    found = [list(gradients.of(p).values()) for p in model.parameters()]
    gradients.zero()
    gradients.backward(losses_of(model(x)))
    for p, held in zip(model.parameters(), found, strict=True):
        torch.testing.assert_close(held, list(gradients.of(p).values()))


class Opaque(torch.autograd.Function):
    """Runs a layer's backward pass inside its own, where no graph shows it."""

    @staticmethod
    def forward(ctx, layer: nn.Module, x: Tensor) -> Tensor:
        ctx.layer, ctx.x = layer, x
        return layer(x)

    @staticmethod
    def backward(ctx, dy: Tensor):
        with torch.enable_grad():
            x = ctx.x.detach().requires_grad_()
            nn.functional.linear(x, ctx.layer.weight, ctx.layer.bias).backward(dy)
        return None, x.grad


def test_a_gradient_that_comes_out_of_nowhere_is_noticed():
    class Hidden(Scorer):
        def between(self, x: Tensor) -> Tensor:
            return Opaque.apply(self.first, x)

    model = Hidden()
    raco_fast.prepare(model)
    gradients = ObjectiveGradients(model.parameters(), [0.4, 0.6])
    scores = model(randn(B, D))
    with pytest.warns(UserWarning, match=r"parameter 'first\.\w+' got a gradient past every rule"):
        gradients.backward(losses_of(scores), scores=scores)


@pytest.mark.parametrize("model", [Shifted, Reordered])
def test_strict_raises_every_time_and_leaves_no_gradient(model):
    model = model()
    trial = Trial(model.requires_grad_(True), strict=False)
    for module in (model.first, model.last):
        (tap,) = module._forward_hooks.values()
        tap.checks = Checks(strict=True, every=1)  # as if prepare had let the model pass
    for _ in range(2):
        scores = model(randn(B, D))
        with pytest.raises(
            ValueError, match=r"would be wrong here: .*; mend it, or prepare the mod"
        ):
            trial.gradients.backward(losses_of(scores), scores=scores)
        assert all(p.grad is None for p in model.parameters())


def test_strict_is_what_prepare_was_told():
    model = Reordered()
    trial = Trial(model, strict=True)
    scores = model(randn(B, D))
    with pytest.raises(ValueError, match="in layer 'first' a score depends on rows of anoth"):
        trial.gradients.backward(losses_of(scores), scores=scores)


@pytest.mark.parametrize(
    ("every", "checked"), [(6, {1, 2, 4, 12, 18}), (1, set(range(1, 20))), (None, set())]
)
def test_when_an_exact_model_is_checked(every, checked):
    model, passes = Scorer(), []
    raco_fast.prepare(model, strict=True, check_every=every)
    gradients = ObjectiveGradients(model.parameters(), [0.4, 0.6])
    model.last.register_full_backward_hook(lambda *_: passes.append(1))
    counts = []
    for _ in range(19):
        passes.clear()
        scores = model(randn(B, D))
        gradients.backward(losses_of(scores), scores=scores)
        gradients.zero()
        counts.append(len(passes))
    # The collecting pass, an ordinary one, and one without a gradient that frees the graph.
    assert {n for n, count in enumerate(counts, 1) if count == 3} == checked
    assert set(counts) <= {1, 3}


@pytest.mark.parametrize("first", ["one sequence", "not a number"])
def test_what_proves_nothing_decides_nothing(first):
    model = Dependent(0, 1)
    trial = Trial(model)
    if first == "one sequence":
        model.between = lambda x: x
        trial.check(randn(1, D))
        del model.between
    else:
        scores = model(torch.full((B, D), torch.nan))
        with warnings.catch_warnings(record=True) as seen:
            trial.gradients.backward(losses_of(scores), scores=scores)
        assert not seen
    with pytest.warns(UserWarning, match="a score depends on rows of another sequence"):
        trial.check(randn(B, D))


def test_other_leaves_get_the_weighted_sum():
    """They get the gradient of the weighted sum, in every mode, added to what is there."""
    model, x = Scorer(), randn(B, D).requires_grad_()
    raco_fast.prepare(model)
    others = [x, model.last.weight, model.last.bias]
    losses = losses_of(model(x))
    expected = torch.autograd.grad(0.4 * losses[0] + 0.6 * losses[1], others)
    for mode in ("autograd", "one_backward", "gram_first", "keep_dy"):
        gradients = ObjectiveGradients(model.first.parameters(), [0.4, 0.6])
        model.zero_grad()
        x.grad, model.last.weight.grad = None, torch.ones(1, D)
        scores = model(x)
        losses = losses_of(scores)
        if mode in ("gram_first", "keep_dy"):
            raco_fast.gram_first(gradients, losses, scores, keep_dy=mode == "keep_dy")
        else:
            given = None if mode == "autograd" else scores
            gradients.backward(losses, scores=given, mode=mode)
            assert gradients.of(model.first.weight)["0"] is not None
        torch.testing.assert_close(x.grad, expected[0])
        torch.testing.assert_close(model.last.weight.grad, expected[1] + 1)
        torch.testing.assert_close(model.last.bias.grad, expected[2])


def test_a_model_that_was_not_prepared():
    model = Scorer()
    gradients = ObjectiveGradients(model.parameters(), [0.4, 0.6])
    scores = model(randn(B, D))
    with pytest.raises(RuntimeError, match=r"not prepared; call raco_fast.prepare\(model\) before"):
        gradients.backward(losses_of(scores), scores=scores)
    leaf = torch.ones(B, requires_grad=True)
    with pytest.raises(RuntimeError, match="`scores` come from a model that was not prepared"):
        gradients.backward(losses_of(leaf), scores=leaf)


def test_several_processes_are_left_to_autograd(monkeypatch):
    with process_group_of_one(monkeypatch):
        Trial(Scorer(), strict=True).check(randn(B, D))
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        assert_falls_back(Scorer(), "it does not reduce gradients over several processes yet")
