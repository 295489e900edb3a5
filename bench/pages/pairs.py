"""The tables of whole training steps on pairs of real lengths: a row for each data and training."""

from collections.abc import Callable, Sequence
from typing import Any

from bench.harness.records import Record, mark
from raco_fast.report import markdown_table

TITLE = "Whole training steps on pairs of real lengths (`train`)"
_FIGURES: dict[str, Callable[[Any], str]] = {
    "ratio": lambda x: f"{x:.2f}",
    "tokens_per_second": lambda x: f"{x:.0f} tokens/s once",
    "tokens_per_second_twice": lambda x: f"{x:.0f} twice",
    "of_matmul": lambda x: f"{x:.0%} of the matrix product",
    "at_once": lambda x: f"{x} at once",
}
# Key of a record -> what it is over what.
_OVER = {
    "over_packed": "`raco pairs` over `raco packed`",
    "over_token_ratio": "the same over the tokens left",
    "over_few": "m = 8 over m = 2",
    "reference_to_padded": "reference pass over `raco padded`",
    "memory_to_trl": "peak memory over `trl`",
}
_NOTE = """\
Seconds of a pair; in brackets: as a multiple of `trl` (of `plain padded` where TRL is missing or
learnt something else), tokens per second with the prompt of a pair counted once and twice, the size
of a micro-batch at which the contestant was fastest (pairs where it pads, tokens where it packs),
and the peak of memory, the model included. On a CPU TRL 1.16 runs the head on every position, on a
GPU on the completions alone; `plain padded` is plain torch with the head on these alone."""


def section(records: Sequence[Record]) -> str:
    """The tables of the records that have figures of pairs; "" where there are none."""
    found = [r for r in records if r.get("per") == "pair"]
    if not found:
        return ""
    cases: dict[str, dict[str, Record]] = {}
    for r in found:
        cases.setdefault(_case(r), {})[_contestant(r)] = r
    names = list(dict.fromkeys(name for of_case in cases.values() for name in of_case))
    rows = [[case, *(_cell(of.get(name)) for name in names)] for case, of in cases.items()]
    times = markdown_table(["case", *(f"`{name}`" for name in names)], rows)
    again = f"Again, one of them: `{found[0]['reproduce']}`."
    return f"### {TITLE}\n\n{times}\n\n{_NOTE}\n\n{_overs(cases)}\n\n{again}"


def _overs(cases: dict[str, dict[str, Record]]) -> str:
    """What pairs save, beside the tokens that are left."""
    rows = []
    for case, of_case in cases.items():
        known = next(iter(of_case.values()))
        lengths = [f"{known['prompt_ratio']:.2f}", f"{known['token_ratio']:.2f}"]
        lengths.append(f"{known['flops_ratio']:.2f}")
        rows.append([case, *lengths, *(_over(of_case, key) for key in _OVER)])
    left = ["(P+A+B)/(2P+A+B), the tokens left", "operations left"]
    titles = ["case", "prompt over completion", *left, *_OVER.values()]
    return markdown_table(titles, rows)


def _over(of_case: dict[str, Record], key: str) -> str:
    """Of pair rows, with the number of objectives that the figure is about."""
    values = [r[key] for name, r in of_case.items() if name.startswith("raco pairs") and key in r]
    return "-" if not values or values[0] is None else f"{values[0]:.2f}"


def _case(record: Record) -> str:
    p = record["params"]
    shape = [p["shape"]] if "shape" in p else []
    layers, pairs = f"{p['layers']} layers", f"{p['pairs']} pairs"
    return ", ".join([p["data"], p["kind"], *shape, layers, pairs, p["dtype"]])


def _contestant(record: Record) -> str:
    name, m = record["name"].split("/", 1)[1], record["params"]["m"]
    return f"{name}, m = {m}" if name.startswith("raco") else name


def _cell(record: Record | None) -> str:
    if record is None:
        return "-"
    known = [form(record[k]) for k, form in _FIGURES.items() if record.get(k) is not None]
    memory = f"{(record['peak_bytes'] + record['model_bytes']) / 2**20:.0f} MiB"
    noise = " ~" if mark(record) else ""
    return f"{record['p50']:.3g} s{noise} ({', '.join([*known, memory])})"
