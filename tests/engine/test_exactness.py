"""What would make one backward pass wrong is found out, named, and done by autograd instead."""

import copy
import re
import warnings
from contextlib import nullcontext
from functools import partial
from itertools import combinations, permutations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import raco_fast
from raco_fast import ObjectiveGradients
from raco_fast.engine import layer_rules
from raco_fast.engine.spot_check import _codes
from raco_fast.engine.tap import Checks

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


class Tokens(nn.Module):
    """[B, T] ids -> token scores [B, T]; a subclass or an attribute spoils it from some step on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.mid, self.out = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 1)
        self.spoil = lambda h: h

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.spoil(self.mid(self.words(ids)).tanh()))[..., 0]


def ids_of(step: int, rows: int = 4, length: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 20, (rows, length), generator=generator)


def in_modes(
    model: nn.Module, scores_of, losses_of, steps: int, changed_at: int, change, **options
):
    """Per step and mode: (the messages, the largest relative error of what was formed)."""
    clean = copy.deepcopy(model).double()
    raco_fast.prepare(model, **options)
    found = []
    for mode in ("one_backward", "gram_first"):
        gradients = ObjectiveGradients(model.parameters(), [0.4, 0.6])
        of_mode = []
        for one in (model, clean):
            one.spoil = Tokens().spoil
        for step in range(1, steps + 1):
            if step == changed_at:
                change(model)
                change(clean)
            gradients.zero()
            scores = scores_of(model, step)
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                if mode == "one_backward":
                    gradients.backward(losses_of(model, scores, step), scores=scores)
                    combined = torch.eye(2, dtype=torch.float64)
                else:
                    losses = losses_of(model, scores, step)
                    solution = raco_fast.gram_first(gradients, losses, scores)
                    combined = torch.as_tensor(solution.coefficients)[None]
            losses = losses_of(clean, scores_of(clean, step), step)
            error = 0.0
            for p, q in zip(model.parameters(), clean.parameters(), strict=True):
                truth = torch.stack(
                    [torch.autograd.grad(loss, q, retain_graph=True)[0] for loss in losses]
                )
                truth = torch.tensordot(combined, truth, 1)
                held = [p.grad] if mode == "gram_first" else list(gradients.of(p).values())
                error = max(error, float((torch.stack(held) - truth).norm() / truth.norm()))
            of_mode.append(([str(w.message) for w in seen], error))
        found.append(of_mode)
    return found


def sum_of_tokens(model: nn.Module, step: int) -> Tensor:
    return model(ids_of(step)).sum(1)


def two_losses(model: nn.Module, scores: Tensor, step: int) -> list[Tensor]:
    return [scores.sin().sum(), scores.square().sum()]


def with_auxiliary(model: nn.Module, scores: Tensor, step: int) -> list[Tensor]:
    """A loss with another way to the parameters, at step 3 only."""
    first, second = two_losses(model, scores, step)
    return [first, second + 10 * model(ids_of(step)).square().mean() if step == 3 else second]


def with_penalty(model: nn.Module, scores: Tensor, step: int) -> list[Tensor]:
    first, second = two_losses(model, scores, step)
    return [first, second + model.mid.weight.square().sum() if step == 3 else second]


def of_another_sum(model: nn.Module, scores: Tensor, step: int) -> list[Tensor]:
    """From step 3 on the losses are functions of another tensor than the scores that are given."""
    return two_losses(model, scores if step < 3 else sum_of_tokens(model, step), step)


@pytest.mark.parametrize("losses", [with_auxiliary, with_penalty, of_another_sum])
def test_a_way_past_the_scores_is_found_whenever_it_appears(losses):
    for steps in in_modes(Tokens(), sum_of_tokens, losses, 4, 0, None):
        said = [messages for messages, _ in steps]
        assert said[0] == said[1] == []
        assert "reaches a loss other than through `scores`" in said[2][0]
        assert said[3] == []
        assert max(error for _, error in steps) < 1e-5


def begin_to_mix(model: nn.Module) -> None:
    model.spoil = lambda h: h + 0.1 * h.roll(1, 0)


def regroup(model: nn.Module) -> None:
    model.spoil = lambda h: h[[0, 0, 1, 3]]


def reorder(model: nn.Module) -> None:
    model.spoil = lambda h: h.flip(0)


@pytest.mark.parametrize("changed_at", [1, 2, 4, 5, 8])
@pytest.mark.parametrize("change", [begin_to_mix, regroup, reorder])
def test_sequences_that_begin_to_meet_are_found_at_once_where_the_graph_is_new(change, changed_at):
    for steps in in_modes(Tokens(), sum_of_tokens, two_losses, 9, changed_at, change):
        for step, (messages, error) in enumerate(steps, 1):
            assert bool(messages) == (step == changed_at)
            assert error < 1e-5
        (message,) = steps[changed_at - 1][0]
        assert "a score depends on rows of another sequence" in message
        assert re.search(r"the gradients of parameter '[a-z.]+' in layer '[a-z]+' differ", message)


@pytest.mark.parametrize("every", [1, 3])
def test_sequences_that_meet_in_a_graph_that_looks_the_same_are_found_by_the_next_check(every):
    """The same nodes, other rows."""
    model = Tokens()
    order = torch.arange(4)
    model.spoil = lambda h: h[order]
    gradients = ObjectiveGradients(model.parameters(), [0.4, 0.6])
    raco_fast.prepare(model, check_every=every)
    found = []
    for step in range(1, 8):
        if step == 5:
            order.copy_(torch.tensor([0, 0, 1, 3]))
        gradients.zero()
        scores = sum_of_tokens(model, step)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            gradients.backward(two_losses(model, scores, step), scores=scores)
        found.append(len(seen))
    assert found.index(1) + 1 == {1: 5, 3: 6}[every]


def test_strict_raises_before_the_step_and_goes_on_raising():
    model = Tokens()
    raco_fast.prepare(model, strict=True)
    gradients = ObjectiveGradients(model.parameters(), [0.4, 0.6])
    for step in range(1, 5):
        if step == 3:
            begin_to_mix(model)
        gradients.zero()
        scores = sum_of_tokens(model, step)
        if step < 3:
            gradients.backward(two_losses(model, scores, step), scores=scores)
        else:
            for run in (gradients.backward, partial(raco_fast.gram_first, gradients)):
                with pytest.raises(ValueError, match=r"would be wrong here: the gradients of para"):
                    run(two_losses(model, scores, step), scores=scores)
                assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("rows", ["one", "same"])
def test_a_batch_in_which_nothing_can_differ_does_not_count(rows):
    """One sequence, or objectives that agree on all: what mixes shows in neither."""
    model = Tokens()
    begin_to_mix(model)
    gradients = ObjectiveGradients(model.parameters(), [0.4, 0.6])
    raco_fast.prepare(model)
    for step in range(1, 4):
        scores = model(ids_of(step, rows=1 if rows == "one" and step < 3 else 4)).sum(1)
        losses = two_losses(model, scores, step)
        if rows == "same" and step < 3:
            losses = [scores.square().sum(), 3 * scores.square().sum()]
        with pytest.warns(UserWarning, match="rows of another") if step == 3 else nullcontext():
            gradients.zero()
            gradients.backward(losses, scores=scores)


class Routed2(Tokens):
    """Two experts that are layers, each with the tokens that a router gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.spoil = self.routed

    def routed(self, h: Tensor) -> Tensor:
        rows, found = h.reshape(-1, 8), torch.zeros(h.numel() // 8, 8).to(h)
        for k, expert in enumerate(self.experts):
            mine = (rows[:, 0] > 0) == bool(k)
            found[mine] = expert(rows[mine])
        return found.view_as(h)


@pytest.mark.parametrize("length", [1, 2, 5])
def test_tokens_of_an_expert_are_never_taken_for_sequences(length):
    model = Routed2()
    raco_fast.prepare(model)
    gradients = ObjectiveGradients(model.parameters(), [0.4, 0.6])
    params = list(model.parameters())
    for step in range(30):
        scores = model(ids_of(step, rows=2, length=length)).sum(1)
        losses = two_losses(model, scores, step)
        truth = [
            torch.autograd.grad(
                x, params, retain_graph=True, materialize_grads=True, allow_unused=True
            )
            for x in losses
        ]
        gradients.zero()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "one backward pass for all objectives would be wrong")
            gradients.backward(losses, scores=scores)
        for p, *expected in zip(params, *truth, strict=True):
            held = [torch.zeros_like(p) if g is None else g for g in gradients.of(p).values()]
            torch.testing.assert_close(held, expected)


