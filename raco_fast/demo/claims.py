"""The report's sentences. Each is computed from the table; none knows how the study ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

from raco_fast.demo.judges import OBJECTIVES
from raco_fast.demo.summary import Row, dominates
from raco_fast.studies.spread import CERTAINTY, Spread


def claims(rows: Sequence[Row]) -> list[str]:
    """What the study found, one statement a sentence; `rows` are those of `summarize`."""
    start, *aligned = rows
    weighted: dict[str, list[Row]] = {}
    for row in aligned:
        if row.weights:
            weighted.setdefault(row.rule, []).append(row)
    return [
        *_what_alignment_moved(start, aligned),
        *(_what_weights_trade(rule, rows) for rule, rows in weighted.items() if len(rows) > 1),
        *_what_rules_change(aligned),
        _who_is_dominated(rows),
        *_what_clipping_did(weighted.get("cagrad-clip", [])),
        *(
            f"{row.name} skipped {row.skipped_steps} steps because a gradient was not finite."
            for row in aligned
            if row.skipped_steps
        ),
    ]


def _difference(spread: Spread) -> str:
    """A signed difference with its 95 % interval, e.g. "+0.12 ± 0.05"; without one for one seed."""
    known = len(spread.values) > 1
    return f"{spread.mean:+.3f} " + (f"± {spread.interval():.3f}" if known else "(one seed)")


def _what_alignment_moved(start: Row, aligned: Sequence[Row]) -> Iterator[str]:
    """Per objective: how many rows clearly rose or fell from the start, and the range reached."""
    for name in OBJECTIVES:
        changes = [row.scores[name] - start.scores[name] for row in aligned]
        clear = [change.mean > 0 for change in changes if change.is_clear()]
        ranked = sorted((row.scores[name].mean, row.name) for row in aligned)
        low, high = (f"{score:.3f} ({row})" for score, row in (ranked[0], ranked[-1]))
        yield (
            f"From the start's {start.scores[name].mean:.3f}, {name} went to between {low} and "
            f"{high}: clearly up in {sum(clear)}, "
            f"clearly down in {len(clear) - sum(clear)} of {len(aligned)} rows."
        )


def _what_weights_trade(rule: str, rows: Sequence[Row]) -> str:
    """What moving weight from brevity to coverage did to both."""
    low, *_, high = sorted(rows, key=lambda row: row.weights)
    coverage, brevity = (high.scores[name] - low.scores[name] for name in ("coverage", "brevity"))
    traded = coverage.is_clear() and brevity.is_clear() and coverage.mean > 0 > brevity.mean
    return (
        f"{rule}: from {low.weights_text} to {high.weights_text}, coverage changed by "
        f"{_difference(coverage)} and brevity by {_difference(brevity)}; "
        + ("the weights trade one for the other." if traded else "not a clear trade-off.")
    )


def _what_rules_change(aligned: Sequence[Row]) -> Iterator[str]:
    """Differences between rules at equal weights."""
    gaps = [
        (a, b, name, a.scores[name] - b.scores[name])
        for a, b in combinations(aligned, 2)
        if a.rule != b.rule and a.weights == b.weights
        for name in OBJECTIVES
    ]
    clear = [gap for gap in gaps if gap[-1].is_clear()]
    if clear:
        yield (
            f"Between rules at equal weights, {len(clear)} of {len(gaps)} differences are clear at "
            f"{CERTAINTY:.0%} (if no rule differed, about {len(gaps) * (1 - CERTAINTY):.0f} would "
            "still look so); the others lie within the spread over seeds."
        )
    elif gaps:
        yield (
            f"Between rules at equal weights, none of {len(gaps)} differences is clear: "
            "all lie within the spread over seeds."
        )
    for a, b, name, gap in clear:
        yield f"{a.name} scores {_difference(gap)} in {name} against {b.rule}."


def _who_is_dominated(rows: Sequence[Row]) -> str:
    """The rows that another one's mean scores are nowhere below and somewhere above."""
    better = {row.name: [other.name for other in rows if dominates(other, row)] for row in rows}
    dominated = [f"{name} (by {', '.join(others)})" for name, others in better.items() if others]
    which = f"; dominated: {', '.join(dominated)}" if dominated else ""
    free = len(rows) - len(dominated)
    return f"By mean scores, {free} of {len(rows)} rows are dominated by no other one{which}."


def _what_clipping_did(rows: Sequence[Row]) -> Iterator[str]:
    shares = [row.clipped.mean for row in rows if row.clipped is not None]
    if shares and max(shares) > 0:
        ends = dict.fromkeys(f"{share:.0%}" for share in (min(shares), max(shares)))
        yield f"Clipping changed the update in {' to '.join(ends)} of cagrad-clip's steps."
    elif shares:
        yield "Clipping never changed an update, so cagrad-clip took the same steps as cagrad."
