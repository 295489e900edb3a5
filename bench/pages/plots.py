"""Records -> PNG plots, one idea each; matplotlib is imported here only."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness.records import Record
from bench.pages.page import SUITES, by_suite, cases, contestant, points, slope, swept


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """Write every plot that there are records for; the files, in the order of a page."""
    drawn = [_ratios(records, suite, folder / f"{suite}.png") for suite in ("step", "memory")]
    drawn.append(_against_m(records, folder / "backward.png"))
    drawn.append(_sweeps(records, folder / "scaling.png"))
    drawn.append(_against_ratio(records, folder / "pairs.png"))
    return [file for file in drawn if file is not None]


def _ratios(records: Sequence[Record], suite: str, file: Path) -> Path | None:
    """Bars of each contestant's ratio, case by case; the whiskers are p20 and p80."""
    found = cases(r for r in by_suite(records, suite) if r["ratio"] is not None)
    if not found:
        return None
    figure, axes = _axes(1, height=1.0 + 0.22 * sum(map(len, found.values())))
    labels: list[str] = []
    for case, of_case in found.items():
        for name, r in of_case.items():
            unit = r["p50"] / r["ratio"]
            low, high = r.get("p20", r["p50"]) / unit, r.get("p80", r["p50"]) / unit
            whiskers = [[max(0.0, r["ratio"] - low)], [max(0.0, high - r["ratio"])]]
            color = "tab:orange" if "raco" in name else "C0"
            axes[0].barh(len(labels), r["ratio"], xerr=whiskers, color=color)
            labels.append(f"{name} ({case})")
    axes[0].set_yticks(range(len(labels)), labels, fontsize=6)
    axes[0].invert_yaxis()
    largest = max(r["ratio"] for of_case in found.values() for r in of_case.values())
    axes[0].set_xlim(0, 1.15 * largest)  # whiskers of a disturbed run may end outside
    axes[0].axvline(1.0, color="black", linewidth=0.8)
    axes[0].set_xlabel(f"multiple of {SUITES[suite][1].strip('`')}")
    axes[0].set_title(SUITES[suite][0])
    return _saved(figure, file)


def _against_m(records: Sequence[Record], file: Path) -> Path | None:
    """The price of a step in plain steps, against the number of objectives."""
    found = by_suite(records, "backward")
    kinds = list(dict.fromkeys(r["params"]["kind"] for r in found))
    if not found:
        return None
    figure, axes = _axes(len(kinds), height=3.2)
    for axis, kind in zip(axes, kinds, strict=True):
        of_kind = [r for r in found if r["params"]["kind"] == kind]
        for name in dict.fromkeys(map(contestant, of_kind)):
            of_name = (r for r in of_kind if contestant(r) == name)
            prices = sorted((r["params"]["m"], r["ratio"]) for r in of_name)
            axis.plot(*zip(*prices, strict=True), marker="o", markersize=3, label=name)
        axis.set_title(f"{kind} fine-tuning")
        axis.set_xlabel("objectives m")
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel("time, in plain DPO steps")
    axes[0].legend(fontsize=6)
    return _saved(figure, file)


def _sweeps(records: Sequence[Record], file: Path) -> Path | None:
    """Time against size, both logarithmic, with the fitted slopes."""
    found = swept(records)
    if not found:
        return None
    figure, axes = _axes(len(found), height=2.6)
    for axis, ((what, against), records_of) in zip(axes, found.items(), strict=True):
        sizes, times = points(records_of)
        axis.loglog(sizes, times, marker="o", markersize=3)
        axis.set_title(f"{what}: slope {slope(sizes, times):.2f}", fontsize=8)
        axis.set_xlabel(against, fontsize=8)
        axis.tick_params(labelsize=6, which="both")
    axes[0].set_ylabel("seconds", fontsize=8)
    return _saved(figure, file)


def _against_ratio(records: Sequence[Record], file: Path) -> Path | None:
    """Time of a pair that shares its prompt, in that of packed sequences, and what bounds it."""
    swept = [r for r in by_suite(records, "ratios") if contestant(r) == "raco pairs"]
    of_data = [r for r in by_suite(records, "train") if "over_packed" in r]
    if not swept and not of_data:
        return None
    figure, (axis,) = _axes(1, height=3.2)
    ratios = np.geomspace(0.2, 20, 100)
    bound = "bound: (P + A + B) / (2P + A + B)"
    axis.plot(ratios, (ratios + 2) / (2 * ratios + 2), color="black", linewidth=0.8, label=bound)
    axis.axhline(1.0, color="gray", linewidth=0.8, linestyle="--", label="packed sequences")
    if swept:
        x, y = [r["prompt_ratio"] for r in swept], [r["ratio"] for r in swept]
        axis.plot(x, y, marker="o", markersize=3, label="pair rows, sequences of one length")
    names = list(dict.fromkeys(r["params"]["data"] for r in of_data))
    for r in of_data:
        data, kind = r["params"]["data"], r["params"]["kind"]
        place, color = (r["prompt_ratio"], r["over_packed"]), f"C{1 + names.index(data)}"
        fill = {"color": color} if kind == "full" else {"mec": color, "mfc": "white"}
        shape = {"marker": "s", "markersize": 5, "linestyle": ""}
        axis.plot(*place, **shape, **fill, label=f"{data}, {kind}")
    axis.set_xscale("log")
    axis.set_ylim(bottom=0.4)
    axis.set_xlabel("tokens of the prompt over those of a completion")
    axis.set_ylabel("time of a pair, packed = 1")
    axis.set_title("What a shared prompt saves")
    axis.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _saved(figure, file)


def _axes(columns: int, height: float) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _saved(figure: Any, file: Path) -> Path:
    figure.savefig(file, dpi=110)
    return file
