"""The miniature study's part of docs/results.md, from its committed records."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from bench.miniature.cells import START, Cell, read_cells
from bench.miniature.run import RESULTS
from raco_fast.dpo.run.files import atomic_file
from raco_fast.report import markdown_table
from raco_fast.studies.fronts import hypervolume
from raco_fast.studies.spread import CERTAINTY, Spread

Method = tuple[str, str]
"""A rule's label and the Gram matrix it finds a conflict in."""
_LINEAR = ("linear", "batch")
_UNBIASED = ("cagrad-clip", "unbiased")
_OPPOSED = "coverage:brevity"
_PICTURED = ("base", "pairs 4", "pairs 16", "pairs 64", "own pairs", "own pairs 24")


@dataclass(frozen=True)
class Finished:
    """A cell all of whose jobs are done.

    Args:
        cell: the cell.
        records: of all its jobs.
    """

    cell: Cell
    records: Sequence[dict[str, Any]]

    @cached_property
    def starts(self) -> dict[int, dict[str, float]]:
        """Seed -> scores of the warmed-up model."""
        return {r["seed"]: r["scores"] for r in self.records if r["rule"] == START}

    def of(self, method: Method) -> dict[int, list[dict[str, Any]]]:
        """Seed -> records of a method, one a weight vector."""
        found: dict[int, list[dict[str, Any]]] = {}
        for record in self.records:
            if tuple(record["method"]) == method and record["rule"] != START:
                found.setdefault(record["seed"], []).append(record)
        return dict(sorted(found.items()))

    def volume(self, method: Method) -> Spread | None:
        """Hypervolume above 0 of each seed's front; None for a method without weights."""
        of_seeds = self.of(method).values()
        if any(record["weights"] is None for records in of_seeds for record in records):
            return None
        fronts = [np.array([list(r["scores"].values()) for r in records]) for records in of_seeds]
        return Spread(tuple(hypervolume(f, np.zeros(f.shape[1])) for f in fronts))

    def weighted(self, method: Method) -> Spread:
        """The users' weighted sum of scores, mean over the weight vectors, of each seed."""
        vectors = self.cell.config.weight_vectors
        values = []
        for records in self.of(method).values():
            pairs = [
                (record["scores"], weights)
                for record in records
                for weights in ([record["weights"]] if record["weights"] else vectors)
            ]
            values.append(fmean(sum(w[name] * s[name] for name in w) for s, w in pairs))
        return Spread(tuple(values))

    def worst(self, method: Method) -> Spread:
        """The change from the start of the objective that came off worst, mean over vectors."""
        values = []
        for seed, records in self.of(method).items():
            start = self.starts[seed]
            values.append(fmean(min(r["scores"][n] - start[n] for n in start) for r in records))
        return Spread(tuple(values))

    def mean(self, method: Method, name: str, kind: str = "means") -> Spread | None:
        """A metric's mean over the steps (or its last value) and the weight vectors, by seed."""
        values = []
        for records in self.of(method).values():
            finite = [r[kind][name] for r in records if r[kind].get(name) is not None]
            if not finite:
                return None
            values.append(fmean(finite))
        return Spread(tuple(values))


def read() -> tuple[list[Finished], list[str]]:
    """The cells that are finished, and the names of those that are not."""
    finished, missing = [], []
    for cell in read_cells():
        path = RESULTS / f"{cell.name}.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        records = [json.loads(line) for line in lines]
        jobs = {(record["seed"], tuple(record["method"])) for record in records}
        whole = len(jobs) == cell.config.seeds * len(cell.methods)
        (finished.append(Finished(cell, records)) if whole else missing.append(cell.name))
    return finished, missing


