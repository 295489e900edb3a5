"""The report's sentences. Each is computed from the table; none knows how the study ends."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from raco_fast.demo.judges import OBJECTIVES
from raco_fast.demo.summary import CERTAINTY, Row, Spread, dominates


def claims(rows: Sequence[Row]) -> list[str]:
    """What the study found, one statement a sentence; `rows` are those of `summarize`."""
    start, aligned = rows[0], rows[1:]
    return [
        *_what_alignment_moved(start, aligned),
        *_what_weights_trade(aligned),
        *_what_rules_change(aligned),
        *_who_is_dominated(rows),
        *_what_clipping_did(aligned),
        *_what_was_skipped(aligned),
    ]


def difference(spread: Spread) -> str:
    """A signed difference with its 95 % interval, e.g. "+0.12 ± 0.05"; without one for one seed."""
    if len(spread.values) == 1:
        return f"{spread.mean:+.3f} (one seed)"
    return f"{spread.mean:+.3f} ± {spread.interval():.3f}"


def _what_alignment_moved(start: Row, aligned: Sequence[Row]) -> list[str]:
    """Per objective: how many rows clearly rose or fell from the start, and the range reached."""
    sentences = []
    for name in OBJECTIVES:
        changes = [row.scores[name] - start.scores[name] for row in aligned]
        up = sum(change.is_clear() and change.mean > 0 for change in changes)
        down = sum(change.is_clear() and change.mean < 0 for change in changes)
        low = min(aligned, key=lambda row: row.scores[name].mean)
        high = max(aligned, key=lambda row: row.scores[name].mean)
        sentences.append(
            f"From the start's {start.scores[name].mean:.3f}, {name} went to between "
            f"{low.scores[name].mean:.3f} ({low.name}) and {high.scores[name].mean:.3f} "
            f"({high.name}): clearly up in {up}, clearly down in {down} of {len(aligned)} rows."
        )
    return sentences


def _what_weights_trade(aligned: Sequence[Row]) -> list[str]:
    """Per rule: what moving weight from brevity to coverage did to both."""
    sentences = []
    for rule, rows in _by_rule(aligned).items():
        rows = sorted(rows, key=lambda row: (row.weights or {}).get("coverage", 0.0))
        if len(rows) < 2:
            continue
        coverage, brevity = (
            rows[-1].scores[name] - rows[0].scores[name] for name in ("coverage", "brevity")
        )
        traded = coverage.is_clear() and brevity.is_clear() and coverage.mean > 0 > brevity.mean
        sentences.append(
            f"{rule}: from {rows[0].name.split(' at ')[1]} to {rows[-1].name.split(' at ')[1]}, "
            f"coverage changed by {difference(coverage)} and brevity by {difference(brevity)}; "
            + ("the weights trade one for the other." if traded else "not a clear trade-off.")
        )
    return sentences


def _what_rules_change(aligned: Sequence[Row]) -> list[str]:
    """Differences between rules at equal weights, and against the rule without weights."""
    compared, clear = 0, []
    for a, b in combinations(aligned, 2):
        if a.rule == b.rule or a.weights != b.weights:
            continue
        for name in OBJECTIVES:
            gap = a.scores[name] - b.scores[name]
            compared += 1
            if gap.is_clear():
                clear.append(f"{a.name} scores {difference(gap)} in {name} against {b.rule}.")
    if not compared:
        return []
    if not clear:
        return [
            f"Between rules at equal weights, none of {compared} differences is clear: "
            "all lie within the spread over seeds."
        ]
    return [
        f"Between rules at equal weights, {len(clear)} of {compared} differences are clear at "
        f"{CERTAINTY:.0%} (if no rule differed, about {compared * (1 - CERTAINTY):.0f} would still "
        "look so); the others lie within the spread over seeds.",
        *clear,
    ]


def _who_is_dominated(rows: Sequence[Row]) -> list[str]:
    """Who is dominated by mean scores, and by whom where some difference is clear."""
    dominated = [row.name for row in rows if any(dominates(other, row) for other in rows)]
    sentences = [
        f"By mean scores, {len(rows) - len(dominated)} of {len(rows)} rows are dominated by no "
        f"other one{f'; dominated: {_listed(dominated)}' if dominated else ''}."
    ]
    for row in rows:
        better = [
            other.name
            for other in rows
            if dominates(other, row)
            and any((other.scores[name] - row.scores[name]).is_clear() for name in OBJECTIVES)
        ]
        if better:
            sentences.append(
                f"{row.name} is dominated by {_listed(better)}, by mean scores and with a clear "
                "difference in at least one objective."
            )
    return sentences


def _what_clipping_did(aligned: Sequence[Row]) -> list[str]:
    sentences = []
    for rule, rows in _by_rule(aligned).items():
        shares = [row.clip_active.mean for row in rows if row.clip_active is not None]
        if rule != "cagrad-clip" or not shares:
            continue
        low, high = f"{min(shares):.0%}", f"{max(shares):.0%}"
        sentences.append(
            f"Clipping changed the update in {low if low == high else f'{low} to {high}'} "
            "of cagrad-clip's steps."
            if max(shares) > 0
            else "Clipping never changed an update, so cagrad-clip took the same steps as cagrad."
        )
    return sentences


def _what_was_skipped(aligned: Sequence[Row]) -> list[str]:
    return [
        f"{row.name} skipped {row.skipped_steps} steps because a gradient was not finite."
        for row in aligned
        if row.skipped_steps
    ]


def _by_rule(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows with weights, grouped by rule."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.weights is not None:
            groups.setdefault(row.rule, []).append(row)
    return groups


def _listed(names: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
