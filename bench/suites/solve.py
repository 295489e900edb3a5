"""The dual problem, from the Gram on the host to the coefficients: ours beside who else solves it.

`raco` is `solve_dual` as a user calls it, `raco, C++ alone` the extension's entry below it. Each
solver must first come within its own accuracy of the optimum on every Gram that it is timed on.
Then every other rule, beside TorchJD's where both mean the same: their updates must agree.
"""

from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch

from bench.harness import optional
from bench.harness.records import OURS
from bench.harness.session import Session
from bench.harness.timing import interleaved, shares
from bench.rivals.dual_solvers import (
    GRAMS,
    SIZES,
    Solver,
    apart,
    grams,
    rule_solvers,
    solvers,
    value,
)
from raco_fast.solver.registry import OURS as RULES
from raco_fast.solver.rules.conflict_averse import DualRule

NAME = "solve"
# Excess of f over the optimum, as a share of its terms, that a solver may have.
TOLERANCE = 1e-3
OURS_TOLERANCE = 1e-9
# One round of one solver takes about as long.
_ROUND = 5e-3
REPRODUCE = "python -m bench tests solve --device cpu --out runs/solve"


def run(session: Session) -> None:
    sizes = SIZES[:3] if session.sizes == "tiny" else SIZES
    for rival in ("slsqp", "torchjd"):
        if (failure := optional.obstacle(rival)) is not None:
            session.records.add(f"{NAME}/{rival}", {}, failure=failure)
    rules = [name for name, rule in RULES.items() if not issubclass(rule, DualRule)]
    half = (perf_counter() + session.until) / 2
    for m, until in shares(sizes, half):
        _measure(session, m, until)
    for (rule, m), until in shares([(rule, m) for m in (3, 8) for rule in rules], session.until):
        found = rule_solvers(rule, m)
        errors = {name: apart(solver, found[OURS], grams(m)) for name, solver in found.items()}
        wrong = "1 - cosine with our update is"
        _time(session, {"m": m, "rule": rule}, found, errors, wrong, until)


def _measure(session: Session, m: int, until: float) -> None:
    found, matrices, errors = solvers(m), grams(m), {}
    best = [
        min(value(M, s.p(s.solve(s.inputs[k]))) for s in found.values())
        for k, M in enumerate(matrices)
    ]
    for name, solver in found.items():
        errors[name] = max(
            (value(M, solver.p(solver.solve(x))) - f) / float(abs(M).max())
            for M, x, f in zip(matrices, solver.inputs, best, strict=True)
        )
    _time(session, {"m": m}, found, errors, "f exceeds the optimum by", until)


def _time(
    session: Session,
    case: dict[str, Any],
    found: dict[str, Solver],
    errors: dict[str, float],
    wrong: str,
    until: float,
) -> None:
    """Time the solvers whose error is small enough; the others get a record that says how large."""
    calls, per_second = {}, {}
    for name, solver in found.items():
        limit = OURS_TOLERANCE if name.startswith(OURS) else TOLERANCE
        if errors[name] > limit:
            failure = f"wrong: {wrong} {errors[name]:.2g}, at most {limit:.2g}"
            session.records.add(f"{NAME}/{name}", case, failure=failure)
            continue
        repeats = _repeats(solver)
        calls[name], per_second[name] = _round(solver, repeats), 1e6 / (repeats * GRAMS)
    if OURS not in calls:
        return
    times = interleaved(calls, torch.device("cpu"), until)
    ours = times[OURS].quantiles()[1] * per_second[OURS]
    for name, taken in times.items():
        summary = taken.summary("us", per_second[name])
        figures = {**summary, "ratio": summary["p50"] / ours, "error": errors[name]}
        session.records.add(f"{NAME}/{name}", case, **figures, reproduce=REPRODUCE)


def _round(solver: Solver, repeats: int) -> Callable[[], None]:
    def call() -> None:
        for _ in range(repeats):
            for x in solver.inputs:
                solver.solve(x)

    return call


def _repeats(solver: Solver) -> int:
    started = perf_counter()
    _round(solver, 1)()
    return max(1, round(_ROUND / (perf_counter() - started)))