@pytest.mark.parametrize("flat", ["sequence by sequence", "time first", "time first, T = B"])
def test_rows_that_are_flattened_are_sequence_by_sequence_or_fall_back(flat):
    class Flat(Tokens):
        def __init__(self) -> None:
            super().__init__()
            self.spoil = self.through

        def through(self, h: Tensor) -> Tensor:
            if flat != "sequence by sequence":
                return (
                    self.mid(h.transpose(0, 1).reshape(-1, 8)).view(-1, len(h), 8).transpose(0, 1)
                )
            return self.mid(h.reshape(-1, 8)).view_as(h)

    length = 4 if "T = B" in flat else 5
    model = Flat()
    raco_fast.prepare(model)
    gradients = ObjectiveGradients(model.parameters(), [0.4, 0.6])
    params = list(model.parameters())
    for step in range(3):
        scores = model(ids_of(step, length=length)).sum(1)
        losses = two_losses(model, scores, step)
        truth = [torch.autograd.grad(x, params, retain_graph=True) for x in losses]
        gradients.zero()
        falls_back = flat != "sequence by sequence" and step == 0
        with pytest.warns(UserWarning, match="'mid'") if falls_back else nullcontext():
            gradients.backward(losses, scores=scores)
        for p, *expected in zip(params, *truth, strict=True):
            torch.testing.assert_close(list(gradients.of(p).values()), expected)


