"""Every loss and its gradient against its formula in numbers of 60 digits.

The formulas here are written out with exp and log, as in the papers: at that precision nothing has
to be rearranged to stay finite, also where margins are 10 000.
"""

from functools import cache

import pytest
import torch
from mpmath import mp, mpf
from pair_scores import make_scores

from raco_fast.dpo.losses.objective_losses import preference_losses
from raco_fast.dpo.losses.pair_scores import PairScores
from raco_fast.dpo.losses.registry import LOSSES, make_loss

OPTIONS = {
    "sigmoid": {"beta": 0.3, "label_smoothing": 0.15},
    "sigmoid-norm": {"beta": 1.7},
    "ld": {"beta": 0.3, "label_smoothing": 0.1, "alpha": 0.4},  # of scores as they are given
    "modpo": {"beta": 0.3, "weight": 0.4},
    "robust": {"beta": 0.3, "label_smoothing": 0.2},
    "exo": {"beta": 0.3, "label_smoothing": 0.01},
    "hinge": {"beta": 0.3},
    "ipo": {"beta": 0.3},
    "discopop": {"beta": 0.3, "tau": 0.4},
    "dpo-positive": {"beta": 0.3, "lam": 4.0},
    "forward-kl": {"beta": 0.3},
    "js": {"beta": 0.3},
    "alpha": {"beta": 0.3, "alpha": 0.7},
    "nca": {"beta": 0.3},
    "bco": {"beta": 0.3},
    "sppo": {"beta": 0.3},
    "apo-zero": {"beta": 0.3},
    "apo-down": {"beta": 0.3},
    "simpo": {"beta": 1.3, "gamma": 0.7},
    "amopo-static": {"beta": 1.3},
    "cpo": {"beta": 0.3, "alpha": 0.6},
    "orpo": {"lam": 0.4},
}
CAPPED = ("forward-kl", "alpha")
FIELDS = ("logps_a", "logps_b", "ref_logps_a", "ref_logps_b", "tokens_a", "tokens_b")
OTHER = ("other_a", "other_b")


def s(x):
    return 1 / (1 + mp.exp(-x))


def nls(x):
    """-log s(x)."""
    return mp.log(1 + mp.exp(-x))


def log_odds(x):
    return mp.log(mp.exp(x) / (1 - mp.exp(x)))


def formula(name, o, pi_w, pi_l, ref_w, ref_l, n_w, n_l, other_w, other_l):
    """The loss of one pair, in the letters of docs/losses.md; o are its options."""
    w, l = pi_w - ref_w, pi_l - ref_l  # noqa: E741
    x = o.get("beta", 0) * (w - l)
    b, e = o.get("beta"), o.get("label_smoothing")
    mean, likelihood = w / n_w - l / n_l, pi_w / n_w - pi_l / n_l
    return {
        "sigmoid": lambda: (1 - e) * nls(x) + e * nls(-x),
        "sigmoid-norm": lambda: nls(b * mean),
        "ld": lambda: (1 - e) * nls(x) + e * nls(-x),
        "modpo": lambda: nls((b * w - other_w - (b * l - other_l)) / o["weight"]),
        "robust": lambda: ((1 - e) * nls(x) - e * nls(-x)) / (1 - 2 * e),
        "exo": lambda: s(x) * (mp.log(s(x)) - mp.log(1 - e)) + s(-x) * (mp.log(s(-x)) - mp.log(e)),
        "hinge": lambda: max(mpf(0), 1 - x),
        "ipo": lambda: (mean - 1 / (2 * b)) ** 2,
        "discopop": lambda: (1 - s(x / o["tau"])) * nls(x) + s(x / o["tau"]) * mp.exp(-x),
        "dpo-positive": lambda: nls(b * (w - l - o["lam"] * max(mpf(0), -w))),
        "forward-kl": lambda: nls(b * (mp.exp(-l) - mp.exp(-w))),
        "js": lambda: nls(b * mp.log((1 + mp.exp(-l)) / (1 + mp.exp(-w)))),
        "alpha": lambda: nls(b * (mp.exp(-o["alpha"] * l) - mp.exp(-o["alpha"] * w)) / o["alpha"]),
        "nca": lambda: nls(b * w) + (nls(-b * w) + nls(-b * l)) / 2,
        "bco": lambda: nls(b * w) + nls(-b * l),
        "sppo": lambda: (w - 1 / (2 * b)) ** 2 + (l + 1 / (2 * b)) ** 2,
        "apo-zero": lambda: 1 - s(b * w) + s(b * l),
        "apo-down": lambda: s(b * w) + 1 - s(x),
        "simpo": lambda: nls(b * likelihood - o["gamma"]),
        "amopo-static": lambda: nls(b * likelihood),
        "cpo": lambda: nls(b * (pi_w - pi_l)) - o["alpha"] * pi_w / n_w,
        "orpo": lambda: -pi_w / n_w + o["lam"] * nls(log_odds(pi_w / n_w) - log_odds(pi_l / n_l)),
    }[name]()


@cache
def truth(name, pair, sign):
    """(loss, slope in logps_a, slope in logps_b) of one pair, its fields as in FIELDS, OTHER."""
    options = {key: mpf(value) for key, value in OPTIONS[name].items()}
    order = (0, 1, 2, 3, 4, 5, 6, 7) if sign > 0 else (1, 0, 3, 2, 5, 4, 7, 6)
    pair = (*pair, 0.0, 0.0)[:8]

    def loss(a, b):
        values = [a, b, *map(mpf, pair[2:])]
        return formula(name, options, *(values[k] for k in order))

    # Digits enough that 1 - s(largest x) is not 0, and its logarithm not infinite.
    extreme = 4500 if name in ("js", "discopop") else 1500
    with mp.workdps(60 if max(map(abs, pair)) < 1e3 else extreme):
        a, b = mpf(pair[0]), mpf(pair[1])
        h = mpf(10) ** -12
        slopes = [loss(a + h, b) - loss(a - h, b), loss(a, b + h) - loss(a, b - h)]
        return float(loss(a, b)), *(float(slope / (2 * h)) for slope in slopes)


