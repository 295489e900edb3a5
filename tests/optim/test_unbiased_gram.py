"""`gram="unbiased"`: the coefficients follow the expected gradients, the update the batch's."""

import copy
import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import raco_fast
from raco_fast.optim.clipped_cagrad_adamw import ClippedCAGradAdamW

WEIGHTS = {"x": 0.5, "y": 0.3, "z": 0.2}
NAMES = tuple(WEIGHTS)
D = 6
# The preferred direction of each objective; y is against x, and labels are mostly noise.
WANTED = torch.tensor(
    [[1.0, 0.5, 0, 0, 0, 0], [-0.8, 0.2, 0.4, 0, 0, 0], [0.3, 0, 0.5, -0.5, 0, 0]]
)


class Scorer(nn.Module):
    """One score a row."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.inner, self.out = nn.Linear(D, 5), nn.Linear(5, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.inner(x)))[:, 0]


def prepared(seed: int = 0, check_every: int | None = None) -> Scorer:
    model = Scorer(seed)
    raco_fast.prepare(model, strict=True, check_every=check_every)
    return model


def data(pairs: int, seed: int, missing: float = 0.0) -> tuple[Tensor, Tensor]:
    """(x [2 * pairs, D]: responses a, then b; labels [m, pairs] in {-1, 0, 1})."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * pairs, D, generator=draw)
    surely = ((x[:pairs] - x[pairs:]) @ WANTED.T * 0.7).sigmoid().T
    labels = torch.where(torch.rand(3, pairs, generator=draw) < surely, 1.0, -1.0)
    kept = torch.rand(3, pairs, generator=draw) >= missing
    kept[:, :2] = True  # two labels of each, so that every entry exists
    return x, labels * kept


def losses_of(scores: Tensor, labels: Tensor, counts: Tensor) -> dict[str, Tensor]:
    pairs = labels.shape[1]
    margins = labels * (scores[:pairs] - scores[pairs:])
    sums = (-F.logsigmoid(margins) * labels.abs()).sum(1) / counts
    return dict(zip(NAMES, sums, strict=True))


def backward(
    target, model: Scorer, x: Tensor, labels: Tensor, cuts=(0, None), mode="one_backward", **said
) -> None:
    """The step's backward passes, of the pairs cut into micro-batches."""
    pairs, counts = labels.shape[1], labels.abs().sum(1)
    for start, stop in pairwise(cuts):
        rows = torch.arange(pairs)[start:stop]
        scores = model(x[torch.cat([rows, rows + pairs])])
        losses = losses_of(scores, labels[:, rows], counts)
        given = {"scores": scores} if mode != "autograd" else {}
        if mode != "autograd" and "samples" not in said:
            given["samples"] = torch.arange(len(rows)).repeat(2)
        target.backward(losses, mode=mode, **given, **said)


def optimizer_of(model: nn.Module, **settings) -> ClippedCAGradAdamW:
    given = {"lr": 1e-2, "weights": WEIGHTS, "weight_decay": 0.1, "gram": "unbiased"}
    return ClippedCAGradAdamW(model.parameters(), **{**given, **settings})


def of_each_pair(model: Scorer, x: Tensor, labels: Tensor) -> Tensor:
    """[pairs, m, all numbers] float64: what each pair adds to the gradients."""
    truth = Scorer().double()
    truth.load_state_dict(model.state_dict())
    parameters, pairs = list(truth.parameters()), labels.shape[1]
    scores, counts = truth(x.double()), labels.abs().sum(1).double()
    found = []
    for k in range(pairs):
        both = torch.stack([scores[k], scores[k + pairs]])
        losses = losses_of(both, labels[:, k : k + 1].double(), counts)
        rows = [torch.autograd.grad(x, parameters, retain_graph=True) for x in losses.values()]
        found.append(torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]))
    return torch.stack(found)


def unbiased_of(v: Tensor, labels: Tensor) -> np.ndarray:
    """H, from what each pair adds."""
    total, there = v.sum(0), labels.abs().double()
    M, own = total @ total.T, torch.einsum("bid,bjd->ij", v, v)
    counts, common = there.sum(1), there @ there.T
    whole = torch.outer(counts, counts)
    return ((M - own) * whole / (whole - common)).numpy()


