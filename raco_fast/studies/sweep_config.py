"""The settings of a sweep."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from raco_fast.dpo.data.choices import check_choices
from raco_fast.dpo.launch import share_of_cores
from raco_fast.settings.paths import expanded


@dataclass(frozen=True)
class SweepConfig:
    """A training run for every point of a grid.

    Args:
        base: the settings that all runs share: the path of a config of `raco-fast train`, or those
            settings themselves.
        grid: setting by its dotted name, such as `rule`, `weights`, `seed` or `loss_options.beta`
            -> the list of its values. Every combination is a run.
        output_dir: a folder for each run, named after its values, and the table of all.
        jobs: runs at a time, each in a process of its own.
        threads: threads of each run; sums, and so the last bits of a result, depend on it. None:
            the cores shared among `jobs`.
        devices: such as [cuda:0, cuda:1]: those that run at a time have them in turn, in place of
            the base's `model.device`; none leaves that as it is.
        keep: what stays of a finished run beside its config, log and metrics: `all`, the trained
            `model` without checkpoints, or the `metrics` alone.
    """

    base: str | dict[str, Any]
    grid: dict[str, list[Any]] = field(default_factory=dict)
    output_dir: str = "runs/sweep"
    jobs: int = 1
    threads: int | None = None
    devices: list[str] = field(default_factory=list)
    keep: Literal["all", "model", "metrics"] = "all"

    def __post_init__(self) -> None:
        """Check what can be checked without reading the base."""
        check_choices(self)
        for name in ("jobs", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        if not self.grid:
            raise ValueError(
                "`grid` must name at least one setting and its values, got none; write for example "
                "`grid: {seed: [0, 1, 2]}`, or use `raco-fast train` for a single run"
            )
        for name, values in self.grid.items():
            if not isinstance(values, list) or not values:
                raise ValueError(
                    f"`grid.{name}` must be a list of at least one value, got {values!r}; write "
                    f"`{name}: [...]` or take it out"
                )
            if any(value in values[:i] for i, value in enumerate(values)):
                raise ValueError(
                    f"`grid.{name}` must hold different values, got {values}; two runs would be "
                    f"the same"
                )

    @property
    def folder(self) -> Path:
        """`output_dir` as a path."""
        return expanded(self.output_dir, "output_dir")

    @property
    def threads_of_each(self) -> int:
        """`threads`, or the cores of this machine shared among the runs at a time."""
        return self.threads or max(1, share_of_cores() // self.jobs)