def part() -> list[str]:
    """Paragraphs and tables."""
    cells, missing = read()
    gains = list(_gains(cells))
    base = cells[0].cell.config
    seeds = f"{base.seeds} seeds"
    parts = [
        "## The demo's task, one change at a time",
        f"A Llama of {base.layers} layers and width {base.hidden_size} is taught to summarise "
        f"small bulletins, then aligned in {base.steps} steps of {base.batch_size} pairs labelled "
        "by exact judges, and what it writes is judged by the same judges (`raco-fast demo`). "
        f"Every cell is run with {seeds}, a model, data and sampling each; differences are taken "
        f"seed by seed, and ± is half of the {CERTAINTY:.0%} Student interval of their mean. "
        "Bold: the interval leaves out 0. *Hypervolume* is that of a rule's weight vectors above "
        "0 in every objective; *weighted score* the users' own weighted sum, and *worst change* "
        "the change from the start of the objective that came off worst, both mean over the "
        "weight vectors.",
        _verdict(gains),
        "### The unbiased Gram matrix against the batch's",
        _unbiased(gains),
        "### Rules against the weighted sum",
        "*Believed* is λ of [conflict.md](conflict.md), mean over the steps: how far the "
        "unbiased estimate counts, the rest being the weights themselves. *Clipped* is the share "
        "of steps that clipping changed.",
        _against_linear(cells),
        "### What a step's gradients show, and the estimate of the expected ones'",
        "Median over the seeds, and their quartiles. The estimate is a ratio of estimates, and "
        "leaves [-1, 1] while a norm is not known; - is where a squared norm came out negative in "
        "a seed.",
        "![cosine in a step and in the estimate](results/conflict.png)",
        _cosines(cells),
    ]
    if missing:
        parts.append(f"Cells of `study.yaml` not run as yet: {'; '.join(missing)}.")
    machine = (RESULTS / "machine.txt").read_text(encoding="utf-8").strip()
    parts.append(
        "One cell again: `python -m bench.miniature.run 'own pairs'` after deleting its file in "
        f"bench/results/miniature/; its settings are in bench/miniature/study.yaml. Machine: "
        f"{machine}."
    )
    return parts


def draw(destination: Path) -> None:
    """The cosine of two opposed objectives over the pairs of a step, in it and as estimated."""
    from matplotlib.figure import Figure

    cells, _ = read()
    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, own in zip(panels, (False, True), strict=True):
        for kind, name, color in (
            ("means", "raco/cosine/", "#D55E00"),
            ("last", "raco/cosine_unbiased/", "#0072B2"),
        ):
            found = [
                (cell.cell.config.batch_size, spread)
                for cell in cells
                if cell.cell.name in _PICTURED and cell.cell.config.own_pairs == own
                if (spread := cell.mean(_UNBIASED, f"{name}{_OPPOSED}", kind)) is not None
            ]
            found.sort(key=lambda each: each[0])
            sizes = np.array([size for size, _ in found], dtype=float)
            low, middle, high = np.array(
                [np.quantile(spread.values, (0.25, 0.5, 0.75)) for _, spread in found]
            ).T
            axes.errorbar(
                sizes,
                middle,
                yerr=[middle - low, high - middle],
                marker="o",
                color=color,
                label="in a step's gradients" if kind == "means" else "estimate, at the last step",
            )
        axes.set(xscale="log", xlabel="pairs in a step", ylim=(-1.3, 0.2))
        axes.set_xticks([4, 8, 16, 32], ["4", "8", "16", "32"])
        axes.minorticks_off()
        axes.set_title(
            "each pair labelled for one objective" if own else "all pairs labelled for all"
        )
        axes.axhline(0.0, color="gray", linewidth=0.8)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("cosine of coverage and brevity")
    panels[0].legend(frameon=False)
    with atomic_file(destination) as partial:
        figure.savefig(partial, format="png", dpi=110)


Gain = tuple[str, str, str, Spread]
"""A cell, a rule, a quantity, and unbiased minus batch."""


def _gains(cells: Sequence[Finished]) -> Iterator[Gain]:
    for cell in cells:
        methods = cell.cell.methods
        for rule in dict.fromkeys(rule for rule, _ in methods):
            batch, unbiased = (rule, "batch"), (rule, "unbiased")
            if batch not in methods or unbiased not in methods:
                continue
            for name in ("volume", "weighted", "worst"):
                of = getattr(cell, name)
                one, other = of(unbiased), of(batch)
                if one is not None and other is not None:
                    yield cell.cell.name, rule, name, one - other


