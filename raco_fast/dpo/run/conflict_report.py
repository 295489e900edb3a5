"""`raco-fast conflict` in words: tables, one sentence a finding, conflict.json."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from raco_fast.dpo.run.config import TrainConfig
from raco_fast.dpo.run.conflict import measure
from raco_fast.dpo.run.conflict_estimates import Conflict, OfObjective, OfTwo, OfUpdate, estimated
from raco_fast.dpo.run.conflict_picture import draw
from raco_fast.dpo.run.files import atomic_file
from raco_fast.dpo.run.places import check_writable
from raco_fast.report import markdown_table
from raco_fast.settings.paths import expanded
from raco_fast.solver.intervals import Interval

_SOURCES = {
    "weights": "the weighted sum",
    "batch": "the batch's Gram matrix",
    "unbiased": "the unbiased Gram matrix",
}


def report_conflict(config: TrainConfig, pairs: int = 256, out: str | None = None) -> str:
    """Measure, write conflict.json and conflict.png, and return what there is to print.

    Args:
        pairs: as for `measure`.
        out: the folder of both files; None: "conflict" in the config's `output_dir`.
    Raises:
        ValueError: as `measure`.
        OSError: a file could not be written.
    """
    folder = config.folder / "conflict" if out is None else expanded(out, "--out")
    check_writable(folder, "--out")
    measured = measure(config, pairs)
    found = estimated(config, measured)
    with atomic_file(folder / "conflict.json") as partial:
        partial.write_text(as_json(found), encoding="utf-8")
    missing = draw(found, folder / "conflict.png")
    files = f"{folder / 'conflict.json'}" + ("" if missing else f" and {folder / 'conflict.png'}")
    return "\n".join([as_text(found), "", *([missing] if missing else []), f"saved {files}"])


def as_json(found: Conflict) -> str:
    """With null for what does not exist or has no end."""
    plain = _plain(asdict(found))
    plain["findings"] = list(findings(found))
    return json.dumps(plain, indent=2, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Interval):
        return _plain({**value._asdict(), "distinguishable": bool(value.sign)})
    if isinstance(value, dict):
        return {":".join(k) if isinstance(k, tuple) else k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_text(found: Conflict) -> str:
    """Tables, and then the findings."""
    n = found.pairs_per_step
    parts = [
        f"{found.pairs} of {found.of_pairs} training pairs, before training; 95 % intervals.",
        markdown_table(
            ["objective", "labelled", "measured", "norm", "noise scale (pairs)"],
            [_row_of(each) for each in found.objectives],
        ),
        markdown_table(
            [
                "objectives",
                "common labels",
                "agree - conflict",
                "cosine",
                f"of {n} pairs",
                "right sign from",
                "half of it from",
            ],
            [_row_of_two(each) for each in found.two],
        ),
    ]
    if found.updates:
        names = list(found.updates[0].coefficients)
        parts.append(
            markdown_table(
                [f"update of {found.rule}, c = {found.c:g}", *(f"descent of {n}" for n in names)],
                [_row_of_update(each) for each in found.updates],
            )
        )
    return "\n\n".join([*parts, "\n".join(f"- {sentence}" for sentence in findings(found))])


def _between(x: Interval, digits: str) -> str:
    if not math.isfinite(x.value):
        return "-" if x.low == -math.inf else f"? ({_to(x, digits)})"
    return f"{x.value:{digits}} ({_to(x, digits)})"


def _to(x: Interval, digits: str) -> str:
    return f"{x.low:{digits}} to {x.high:{digits}}"


def _norm(x: Interval) -> Interval:
    """Of a squared norm."""
    low, high = (math.sqrt(max(end, 0.0)) for end in (x.low, x.high))
    return Interval(math.sqrt(x.value) if x.value >= 0.0 else math.nan, low, high)


def _row_of(each: OfObjective) -> list[str]:
    known = math.isfinite(each.squared_norm.low)
    values = [_between(_norm(each.squared_norm), ".3g"), _between(each.noise_scale, ".3g")]
    return [each.name, str(each.labelled), str(each.measured), *(values if known else ["-", "-"])]


def _row_of_two(each: OfTwo) -> list[str]:
    said = f"{each.agreement:+.2f}" if each.common else "-"
    row = [" : ".join(each.names), str(each.common), said, _between(each.cosine, "+.2f")]
    row.append("-" if math.isnan(each.of_batch) else f"{each.of_batch:+.2f}")
    if not each.product.sign:
        return [*row, "-", "-"]
    return [*row, *(f"{n:.0f}" if math.isfinite(n) else "-" for n in _from(each))]


def _from(each: OfTwo) -> tuple[float, float]:
    return each.sign_from, each.half_from


def _row_of_update(each: OfUpdate) -> list[str]:
    values = [_between(x, "+.2g") for x in each.descent.values()]
    return [f"{_SOURCES[each.source]}: {_shares(each)}", *values]


def _shares(each: OfUpdate) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in each.coefficients.items())


def findings(found: Conflict) -> Iterator[str]:
    """One sentence each; first what cannot be told."""
    yield from _not_there(found)
    for each in found.two:
        if not each.product.sign and not set(each.names) & set(found.unmeasured):
            yield (
                f"{each.names[0]} and {each.names[1]}: whether they conflict is not "
                f"distinguishable from noise on {found.pairs} pairs (the interval of their cosine "
                f"has both signs)."
            )
    for update in found.updates:
        unclear = [name for name, x in update.descent.items() if not x.sign]
        if unclear:
            yield (
                f"Along {_SOURCES[update.source]}, whether {_listed(unclear)} would gain or lose "
                f"is not distinguishable from noise."
            )
    yield from (_of_two(each, found) for each in found.two if each.product.sign)
    for update in found.updates:
        hurt = [name for name, x in update.descent.items() if x.sign < 0]
        if hurt:
            yield f"Along {_SOURCES[update.source]} the update works against {_listed(hurt)}."
    yield from _of_none_hurt(found)


def _not_there(found: Conflict) -> Iterator[str]:
    for each in found.objectives:
        if each.name in found.unmeasured:
            yield (
                f"{each.name}: {each.measured} labelled pairs among {found.pairs} are too few for "
                f"products between different pairs, also without one block; measure more "
                f"(--pairs), or add data that is labelled for it ({each.labelled} pairs are)."
            )
        elif each.squared_norm.sign <= 0:
            yield (
                f"{each.name}: the expected gradient is not distinguishable from 0 on "
                f"{each.measured} labelled pairs, so its cosines are not known either; measure "
                f"more (--pairs)."
            )
    if not found.updates:
        yield "No update is computed, as an objective that has a weight is not known."
    for name in found.scheduled:
        yield f"`{name}` is not followed: c and weights are those of the file."


def _of_two(each: OfTwo, found: Conflict) -> str:
    a, b = each.names
    what = "conflict" if each.product.sign < 0 else "want similar things"
    known = _between(each.cosine, "+.2f")
    sentence = f"{a} and {b} {what}: cosine {known}"
    if not math.isfinite(each.half_from):
        return f"{sentence}."
    n = found.pairs_per_step
    shown = f"a batch of {n} shows {each.of_batch:+.2f} on average"
    if n >= each.half_from:
        return f"{sentence}; {shown}."
    if n < each.sign_from:
        return (
            f"{sentence}; {shown}, of the other sign: the right one from {each.sign_from:.0f} "
            f"pairs on, half of the cosine from {each.half_from:.0f}."
        )
    return f"{sentence}; {shown}, half of it from {each.half_from:.0f} pairs on."


def _of_none_hurt(found: Conflict) -> Iterator[str]:
    for update in found.updates:
        if all(x.sign > 0 for x in update.descent.values()):
            yield f"Along {_SOURCES[update.source]} every objective gains."


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
