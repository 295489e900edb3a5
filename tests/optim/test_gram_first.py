"""The Gram matrix before any gradient, against `combine` on autograd's gradients in float64."""

import copy
import re

import pytest
import torch
from torch import Tensor, nn

import raco_fast
from raco_fast import ObjectiveGradients, combine, gram_first
from raco_fast.engine.lm_head import token_logps
from raco_fast.engine.tap import NotExactError

WAYS = pytest.mark.parametrize("keep_dy", [False, True], ids=["two passes", "keep dy"])
WEIGHTS = {"a": 0.2, "b": 0.3, "c": 0.5}


def by_combine(model: nn.Module, losses_of, **options):
    """(solution, parameter name -> G0) of m backward passes."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    gradients = ObjectiveGradients(named.values(), WEIGHTS)
    nothing = 0.0 * next(iter(named.values())).sum()  # instead of a constant
    gradients.backward([loss + nothing for loss in losses_of(model)])
    solution = combine(gradients, **options)
    directions = {name: p.grad for name, p in named.items()}
    model.zero_grad()
    return solution, directions


def gram_error(found, truth) -> float:
    """Largest error of an entry, relative to the norms of its two gradients."""
    norms = truth.gram.diagonal().sqrt()
    size = norms[:, None] * norms
    assert not found.gram[size == 0].any()
    return float(((found.gram - truth.gram).abs() / size)[size > 0].max())


class Trial:
    """A model and its losses; `check` holds gram_first against float64 in every respect."""

    def __init__(self, model: nn.Module, scores_of, losses_of_scores, **options) -> None:
        self.model, self.scores_of, self.losses_of_scores = model, scores_of, losses_of_scores
        self.options = {"c": 0.5, "max_grad_norm": 0.3, **options}
        oracle = copy.deepcopy(model).double()
        self.expected, self.truth = by_combine(oracle, self.losses_of, **self.options)
        self.plain, _ = by_combine(model, self.losses_of, **self.options)
        self.gradients = ObjectiveGradients(
            (p for p in model.parameters() if p.requires_grad), WEIGHTS
        )
        raco_fast.prepare(model, strict=True)

    def losses_of(self, model: nn.Module) -> list[Tensor]:
        return self.losses_of_scores(self.scores_of(model))

    def run(self, **options):
        scores = self.scores_of(self.model)
        losses = self.losses_of_scores(scores)
        return gram_first(self.gradients, losses, scores, **self.options, **options)

    def check(self, **options) -> None:
        solution = self.run(**options)
        self.check_solution(solution)
        self.check_directions(
            {n: p.grad for n, p in self.model.named_parameters() if p.requires_grad}
        )

    def check_solution(self, solution) -> None:
        assert gram_error(solution, self.expected) <= max(
            1e-6, 2 * gram_error(self.plain, self.expected)
        )
        torch.testing.assert_close(
            solution.coefficients, self.expected.coefficients, rtol=1e-4, atol=1e-4
        )

    def check_directions(self, found: dict[str, Tensor]) -> None:
        for name, direction in self.truth.items():
            assert (found[name].double() - direction).norm() <= 1e-5 * direction.norm(), name


@pytest.mark.parametrize(
    ("adapter", "keep_dy"),
    [
        pytest.param(None, False, id="full-two passes"),
        pytest.param("lora", True, id="lora-keep dy"),
        pytest.param(None, True, id="full-keep dy", marks=pytest.mark.slow),
        pytest.param("lora", False, id="lora-two passes", marks=pytest.mark.slow),
    ],
)
def test_every_architecture(lm, family, layout, adapter, keep_dy):
    batch = lm.batch()
    trial = Trial(lm.build(family, adapter=adapter), lambda model: layout(model, batch), lm.losses)
    trial.check(keep_dy=keep_dy)


@WAYS
@pytest.mark.parametrize("rule", ["linear", "cagrad", "cagrad-clip", "mgda"])
def test_every_rule(lm, rule, keep_dy):
    batch = lm.batch()
    trial = Trial(
        lm.build("llama, tied, biased"),
        lambda model: lm.by_head(model, batch),
        lm.losses,
        rule=rule,
        max_grad_norm=None,
    )
    trial.check(keep_dy=keep_dy)


class Repeated(nn.Module):
    """Layers of every kind that a forward pass uses twice."""

    def __init__(self, words: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(11, 6) if words else None
        self.norm, self.mix = nn.LayerNorm(6), nn.Linear(6, 6)
        with torch.no_grad():
            self.norm.weight.normal_()

    def forward(self, x: Tensor) -> Tensor:
        more = 0.0
        if self.words is not None:
            x, more = self.words(x), self.words(x.flip(1))
        for _ in range(2):
            x = self.mix(self.norm(x)).tanh()
        return (x + more).square().sum((1, 2))


def three_losses(scores: Tensor) -> list[Tensor]:
    return [scores[:2].sin().sum(), scores[1:].cos().sum(), scores.square().sum() / 90]


@WAYS
@pytest.mark.parametrize("words", [False, True], ids=["no lookup", "lookup"])
def test_layers_that_are_called_again(words, keep_dy):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 11, (4, 5), generator=generator)
    x = torch.randn(4, 5, 6, generator=generator)
    trial = Trial(
        Repeated(words),
        lambda model: model(ids if words else x.to(next(model.parameters()))),
        three_losses,
    )
    trial.check(keep_dy=keep_dy)


class BiasedHead(nn.Module):
    """Scores pieces of the batch in calls of their own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = nn.Embedding(11, 6), nn.Linear(6, 11)

    def forward(self, ids: Tensor, rows: list[int]) -> Tensor:
        index = torch.tensor(rows).repeat_interleave(ids.shape[1] - 1)
        with raco_fast.sequences(rows):
            hidden = self.words(ids[rows]).tanh()
        with raco_fast.sequences(index):
            logps = token_logps(
                hidden[:, :-1].flatten(0, 1),
                self.head.weight,
                self.head.bias,
                ids[rows, 1:].flatten(),
                max_logits=60,
            )
        return logps.view(len(rows), -1).sum(1)


