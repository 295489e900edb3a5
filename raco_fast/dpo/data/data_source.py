"""A source of preference pairs, as a config names it."""

from dataclasses import dataclass, field
from typing import Literal

from raco_fast.dpo.data.label_columns import LabelColumn


@dataclass(frozen=True)
class DataSource:
    """One file, or several alike, of a run.

    Args:
        path: JSON Lines, a JSON list or CSV, gzip or not; Parquet or Arrow; a folder that
            `save_to_disk` of the `datasets` library wrote; a pattern of such (`shards/*.jsonl`);
            `hub:org/name`, a data set of the Hugging Face hub; `-`, standard input.
        objective: the objective(s) this file labels; None: every objective of the run, or those
            that `objectives` names.
        objectives: the objectives this file labels, each with the field that does: its name, or
            {column: verbosity, prefer: lower, soft: {1: 0.75, 2: 1.0}} (`LabelColumn`). Without it
            fields have the names of their objectives.
        format: a name in `raco_fast.dpo.data.formats.registry.FORMATS`, or "auto": by the fields
            of the first row.
        limit: read only the first `limit` usable pairs.
        pairs_per_row: of a row with several answers, at most so many of its pairs, drawn by a hash
            of their ids; None: each two answers that an objective tells apart.
        config, split, revision: of a data set of the hub; `split` also of a saved one. None: the
            only config or split that there is, and the newest revision.
        on_bad: "error", or "skip" to leave out every row with something wrong in it (a line that
            is no JSON, a missing field, an unknown label, identical responses ...), with a warning
            that counts them. What is wrong with the file itself, a JSON list that is no JSON
            included, is an error either way, as is a file without one good row.
    """

    path: str
    objective: str | list[str] | None = None
    objectives: dict[str, str | LabelColumn] = field(default_factory=dict)
    format: str = "auto"
    limit: int | None = None
    pairs_per_row: int | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    on_bad: Literal["error", "skip"] = "error"

    @property
    def declared(self) -> tuple[str, ...] | None:
        """The objectives this file is said to label, or None for all of the run."""
        if self.objectives:
            return tuple(self.objectives)
        if self.objective is None:
            return None
        return (self.objective,) if isinstance(self.objective, str) else tuple(self.objective)

    @property
    def described(self) -> str:
        """The path, and what of a data set is read."""
        named = ((name, getattr(self, name)) for name in ("config", "split", "revision"))
        parts = [f"{name} {value}" for name, value in named if value is not None]
        return f"{self.path} ({', '.join(parts)})" if parts else self.path

    def check(self, names: tuple[str, ...]) -> None:
        """Raise ValueError for a setting that does not fit a run with these objectives."""
        if self.objective is not None and self.objectives:
            raise ValueError(
                f"`objectives` of {self.path} must be the only one that says what the source "
                f"labels, got `objective` {self.objective!r} beside it; leave that out"
            )
        what = "objectives" if self.objectives else "objective"
        unknown = [name for name in self.declared or () if name not in names]
        if unknown:
            raise ValueError(
                f"`{what}` of {self.path} must name objectives of the run {list(names)}, "
                f"got {unknown}; add them to the weights or correct the name"
            )
        if self.declared == ():
            raise ValueError(
                f"`objective` of {self.path} must name at least one objective, got []; leave it "
                "out when the file labels all of them"
            )
        for setting in ("limit", "pairs_per_row"):
            value = getattr(self, setting)
            if value is not None and value < 1:
                raise ValueError(
                    f"`{setting}` of {self.path} must be at least 1, got {value}; leave it out to "
                    "read all pairs"
                )
        if self.on_bad not in ("error", "skip"):
            raise ValueError(
                f"`on_bad` of {self.path} must be 'error' or 'skip', got {self.on_bad!r}"
            )
