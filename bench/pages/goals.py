"""What the figures are meant to reach, as data, and the verdicts on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.harness.records import Record


@dataclass(frozen=True)
class Goal:
    """A limit on one figure of the records `name` whose params contain `params`.

    Args:
        text: the claim, as a reader sees it.
        name: of the records, suite/contestant.
        device: "cpu" or "cuda".
        limit: of the figure.
        figure: "ratio", "1/ratio" (ours over a rival whose ratio is in units of ours), "share",
            "p50" or "wall".
        at_least: the limit is a lower one.
        params: what the record's params must contain.
        elements: the least number of parameters that counts.
    """

    text: str
    name: str
    device: str
    limit: float
    figure: str = "ratio"
    at_least: bool = False
    params: Mapping[str, Any] = field(default_factory=dict)
    elements: int = 0


def _backward(kind: str, m: int, limit: float, device: str, mode: str = "one_backward") -> Goal:
    text = f"{mode}, {kind}, m = {m}: at most {limit} plain DPO steps"
    whole = {"kind": kind, "m": m, "layers": 30}
    return Goal(text, f"backward/{mode}", device, limit, params=whole)


GOALS: tuple[Goal, ...] = (
    *(
        Goal(
            f"`_C.solve`, m = {m}: at most {limit} us",
            "solve/raco, C++ alone",
            "cpu",
            limit,
            "p50",
            params={"m": m},
        )
        for m, limit in ((2, 1.5), (4, 5.0), (8, 20.0), (16, 100.0))
    ),
    Goal(
        "step, m = 2: at least 2 times as fast as the paper's arithmetic",
        "step/paper",
        "cpu",
        2.0,
        at_least=True,
        params={"m": 2, "dtype": "float32"},
        elements=50_000_000,
    ),
    Goal(
        "step, m = 2: at most 1.6 times torch's fused AdamW on one gradient",
        "step/adamw",
        "cpu",
        1.6,
        "1/ratio",
        params={"m": 2, "dtype": "float32"},
        elements=50_000_000,
    ),
    Goal(
        "Gram: at least 92 % of the copy bandwidth",
        "gram/raco",
        "cuda",
        0.92,
        "share",
        at_least=True,
        elements=10**9,
    ),
    Goal(
        "combine_adamw: at least 90 % of the copy bandwidth",
        "combine_adamw/raco",
        "cuda",
        0.90,
        "share",
        at_least=True,
        elements=10**9,
    ),
    Goal(
        "step, m = 2: at most 1.35 times torch's fused AdamW on one gradient",
        "step/adamw",
        "cuda",
        1.35,
        "1/ratio",
        params={"m": 2},
        elements=10**9,
    ),
    Goal(
        "step of 300 small tensors, m = 2: at most 0.15 ms, which is the work of the host",
        "step/raco",
        "cuda",
        0.15,
        "wall",
        params={"m": 2, "list": "300 small"},
    ),
    _backward("lora", 2, 1.05, "cpu"),
    _backward("lora", 8, 1.15, "cpu"),
    _backward("full", 2, 1.35, "cpu"),
    _backward("full", 8, 1.5, "cpu"),
    _backward("lora", 2, 1.05, "cuda"),
    _backward("lora", 8, 1.15, "cuda"),
    _backward("full", 2, 1.15, "cuda"),
    _backward("full", 4, 1.35, "cuda"),
    *(_backward("full", m, 1.25, "cuda", "gram_first, keep_dy") for m in (2, 4, 8)),
    *(
        Goal(
            f"{mode}: at most {limit} of plain DPO's peak memory",
            f"memory/{mode}",
            device,
            limit,
            params={"layers": 30},
        )
        for device in ("cpu", "cuda")
        for mode, limit in (("gram_first", 1.02), ("gram_first, step_in_backward", 0.85))
    ),
)


@dataclass(frozen=True)
class Verdict:
    """A goal and the figure of one record, or None where nothing was measured."""

    goal: Goal
    record: Record | None
    figure: float | None

    @property
    def met(self) -> bool | None:
        """Whether it is met; None where nothing was measured."""
        if self.figure is None:
            return None
        reached = self.figure >= self.goal.limit if self.goal.at_least else None
        return self.figure <= self.goal.limit if reached is None else reached


def device_of(record: Record) -> str:
    """ "cuda" or "cpu", from the machine card."""
    return "cuda" if "gpu" in record["machine"] else "cpu"


def verdicts(records: Sequence[Record], devices: Iterable[str]) -> list[Verdict]:
    """Every goal of the devices beside every figure that it is about."""
    found = []
    for goal in GOALS:
        if goal.device not in devices:
            continue
        matching = [r for r in records if _is_about(goal, r)]
        judged = [Verdict(goal, r, _figure(goal, r)) for r in matching]
        found += judged or [Verdict(goal, None, None)]
    return found


def _is_about(goal: Goal, record: Record) -> bool:
    params = record["params"]
    return (
        record["name"] == goal.name
        and "p50" in record
        and device_of(record) == goal.device
        and all(params.get(k) == v for k, v in goal.params.items())
        and params.get("elements", 0) >= goal.elements
    )


def _figure(goal: Goal, record: Record) -> float | None:
    if goal.figure == "1/ratio":
        return 1 / record["ratio"]
    value = record[goal.figure]
    return None if value is None else float(value)