def of_pair(scores: PairScores, k: int) -> tuple[float, ...]:
    given = [getattr(scores, field) for field in (*FIELDS, *OTHER)]
    return tuple(tensor[k].item() for tensor in given if tensor is not None)


def test_every_loss_has_its_formula_here():
    assert set(OPTIONS) == set(LOSSES)


@pytest.mark.parametrize("name", OPTIONS)
def test_loss_and_gradient(name):
    scores, label = make_scores(7, dtype=torch.float64), torch.tensor([1, -1, 0, 1, -1, -1, 0])
    loss = preference_losses(scores, {"x": label}, loss=make_loss(name, options=OPTIONS[name]))["x"]
    grads = torch.autograd.grad(loss, [scores.logps_a, scores.logps_b])
    labelled = label.nonzero().flatten().tolist()
    expected = {k: truth(name, of_pair(scores, k), int(label[k])) for k in labelled}
    total = sum(value for value, *_ in expected.values()) / len(labelled)
    assert loss.item() == pytest.approx(total, rel=1e-12)
    for k in range(7):
        for side, grad in enumerate(grads):
            slope = expected[k][1 + side] / len(labelled) if k in labelled else 0.0
            assert grad[k].item() == pytest.approx(slope, rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("name", OPTIONS)
def test_float32_is_within_1e_6_where_the_inputs_are_exact(name):
    """Inputs of few bits, so that differences of log-probabilities are not rounded."""
    generator = torch.Generator().manual_seed(3)
    whole = torch.randint(-80, -8, (4, 40), generator=generator) / 8
    whole[:2] = whole[2:] + torch.randint(-16, 16, (2, 40), generator=generator) / 8
    tokens = torch.full((2, 40), 16.0)
    columns = [*whole.clamp(max=-0.125), *tokens]
    label = torch.ones(40)
    loss = make_loss(name, options=OPTIONS[name])
    ours, exact = (
        preference_losses(PairScores(*(c.to(dtype) for c in columns)), {"x": label}, loss=loss)["x"]
        for dtype in (torch.float32, torch.float64)
    )
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(exact.item(), rel=1e-6)


EXTREME = [
    (-1.0, -10_001.0, -5.0, -5.0, 10.0, 20.0),
    (-10_001.0, -1.0, -5.0, -5.0, 20.0, 10.0),
    (-1.0, -1.0, -10_001.0, -2.0, 10.0, 10.0),
    (-1.0, -1.0, -2.0, -10_001.0, 10.0, 10.0),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OPTIONS)
def test_margins_of_ten_thousand(name, dtype):
    columns = [torch.tensor(column, dtype=dtype) for column in zip(*EXTREME, strict=True)]
    scores = PairScores(columns[0].requires_grad_(), columns[1].requires_grad_(), *columns[2:])
    for sign in (1, -1):
        label = torch.full((len(EXTREME),), sign)
        loss = make_loss(name, options=OPTIONS[name])(scores.ranked(label > 0))
        grads = torch.autograd.grad(loss.sum(), [scores.logps_a, scores.logps_b])
        assert loss.isfinite().all()
        assert all(grad.isfinite().all() for grad in grads)
        if name in CAPPED:
            continue
        for k, pair in enumerate(EXTREME):
            value, *slopes = truth(name, pair, sign)
            assert loss[k].item() == pytest.approx(value, rel=1e-6, abs=1e-6)
            for grad, slope in zip(grads, slopes, strict=True):
                assert grad[k].item() == pytest.approx(slope, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("name", CAPPED)
def test_what_is_capped_is_exact_up_to_there(name):
    share = OPTIONS[name].get("alpha", 1.0)
    for ratio, moves in ((-39.0 / share, True), (-41.0 / share, False)):
        logps = torch.tensor([-70.0], dtype=torch.float64, requires_grad=True)
        fixed = torch.tensor([-60.0], dtype=torch.float64)
        tokens = torch.ones(1, dtype=torch.float64)
        scores = PairScores(logps, fixed, logps.detach() - ratio, fixed, tokens, tokens)
        loss = make_loss(name, options=OPTIONS[name])(scores.ranked(torch.tensor([True])))
        (grad,) = torch.autograd.grad(loss, logps)
        value, slope, _ = truth(name, of_pair(scores, 0), 1)
        if moves:
            assert loss.item() == pytest.approx(value, rel=1e-9)
            assert grad.item() == pytest.approx(slope, rel=1e-9)
        else:
            assert grad.item() == 0.0
            assert loss.item() < value


def test_orpo_is_finite_where_every_token_is_certain():
    logps = torch.zeros(2, requires_grad=True)
    pairs = PairScores(logps, logps - 1, logps, logps, torch.ones(2), torch.ones(2))
    loss = make_loss("orpo")(pairs.ranked(torch.tensor([True, False]))).sum()
    assert loss.isfinite()
    assert torch.autograd.grad(loss, logps)[0].isfinite().all()


def test_robust_averages_to_dpo_over_flipped_labels():
    scores, e = make_scores(20, dtype=torch.float64), 0.2
    robust = make_loss({"name": "robust", "beta": 0.3, "label_smoothing": e})
    right, flipped = (robust(scores.ranked(torch.full((20,), k))) for k in (True, False))
    plain = make_loss({"name": "sigmoid", "beta": 0.3})(scores.ranked(torch.full((20,), True)))
    torch.testing.assert_close((1 - e) * right + e * flipped, plain)
