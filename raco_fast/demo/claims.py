"""The report's sentences. Each is computed from the table; none knows how the study ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from statistics import fmean
from typing import NamedTuple

from raco_fast.demo.hypervolumes import comparable, fronts_of
from raco_fast.demo.summary import Row, dominates
from raco_fast.studies.spread import CERTAINTY, Spread


class Finding(NamedTuple):
    """A sentence, and whether what it tells stands out of the spread over seeds."""

    clear: bool
    sentence: str


def claims(rows: Sequence[Row]) -> list[str]:
    """What the study found, a sentence each, what is not clear first.

    Args:
        rows: those of `summarize`.
    """
    start, *aligned = rows
    weighted: dict[str, list[Row]] = {}
    for row in aligned:
        if row.weights:
            weighted.setdefault(row.method, []).append(row)
    found = [
        *_what_a_front_holds(aligned),
        *_what_batches_show(aligned),
        *_what_alignment_moved(start, aligned),
        *(_what_weights_trade(name, line) for name, line in weighted.items() if len(line) > 1),
        *_what_rules_change(aligned),
        _who_is_dominated(rows),
        *_what_clipping_did(weighted),
        *(
            Finding(
                True,
                f"{row.name} skipped {row.skipped_steps} steps because a gradient was not finite.",
            )
            for row in aligned
            if row.skipped_steps
        ),
    ]
    return [finding.sentence for finding in sorted(found, key=lambda finding: finding.clear)]


def difference(spread: Spread) -> str:
    """A signed difference with its 95 % interval, e.g. "+0.12 ± 0.05"; without one for one seed."""
    known = len(spread.values) > 1
    return f"{spread.mean:+.4f} " + (f"± {spread.interval():.4f}" if known else "(one seed)")


def _what_a_front_holds(aligned: Sequence[Row]) -> Iterator[Finding]:
    """Hypervolumes of methods at the same weights against each other."""
    for one, other in comparable(fronts_of(aligned)):
        gain = one.volume - other.volume
        clear = gain.is_clear()
        verdict = (
            ("clearly larger" if gain.mean > 0 else "clearly smaller")
            if clear
            else "not a clear difference"
        )
        yield Finding(
            clear,
            f"Hypervolume of {one.method} against {other.method}: {difference(gain)}, {verdict}.",
        )


def _what_batches_show(aligned: Sequence[Row]) -> Iterator[Finding]:
    """Per pair of objectives, the cosine in a step's gradients and in the expected ones."""
    rows = [row for row in aligned if row.expected]
    for pair in rows[0].cosines if rows else ():
        both = [row for row in rows if pair in row.expected]
        if not both:
            continue
        batch = _mean_over_rows([row.cosines[pair] for row in both])
        expected = _mean_over_rows([row.expected[pair] for row in both])
        gap = expected - batch
        verdict = "no clear difference"
        if gap.is_clear():
            verdict = (
                f"batches show {'more' if gap.mean > 0 else 'less'} conflict than the estimate"
            )
        yield Finding(
            gap.is_clear(),
            f"Cosine between {' and '.join(pair.split(':'))}: {batch.with_interval()} in a step's "
            f"gradients, {expected.with_interval()} in the estimate of the expected ones at the "
            f"last step; {verdict}.",
        )


def _mean_over_rows(spreads: Sequence[Spread]) -> Spread:
    values = zip(*(spread.values for spread in spreads), strict=True)
    return Spread(tuple(fmean(of_seed) for of_seed in values))


def _what_alignment_moved(start: Row, aligned: Sequence[Row]) -> Iterator[Finding]:
    """Per objective: how many rows clearly rose or fell from the start, and the range reached."""
    for name in start.scores:
        changes = [row.scores[name] - start.scores[name] for row in aligned]
        clear = [change.mean > 0 for change in changes if change.is_clear()]
        ranked = sorted(aligned, key=lambda row: (row.scores[name].mean, row.name))
        ends = (ranked[0], ranked[-1])
        low, high = (f"{row.scores[name].with_interval()} ({row.name})" for row in ends)
        yield Finding(
            bool(clear),
            f"From the start's {start.scores[name].with_interval()}, {name} went to between {low} "
            f"and {high}: clearly up in {sum(clear)}, "
            f"clearly down in {len(clear) - sum(clear)} of {len(aligned)} rows.",
        )


def _what_weights_trade(method: str, rows: Sequence[Row]) -> Finding:
    """What moving weight from brevity to coverage did to both."""
    low, *_, high = sorted(rows, key=lambda row: row.weights)
    coverage, brevity = (high.scores[name] - low.scores[name] for name in ("coverage", "brevity"))
    traded = coverage.is_clear() and brevity.is_clear() and coverage.mean > 0 > brevity.mean
    return Finding(
        traded,
        f"{method}: from {low.weights_text} to {high.weights_text}, coverage changed by "
        f"{difference(coverage)} and brevity by {difference(brevity)}; "
        + ("the weights trade one for the other." if traded else "not a clear trade-off."),
    )


def _what_rules_change(aligned: Sequence[Row]) -> Iterator[Finding]:
    """Differences between rules, and between their Gram matrices, at equal weights."""
    gaps = [
        (a, b, name, a.scores[name] - b.scores[name])
        for a, b in combinations(aligned, 2)
        if a.method != b.method and a.weights == b.weights
        for name in a.scores
    ]
    clear = [gap for gap in gaps if gap[-1].is_clear()]
    if clear:
        yield Finding(
            False,
            f"Between rules at equal weights, {len(clear)} of {len(gaps)} differences are clear at "
            f"{CERTAINTY:.0%} (if no rule differed, about {len(gaps) * (1 - CERTAINTY):.0f} would "
            "still look so); the others lie within the spread over seeds.",
        )
    elif gaps:
        yield Finding(
            False,
            f"Between rules at equal weights, none of {len(gaps)} differences is clear: "
            "all lie within the spread over seeds.",
        )
    for a, b, name, gap in clear:
        yield Finding(True, f"{a.name} scores {difference(gap)} in {name} against {b.method}.")


def _who_is_dominated(rows: Sequence[Row]) -> Finding:
    """The rows that another one's mean scores are nowhere below and somewhere above."""
    free = [row for row in rows if not any(dominates(other, row) for other in rows)]
    # Naming only these leaves nobody out: what dominates a dominator dominates its row as well.
    better = {row.name: [other.name for other in free if dominates(other, row)] for row in rows}
    dominated = [f"{name} (by {', '.join(others)})" for name, others in better.items() if others]
    which = f"; dominated: {', '.join(dominated)}" if dominated else ""
    return Finding(
        False,
        f"By mean scores, whatever their intervals, {len(free)} of {len(rows)} rows are dominated "
        f"by no other one{which}.",
    )


def _what_clipping_did(weighted: dict[str, list[Row]]) -> Iterator[Finding]:
    for method, rows in weighted.items():
        if method.split()[-1] != "cagrad-clip":
            continue
        shares = sorted((row.clipped for row in rows if row.clipped), key=lambda each: each.mean)
        if shares and shares[-1].mean > 0:
            ends = dict.fromkeys(map(_percent, (shares[0], shares[-1])))
            yield Finding(
                True, f"Clipping changed the update in {' to '.join(ends)} of {method}'s steps."
            )
        elif shares:
            other = method.replace("cagrad-clip", "cagrad")
            yield Finding(
                True,
                f"Clipping never changed an update, so {method} took the same steps as {other}.",
            )


def _percent(share: Spread) -> str:
    known = len(share.values) > 1
    return f"{share.mean:.0%}" + f" ± {share.interval():.0%}" * known