WAYS = {
    "one_backward": {},
    "micro-batches": {"cuts": (0, 1, 4, None)},
    "gram_first": {"mode": "gram_first"},
    "gram_first, dY kept": {"mode": "gram_first", "keep_dy": True},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("check_every", [None, 1], ids=["unchecked", "checked"])
def test_every_mode_has_the_same_statistic(way, check_every):
    model, (x, labels) = prepared(check_every=check_every), data(9, 1, missing=0.4)
    opt = optimizer_of(model)
    v = of_each_pair(model, x, labels)
    backward(opt, model, x, labels, **WAYS[way])
    opt.step()
    estimate = opt.solution.expected
    truth = unbiased_of(v, labels)
    np.testing.assert_allclose(estimate.mean, truth, atol=2e-5 * abs(truth).max())
    gram = (v.sum(0) @ v.sum(0).T).numpy()
    np.testing.assert_allclose(opt.solution.gram, gram, atol=1e-5 * gram.max())
    assert estimate.shrinkage == 0.0  # one step proves nothing


@pytest.mark.slow
@pytest.mark.parametrize(
    "way", ["one_backward", "micro-batches", "gram_first", "passes as samples"]
)
def test_estimates_are_right_on_average_and_the_batch_is_not(way):
    """Batches of logistic pairs through the engine; the truth is the mean of 200,000 pairs."""
    model, batches, pairs = prepared(), 600, 6
    x, labels = data(200_000, 0)
    whole = Scorer().double()
    whole.load_state_dict(model.state_dict())
    losses = losses_of(whole(x.double()), labels.double(), labels.abs().sum(1))
    rows = [
        torch.autograd.grad(loss, list(whole.parameters()), retain_graph=True)
        for loss in losses.values()
    ]
    g = torch.stack([torch.cat([t.flatten() for t in row]) for row in rows])
    truth = (g @ g.T).numpy()
    opt, found, batch = optimizer_of(model, lr=0.0, weight_decay=0.0), [], []
    for seed in range(1, batches + 1):
        one, of_one = data(pairs, seed, missing=0.3 * (way != "passes as samples"))
        if way == "passes as samples":
            backward(
                opt, model, one, of_one, cuts=(0, 1, 3, None), mode="one_backward", samples=None
            )
        else:
            backward(opt, model, one, of_one, **WAYS[way])
        opt.gram_state = {}
        opt.step()
        opt.zero_grad()
        found.append(opt.solution.expected.mean)
        batch.append(opt.solution.gram.numpy())
    found, batch = np.array(found), np.array(batch)
    # The truth's own error: its batch has 200,000 pairs.
    slack = np.sqrt(np.outer(np.diag(truth), np.diag(truth))) * 0.02
    errors = found.std(0, ddof=1) / np.sqrt(batches)
    assert (abs(found.mean(0) - truth) <= 4 * errors + slack).all()
    batch_errors = batch.std(0, ddof=1) / np.sqrt(batches)
    assert (np.diag(batch.mean(0) - truth - slack) > 6 * np.diag(batch_errors)).all()


@pytest.mark.parametrize("c_mode", ["batch", "signal"])
def test_the_update_is_that_of_the_batch(c_mode):
    model = prepared()
    opt = optimizer_of(model, c_mode=c_mode, max_grad_norm=0.05, gram_ema=0.98)
    for t in range(25):
        if t == 24:
            before = copy.deepcopy(model.state_dict())
            state = copy.deepcopy(opt.state_dict())
        x, labels = data(24, t)
        backward(opt, model, x, labels)
        gradients = {p: torch.stack(p.grad.buffers) for p in model.parameters()}
        opt.step()
        opt.zero_grad()
    solution, M = opt.solution, opt.solution.gram.double()
    estimate, w = solution.expected, torch.tensor(list(WEIGHTS.values()), dtype=torch.float64)
    share = estimate.shrinkage
    assert 0.05 < share < 1.0
    alone = raco_fast.solve_dual(estimate.gram, WEIGHTS, 0.4)
    np.testing.assert_allclose(solution.p, alone.p)
    p = share * torch.tensor(alone.p_clipped) + (1 - share) * w
    of = M
    if c_mode == "signal":
        gram = torch.tensor(estimate.gram)
        of = share * gram + (1 - share) * (w @ gram.diagonal())
    alpha = w + 0.4 * ((w @ of @ w) / (p @ of @ p)).sqrt() * p
    torch.testing.assert_close(torch.as_tensor(solution.coefficients), alpha)
    norm = float((alpha @ M @ alpha).sqrt())
    assert solution.update_norm == pytest.approx(norm)
    assert solution.g0_norm == pytest.approx(float((w @ M @ w).sqrt()))
    assert norm > 0.05  # it is clipped, by the norm that the batch's update has
    plain = Scorer()
    plain.load_state_dict(before)
    adamw = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.1)
    adamw.load_state_dict({k: state[k] for k in ("state", "param_groups")})
    for p_plain, p in zip(plain.parameters(), model.parameters(), strict=True):
        along = torch.einsum("i,i...->...", alpha, gradients[p].double()) * 0.05 / norm
        p_plain.grad = along.float()
    adamw.step()
    for p_plain, p in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, p_plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", ["sdmgrad", {"name": "modo", "gamma": 30.0}], ids=str)