@WAYS
@pytest.mark.parametrize("tied", [False, True])
def test_several_forward_passes(tied, keep_dy):
    model = BiasedHead()
    if tied:
        model.head.weight = model.words.weight
    ids = torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(1))
    trial = Trial(
        model, lambda model: torch.cat([model(ids, [0, 1]), model(ids, [2, 3])]), three_losses
    )
    trial.check(keep_dy=keep_dy)


@WAYS
def test_objectives_without_anything_in_this_batch(lm, keep_dy):
    model, batch = lm.build("llama, tied, biased"), lm.batch()
    trial = Trial(
        model,
        lambda model: lm.by_head(model, batch),
        lambda scores: lm.losses(scores, 3, without_pair=1),
    )
    trial.check(keep_dy=keep_dy)
    trial.gradients.zero()
    scores = lm.by_head(model, batch)
    nothing = [0.0 * scores.sum(), torch.tensor(1.0), torch.tensor(0.0)]
    solution = gram_first(trial.gradients, nothing, scores, keep_dy=keep_dy)
    assert not solution.gram.any()
    assert not any(p.grad.any() for p in model.parameters())


MODES = [
    ("autograd", {}),
    ("one_backward", {}),
    ("gram_first", {}),
    ("gram_first", {"keep_dy": True}),
    ("gram_first", {"step_in_backward": True}),
]


@pytest.mark.parametrize(("mode", "options"), MODES)
def test_a_step_without_any_label_decays_and_moves_on_in_every_mode(lm, mode, options):
    model, batch = lm.build(), lm.batch()
    model.spare = nn.Linear(2, 2)
    raco_fast.prepare(model, strict=True)
    opt = raco_fast.ClippedCAGradAdamW(
        model.parameters(), lr=0.1, weight_decay=0.2, betas=(0.8, 0.9), weights=[0.3, 0.7]
    )

    def step(factor: float) -> None:
        scores = lm.by_logits(model, batch)
        losses = [factor * scores.sum(), factor * scores.square().sum()]
        opt.backward(losses, scores=scores, mode=mode, **options)
        opt.step()
        opt.zero_grad()

    step(1.0)
    # AdamW's formulas in float64, for a gradient of zero.
    expected = {name: p.detach().clone().double() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        if not name.startswith("spare"):
            state = opt.state[p]
            m, v = 0.8 * state["exp_avg"].double(), 0.9 * state["exp_avg_sq"].double()
            change = (m / (1 - 0.8**2)) / ((v / (1 - 0.9**2)).sqrt() + 1e-8)
            expected[name] = expected[name] * (1 - 0.1 * 0.2) - 0.1 * change
    step(0.0)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.double(), expected[name], rtol=1e-5, atol=1e-6, msg=name)