def _verdict(gains: Sequence[Gain]) -> str:
    clear = [gain for *_, gain in gains if gain.is_clear()]
    better = sum(gain.mean > 0 for gain in clear)
    chance = len(gains) * (1 - CERTAINTY)
    if not clear:
        return (
            f"**Batch or unbiased makes no clear difference here**: none of {len(gains)} "
            "comparisons of a rule with itself leaves out 0."
        )
    return (
        f"Of {len(gains)} comparisons of a rule on the unbiased Gram matrix with itself on the "
        f"batch's, {better} are clearly in favour of the unbiased one and {len(clear) - better} "
        f"clearly against it; if there were no difference, about {chance:.0f} would look clear. "
        "The others lie within the spread over seeds."
    )


def _signed(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    text = f"{spread.mean:+.4f} ± {spread.interval():.4f}"
    return f"**{text}**" if spread.is_clear() else text


def _quartiles(spread: Spread | None) -> str:
    """The median over seeds, and the quartiles; a ratio of noisy numbers has no use for a mean."""
    if spread is None:
        return "-"
    low, middle, high = np.quantile(spread.values, (0.25, 0.5, 0.75))
    return f"{middle:+.2f} ({low:+.2f} to {high:+.2f})"


def _unbiased(gains: Sequence[Gain]) -> str:
    rows: dict[tuple[str, str], dict[str, Spread]] = {}
    for cell, rule, name, gain in gains:
        rows.setdefault((cell, rule), {})[name] = gain
    titles = ("cell", "rule, unbiased - batch", "hypervolume", "weighted score", "worst change")
    names = ("volume", "weighted", "worst")
    lines = [
        (cell, f"`{rule}`", *(_signed(found.get(name)) for name in names))
        for (cell, rule), found in rows.items()
    ]
    return markdown_table(titles, lines)


def _against_linear(cells: Sequence[Finished]) -> str:
    lines = []
    base = cells[0]
    for cell in cells:
        # A cell without `linear` changes nothing that the weighted sum sees: the base's is its.
        yardstick = cell if _LINEAR in cell.cell.methods else base
        for method in cell.cell.methods:
            if method == _LINEAR:
                continue
            volume, linear = cell.volume(method), yardstick.volume(_LINEAR)
            clipped = cell.mean(method, "raco/clip_active")
            believed = cell.mean(method, "raco/shrinkage")
            lines.append(
                (
                    cell.cell.name,
                    f"`{method[0]}`",
                    method[1],
                    "-" if volume is None else volume.with_interval(),
                    "-" if volume is None or linear is None else _signed(volume - linear),
                    _signed(cell.weighted(method) - yardstick.weighted(_LINEAR)),
                    _signed(cell.worst(method) - yardstick.worst(_LINEAR)),
                    "-" if believed is None else f"{believed.mean:.2f}",
                    "-" if not clipped or not clipped.mean else f"{clipped.mean:.0%}",
                )
            )
    titles = ("cell", "rule", "gram", "hypervolume", "hypervolume - linear's")
    titles += ("weighted score - linear's", "worst change - linear's", "believed", "clipped")
    return markdown_table(titles, lines)


def _cosines(cells: Sequence[Finished]) -> str:
    lines = []
    for cell in cells:
        unbiased = [method for method in cell.cell.methods if method[1] == "unbiased"]
        if not unbiased:
            continue
        method, names = unbiased[0], cell.cell.config.names
        for place, one in enumerate(names):
            for other in names[place + 1 :]:
                pair = f"{one}:{other}"
                batch = cell.mean(method, f"raco/cosine/{pair}")
                last = cell.mean(method, f"raco/cosine_unbiased/{pair}", "last")
                lines.append((cell.cell.name, pair, *map(_quartiles, (batch, last))))
    titles = ("cell", "objectives", "in a step", "estimate at the last step")
    return markdown_table(titles, lines)
