"""Rules as an extension point: names, options, one of a user's own, what goes in and out."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import raco_fast
from raco_fast.solver import registry
from raco_fast.solver.dual import solve_dual
from raco_fast.solver.registry import check_rule, label_of, spec_of
from raco_fast.solver.rule import Problem, Rule, State
from raco_fast.solver.rules.conflict_averse import DualRule

GRAM = np.array([[17.0, -5.0], [-5.0, 2.0]])
WEIGHTS = {"a": 0.2, "b": 0.8}


@dataclass(frozen=True)
class Levelled(raco_fast.Rule):
    """w_i / |g_i|^p: with p = 1 every objective moves the parameters as far as its weight says.

    A gradient of zero has the coefficient 0: its direction is unknown.
    """

    p: float = 1.0

    def coefficients(self, problem: Problem) -> np.ndarray:
        """[n, m]."""
        return problem.weights * problem.inverse_norms**self.p


@dataclass(frozen=True)
class Echo(Rule):
    """Returns what it is told to; remembers how often it was asked and the last diagonal."""

    needs_losses: ClassVar[bool] = True

    def initial_state(self, m: int) -> State:
        return {"asked": np.zeros(()), "last": np.zeros(m), "pairs": np.zeros((m, m))}

    def step(self, problem: Problem, state: State) -> tuple[np.ndarray, State]:
        (M,), (losses,) = problem.gram, problem.losses
        after = {"asked": state["asked"] + 1, "last": np.diag(M), "pairs": state["pairs"] + M}
        state["pairs"][:] = np.nan  # a copy: nobody else's
        return losses[None] * after["asked"], after


@pytest.fixture(autouse=True)
def own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names registered in a test end with it."""
    monkeypatch.setattr(registry, "_TYPES", dict(registry._TYPES))
    monkeypatch.setattr(registry, "_BUILT", {})
    yield
    label_of.cache_clear()


def test_a_rule_of_ones_own() -> None:
    raco_fast.register_combination_rule("levelled", Levelled)
    expected = np.array([0.2, 0.8]) / np.sqrt([17.0, 2.0])
    for rule in ("levelled", Levelled(), {"name": "levelled"}, {"name": "levelled", "p": 1}):
        solution = raco_fast.solve_dual(GRAM, WEIGHTS, 0.4, rule)
        np.testing.assert_allclose(solution.coefficients, expected, rtol=1e-15)
        assert solution.rule == "levelled"
        assert solution.update_norm == pytest.approx(np.sqrt(expected @ GRAM @ expected), rel=1e-14)
        assert solution.g0_norm == solve_dual(GRAM, WEIGHTS, 0.4).g0_norm
        assert (solution.status, solution.finite, solution.converged) == ("ok", True, True)
        assert np.isnan([*solution.p, *solution.p_clipped, solution.gap, solution.value]).all()
        assert np.isnan(solution.gp_norm)
        assert solution.clip_active is None
        assert solution.state == {}
    assert "coefficients={a: 0.0485" in repr(solution)
    assert "nan" not in repr(solution)


def test_names_and_options_are_data() -> None:
    raco_fast.register_combination_rule("levelled", Levelled)
    halves = {"name": "levelled", "p": 0.5}
    assert check_rule(halves) == Levelled(0.5)
    assert spec_of(Levelled(0.5)) == halves
    assert label_of(Levelled(0.5)) == "levelled(p=0.5)"
    assert spec_of(check_rule("levelled")) == label_of(check_rule("levelled")) == "levelled"
    assert check_rule("cagrad-clip") is check_rule("cagrad-clip")
    assert spec_of(Echo())["name"].endswith("test_rule.Echo")  # not registered


