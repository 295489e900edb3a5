"""`metric="adam"`: the products are those of AdamW's update, beside float64 and torch's AdamW."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import raco_fast
from raco_fast.backends import choose
from raco_fast.optim.clipped_cagrad_adamw import ClippedCAGradAdamW

WEIGHTS = {"a": 0.5, "b": 0.2, "c": 0.3}
W = torch.tensor([*WEIGHTS.values()], dtype=torch.float64)
SHAPES = [(7, 5), (513,), (), (3, 4), (6,)]
GROUPS = [
    {"lr": 0.02, "weight_decay": 0.1},
    {"lr": 0.05, "betas": (0.7, 0.9), "eps": 1e-3, "weight_decay": 0.02},
]


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(3)
    return [
        nn.Parameter(torch.randn(s, generator=draw, dtype=torch.float64).to(dtype)) for s in SHAPES
    ]


def groups(params: list[nn.Parameter]) -> list[dict]:
    return [
        {"params": part, **options}
        for part, options in zip((params[:2], params[2:]), GROUPS, strict=True)
    ]


def slopes(t: int, touched: int = len(SHAPES)) -> list[list[Tensor | None]]:
    """The gradients of step t, of sizes that differ from element to element by 10^±2."""
    draw, sizes = torch.Generator().manual_seed(50 + t), torch.Generator().manual_seed(9)
    found: list[list[Tensor | None]] = [[], [], []]
    for k, shape in enumerate(SHAPES):
        size = 10 ** (4 * torch.rand(shape, generator=sizes, dtype=torch.float64) - 2)
        common = torch.randn(shape, generator=draw, dtype=torch.float64)
        for i, one in enumerate(found):
            g = (0.6, -0.2, -1.0)[i] * common + torch.randn(
                shape, generator=draw, dtype=torch.float64
            )
            if k == 4 and t == 0:
                g = 0.0 * g  # as a fresh adapter's first matrix
            one.append(None if k >= touched or (k == 1 and i == 2) else size * g)
    return found


def backward(opt, params: list[nn.Parameter], t: int, scale: float = 1.0, **more) -> None:
    losses = {}
    for name, one in zip(WEIGHTS, slopes(t, **more), strict=True):
        parts = [(p * g.to(p)).sum() for p, g in zip(params, one, strict=True) if g is not None]
        losses[name] = scale * sum(parts)
    opt.backward(losses)


def rows_of(grads: list[list[Tensor | None]], params: list[nn.Parameter]) -> Tensor:
    return torch.stack(
        [
            torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).detach().double().flatten()
                    for g, p in zip(one, params, strict=True)
                ]
            )
            for one in grads
        ]
    )


def weights_of_elements(opt: torch.optim.Optimizer, amsgrad: bool = False) -> Tensor:
    """D of every element, from the state as it is."""
    largest = max(group["lr"] for group in opt.param_groups)
    found = []
    for group in opt.param_groups:
        for p in group["params"]:
            state, zeros = opt.state.get(p, {}), torch.zeros(p.numel(), dtype=torch.float64)
            if not state:
                found.append(zeros)
                continue
            v = state["max_exp_avg_sq" if amsgrad else "exp_avg_sq"].double().flatten()
            root = (v / (1 - group["betas"][1] ** float(state["step"]))).sqrt()
            D = group["lr"] / largest / (root + group["eps"])
            found.append(torch.where(v == 0.0, zeros, D))
    return torch.cat(found)


def in_torch(steps: int, rule="cagrad-clip", limit=None, touched=lambda t: len(SHAPES), **adamw):
    """(parameters, [M], [H or None], [α]) of torch's AdamW along Σ α_i g_i, all in float64."""
    params = parameters()
    opt = torch.optim.AdamW(groups(params), **adamw)
    found: tuple[list, list, list] = ([], [], [])
    for t in range(steps):
        grads = slopes(t, touched(t))
        G = rows_of(grads, params)
        D = weights_of_elements(opt, adamw.get("amsgrad", False))
        H = (G * D) @ G.T
        solved = H if H.any() else G @ G.T
        solution = raco_fast.solve_dual((solved + solved.T) / 2, W, 0.4, rule)
        alpha = torch.as_tensor(solution.coefficients)
        direction = alpha @ G
        if limit is not None:
            direction *= min(1.0, limit / (float(direction.norm()) + 1e-6))
        parts = direction.split([p.numel() for p in params])
        for k, (p, part) in enumerate(zip(params, parts, strict=True)):
            p.grad = part.view_as(p) if k < touched(t) else None
        opt.step()
        for into, x in zip(found, (G @ G.T, H if H.any() else None, alpha), strict=True):
            into.append(x)
    return params, *found