def test_double_sampling_rules_are_asked_for_the_estimate(rule):
    model = prepared()
    opt, state = optimizer_of(model, rule=rule, gram_ema=0.95), None
    for t in range(24):
        backward(opt, model, *data(24, t))
        opt.step()
        opt.zero_grad()
        estimate = opt.solution.expected
        alone = raco_fast.solve_dual(estimate.gram, WEIGHTS, 0.4, rule, state=state)
        state, share = alone.state, estimate.shrinkage
        w = np.array(list(WEIGHTS.values()))
        expected = share * alone.coefficients + (1 - share) * alone.coefficients.sum() * w
        np.testing.assert_allclose(opt.solution.coefficients, expected, rtol=1e-9)
    assert 0.0 < share < 1.0
    assert opt.rule_state["values"]["u"] == state["u"].tolist()
    assert abs(state["u"] - 1 / 3).max() > 0.05


def test_a_run_goes_on_to_the_bit():
    def train(opt, model, steps):
        for t in steps:
            backward(opt, model, *data(6, t))
            opt.step()
            opt.zero_grad()

    model = prepared()
    opt = optimizer_of(model)
    train(opt, model, range(12))
    saved = json.loads(json.dumps(opt.state_dict()["raco"]))
    whole = {**opt.state_dict(), "raco": saved}
    resumed_model = prepared()
    resumed_model.load_state_dict(model.state_dict())
    resumed = optimizer_of(resumed_model, gram="batch")
    resumed.load_state_dict(copy.deepcopy(whole))
    assert resumed.gram == "unbiased"
    train(opt, model, range(12, 30))
    train(resumed, resumed_model, range(12, 30))
    assert resumed.gram_state == opt.gram_state
    assert resumed.gram_state["values"]["count"][0][0] == 30
    for one, other in zip(model.parameters(), resumed_model.parameters(), strict=True):
        assert torch.equal(one, other)
    again = copy.deepcopy(opt)
    assert again.gram_state == opt.gram_state
    opt.load_state_dict({k: v for k, v in whole.items() if k != "raco"} | {"raco": saved})
    assert opt.gram_state["values"]["count"][0][0] == 12


def test_its_state_follows_the_names_of_the_objectives():
    model = prepared()
    opt = optimizer_of(model)
    for t in range(4):
        backward(opt, model, *data(6, t))
        opt.step()
        opt.zero_grad()
    saved = opt.gram_state
    turned = optimizer_of(model, weights={"z": 0.2, "x": 0.5, "y": 0.3})
    turned.gram_state = saved
    mean, moved = (np.array(s["values"]["mean"]) for s in (saved, turned.gram_state))
    np.testing.assert_array_equal(moved, mean[np.ix_([2, 0, 1], [2, 0, 1])])
    with pytest.raises(ValueError, match="`gram_state` must be of the objectives"):
        optimizer_of(model, weights={"x": 0.5, "q": 0.5}).gram_state = saved


