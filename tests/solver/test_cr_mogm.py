"""Averaged coefficients: the recursion, TorchJD's, rules within rules, what is remembered."""

import json

import numpy as np
import pytest
import torch

import raco_fast
from raco_fast.solver.dual import solve_dual
from raco_fast.solver.registry import check_rule, label_of, spec_of
from raco_fast.solver.rules.cr_mogm import CRMOGM
from raco_fast.solver.rules.fairgrad import FairGrad

WEIGHTS = {"a": 0.5, "b": 0.2, "c": 0.3}


def grams(n: int, m: int = 3) -> list[np.ndarray]:
    rng = np.random.default_rng(m)
    found = [rng.standard_normal((m, m + 1)) for _ in range(n)]
    return [G @ G.T for G in found]


def averaged(steps: list[np.ndarray], rule, **more) -> list[np.ndarray]:
    state, found = None, []
    for M in steps:
        solution = solve_dual(M, WEIGHTS, 0.4, rule, state=state, **more)
        state = solution.state
        found.append(solution.coefficients)
    return found


@pytest.mark.parametrize("inner", ["cagrad-clip", "linear", "upgrad", "nash", "gradvac", "pcd"])
def test_the_recursion(inner):
    """Of a rule with a memory as well, which the steps leave as they would alone."""
    steps, state, expected = grams(5), None, None
    found = averaged(steps, {"name": "cr-mogm", "of": inner, "alpha": 0.7})
    for M, coefficients in zip(steps, found, strict=True):
        alone = solve_dual(M, WEIGHTS, 0.4, inner, state=state)
        state = alone.state
        new = alone.coefficients
        expected = new if expected is None else 0.7 * expected + 0.3 * new
        np.testing.assert_allclose(coefficients, expected, rtol=1e-14)
    nothing = averaged(steps, {"name": "cr-mogm", "of": inner, "alpha": 0.0})
    np.testing.assert_array_equal(nothing[-1], new)


def test_beside_torchjd():
    from torchjd.aggregation import CRMOGMWeighting, IMTLGWeighting

    steps = grams(6)
    theirs = CRMOGMWeighting(IMTLGWeighting(), alpha=0.9)
    found = averaged(steps, {"name": "cr-mogm", "of": "imtl-g"})
    for M, coefficients in zip(steps, found, strict=True):
        expected = theirs(torch.from_numpy(M)).numpy()
        np.testing.assert_allclose(coefficients, expected, rtol=1e-7, atol=1e-9)


def test_a_rule_within_a_rule_is_plain_json_and_back():
    spec = {"name": "cr-mogm", "of": {"name": "fairgrad", "alpha": 0.5}, "alpha": 0.8}
    rule = check_rule(json.loads(json.dumps(spec)))
    assert rule == CRMOGM(FairGrad(0.5), 0.8)
    assert spec_of(rule) == spec
    assert spec_of(check_rule({"name": "cr-mogm", "of": "cagrad-clip"})) == "cr-mogm"
    assert label_of(rule) == "cr-mogm(of=fairgrad(alpha=0.5), alpha=0.8)"
    twice = {"name": "cr-mogm", "of": {"name": "cr-mogm", "of": "nash", "alpha": 0.5}}
    assert spec_of(check_rule(twice)) == twice
    assert set(check_rule(twice).initial_state(2)) == {
        *("steps", "coefficients", "of.steps", "of.coefficients")
    }


def test_what_holds_for_a_rule_holds_for_its_average():
    for name in ("nash", "mgda", "mgda-decoupled", "cagrad", "chebyshev"):
        inner = check_rule(name)
        outer = check_rule({"name": "cr-mogm", "of": name})
        for what in ("needs_losses", "uses_weights", "scale_invariant"):
            assert getattr(outer, what) == getattr(inner, what)
    losses = [1.0, 2.0, 3.0]
    found = averaged(grams(1), {"name": "cr-mogm", "of": "mgda-decoupled"}, losses=losses)
    alone = solve_dual(grams(1)[0], WEIGHTS, 0.4, "mgda-decoupled", losses=losses)
    np.testing.assert_array_equal(found[0], alone.coefficients)


@pytest.mark.parametrize(
    ("spec", "kind", "message"),
    [
        ({"alpha": 1.0}, ValueError, r"`alpha` of the rule cr-mogm must be in \[0, 1\), got 1.0"),
        ({"of": "nahs"}, ValueError, "`rule` must be one of .*, got 'nahs'; did you mean 'nash'"),
        ({"of": {"name": "nash", "x": 1}}, ValueError, r"'nash' has the options \[\].*unknown"),
        ({"of": 3}, TypeError, "`rule` must be a name, a raco_fast.Rule or .* got 3"),
    ],
)
def test_wrong_options(spec, kind, message):
    with pytest.raises(kind, match=message):
        check_rule({"name": "cr-mogm", **spec})
    with pytest.raises(
        TypeError, match=r"must be a raco_fast.Rule, got 'nash'; by name write rule="
    ):
        CRMOGM("nash")


RULE = {"name": "cr-mogm", "of": "gradvac", "alpha": 0.6}


def optimizer(order=("a", "b", "c")) -> raco_fast.ClippedCAGradAdamW:
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    weights = {name: WEIGHTS[name] for name in order}
    return raco_fast.ClippedCAGradAdamW([p], lr=0.1, weights=weights, rule=RULE)


def train(
    opt: raco_fast.ClippedCAGradAdamW, steps: range, broken: int | None = None
) -> list[float]:
    (p,) = opt.param_groups[0]["params"]
    for step in steps:
        opt.zero_grad()
        target = torch.tensor([1.0, float(step % 3), -1.0], dtype=torch.float64)
        losses = {"a": (p - target).square().sum(), "b": p[0] * p[1], "c": p.exp().sum()}
        if step == broken:
            losses["a"] = losses["a"] * torch.nan
        opt.backward(losses)
        opt.step()
    return p.tolist()


def test_the_memory_is_in_checkpoints_and_skipped_steps_leave_it():
    whole = optimizer()
    end = train(whole, range(6))
    begun = optimizer()
    half = train(begun, range(3))
    before = begun.rule_state
    train(begun, range(3, 4), broken=3)
    assert begun.rule_state == before
    again = optimizer(order=("c", "a", "b"))
    again.param_groups[0]["params"][0].data.copy_(torch.tensor(half, dtype=torch.float64))
    again.load_state_dict(begun.state_dict())
    assert again.rule == RULE
    # Random orders are drawn by place, so only what is remembered is compared across orders.
    kept, other = begun.rule_state["values"], again.rule_state["values"]
    assert other["coefficients"] == [kept["coefficients"][i] for i in (2, 0, 1)]
    same = optimizer()
    same.param_groups[0]["params"][0].data.copy_(torch.tensor(half, dtype=torch.float64))
    same.load_state_dict(begun.state_dict())
    assert train(same, range(3, 6)) == end