def optimizer(params: list[nn.Parameter], **settings) -> ClippedCAGradAdamW:
    return ClippedCAGradAdamW(groups(params), weights=WEIGHTS, **{"metric": "adam", **settings})


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"amsgrad": True},
        {"max_grad_norm": 30.0},
        {"rule": "upgrad"},
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_steps_beside_float64(settings, backend):
    """Groups of other lr, betas and eps, a parameter that joins later, elements with v = 0."""
    if backend == "cpu" and "amsgrad" in settings:
        return  # which it does not have
    touched = lambda t: 3 if t < 2 else len(SHAPES)  # noqa: E731
    limit = settings.get("max_grad_norm")
    given = {k: v for k, v in settings.items() if k not in ("max_grad_norm", "rule")}
    truth, grams, in_metric, alphas = in_torch(
        6, settings.get("rule", "cagrad-clip"), limit, touched, **given
    )
    params = parameters()
    opt = optimizer(params, **settings)
    clipped = 0
    with choose.backend(backend):
        for t, (M, H, alpha) in enumerate(zip(grams, in_metric, alphas, strict=True)):
            backward(opt, params, t, touched=touched(t))
            opt.step()
            opt.zero_grad()
            found = opt.solution
            torch.testing.assert_close(found.gram, M, rtol=1e-12, atol=1e-12 * float(M.max()))
            np.testing.assert_allclose(found.coefficients, alpha, rtol=1e-9)
            assert (found.in_metric is None) == (H is None) == (t == 0)
            if H is not None:
                torch.testing.assert_close(
                    found.in_metric, H, rtol=1e-12, atol=1e-12 * float(H.max())
                )
            assert found.update_norm == pytest.approx(float((alpha @ M @ alpha).sqrt()), rel=1e-9)
            assert found.g0_norm == pytest.approx(float((W @ M @ W).sqrt()), rel=1e-9)
            clipped += limit is not None and found.update_norm > limit
    for p, q in zip(params, truth, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)
    assert (clipped > 0) == (limit is not None)
    plain = in_torch(1)
    assert plain[2] == [None]


def taken(steps: int, scale: float = 1.0, unscale: bool = False, **settings):
    """(optimizer, its parameters) after some steps, with a GradScaler where losses are scaled."""
    params = parameters()
    opt = optimizer(params, **settings)
    go_on(opt, range(steps), scale, unscale)
    return opt, params


def go_on(opt: ClippedCAGradAdamW, steps: range, scale: float = 1.0, unscale: bool = False) -> None:
    params = [p for group in opt.param_groups for p in group["params"]]
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1.0)
    for t in steps:
        opt.zero_grad()
        scaler.scale(torch.zeros(()))  # or its factor is not known
        backward(opt, params, t, scale)
        if unscale:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()


def flat(params: list[nn.Parameter]) -> Tensor:
    return torch.cat([p.detach().flatten() for p in params])


def test_it_changes_the_coefficients_and_what_is_known_of_them():
    (adam, _), (plain, _) = taken(4), taken(4, metric="euclidean")
    found = adam.solution
    assert abs(found.coefficients - plain.solution.coefficients).max() > 0.03
    assert plain.solution.in_metric is plain.solution.cosines_in_metric is None
    size = found.in_metric.diagonal().sqrt()
    torch.testing.assert_close(found.cosines_in_metric, found.in_metric / torch.outer(size, size))
    assert abs(found.cosines_in_metric - found.cosines).max() > 0.05
    # p and its certificate are of the problem that was solved.
    alone = raco_fast.solve_dual(found.in_metric, WEIGHTS, 0.4)
    assert (found.gap, found.value) == (alone.gap, alone.value)
    torch.testing.assert_close(found.p, alone.p, rtol=0.0, atol=0.0)


def test_the_radius_is_one_of_the_metric():
    """‖G0 - g0‖ = c ‖g0‖ there, whatever the unit of the metric is."""
    found = taken(4)[0].solution
    H, correction = found.in_metric, found.coefficients - W
    size = lambda x: float((x @ H @ x).sqrt())  # noqa: E731
    assert size(correction) == pytest.approx(0.4 * size(W), rel=1e-9)
    M = found.gram
    assert float((correction @ M @ correction).sqrt()) != pytest.approx(0.4 * found.g0_norm, 1e-3)


def test_a_metric_that_is_the_same_everywhere_changes_nothing():
    found = []
    for metric in ("euclidean", "adam"):
        opt, params = taken(1, metric=metric)
        for group in opt.param_groups:
            group |= {"lr": 0.01, "eps": 1e-8, "betas": (0.9, 0.99)}
            for p in group["params"]:
                opt.state[p]["exp_avg_sq"].fill_(1e-3)
        go_on(opt, range(3, 4))
        found.append((opt.solution.coefficients, flat(params)))
    assert opt.solution.in_metric is not None
    for adam, plain in zip(*found, strict=True):
        torch.testing.assert_close(adam, plain, rtol=1e-9, atol=1e-12)


