"""What the figures are meant to reach, as data, and the verdicts on them."""

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


def _memory(mode: str, limit: float, device: str) -> Goal:
    text = f"{mode}: at most {limit} of plain DPO's peak memory"
    return Goal(text, f"memory/{mode}", device, limit, params={"layers": 30})


def _solve(m: int, limit: float) -> Goal:
    text = f"`_C.solve`, m = {m}: at most {limit} us"
    return Goal(text, "solve/raco, C++ alone", "cpu", limit, "p50", params={"m": m})


def _of_copy(suite: str, title: str, limit: float) -> Goal:
    text = f"{title}: at least {limit:.0%} of the copy bandwidth".replace("%", " %")
    return Goal(text, f"{suite}/raco", "cuda", limit, "share", at_least=True, elements=10**9)


def _to_adamw(limit: float, device: str, elements: int, **params: str) -> Goal:
    text = f"step, m = 2: at most {limit} times torch's fused AdamW on one gradient"
    of_two = {"m": 2, **params}
    return Goal(text, "step/adamw", device, limit, "1/ratio", params=of_two, elements=elements)


GOALS: tuple[Goal, ...] = (
    *(_solve(m, limit) for m, limit in ((2, 1.5), (4, 5.0), (8, 20.0), (16, 100.0))),
    Goal(
        "step, m = 2: at least 2 times as fast as the paper's arithmetic",
        *("step/paper", "cpu", 2.0),
        at_least=True,
        params={"m": 2, "dtype": "float32"},
        elements=50_000_000,
    ),
    _to_adamw(1.6, "cpu", 50_000_000, dtype="float32"),
    _of_copy("gram", "Gram", 0.92),
    _of_copy("combine_adamw", "combine_adamw", 0.90),
    _to_adamw(1.35, "cuda", 10**9),
    Goal(
        "step of 300 small tensors, m = 2: at most 0.15 ms, which is the work of the host",
        *("step/raco", "cuda", 0.15, "wall"),
        params={"m": 2, "list": "300 small"},
    ),
    *(_backward("lora", m, limit, "cpu") for m, limit in ((2, 1.05), (8, 1.15))),
    *(_backward("full", m, limit, "cpu") for m, limit in ((2, 1.35), (8, 1.5))),
    *(_backward("lora", m, limit, "cuda") for m, limit in ((2, 1.05), (8, 1.15))),
    *(_backward("full", m, limit, "cuda") for m, limit in ((2, 1.15), (4, 1.35))),
    *(_backward("full", m, 1.25, "cuda", "gram_first, keep_dy") for m in (2, 4, 8)),
    *(_memory("gram_first", 1.02, device) for device in ("cpu", "cuda")),
    *(_memory("gram_first, step_in_backward", 0.85, device) for device in ("cpu", "cuda")),
)


@dataclass(frozen=True)
class Verdict:
    """A goal beside one record, or None where nothing was measured."""

    goal: Goal
    record: Record | None

    @property
    def figure(self) -> float | None:
        """What the record says; None where it says nothing."""
        if self.record is None:
            return None
        if self.goal.figure == "1/ratio":
            return 1 / self.record["ratio"]
        return self.record[self.goal.figure]

    @property
    def met(self) -> bool | None:
        """Whether it is met; None where nothing was measured."""
        if self.figure is None:
            return None
        sign = -1 if self.goal.at_least else 1
        return sign * self.figure <= sign * self.goal.limit


def device_of(record: Record) -> str:
    """ "cuda" or "cpu", from the machine card."""
    return "cuda" if "gpu" in record["machine"] else "cpu"


def verdicts(records: Sequence[Record], devices: Iterable[str]) -> list[Verdict]:
    """Every goal of the devices beside every figure that it is about."""
    found = []
    for goal in (g for g in GOALS if g.device in devices):
        judged = [Verdict(goal, r) for r in records if _is_about(goal, r)]
        found += judged or [Verdict(goal, None)]
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