def scaled(scale: float, unscale: bool) -> np.ndarray:
    """The averages after steps of gradients that a GradScaler has scaled."""
    model = prepared()
    opt = optimizer_of(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3, enabled=scale != 1.0)
    for t in range(8):
        x, labels = data(6, t)
        scores = model(x)
        losses = losses_of(scores, labels, labels.abs().sum(1))
        losses = {name: scaler.scale(loss) for name, loss in losses.items()}
        opt.backward(losses, scores=scores, samples=torch.arange(6).repeat(2))
        if unscale:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
    return np.array(opt.gram_state["values"]["mean"])


@pytest.mark.parametrize("unscale", [False, True], ids=["by the step", "before it"])
def test_with_a_grad_scaler(unscale):
    np.testing.assert_allclose(scaled(256.0, unscale), scaled(1.0, False), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("mode", ["combine", "gram_first"])
def test_for_another_optimizer(mode):
    model = prepared()
    gradients = raco_fast.ObjectiveGradients(
        model.parameters(), WEIGHTS, gram="unbiased", gram_ema=0.9
    )
    other_model = prepared()
    opt = optimizer_of(other_model, gram_ema=0.9)
    for t in range(25):
        x, labels = data(6, t)
        if mode == "combine":
            backward(gradients, model, x, labels)
            solution = raco_fast.combine(gradients)
        else:
            scores = model(x)
            losses = losses_of(scores, labels, labels.abs().sum(1))
            samples = torch.arange(6).repeat(2)
            solution = raco_fast.gram_first(gradients, losses, scores, samples=samples)
        alone = [p.grad.clone() for p in model.parameters()]
        for p in model.parameters():
            p.grad = None
        backward(opt, other_model, x, labels)
        buffers = [torch.stack(p.grad.buffers) for p in other_model.parameters()]
        for group in opt.param_groups:
            group["lr"], group["weight_decay"] = 0.0, 0.0
        opt.step()
        opt.zero_grad()
        np.testing.assert_allclose(solution.coefficients, opt.solution.coefficients, rtol=1e-3)
        for g, three in zip(alone, buffers, strict=True):
            along = torch.einsum("i,i...->...", solution.coefficients.float(), three)
            torch.testing.assert_close(torch.as_tensor(g), along, rtol=1e-4, atol=1e-6)
    assert solution.expected.shrinkage > 0.1


def test_a_direction_found_from_scaled_gradients_is_not_unscaled():
    model = prepared()
    gradients = raco_fast.ObjectiveGradients(model.parameters(), WEIGHTS, gram="unbiased")
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    x, labels = data(6, 0)
    scores = model(x)
    losses = losses_of(scores, labels, labels.abs().sum(1))
    losses = {name: scaler.scale(loss) for name, loss in losses.items()}
    gradients.backward(losses, scores=scores, samples=torch.arange(6).repeat(2))
    raco_fast.combine(gradients)
    with pytest.raises(RuntimeError, match="with gram='unbiased' was found from gradients times"):
        scaler.unscale_(sgd)


def test_autograd_counts_whole_passes():
    """Four micro-batches of one size: as if each were a sample."""
    model, (x, labels) = Scorer(), data(8, 3)
    opt = optimizer_of(model)
    v = of_each_pair(model, x, labels)
    backward(opt, model, x, labels, cuts=(0, 2, 4, 6, None), mode="autograd")
    opt.step()
    passes = v.view(4, 2, *v.shape[1:]).sum(1)
    truth = unbiased_of(passes, torch.ones(3, 4))
    np.testing.assert_allclose(opt.solution.expected.mean, truth, atol=1e-5 * abs(truth).max())
    total = v.sum(0)
    for name, g in zip(NAMES, total, strict=True):
        held = torch.cat([opt.gradients.of(p)[name].flatten() for p in model.parameters()])
        torch.testing.assert_close(held.double(), g, rtol=1e-4, atol=1e-6)


def test_labels_whose_gradient_is_zero_count_where_they_are_said():
    model, (x, labels) = prepared(), data(6, 4)
    scores = model(x)
    margins = labels * (scores[:6] - scores[6:])
    hinge = dict(zip(NAMES, F.relu(margins.detach().median() - margins).sum(1) / 6, strict=True))
    opt = optimizer_of(model)
    every = {name: torch.ones(12, dtype=torch.bool) for name in NAMES}
    samples = torch.arange(6).repeat(2)
    opt.backward(hinge, scores=scores, samples=samples, labelled=every)
    assert opt.gradients.expectation.samples.sums(opt.gradients.processes, 1.0).counts.tolist() == [
        6.0,
        6.0,
        6.0,
    ]
    opt.zero_grad()
    scores = model(x)
    hinge = dict(zip(NAMES, F.relu(-labels * (scores[:6] - scores[6:])).sum(1) / 6, strict=True))
    opt.backward(hinge, scores=scores, samples=samples)
    counts = opt.gradients.expectation.samples.sums(opt.gradients.processes, 1.0).counts
    assert (counts < 6).any()


def test_a_step_without_two_samples_takes_nothing_but_goes_on():
    """The last step of an epoch may have one pair left."""
    model = prepared()
    opt = optimizer_of(model)
    for t in range(5):
        backward(opt, model, *data(6, t))
        opt.step()
        opt.zero_grad()
    before, weights = opt.gram_state, model.out.weight.clone()
    backward(opt, model, *data(1, 9))
    opt.step()
    assert opt.gram_state["values"]["mean"] == before["values"]["mean"]
    assert not torch.equal(model.out.weight, weights)


def test_a_step_that_is_skipped_leaves_the_averages():
    model = prepared()
    opt = optimizer_of(model)
    backward(opt, model, *data(6, 0))
    opt.step()
    opt.zero_grad()
    before = opt.gram_state
    x, labels = data(6, 1)
    x[0] = math.nan
    backward(opt, model, x, labels)
    opt.step()
    assert opt.skipped_steps == 1
    assert opt.gram_state == before


def test_an_objective_of_weight_0_may_be_left_out():
    model = prepared()
    opt = optimizer_of(model, weights={"x": 0.6, "y": 0.4, "z": 0.0})
    for t in range(8):
        x, labels = data(6, t)
        scores = model(x)
        losses = losses_of(scores, labels, labels.abs().sum(1))
        if t % 2:
            del losses["z"]
        opt.backward(losses, scores=scores, samples=torch.arange(6).repeat(2))
        opt.step()
        opt.zero_grad()
    assert opt.solution.coefficients[2] == 0.0
    assert np.array(opt.gram_state["values"]["count"])[[0, 2], [1, 2]].tolist() == [8.0, 4.0]


def test_an_entry_that_never_is_there_is_told_of():
    model = prepared()
    opt = optimizer_of(model)

    def step(t: int) -> None:
        x, labels = data(6, t)
        labels[2, 1:] = 0.0
        backward(opt, model, x, labels)
        opt.step()
        opt.zero_grad()

    for t in range(19):
        step(t)
    with pytest.warns(UserWarning, match="of which one is labelled for 'z' and the other for 'z'"):
        step(19)
    step(20)  # once is enough
    assert opt.solution.expected.shrinkage == 0.0


def test_what_is_estimated_on_the_host_is_not_captured():
    opt = optimizer_of(prepared(), capturable=True, weights={"x": 0.6, "y": 0.4})
    assert "estimated on the host" in opt._waits(opt.gradients.reduced_groups([]))


def test_one_objective_has_no_conflict_to_estimate():
    model = prepared()
    opt = optimizer_of(model, weights={"x": 1.0})
    F.mse_loss(model(torch.randn(4, D)), torch.zeros(4)).backward()
    opt.step()
    assert opt.solution.expected is None


@pytest.mark.parametrize(
    ("said", "error", "match"),
    [
        ({"samples": None}, RuntimeError, "at least two independent samples in a step"),
        ({"samples": [0] * 12}, RuntimeError, "at least two independent samples"),
        ({"samples": [0] * 5}, ValueError, r"`samples` must have one entry a score, shape \[12\]"),
        ({"samples": [0.5] * 12}, TypeError, "`samples` must be integers"),
        ({"labelled": {"x": [True] * 5}}, ValueError, r"`labelled`\['x'\] must have one entry"),
        ({"labelled": {"x": [False] * 12}}, ValueError, "must be true wherever the loss depends"),
    ],
)
def test_samples_that_do_not_fit(said, error, match):
    model = prepared()
    opt = optimizer_of(model)

    def step() -> None:
        backward(opt, model, *data(6, 0), **{"samples": torch.arange(6).repeat(2), **said})
        opt.step()

    with pytest.raises(error, match=match):
        step()


def test_what_cannot_be_seen_is_refused():
    model = prepared()
    opt = optimizer_of(model)
    with (
        pytest.raises(RuntimeError, match=r"which `with objective\('x'\):` does not show"),
        opt.objective("x"),
    ):
        pass
    x, labels = data(6, 0)
    scores = model(x)
    losses = losses_of(scores, labels, labels.abs().sum(1))
    with pytest.raises(RuntimeError, match="has the products of single samples from one backward"):
        opt.backward(losses, scores=scores, mode="autograd", samples=torch.arange(6).repeat(2))


@pytest.mark.parametrize("then", ["step", "backward"])
def test_gradients_may_be_read_and_not_written(then):
    model, (x, labels) = prepared(), data(6, 0)
    opt = optimizer_of(model)
    p = next(iter(model.parameters()))
    for written in (False, True):
        opt.zero_grad()
        for _ in range(2):
            backward(opt, model, x, labels)
            (one, *_) = opt.gradients.of(p).values()
        if not written:
            opt.step()
            continue
        one.mul_(0.5)
        with pytest.raises(RuntimeError, match=r"have been written to: gram='unbiased'"):
            opt.step() if then == "step" else backward(opt, model, x, labels)


def test_scores_that_share_rows_are_samples_by_themselves():
    x, labels = torch.randn(4, 3, D), data(4, 0)[1]
    model = prepared()
    opt = optimizer_of(model)
    first, second = torch.arange(4).repeat_interleave(3), torch.full((4, 3), -1)
    second[:, 0] = torch.arange(4, 8)  # the first row of each is a prompt
    index = first.view(4, 3).clone()
    index[:, 2] += 4

    def scores_of() -> Tensor:
        with raco_fast.sequences(index.flatten(), shared_with=second.flatten()):
            y = model(x.flatten(0, 1)).view(4, 3)
        return torch.cat([y[:, 0] + y[:, 1], y[:, 0] + y[:, 2]])

    scores = scores_of()
    opt.backward(losses_of(scores, labels, labels.abs().sum(1)), scores=scores)
    sums = opt.gradients.expectation.samples.sums(opt.gradients.processes, 1.0)
    assert sums.samples == 4
    opt.zero_grad()
    scores = scores_of()
    with pytest.raises(ValueError, match="`samples` must be the same for scores 0 and 4"):
        opt.backward(
            losses_of(scores, labels, labels.abs().sum(1)), scores=scores, samples=range(8)
        )


def test_settings():
    model = Scorer()
    opt = optimizer_of(model, gram="batch")
    opt.gram, opt.gram_ema, opt.c_mode = "unbiased", 0.9, "signal"
    given = {"gram": "unbiased", "gram_ema": 0.9, "c_mode": "signal"}
    assert opt.gram_options == {**given, "metric": "euclidean"}
    with pytest.raises(ValueError, match="`gram` must be 'batch'"):
        opt.gram = "mean"
    with pytest.raises(ValueError, match="leave them out, or set gram='unbiased'"):
        opt.gram = "batch"
    assert opt.gram == "unbiased"
    with pytest.raises(ValueError, match="`gram` holds for all parameter groups together"):
        opt.add_param_group({"params": [torch.zeros(1, requires_grad=True)], "gram": "batch"})
    assert "gram: unbiased" in repr(opt)


@pytest.mark.parametrize("rule", ["mgda-decoupled", {"name": "cr-mogm", "of": "mgda-decoupled"}])
def test_a_step_without_a_label_for_an_objective_has_no_loss_to_divide_by(rule):
    model = prepared()
    optimizer = optimizer_of(model, rule=rule)
    for step in range(6):
        x, labels = data(8, seed=step)
        if step >= 4:
            labels[2] = 0.0
        pairs, counts = labels.shape[1], labels.abs().sum(1).clamp(min=1.0)
        scores = model(x)
        losses = losses_of(scores, labels, counts)
        optimizer.backward(losses, scores=scores, samples=torch.arange(pairs).repeat(2))
        optimizer.step()
        coefficients = np.asarray(optimizer.solution.coefficients)
        assert np.isfinite(coefficients).all()
        assert coefficients[:2].max() > 0.0
    assert optimizer.solution.expected.gram[2, 2] > 0.0, "what was seen before is still known"
