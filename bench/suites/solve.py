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
from bench.harness.timing import interleaved
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
    cases = [(name, m) for m in (3, 8) for name in rules]
    started = perf_counter()
    share = (session.until - started) / (2 * len(sizes))
    for number, m in enumerate(sizes):
        _measure(session, m, started + share * (number + 1))
    started = perf_counter()
    share = (session.until - started) / len(cases)
    for number, (name, m) in enumerate(cases):
        _measure_rule(session, name, m, started + share * (number + 1))


def _measure(session: Session, m: int, until: float) -> None:
    found, errors = solvers(m), {}
    matrices = grams(m)
    best = [
        min(value(M, s.p(s.solve(s.inputs[k]))) for s in found.values())
        for k, M in enumerate(matrices)
    ]
    for name, solver in list(found.items()):
        excess = [
            (value(M, solver.p(solver.solve(x))) - f) / float(abs(M).max())
            for M, x, f in zip(matrices, solver.inputs, best, strict=True)
        ]
        errors[name] = max(excess)
        limit = OURS_TOLERANCE if name.startswith(OURS) else TOLERANCE
        if errors[name] > limit:
            del found[name]
            failure = f"wrong: f exceeds the optimum by {errors[name]:.2g}, at most {limit:.2g}"
            session.records.add(f"{NAME}/{name}", {"m": m}, failure=failure)
    if OURS in found:
        _time(session, {"m": m}, found, errors, until)


def _measure_rule(session: Session, rule: str, m: int, until: float) -> None:
    found, case = rule_solvers(rule, m), {"m": m, "rule": rule}
    errors = {name: apart(solver, found[OURS], grams(m)) for name, solver in found.items()}
    for name in [name for name, error in errors.items() if error > TOLERANCE]:
        del found[name]
        failure = (
            f"wrong: 1 - cosine with our update is {errors[name]:.2g}, at most {TOLERANCE:.2g}"
        )
        session.records.add(f"{NAME}/{name}", case, failure=failure)
    _time(session, case, found, errors, until)


def _time(
    session: Session,
    case: dict[str, Any],
    found: dict[str, Solver],
    errors: dict[str, float],
    until: float,
) -> None:
    repeats = {name: _repeats(solver) for name, solver in found.items()}
    calls = {name: _round(solver, repeats[name]) for name, solver in found.items()}
    times = interleaved(calls, torch.device("cpu"), until)
    per_call = {name: 1e6 / (repeats[name] * GRAMS) for name in found}
    ours = times[OURS].quantiles()[1] * per_call[OURS]
    for name, taken in times.items():
        low, middle, high = (q * per_call[name] for q in taken.quantiles())
        session.records.add(
            f"{NAME}/{name}",
            case,
            unit="us",
            p20=low,
            p50=middle,
            p80=high,
            rounds=len(taken.device),
            ratio=middle / ours,
            error=errors[name],
            reproduce=REPRODUCE,
        )


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
