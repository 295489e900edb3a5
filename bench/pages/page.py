"""Records -> Markdown: tables by suite, goals beside figures, and where a rival is faster."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from bench.harness.records import OURS, Record
from bench.harness.timing import noisy
from bench.pages.goals import Verdict, device_of, verdicts
from raco_fast.report import markdown_table

# Suite -> (title, what its ratios are multiples of).
SUITES = {
    "solve": ("The dual problem", "`raco`"),
    "gram": ("Gram matrix", "`raco`"),
    "combine_adamw": ("Combination and AdamW", "`raco`"),
    "step": ("Optimizer step", "`raco`"),
    "backward": ("One DPO step, forward to update", "one plain DPO step"),
    "memory": ("Peak memory above weights and states", "plain DPO"),
    "train": ("Whole training steps", "`trl`, of `plain` where TRL is missing"),
}
SCALES = {"us": (1.0, "us"), "ms": (1.0, "ms"), "s": (1.0, "s"), "bytes": (2.0**-20, "MiB")}


def latest(records: Iterable[Record]) -> list[Record]:
    """Of several records of the same thing the last one."""
    return list({(r["name"], *map(str, r["params"].items())): r for r in records}.values())


def by_suite(records: Iterable[Record], suite: str) -> list[Record]:
    """The measured records of one suite."""
    return [r for r in records if r["name"].startswith(f"{suite}/") and "p50" in r]


def cases(records: Iterable[Record]) -> dict[str, dict[str, Record]]:
    """Case, as shown -> contestant -> record, in the order of the records."""
    found: dict[str, dict[str, Record]] = {}
    for r in records:
        found.setdefault(shown(r["params"]), {})[contestant(r)] = r
    return found


def contestant(record: Record) -> str:
    """The part of the name behind the suite."""
    return str(record["name"]).split("/", 1)[1]


def shown(params: Mapping[str, object]) -> str:
    """Params in a few words."""
    units = {"layers": "layers", "sequences": "sequences", "tokens": "tokens each"}
    parts = []
    for name, value in params.items():
        if name == "elements":
            parts.append(f"{float(str(value)) / 1e6:.3g} M")
        elif name == "m":
            parts.append(f"m = {value}")
        else:
            parts.append(f"{value} {units[name]}" if name in units else str(value))
    return ", ".join(parts)


def body(records: Sequence[Record]) -> str:
    """All sections about one run on one machine."""
    records = latest(records)
    parts = [_machine(records), _ceilings(records), *(_suite(records, s) for s in SUITES)]
    return "\n\n".join(part for part in [*parts, _scaling(records), _failures(records)] if part)


def goals(records: Sequence[Record], devices: Sequence[str]) -> str:
    """A table of every goal for the devices, with the figure and how sure it is."""
    rows = [
        [v.goal.text, _of_case(v), _figure(v), {True: "met", False: "**missed**", None: "-"}[v.met]]
        for v in verdicts(latest(records), devices)
    ]
    return markdown_table(["goal", "measured on", "figure", ""], rows)


def losses(records: Sequence[Record]) -> str:
    """Every case in which a rival is faster than ours, worst first; a sentence where there is none.

    Our own other ways and the price of one objective (`adamw`, `plain`) are no rivals.
    """
    own = (OURS, "reference", "capturable", "adamw", "plain", "raco, C++ alone")
    rows = []
    for suite in ("solve", "gram", "combine_adamw", "step"):
        for case, found in cases(by_suite(latest(records), suite)).items():
            for name, r in found.items():
                if name not in own and OURS in found and r["ratio"] < 1:
                    rows.append((r["ratio"], [suite, case, f"`{name}`", f"{r['ratio']:.2f}"]))
    if not rows:
        return "In no case of the solver, Gram, update or step was a rival faster."
    table = [row for _, row in sorted(rows, key=lambda pair: pair[0])]
    return markdown_table(["suite", "case", "rival", "its time, ours is 1"], table)


def slope(sizes: Sequence[float], times: Sequence[float]) -> float:
    """The exponent k of time ~ size^k, by least squares of the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(times), 1)[0])


def swept(records: Iterable[Record]) -> dict[tuple[str, str], list[Record]]:
    """(what, against what) -> the records of one sweep."""
    found: dict[tuple[str, str], list[Record]] = {}
    for r in by_suite(records, "scaling"):
        found.setdefault((contestant(r), r["params"]["against"]), []).append(r)
    return found


