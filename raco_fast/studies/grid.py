"""The points of a grid: settings of a base config replaced by dotted names, and a name for each.

A rule that ignores the weights is the same run at all of them, so it has one run, at the first of
the grid's weights.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_origin

from raco_fast.dpo.run.config import TrainConfig
from raco_fast.dpo.run.identity import keys_of
from raco_fast.settings.plain import fields_of, members_of
from raco_fast.solver.registry import check_rule

Point = dict[str, Any]
"""Setting by its dotted name -> value."""

# Two runs in a folder, and the reference once a cache.
_OF_THE_SWEEP = ("output_dir", "cache_dir")
_LONGEST, _LONGEST_NAME = 60, 200


def points_of(base: Mapping[str, Any], grid: Mapping[str, Sequence[Any]]) -> list[Point]:
    """Every combination of the grid's values that is a run of its own, the last setting fastest.

    Args:
        base: the settings that the points share.
        grid: setting -> its values.
    Raises:
        ValueError: a name that is no setting, one that a sweep sets itself, or one within another.
    """
    check_names(grid)
    found = []
    for values in itertools.product(*grid.values()):
        point = dict(zip(grid, values, strict=True))
        first = "weights" not in grid or point["weights"] == grid["weights"][0]
        if first or _uses_weights(applied(base, point).get("rule", TrainConfig.rule)):
            found.append(point)
    return found


def check_names(grid: Mapping[str, Any]) -> None:
    """Raise ValueError unless every name of a grid is a setting that may be swept."""
    known, free = {*keys_of()}, _mappings()
    groups = {
        ".".join(name.split(".")[:n]) for name in known for n in range(1, name.count(".") + 1)
    }
    for name in grid:
        if name in _OF_THE_SWEEP:
            raise ValueError(
                f"`grid` must not name `{name}`: every run of a sweep has a folder of its own in "
                f"the sweep's `output_dir`, and all share the base's `cache_dir`; take it out"
            )
        if not (name in known | groups or name.partition(".")[0] in free):
            near = difflib.get_close_matches(name, known | groups, 1)
            raise ValueError(
                f"`grid` must name settings of `raco-fast train`, got {name!r}; "
                + (f"did you mean {near[0]!r}?" if near else "`raco-fast train --help` lists them")
            )
        if any(other.startswith(f"{name}.") for other in grid):
            raise ValueError(
                f"`grid` must not name a setting and a part of it, got {name!r} and what is below "
                f"it; write the values out under one of them"
            )


def _mappings() -> set[str]:
    """Settings that are or may be mappings, with names of the user's own in them."""
    return {
        name
        for name, hint in fields_of(TrainConfig).items()
        if any(get_origin(member) is dict for member in members_of(hint))
    }


def applied(base: Mapping[str, Any], point: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the base with the values of a point.

    Raises:
        ValueError: a dotted name leads through a value that has no parts.
    """
    settings: dict[str, Any] = copy.deepcopy(dict(base))
    for name, value in point.items():
        *groups, last = name.split(".")
        at = settings
        for k, group in enumerate(groups):
            inner = at.get(group)
            if inner is None:
                inner = at[group] = {}
            if not isinstance(inner, dict):
                place = ".".join(groups[: k + 1])
                raise ValueError(
                    f"`grid.{name}` needs `{place}` of the base to be a mapping, got {inner!r}; "
                    f"write it as one, or sweep `{place}` as a whole"
                )
            at = inner
        at[last] = copy.deepcopy(value)
    return settings


def name_of(point: Mapping[str, Any]) -> str:
    """A folder's name that tells the values: "rule=cagrad-clip,weights=kind0.3_sure0.7,seed=1".

    What is too long, or has signs that not every file system takes, ends in a hash of the value.
    """
    whole = ",".join(f"{name}={_text(name, value)}" for name, value in point.items())
    return whole if len(whole) <= _LONGEST_NAME else f"{whole[:_LONGEST_NAME]}~{_hash(point)}"


def _text(name: str, value: Any) -> str:
    if name == "weights" and isinstance(value, dict):
        plain = "_".join(f"{objective}{weight}" for objective, weight in value.items())
    else:
        plain = "_".join(_words(value))
    text = re.sub(r"[^A-Za-z0-9.+_-]+", "_", plain)[:_LONGEST]
    if text == plain:
        return text
    return f"{text}~{_hash(value)}"


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def _words(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from ((key,) if key != "name" else ())
            yield from _words(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _words(inner)
    elif isinstance(value, bool) or value is None:
        yield json.dumps(value)
    else:
        yield str(value)


def _uses_weights(rule: Any) -> bool:
    try:
        return check_rule(rule).uses_weights
    except TypeError as error:  # neither a name nor a mapping
        raise ValueError(str(error)) from error
