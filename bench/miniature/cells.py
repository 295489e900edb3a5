"""The cells of the study, and one seed of one method in a cell, which is what a job runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from raco_fast.demo.config import DemoConfig
from raco_fast.solver.registry import check_rule, label_of

STUDY = Path(__file__).with_name("study.yaml")
START = "start"
"""The rule of the lines that hold a warmed-up model's scores."""
_WARM_UP = ("hidden_size", "layers", "warm_up_steps", "warm_up_batch_size", "warm_up_lr")


@dataclass(frozen=True)
class Cell:
    """One set of settings.

    Args:
        name: what tables call it; its records are in a file of this name.
        config: its settings.
    """

    name: str
    config: DemoConfig

    @property
    def methods(self) -> list[tuple[str, str]]:
        """(label of the rule, Gram matrix), in order."""
        return list(dict.fromkeys((label_of(check_rule(r)), g) for r, g, _ in self.config.points))

    def points(self, rule: str, gram: str) -> list[tuple[Any, str, dict[str, float] | None]]:
        """Those of `DemoConfig.points` of a method."""
        return [p for p in self.config.points if (label_of(check_rule(p[0])), p[1]) == (rule, gram)]


def read_cells(path: Path = STUDY) -> list[Cell]:
    """The cells of a study file, in order.

    Raises:
        TypeError: a setting that the demo does not have.
        ValueError: a setting that it cannot run with, or cells that differ in the warm-up, whose
            models they share.
    """
    study = yaml.safe_load(path.read_text(encoding="utf-8"))
    cells = [
        Cell(name, DemoConfig(**_tuples({**study["base"], **settings})))
        for name, settings in study["cells"].items()
    ]
    for name in _WARM_UP:
        if len({getattr(cell.config, name) for cell in cells}) > 1:
            raise ValueError(
                f"`{name}` must be the same in all cells, which share their warmed-up models; set "
                "it in `base` only"
            )
    return cells


def warm_up_config(cells: list[Cell]) -> DemoConfig:
    """The settings that every warm-up has; judged for as many objectives as there are."""
    widest = max(cell.config.objectives for cell in cells)
    return replace(cells[0].config, objectives=widest)


def jobs(cells: list[Cell]) -> Iterator[tuple[Cell, int, str, str]]:
    """(cell, seed, rule, Gram matrix) of every job; all of a cell before the next one."""
    for cell in cells:
        for seed in range(cell.config.seed, cell.config.seed + cell.config.seeds):
            for rule, gram in cell.methods:
                yield cell, seed, rule, gram


def _tuples(settings: dict[str, Any]) -> dict[str, Any]:
    known = {field.name for field in fields(DemoConfig)}
    if unknown := set(settings) - known:
        raise TypeError(f"a cell has settings of the demo only, got {sorted(unknown)}")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
