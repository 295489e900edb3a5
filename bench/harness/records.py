"""Results as JSON lines, one record a line, written as they are made; and the table of them.

    python -m bench.records DIR                     print the table of DIR/report.json
    python -m bench.records DIR NAME MESSAGE        add a record of what went wrong

Every record has `name` (part/rival), `params` (what was measured on), `machine`, `versions` and
`commit`. A time has `unit`, `p20`, `p50`, `p80`, `wall` (see timing.py), `rounds`, `ratio` (p50 as
a multiple of ours), `bytes` (what has to move at least), `share` (of the copy bandwidth measured in
the same run, reached with those bytes) and `error` (against float64). What could not be measured
has `failure` instead. A run that is killed keeps what it had measured.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.harness import machine

OURS = "raco"
FILE = "report.json"

Record = dict[str, Any]


class Records:
    """The records of one run, in `folder`/report.json."""

    def __init__(self, folder: Path, device: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / FILE
        self.device = device

    def add(self, name: str, params: Record, **values: object) -> None:
        """Append one record to the file at once, and print it in a line."""
        record = {
            "name": name,
            "params": params,
            **values,
            "machine": machine.card(self.device),
            "versions": machine.versions(),
            "commit": machine.commit(),
        }
        with self.file.open("ab", buffering=0) as lines:  # one write, so a line is whole or absent
            lines.write(json.dumps(record).encode() + b"\n")
        print(_line(record), flush=True)

    def read(self) -> list[Record]:
        if not self.file.exists():
            return []
        return [json.loads(line) for line in self.file.read_text(encoding="utf-8").splitlines()]

    def copy_bandwidth(self) -> float | None:
        """Bytes per second of the large copy of this run."""
        return self._rate("ceilings/copy", 1e9)

    def matmul_rate(self) -> float | None:
        """Floating-point operations per second of the large matrix product of this run."""
        return self._rate("ceilings/matmul", 1e12)

    def _rate(self, name: str, unit: float) -> float | None:
        found = [r["rate"] for r in self.read() if r["name"] == name and "rate" in r]
        return found[-1] * unit if found else None


def latest(records: Iterable[Record]) -> list[Record]:
    """Of several records of the same thing the last one."""
    return list({(r["name"], *_shown(r["params"])): r for r in records}.values())


def mark(record: Record) -> str:
    """ "~" for a figure whose p20 and p80 are more than a tenth of the median apart."""
    spread = record.get("p80", 0.0) - record.get("p20", 0.0)
    return "~" if spread > 0.1 * record.get("p50", 0.0) else ""


def table(records: Iterable[Record]) -> str:
    """Ceilings and tests, one line per case with all contestants, then what failed."""
    records = latest(records)
    single = [r for r in records if {"rate", "passed", "reports"} & r.keys()]
    lines = [f"{r['name']}: {_figures(r)}" for r in single]
    cases: dict[tuple[str, ...], dict[str, Record]] = {}
    for r in records:
        if "share" in r:
            suite, contestant = r["name"].split("/")
            p = r["params"]
            case = (suite, p["list"], f"{p['elements'] / 1e6:.1f}", str(p["m"]), p["dtype"])
            cases.setdefault(case, {})[contestant] = r
    rivals = [r for r in dict.fromkeys(r for case in cases.values() for r in case) if r != OURS]
    if cases:
        titles = ["part", "list", "million", "m", "dtype", f"{OURS} ms", "wall ms", "share"]
        rows = [[*case, *_cells(found, rivals)] for case, found in cases.items()]
        lines += ["", *_aligned([[*titles, *rivals], *rows]), ""]
        lines += [f"rivals: p50 as a multiple of {OURS}'s; ~: p20 and p80 more than 10 % apart"]
    return "\n".join([*lines, *(_line(r) for r in records if "failure" in r)])


def _cells(found: dict[str, Record], rivals: Sequence[str]) -> list[str]:
    ours = found[OURS]
    share = "-" if ours["share"] is None else f"{ours['share']:.0%}"
    ratios = [f"{found[r]['ratio']:.2f}{mark(found[r])}" if r in found else "-" for r in rivals]
    return [f"{ours['p50']:.3f}{mark(ours)}", f"{ours['wall']:.3f}", share, *ratios]


def _line(record: Record) -> str:
    thing = " ".join([record["name"], *_shown(record["params"])])
    if "failure" not in record:
        return f"{thing}: {_figures(record)}"
    reason = (record["failure"].strip().splitlines() or ["no message"])[0]
    return f"failed: {thing}: {reason[:160]}"


def _figures(record: Record) -> str:
    if "reports" in record:
        return f"{record['reports']} reports on our kernels"
    if "passed" in record:
        unfinished = "" if record["finished"] else ", not finished in time"
        return f"{record['passed']} passed, {record['failed']} failed{unfinished}"
    if "rate" in record:
        return f"{record['rate']:.2f} {record['rate_unit']}"
    ratio = "" if record.get("ratio") is None else f" ({record['ratio']:.2f})"
    return f"{record['p50']:.4g} {record['unit']}{mark(record)}{ratio}"


def _shown(params: Record) -> list[str]:
    return [f"{name}={value}" for name, value in params.items()]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    align = [str.ljust, str.ljust, *[str.rjust] * (len(widths) - 2)]
    return ["  ".join(a(c, w) for a, c, w in zip(align, row, widths, strict=True)) for row in rows]


def main() -> None:
    records = Records(Path(sys.argv[1]), "cpu")
    if len(sys.argv) > 2:
        records.add(sys.argv[2], {}, failure=sys.argv[3])
    else:
        print(table(records.read()))