def test_only_ratios_of_learning_rates_count():
    found = []
    for factor in (1.0, 1e-3):
        opt, _ = taken(2)
        for group in opt.param_groups:
            group["lr"] *= factor
        go_on(opt, range(2, 3))
        found.append(opt.solution.in_metric)
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0.0)
    # A group that does not move has no say; where none does, all have.
    ones = []
    for rates in ((0.02, 0.0), (0.0, 0.0), (0.5, 0.5)):
        opt, params = taken(2)
        for group, lr in zip(opt.param_groups, rates, strict=True):
            group["lr"] = lr
        D = weights_of_elements(opt) if any(rates) else None
        go_on(opt, range(2, 3))
        ones.append(opt.solution.in_metric)
        if D is not None:
            G = rows_of(slopes(2), params)
            torch.testing.assert_close(ones[-1], (G * D) @ G.T, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ones[1], ones[2], rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("rule", ["cagrad-clip", "nash"])
def test_a_scaler_changes_nothing(rule, unscale):
    (scaled, ours), (plain, theirs) = taken(4, 2.0**12, unscale, rule=rule), taken(4, rule=rule)
    torch.testing.assert_close(
        scaled.solution.in_metric, plain.solution.in_metric, rtol=1e-9, atol=0.0
    )
    torch.testing.assert_close(flat(ours), flat(theirs), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("settings", [{}, {"rule": "gradvac"}], ids=str)
def test_a_run_that_is_taken_up_has_the_same_bits(settings):
    _, whole = taken(6, **settings)
    opt, half = taken(3, **settings)
    again = [nn.Parameter(p.detach().clone()) for p in half]
    new = ClippedCAGradAdamW(groups(again), weights=WEIGHTS)
    new.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert new.metric == copy.deepcopy(opt).metric == "adam"
    assert "metric: adam" in repr(new)
    go_on(new, range(3, 6))
    assert torch.equal(flat(again), flat(whole))
    old = opt.state_dict()
    del old["raco"]["gram_options"]["metric"]  # of a version without
    new.load_state_dict(old)
    assert new.metric == "euclidean"


def test_a_step_in_which_nothing_has_a_second_moment_is_euclidean():
    """The first; and the second, if pairs all conflicted in the first: G0 was 0, and v is."""
    p = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    opt = ClippedCAGradAdamW([p], weights=[0.5, 0.5], metric="adam")
    target = torch.tensor([[3.0, 1.0], [1.0, -2.0]], dtype=torch.float64)
    for slopes_of_step in ((target[0], -target[0]), target, target):
        opt.backward([(p * g).sum() for g in slopes_of_step])
        opt.step()
        opt.zero_grad()
        if p in opt.state and float(opt.state[p]["step"]) < 3.0:
            assert opt.solution.in_metric is None
    assert opt.solution.in_metric is not None


def test_a_metric_that_knew_the_gradients_would_see_conflict_in_independent_ones():
    """What the page says of D from v̂ after the step: why it is that of before."""
    draw, n, beta = torch.Generator().manual_seed(0), 200_000, 0.999
    G = torch.randn(2, n, generator=draw, dtype=torch.float64)

    def cosine(v_hat: Tensor) -> float:
        H = (G / (v_hat.sqrt() + 1e-8)) @ G.T
        return float(H[0, 1] / (H[0, 0] * H[1, 1]).sqrt())

    g0 = G.mean(0)
    assert cosine(g0**2) < -0.8  # of a weight 1/|g0|, whose mean does not exist
    before = torch.randn(9, n, generator=draw, dtype=torch.float64).square().mean(0) / 2
    after = (beta * (1 - beta**9) * before + (1 - beta) * g0**2) / (1 - beta**10)
    assert cosine(after) == pytest.approx(-0.05, abs=0.01)
    assert abs(cosine(before)) < 0.01


def test_without_an_objective_it_is_the_step_of_the_others():
    opt, params = taken(2)
    opt.weights = {"a": 0.6, "b": 0.0, "c": 0.4}
    opt.zero_grad()
    one = slopes(2)
    opt.backward(
        {
            name: sum((p * g).sum() for p, g in zip(params, one[i], strict=True) if g is not None)
            for i, name in enumerate(WEIGHTS)
            if name != "b"
        }
    )
    D, G = weights_of_elements(opt), rows_of(one, params)
    opt.step()
    H, rest = (G * D) @ G.T, [0, 2]
    found = opt.solution
    torch.testing.assert_close(found.in_metric[rest][:, rest], H[rest][:, rest], rtol=1e-10, atol=0)
    assert found.in_metric[1].abs().max() == found.coefficients[1] == 0.0
    part = (H[rest][:, rest] + H[rest][:, rest].T) / 2
    alone = raco_fast.solve_dual(part, [0.6, 0.4], 0.4).coefficients
    torch.testing.assert_close(found.coefficients[rest], alone, rtol=1e-9, atol=0.0)


def test_one_objective_has_no_products():
    found = []
    for metric in ("adam", "euclidean"):
        params = parameters()
        opt = ClippedCAGradAdamW(params, weights={"only": 1.0}, metric=metric, c=0.2)
        for t in range(3):
            opt.zero_grad()
            sum((p * g).sum() for p, g in zip(params, slopes(t)[0], strict=True)).backward()
            opt.step()
        assert opt.solution.in_metric is None
        found.append(flat(params))
    assert torch.equal(*found)


def test_steps_that_are_not_finite_are_skipped():
    for what in ("gradient", "second moment"):
        opt, params = taken(2)
        before = flat(params)
        if what == "second moment":
            opt.state[params[1]]["exp_avg_sq"][7] = torch.nan
        opt.zero_grad()
        backward(opt, params, 2)
        if what == "gradient":
            opt.gradients.of(params[0])["b"][0, 0] = torch.inf
        opt.step()
        assert opt.skipped_steps == 1
        assert not opt.solution.finite
        assert torch.equal(flat(params), before)


def test_products_that_a_pass_has_kept_are_not_used():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 1), nn.Flatten(0))
    raco_fast.prepare(model, check_every=None)
    opt = ClippedCAGradAdamW(model.parameters(), weights=WEIGHTS, metric="adam")
    params = list(model.parameters())
    for t in range(3):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(t))
        scores = model(x)
        losses = {"a": scores.square().mean(), "b": scores[:4].sum(), "c": scores.exp().mean()}
        D = weights_of_elements(opt)
        opt.backward(losses, scores=scores)
        assert all(p.grad.products is None for p in params)
        G = rows_of([[p.grad.buffers[i] for p in params] for i in range(3)], params)
        opt.step()
        opt.zero_grad()
    H = (G * D) @ G.T
    torch.testing.assert_close(opt.solution.in_metric, H, rtol=1e-5, atol=1e-6 * float(H.max()))


