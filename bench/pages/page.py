"""Records -> Markdown: tables by suite, goals beside figures, and where a rival is faster."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from bench.harness.records import OURS, Record, latest, mark
from bench.pages import pairs
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
    "ratios": ("Pair rows against the ratio of prompt to completion", "packed sequences"),
    "distributed": (
        "One DPO step on several processes",
        "plain DPO under DistributedDataParallel (case replicas) or FSDP2",
    ),
}
SCALES = {"us": (1.0, "us"), "ms": (1.0, "ms"), "s": (1.0, "s"), "bytes": (2.0**-20, "MiB")}


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


def shown(params: Mapping[str, Any]) -> str:
    """Params in a few words."""
    if "elements" in params:
        params = {**params, "elements": f"{params['elements'] / 1e6:.3g} M"}
    forms = {"m": "m = {}", "tokens": "{} tokens each"}
    forms |= {name: f"{{}} {name}" for name in ("layers", "sequences", "pairs", "processes")}
    return ", ".join(forms.get(name, "{}").format(value) for name, value in params.items())


def body(records: Sequence[Record]) -> str:
    """All sections about one run on one machine."""
    records = latest(records)
    of_length = [r for r in records if r.get("per") != "pair"]  # the others have their own tables
    parts = [_machine(records), _ceilings(records), pairs.section(records)]
    parts += [_suite(of_length, s) for s in SUITES]
    return "\n\n".join(part for part in [*parts, _scaling(records), _failures(records)] if part)


def goals(records: Sequence[Record], devices: Sequence[str]) -> str:
    """A table of every goal for the devices, with the figure and how sure it is."""
    rows = [_verdict(v) for v in verdicts(latest(records), devices)]
    return markdown_table(["goal", "measured on", "figure", ""], rows)


def losses(records: Sequence[Record]) -> str:
    """Every case in which a rival is faster than ours, worst first; a sentence where there is none.

    Our own other ways and the price of one objective (`adamw`, `plain`) are no rivals.
    """
    own = (OURS, "reference", "capturable", "products kept", "adamw", "plain", "raco, C++ alone")
    faster = [
        (r["ratio"], [suite, case, f"`{name}`", f"{r['ratio']:.2f}"])
        for suite in ("solve", "gram", "combine_adamw", "step")
        for case, found in cases(by_suite(latest(records), suite)).items()
        for name, r in found.items()
        if name not in own and OURS in found and r["ratio"] < 1
    ]
    if not faster:
        return "In no case of the solver, Gram, update or step was a rival faster."
    rows = [row for _, row in sorted(faster, key=lambda pair: pair[0])]
    return markdown_table(["suite", "case", "rival", "its time, ours is 1"], rows)


def slope(sizes: Sequence[float], times: Sequence[float]) -> float:
    """The exponent k of time ~ size^k, by least squares of the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(times), 1)[0])


def swept(records: Iterable[Record]) -> dict[tuple[str, str], list[Record]]:
    """(what, against what) -> the records of one sweep."""
    found: dict[tuple[str, str], list[Record]] = {}
    for r in by_suite(records, "scaling"):
        found.setdefault((contestant(r), r["params"]["against"]), []).append(r)
    return found


def points(records: Sequence[Record]) -> tuple[list[float], list[float]]:
    """Sizes and medians of one sweep."""
    return [r["params"]["size"] for r in records], [r["p50"] for r in records]


def _machine(records: Sequence[Record]) -> str:
    last = records[-1]
    card = {**last["machine"], **last["versions"]}
    loads = [r["machine"]["load"] for r in records]
    facts = [f"{k} {v}" for k, v in card.items() if k != "load"]
    commits = ", ".join(dict.fromkeys(f"`{r['commit'][:12]}`" for r in records))
    dirty = " (with changes)" if any("-dirty" in r["commit"] for r in records) else ""
    load = f"Load at the start of its parts: {min(loads)} to {max(loads)}."
    return f"{'; '.join(facts)}. Commit {commits}{dirty}. {load}"


def _ceilings(records: Sequence[Record]) -> str:
    found = by_suite(records, "ceilings")
    rows = [[contestant(r), f"{r['rate']:.1f} {r['rate_unit']}{_mark(r)}"] for r in found]
    return "### Ceilings\n\n" + markdown_table(["what", "rate"], rows) if rows else ""


def _suite(records: Sequence[Record], suite: str) -> str:
    found = cases(by_suite(records, suite))
    if not found:
        return ""
    title, unit = SUITES[suite]
    names = list(dict.fromkeys(name for of_case in found.values() for name in of_case))
    rows = [[case, *(_cell(of.get(name)) for name in names)] for case, of in found.items()]
    table = markdown_table(["case", *(f"`{name}`" for name in names)], rows)
    text = f"### {title} (`{suite}`)\n\n{table}\n\nIn brackets: as a multiple of {unit}."
    ours = {case: of.get(OURS, {}).get("share") for case, of in found.items()}
    shares = [f"{case}: {share:.0%}" for case, share in ours.items() if share is not None]
    if shares:
        text += f" Share of the copy bandwidth that `{OURS}` reaches: {'; '.join(shares)}."
    commands = [r["reproduce"] for r in by_suite(records, suite) if "reproduce" in r]
    return f"{text}\n\nAgain: `{commands[0]}`." if commands else text


def _cell(record: Record | None) -> str:
    if record is None:
        return "-"
    scale, unit = SCALES[record["unit"]]
    value = f"{record['p50'] * scale:.3g} {unit}{_mark(record)}"
    extra = {
        "ratio": lambda x: f"{x:.2f}",
        "tokens_per_second": lambda x: f"{x:.0f} tokens/s",
        "peak_bytes": lambda x: f"+{x / 2**20:.0f} MiB",
        "payload": lambda x: f"{x:.2f} θ sent",
        "memory_bytes": lambda x: f"{x / 2**20:.0f} MiB each",
    }
    known = [form(record[k]) for k, form in extra.items() if record.get(k) is not None]
    return f"{value} ({', '.join(known)})" if known else value


def _mark(record: Record) -> str:
    return " ~" if mark(record) else ""


def _scaling(records: Sequence[Record]) -> str:
    rows = []
    for (what, against), found in swept(records).items():
        sizes, times = points(found)
        medians = "; ".join(f"{s:g}: {t:.3g} s" for s, t in zip(sizes, times, strict=True))
        rows.append([f"`{what}`", against, medians, f"{slope(sizes, times):.2f}"])
    titles = ["what", "against", "medians", "slope"]
    return "### Scaling\n\n" + markdown_table(titles, rows) if rows else ""


def _failures(records: Sequence[Record]) -> str:
    lines = [
        f"- `{r['name']}` {shown(r['params'])}: {' '.join(r['failure'].split())[:200]}"
        for r in records
        if "failure" in r
    ]
    return "### Not measured\n\n" + "\n".join(lines) if lines else ""


def _verdict(verdict: Verdict) -> list[str]:
    case = verdict.record and f"{shown(verdict.record['params'])}{_mark(verdict.record)}"
    figure = "-" if verdict.figure is None else f"{verdict.figure:.3g}"
    met = {True: "met", False: "**missed**", None: "-"}[verdict.met]
    return [verdict.goal.text, case or "not measured", figure, met]


def devices(records: Iterable[Record]) -> list[str]:
    return sorted({device_of(r) for r in records})