def test_registering_a_name_again_replaces_the_class() -> None:
    @dataclass(frozen=True)
    class Other(Levelled):
        p: float = 2.0

    raco_fast.register_combination_rule("levelled", Levelled)
    assert solve_dual(GRAM, WEIGHTS, 0.4, "levelled").rule == "levelled"
    raco_fast.register_combination_rule("levelled", Other)
    assert check_rule("levelled") == Other()
    assert label_of(Levelled()).endswith("test_rule.Levelled()")


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        ("cagrad-clop", ValueError, r"one of linear, .*'cagrad-clop'; did you mean 'cagrad-clip'"),
        (
            "",
            ValueError,
            r"`rule` must be one of linear, .* got ''; raco_fast.register_comb",
        ),
        (
            None,
            TypeError,
            r"must be a name, a raco_fast.Rule or .* got None; names are linear,",
        ),
        (["mgda"], TypeError, r"must be a name, .* got \['mgda'\]"),
        ({"alpha": 2.0}, TypeError, r"must be a name, .* got \{'alpha': 2.0\}"),
        ({"name": "nosh"}, ValueError, "must be one of .* got 'nosh'"),
        ({"name": "mgda", "p": 2}, ValueError, r"'mgda' has the options \[\], .* unknown \['p'\]"),
        (Levelled, TypeError, "must be a name, a raco_fast.Rule or"),
        (Levelled([1.0]), TypeError, r"options of a rule must be numbers, .* got p = \[1.0\]"),
    ],
)
def test_bad_rule(rule: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        solve_dual(GRAM, WEIGHTS, 0.4, rule)


def test_what_cannot_be_registered() -> None:
    class Thawed(Rule):
        pass

    for name in ("mgda", "", 3):
        with pytest.raises(ValueError, match=r"`name` must be a text that is not one of linear"):
            raco_fast.register_combination_rule(name, Levelled)
    with pytest.raises(TypeError, match="`rule_type` must be a class that derives from raco_fast"):
        raco_fast.register_combination_rule("x", dict)
    with pytest.raises(TypeError, match=r"frozen dataclass, .*Thawed; write @dataclass\(frozen"):
        raco_fast.register_combination_rule("x", Thawed)
    with pytest.raises(TypeError, match="must be a frozen dataclass"):
        solve_dual(GRAM, WEIGHTS, 0.4, Thawed())
    with pytest.raises(NotImplementedError, match="must define `coefficients`, or `step` and"):
        solve_dual(GRAM, WEIGHTS, 0.4, dataclass(frozen=True)(Thawed)())


@pytest.mark.parametrize(
    ("returned", "shown"),
    [
        ([[0.5, np.nan]], r"\[\[0.5, nan\]\]"),
        ([0.5, 0.5], r"\[0.5, 0.5\]"),
        ([[0.5]], r"\[\[0.5\]\]"),
    ],
)
def test_coefficients_that_are_none(returned: Any, shown: str) -> None:
    @dataclass(frozen=True)
    class Wrong(Rule):
        def coefficients(self, problem: Problem) -> Any:
            return returned

    with pytest.raises(ValueError, match=rf"finite and \[n, m\] = \[1, 2\], got {shown}.*Wrong"):
        solve_dual(GRAM, WEIGHTS, 0.4, Wrong())


@pytest.mark.parametrize(
    ("broken", "status"),
    [
        ([[np.nan, 0.0], [0.0, 1.0]], "non_finite"),
        ([[-1.0, 0.0], [0.0, 1.0]], "negative_diagonal"),
        ([[1.0, 0.5], [0.25, 1.0]], "asymmetric"),
        ([[1.0, 3.0], [3.0, 4.0]], "not_gram"),
    ],
)
def test_a_rule_sees_only_gram_matrices(broken: Any, status: str) -> None:
    batch = solve_dual(np.stack([GRAM, broken, 4 * GRAM]), WEIGHTS, 0.4, Levelled())
    assert batch.status.tolist() == ["ok", status, "ok"]
    one = solve_dual(GRAM, WEIGHTS, 0.4, Levelled()).coefficients
    np.testing.assert_array_equal(batch.coefficients, [one, [np.nan] * 2, one / 2])
    assert np.isnan(batch.update_norm).tolist() == [False, True, False]
    assert batch.clip_active is None
    assert repr(batch).endswith("n=3, m=2)")  # no word of clipping, which the rule does not have
    if status == "non_finite":
        assert not solve_dual(broken, WEIGHTS, 0.4, Levelled()).finite
    else:
        with pytest.raises(ValueError, match="`gram` must "):
            solve_dual(broken, WEIGHTS, 0.4, Levelled())


def test_state_and_losses() -> None:
    first = solve_dual(GRAM, WEIGHTS, 0.4, Echo(), losses=[3.0, 4.0])
    assert first.coefficients.tolist() == [3.0, 4.0]
    second = solve_dual(2 * GRAM, WEIGHTS, 0.4, Echo(), losses=[3.0, 4.0], state=first.state)
    assert second.coefficients.tolist() == [6.0, 8.0]
    assert first.state["pairs"].tolist() == GRAM.tolist()
    assert second.state["pairs"].tolist() == (3 * GRAM).tolist()
    plain = {key: value.tolist() for key, value in first.state.items()}  # as from JSON
    again = solve_dual(2 * GRAM, WEIGHTS, 0.4, Echo(), losses=[3.0, 4.0], state=plain)
    assert again.state["last"].tolist() == [34.0, 4.0]
    skipped = solve_dual(np.nan * GRAM, WEIGHTS, 0.4, Echo(), losses=[1, 1], state=first.state)
    assert {k: v.tolist() for k, v in skipped.state.items()} == plain
    lost = solve_dual(GRAM, WEIGHTS, 0.4, Echo(), losses=[1, np.inf], state=first.state)
    assert (lost.status, lost.finite) == ("non_finite", False)
    assert np.isnan([*lost.coefficients, lost.update_norm, lost.g0_norm]).all()
    batch = solve_dual(
        np.stack([GRAM, GRAM]), WEIGHTS, 0.4, Echo(), losses=[[1, 2], [3, 4]], state=first.state
    )
    assert batch.coefficients.tolist() == [[2.0, 4.0], [6.0, 8.0]]
    assert batch.state == {}
    empty = solve_dual(np.zeros((0, 2, 2)), WEIGHTS, 0.4, Echo(), losses=[1, 2])
    assert empty.coefficients.shape == (0, 2)


def test_bad_state_and_losses() -> None:
    with pytest.raises(ValueError, match=r"`losses` must be given, as Echo\(\) needs them: sol"):
        solve_dual(GRAM, WEIGHTS, 0.4, Echo())
    with pytest.raises(ValueError, match=r"must be \[m\] or \[n, m\] with m = 2, got shape \(3,\)"):
        solve_dual(GRAM, WEIGHTS, 0.4, Echo(), losses=[1, 2, 3])
    with pytest.raises(ValueError, match=r"`state` must have .*'last': \(2,\).* got \{'last': \(3"):
        solve_dual(GRAM, WEIGHTS, 0.4, Echo(), losses=[1, 2], state={"last": np.zeros(3)})
    with pytest.raises(ValueError, match=r"`state` must have \{\} for Levelled"):
        solve_dual(GRAM, WEIGHTS, 0.4, Levelled(), state={"last": np.zeros(2)})
    with pytest.raises(ValueError, match=r"`state` must have \{\} for MGDA"):
        solve_dual(GRAM, WEIGHTS, 0.4, "mgda", state={"last": np.zeros(2)})


def page() -> str:
    root = next(p for p in Path(__file__).parents if (p / "pyproject.toml").exists())
    return (root / "docs" / "rules.md").read_text(encoding="utf-8")


def test_the_example_of_the_page_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", page(), flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    exec(code, {"__name__": __name__})


def test_the_table_of_the_page_is_the_registry() -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page().splitlines()
        if line.startswith("| `")
    ]
    assert [row[0].strip("`") for row in rows] == list(registry.OURS)
    for name, _, options, weights, certificate, memory, _ in rows:
        kind = registry.OURS[name.strip("`")]
        fields = {f.name: f.default for f in dataclasses.fields(kind)}
        assert dict(re.findall(r"`(\w+)` ([^,]+)", options)) == {
            key: f'"{spec}"' if isinstance(spec, str) else repr(spec)
            for key, value in fields.items()
            for spec in [spec_of(value) if isinstance(value, Rule) else value]
        }
        assert (weights == "yes") == kind.uses_weights
        assert (certificate == "yes") == issubclass(kind, DualRule)
        assert [word for word in memory.split(", ") if word] == list(kind().initial_state(2))
        assert kind.needs_losses == (name == "`mgda-decoupled`")