@pytest.mark.parametrize("rounding", ["nearest", "split"])
def test_bfloat16_states(rounding):
    """Twice the error of plain torch at most, of the same second moments."""
    params = parameters(torch.bfloat16)
    opt = optimizer(params, rounding=rounding)
    for t in range(3):
        opt.zero_grad()
        D = weights_of_elements(opt)
        backward(opt, params, t)
        G = rows_of([[p.grad.buffers[i] for p in params] for i in range(3)], params)
        opt.step()
    truth = (G * D) @ G.T
    R = G.float() * D.float().sqrt()
    size = torch.outer(truth.diagonal().sqrt(), truth.diagonal().sqrt())
    plain = float((((R @ R.T).double() - truth).abs() / size).max())
    found = float(((opt.solution.in_metric - truth).abs() / size).max())
    assert found <= 2 * max(plain, 2.0**-24)


def gram_first(opt, model):
    scores = model(torch.ones(2, 3))
    opt.backward([scores.sum(), scores[0]], scores=scores, mode="gram_first")


def combined(opt, model):
    opt.backward([model(torch.ones(2, 3)).sum()] * 2)
    raco_fast.combine(opt.gradients)


@pytest.mark.parametrize("use", [gram_first, combined])
def test_where_there_is_no_step_it_is_refused(use):
    model = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))
    raco_fast.prepare(model)
    opt = ClippedCAGradAdamW(model.parameters(), weights=[0.5, 0.5], metric="adam")
    with pytest.raises(ValueError, match=r"and \w+ lacks one of both.*opt.metric = 'euclidean'"):
        use(opt, model)
    opt.metric = "euclidean"
    opt.zero_grad()
    use(opt, model)


def test_wrong_settings():
    params = parameters()
    with pytest.raises(ValueError, match=r"`metric` must be 'euclidean' or 'adam' .* got 'adamw'"):
        optimizer(params, metric="adamw")
    with pytest.raises(ValueError, match="must be 'euclidean' with gram='unbiased'"):
        optimizer(params, gram="unbiased")
    opt = optimizer(params)
    with pytest.raises(ValueError, match="must be 'euclidean' with gram='unbiased'"):
        opt.gram = "unbiased"
    assert (opt.gram, opt.metric) == ("batch", "adam")
    with pytest.raises(ValueError, match="`metric` holds for all parameter groups together"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(1))], "metric": "adam"})
    for group in opt.param_groups:
        group["capturable"] = True
    backward(opt, params, 0)
    reduced = opt.gradients.reduced(group["params"] for group in opt.param_groups)
    assert opt._waits(reduced) == "metric='adam' is solved on the host"