@WAYS
def test_inside_autocast_it_computes_as_outside(lm, family, keep_dy):
    model, batch = lm.build(family), lm.batch()
    raco_fast.prepare(model, strict=True)
    gradients = ObjectiveGradients(model.parameters(), WEIGHTS)
    found = []
    for inside in (False, True):
        gradients.zero()
        with torch.autocast("cpu", torch.bfloat16):
            scores = lm.by_head(model, batch)
        losses = lm.losses(scores)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            solution = gram_first(gradients, losses, scores, keep_dy=keep_dy)
        found.append([solution.gram, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


@WAYS
@pytest.mark.parametrize("family", ["llama", "llama, tied, biased", "gpt2"])
def test_parameters_are_handed_over_as_soon_as_they_are_complete(lm, family, keep_dy):
    """A parameter may be overwritten there: nothing that is still to come depends on it."""
    batch, found = lm.batch(), {}
    trial = Trial(lm.build(family), lambda model: lm.by_head(model, batch), lm.losses)
    names = {p: name for name, p in trial.model.named_parameters()}
    held = []

    def take(p: Tensor) -> None:
        assert names[p] not in found
        found[names[p]] = p.grad.clone()
        held.append(sum(q.grad is not None for q in names))
        with torch.no_grad():
            p.fill_(torch.nan)

    trial.check_solution(trial.run(keep_dy=keep_dy, on_gradient=take))
    trial.check_directions(found)
    assert all(p.grad is None for p in names)
    assert max(held) <= 3  # a layer's own, and a tied one


@WAYS
@pytest.mark.parametrize("m", [1, 2])
def test_without_one_backward_the_gradients_are_handed_over_as_well(m, keep_dy):
    model, x = nn.Sequential(nn.Linear(4, 3), nn.PReLU()), torch.randn(5, 4)
    gradients = ObjectiveGradients(model.parameters(), [1 / m] * m)
    raco_fast.prepare(model)
    seen = []
    for on_gradient in (None, lambda p: seen.append(p.grad.clone())):
        gradients.zero()
        scores = model(x).sum(1)
        losses = [scores.sin().sum(), scores.square().sum()][:m]
        if m > 1 and on_gradient is None:
            with pytest.warns(UserWarning, match="parameter '1.weight' reaches the scores past"):
                gram_first(gradients, losses, scores, keep_dy=keep_dy)
        else:
            gram_first(gradients, losses, scores, keep_dy=keep_dy, on_gradient=on_gradient)
        if on_gradient is None:
            expected = [p.grad for p in model.parameters()]
    torch.testing.assert_close(seen, expected)
    assert all(p.grad is None for p in model.parameters())
    model.zero_grad()
    losses = [(s := model(x).sum(1)).sin().sum(), s.square().sum()][:m]
    reference = ObjectiveGradients(model.parameters(), [1 / m] * m)
    reference.backward(losses)
    combine(reference)
    torch.testing.assert_close([p.grad for p in model.parameters()], expected)


@WAYS
def test_a_gram_that_is_not_finite_leaves_no_gradient_to_step_along(lm, keep_dy):
    model, batch = lm.build(), lm.batch()
    raco_fast.prepare(model, strict=True)
    gradients = ObjectiveGradients(model.parameters(), WEIGHTS)
    scores = lm.by_head(model, batch)
    losses = lm.losses(scores)
    losses[1] = losses[1] * torch.inf
    solution = gram_first(gradients, losses, scores, keep_dy=keep_dy)
    assert not solution.finite
    assert all(p.grad.isnan().all() for p in model.parameters())
    torch.optim.SGD(model.parameters()).step()
    assert all(p.grad is None for p in model.parameters())
    handed_over = []
    scores = lm.by_head(model, batch)
    losses = lm.losses(scores)
    losses[1] = losses[1] * torch.inf
    gram_first(gradients, losses, scores, keep_dy=keep_dy, on_gradient=handed_over.append)
    assert handed_over == []
    assert all(p.grad is None for p in model.parameters())


@WAYS
def test_a_parameter_that_a_rule_no_longer_covers_is_noticed(keep_dy):
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1), nn.Flatten(0))
    model[0].requires_grad_(False)
    raco_fast.prepare(model)
    gradients = ObjectiveGradients(model.parameters(), WEIGHTS)
    for _ in range(2):
        gradients.zero()
        scores = model(torch.randn(4, 4))
        if model[0].weight.requires_grad:
            with pytest.warns(UserWarning, match=r"parameter '0.\w+' reaches the scores past ever"):
                gram_first(gradients, three_losses(scores), scores, keep_dy=keep_dy)
        else:
            gram_first(gradients, three_losses(scores), scores, keep_dy=keep_dy)
        model[0].requires_grad_(True)
    assert all(p.grad is not None for p in model.parameters())