def _machine(records: Sequence[Record]) -> str:
    last = records[-1]
    card = {k: v for k, v in last["machine"].items() if k != "load"}
    loads = [r["machine"]["load"] for r in records]
    facts = [f"{k} {v}" for k, v in card.items()] + [
        f"{k} {v}" for k, v in last["versions"].items()
    ]
    commits = ", ".join(dict.fromkeys(f"`{r['commit'][:12]}`" for r in records))
    dirty = " (with changes)" if any("-dirty" in r["commit"] for r in records) else ""
    load = f"Load at the start of its parts: {min(loads)} to {max(loads)}."
    return f"{'; '.join(facts)}. Commit {commits}{dirty}. {load}"


def _ceilings(records: Sequence[Record]) -> str:
    rows = [
        [contestant(r), f"{r['rate']:.1f} {r['rate_unit']}{_mark(r)}"]
        for r in records
        if r["name"].startswith("ceilings/") and "rate" in r
    ]
    return "### Ceilings\n\n" + markdown_table(["what", "rate"], rows) if rows else ""


def _suite(records: Sequence[Record], suite: str) -> str:
    found = cases(by_suite(records, suite))
    if not found:
        return ""
    title, unit = SUITES[suite]
    names = list(dict.fromkeys(name for of_case in found.values() for name in of_case))
    rows = [
        [case, *(_cell(of_case.get(name)) for name in names)] for case, of_case in found.items()
    ]
    text = f"### {title} (`{suite}`)\n\n" + markdown_table(
        ["case", *(f"`{name}`" for name in names)], rows
    )
    text += f"\n\nIn brackets: as a multiple of {unit}."
    shares = [f"{c}: {f[OURS]['share']:.0%}" for c, f in found.items() if _has_share(f)]
    if shares:
        text += f" Share of the copy bandwidth that `{OURS}` reaches: {'; '.join(shares)}."
    commands = dict.fromkeys(r["reproduce"] for r in by_suite(records, suite) if "reproduce" in r)
    if commands:
        text += f"\n\nAgain: `{next(iter(commands))}`."
    return text


def _has_share(found: Mapping[str, Record]) -> bool:
    return OURS in found and found[OURS].get("share") is not None


def _cell(record: Record | None) -> str:
    if record is None:
        return "-"
    scale, unit = SCALES[record["unit"]]
    value = f"{record['p50'] * scale:.3g} {unit}{_mark(record)}"
    ratio = record.get("ratio")
    extra = [] if ratio is None else [f"{ratio:.2f}"]
    if "tokens_per_second" in record:
        extra.append(f"{record['tokens_per_second']:.0f} tokens/s")
    if "peak_bytes" in record:
        extra.append(f"+{record['peak_bytes'] / 2**20:.0f} MiB")
    return f"{value} ({', '.join(extra)})" if extra else value


def _mark(record: Record) -> str:
    known = all(q in record for q in ("p20", "p50", "p80"))
    return " ~" if known and noisy(record[q] for q in ("p20", "p50", "p80")) else ""


def _scaling(records: Sequence[Record]) -> str:
    rows = []
    for (what, against), found in swept(records).items():
        sizes, times = ([float(x) for x in column] for column in _points(found))
        points = "; ".join(f"{s:g}: {t:.3g} s" for s, t in zip(sizes, times, strict=True))
        rows.append([f"`{what}`", against, points, f"{slope(sizes, times):.2f}"])
    if not rows:
        return ""
    return "### Scaling\n\n" + markdown_table(["what", "against", "medians", "slope"], rows)


def _points(records: Sequence[Record]) -> tuple[list[float], list[float]]:
    return [r["params"]["size"] for r in records], [r["p50"] for r in records]


def _failures(records: Sequence[Record]) -> str:
    lines = [
        f"- `{r['name']}` {shown(r['params'])}: {' '.join(r['failure'].split())[:200]}"
        for r in records
        if "failure" in r
    ]
    return "### Not measured\n\n" + "\n".join(lines) if lines else ""


def _of_case(verdict: Verdict) -> str:
    if verdict.record is None:
        return "not measured"
    return f"{shown(verdict.record['params'])}{_mark(verdict.record)}"


def _figure(verdict: Verdict) -> str:
    return "-" if verdict.figure is None else f"{verdict.figure:.3g}"


def devices(records: Iterable[Record]) -> list[str]:
    """The kinds of device that the records are of."""
    return sorted({device_of(r) for r in records})