@pytest.mark.parametrize("check_every", [1, 4, None])
def test_a_check_changes_no_bit(check_every):
    """Gradients of micro-batches add up alike wherever they are checked."""
    found = []
    for every in (check_every, 3):
        model = Tokens()
        raco_fast.prepare(model, check_every=every)
        gradients = ObjectiveGradients(model.parameters(), [0.4, 0.6])
        for step in range(5):
            scores = sum_of_tokens(model, step)
            gradients.backward(two_losses(model, scores, step), scores=scores)
        found.append([list(gradients.of(p).values()) for p in model.parameters()])
    for ours, others in zip(*found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, others, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["one_backward", "gram_first"])
def test_rounding_is_no_mismatch_and_a_wrong_rule_is(lm, family, dtype, mode, monkeypatch):
    def slightly_wrong(module, x, dy, segments):
        return layer_rules.linear(module, x, 1.3 * dy, segments)

    for rules, wrong in ((layer_rules._RULES, False), ({nn.Linear: slightly_wrong}, True)):
        if wrong and family == "gpt2":
            continue  # without a Linear
        monkeypatch.setattr(layer_rules, "_RULES", {**layer_rules._RULES, **rules})
        model, batch = lm.build(family, dtype), lm.batch()
        raco_fast.prepare(model, check_every=1)
        gradients = ObjectiveGradients(model.parameters(), lm.weights(3))
        for _ in range(3):
            gradients.zero()
            scores = lm.by_logits(model, batch)
            losses = lm.losses(scores)
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                if mode == "one_backward":
                    gradients.backward(losses, scores=scores)
                else:
                    raco_fast.gram_first(gradients, losses, scores)
            if wrong:
                (warning,) = seen
                assert "does not describe what it computed" in str(warning.message)
                assert re.search(r"in layer '[\w.]*(proj|lm_head)'", str(warning.message))
                break
            assert not seen


ADAPTERS = {
    "IA3": lambda peft: peft.IA3Config(
        task_type="CAUSAL_LM",
        target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    ),
    "VeRA": lambda peft: peft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"]),
    "OFT": lambda peft: peft.OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj", "v_proj"]),
    "LoHa": lambda peft: peft.LoHaConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "AdaLoRA": lambda peft: peft.AdaLoraConfig(total_step=5, target_modules=["q_proj", "v_proj"]),
    "prompt tuning": lambda peft: peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3
    ),
    "DoRA": lambda peft: peft.LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "v_proj"]),
}


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.filterwarnings("ignore:.*OFT:UserWarning")
def test_adapters_without_rules_are_done_by_autograd(lm, adapter):
    import peft

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(lm.build("llama"), ADAPTERS[adapter](peft))
    for p in lm.trained(model).values():
        nn.init.normal_(p, std=0.2)
    batch = lm.batch()

    def scores_of(model: nn.Module) -> Tensor:
        logits = model(input_ids=batch.ids, attention_mask=batch.mask.long()).logits
        logits = logits[:, -batch.ids.shape[1] :]  # virtual tokens come first
        logps = logits[:, :-1].log_softmax(-1).gather(-1, batch.ids[:, 1:, None])[..., 0]
        return logps.masked_fill(~batch.scored[:, 1:], 0).sum(-1)

    truth = lm.by_autograd(model, lm.losses(scores_of(model)))
    raco_fast.prepare(model)
    gradients = ObjectiveGradients(lm.trained(model).values(), lm.weights(3))
    scores = scores_of(model)
    with pytest.warns(UserWarning, match="taking one pass per objective"):
        gradients.backward(lm.losses(scores), scores=scores)
    assert max(lm.errors(lm.held(gradients, model), truth).values()) < 1e-6


def test_reentrant_checkpointing_that_is_switched_on_later():
    model = Tokens()
    raco_fast.prepare(model)
    gradients = ObjectiveGradients(model.parameters(), [0.4, 0.6])
    for step in range(2):
        if step:
            model.spoil = lambda h: checkpoint(torch.tanh, h, use_reentrant=True)
        gradients.zero()
        scores = sum_of_tokens(model, step)
        with pytest.warns(UserWarning, match="reentrant check") if step else nullcontext():
            gradients.backward(two_losses(model, scores, step), scores=scores)


def test_a_loss_of_nothing_that_is_known_is_refused():
    model, other = Tokens(), nn.Parameter(torch.ones(()))
    raco_fast.prepare(model)
    gradients = ObjectiveGradients(model.parameters(), {"a": 0.4, "b": 0.6})
    scores = sum_of_tokens(model, 0)
    for loss in (other, other.square()):
        with pytest.raises(
            ValueError, match=r"`losses`\['b'\] must be a function of `scores`, and"
        ):
            gradients.backward({"a": scores.sum(), "b": loss}, scores=scores)
    assert all(p.grad is None for p in [*model.parameters(), other])


@pytest.mark.parametrize("value", [0, -1, 0.5])
def test_how_often_to_check_is_checked(value):
    with pytest.raises(
        ValueError, match="`check_every` must be a number of calls, at least 1, got"
    ):
        raco_fast.prepare(Tokens(), check_every=value)