def test_a_backward_pass_of_somebody_else():
    """DeepSpeed's engine keeps gradients elsewhere; it is handed a scalar whose gradient is G0."""
    generator = torch.Generator().manual_seed(1)
    x, model = torch.randn(4, 5, 6, generator=generator), Repeated(False)
    trial = Trial(model, lambda model: model(x.to(next(model.parameters()))), three_losses)
    kept = []

    def elsewhere(scalar: Tensor) -> None:
        kept.append(torch.autograd.grad(scalar, list(model.parameters())))

    solution = trial.run(backward=elsewhere)
    assert gram_error(solution, trial.expected) < 1e-5
    (grads,) = kept
    for (name, p), g in zip(model.named_parameters(), grads, strict=True):
        assert p.grad is None
        torch.testing.assert_close(g.double(), trial.truth[name], rtol=1e-4, atol=1e-6)


def test_nothing_is_handed_over_that_is_not_finite():
    model = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))
    raco_fast.prepare(model)
    scores = model(torch.randn(4, 4))
    losses = [loss * torch.nan for loss in three_losses(scores)]
    gradients = ObjectiveGradients(model.parameters(), WEIGHTS)
    solution = gram_first(gradients, losses, scores, backward=lambda scalar: 1 / 0)
    assert not solution.finite
    assert all(p.grad is None for p in model.parameters())


def test_a_backward_pass_of_somebody_else_needs_one_pass_to_be_exact():
    model = nn.Sequential(nn.Linear(4, 4), nn.PReLU(), nn.Linear(4, 1), nn.Flatten(0))
    raco_fast.prepare(model)
    gradients = ObjectiveGradients(model.parameters(), WEIGHTS)
    scores = model(torch.randn(4, 4))
    with (
        pytest.warns(UserWarning, match="one backward pass for all objectives would be wrong"),
        pytest.raises(NotExactError, match="`backward` needs one backward pass to be exact"),
    ):
        gram_first(gradients, three_losses(scores), scores, backward=lambda scalar: None)


def test_wrong_arguments():
    model = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))
    raco_fast.prepare(model)
    gradients = ObjectiveGradients(model.parameters(), WEIGHTS)
    scores = model(torch.randn(4, 4))
    losses = three_losses(scores)
    with pytest.raises(
        ValueError, match=re.escape("`scores` must be given: the [B] sequence scor")
    ):
        gram_first(gradients, losses, None)
    with pytest.raises(ValueError, match="`max_grad_norm` must be a positive number, got 0"):
        gram_first(gradients, losses, scores, max_grad_norm=0.0)
    with pytest.raises(ValueError, match=r"one loss for each of \('a', 'b', 'c'\), got 2"):
        gram_first(gradients, losses[:2], scores)
    with pytest.raises(ValueError, match="`backward` must be None with `keep_dy` or `on_gradient`"):
        gram_first(gradients, losses, scores, keep_dy=True, backward=lambda scalar: None)
    alone = ObjectiveGradients(model.parameters(), [1.0])
    with pytest.raises(ValueError, match="`backward` is for several objectives, got one"):
        gram_first(alone, losses[:1], scores, backward=lambda scalar: None)
    gradients.backward(losses, scores=scores)
    scores = model(torch.randn(4, 4))
    with pytest.raises(RuntimeError, match=r"cannot add to gradients .*; call zero_grad\(\) first"):
        gram_first(gradients, three_losses(scores), scores)
