"""What the figures are meant to reach, as data, and the verdicts on them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.harness.records import Record


@dataclass(frozen=True)
class Goal:
    """A limit on one figure of the records `name` whose params contain `params`.

    Args:
        claim: as a reader sees it, with places for {limit}, {rival} and params.
        name: of the records, suite/contestant.
        device: "cpu" or "cuda".
        limit: of the figure; a lower one where `at_least`.
        figure: a key of the record, "1/ratio" (ours over a rival whose ratio is in units of ours),
            or "of adamw" (in units of the suite's `adamw` in the same case).
        params: what the record's params must contain.
        elements: the least number of parameters that counts.
    """

    claim: str
    name: str
    device: str
    limit: float
    figure: str = "ratio"
    params: Mapping[str, Any] = field(default_factory=dict)
    elements: int = 0
    at_least: bool = False

    @property
    def text(self) -> str:
        return self.claim.format(limit=self.limit, rival=self.name.split("/")[1], **self.params)


_SOLVE = ("`_C.solve`, m = {m}: at most {limit} us", "solve/raco, C++ alone", "cpu")
_SOLVE_US = {2: 1.5, 4: 5.0, 8: 20.0, 16: 100.0}
_PAPER = "step, m = 2: at least 2 times as fast as the paper's arithmetic"
_ADAMW = ("step, m = 2: at most {limit} times torch's fused AdamW on one gradient", "step/adamw")
_KEPT = (
    "products kept, m = {m}: step at most {limit} times torch's fused AdamW on one gradient",
    "step/products kept",
)
_KEPT_LIMITS = {2: 1.2, 4: 1.6}  # by bytes alone (m + 6) / 7: 1.14 and 1.43
_HOST = "step of 300 small tensors, m = 2: at most 0.15 ms, which is the work of the host"
_FLOAT32, _50M, _1B = {"m": 2, "dtype": "float32"}, 50_000_000, 10**9


def _copy(suite: str, claim: str, limit: float) -> Goal:
    return Goal(claim, f"{suite}/raco", "cuda", limit, "share", elements=_1B, at_least=True)


def _backward(kind: str, m: int, limit: float, device: str, mode: str = "one_backward") -> Goal:
    claim = "{rival}, {kind}, m = {m}: at most {limit} plain DPO steps"
    params = {"kind": kind, "m": m, "layers": 30}
    return Goal(claim, f"backward/{mode}", device, limit, params=params)


def _memory(mode: str, limit: float, device: str) -> Goal:
    claim = "{rival}: at most {limit} of plain DPO's peak memory"
    return Goal(claim, f"memory/{mode}", device, limit, params={"layers": 30})


def _training(device: str) -> Iterator[Goal]:
    """Of whole training steps on pair rows, m = 2 but for one."""
    trl = "{data}, {kind}, m = {m}: a step on pair rows in at most {limit} of TRL's "
    over = "m = {m}: a step on pair rows in at most {limit} times "
    once = "{data}: a reference pass on pair rows in at most {limit} of padded rows' time"
    # With fewer layers the head, which takes every scored token, has a larger share.
    whole = {"m": 2, **({"layers": 30} if device == "cpu" else {})}
    hh = {"data": "hh_rlhf"}
    goals: tuple[tuple[str, str, float, Mapping[str, Any]], ...] = (
        (trl + "time", "ratio_to_trl", 0.45, {"kind": "lora", **hh}),
        (trl + "peak memory", "memory_to_trl", 0.7, {"kind": "lora", **hh}),
        (trl + "time", "ratio_to_trl", 0.5, {"kind": "full", **hh}),
        (over + "(P+A+B)/(2P+A+B) of packed sequences", "over_token_ratio", 1.1, {}),
        (over + "that with m = 2", "over_few", 1.1, {"m": 8}),
        (once, "reference_to_padded", 0.6, hh),
    )
    for claim, figure, limit, params in goals:
        yield Goal(claim, "train/raco pairs", device, limit, figure, {**whole, **params})


GOALS = (
    *(Goal(*_SOLVE, limit, "p50", {"m": m}) for m, limit in _SOLVE_US.items()),
    Goal(_PAPER, "step/paper", "cpu", 2.0, "ratio", _FLOAT32, _50M, at_least=True),
    Goal(*_ADAMW, "cpu", 1.6, "1/ratio", _FLOAT32, _50M),
    *(
        Goal(*_KEPT, "cpu", limit, "of adamw", {"m": m, "dtype": "float32"}, _50M)
        for m, limit in _KEPT_LIMITS.items()
    ),
    _copy("gram", "Gram: at least 92 % of the copy bandwidth", 0.92),
    _copy("combine_adamw", "combine_adamw: at least 90 % of the copy bandwidth", 0.90),
    Goal(*_ADAMW, "cuda", 1.35, "1/ratio", {"m": 2}, _1B),
    Goal(_HOST, "step/raco", "cuda", 0.15, "wall", {"m": 2, "list": "300 small"}),
    *(_backward("lora", m, limit, "cpu") for m, limit in ((2, 1.05), (8, 1.15))),
    *(_backward("full", m, limit, "cpu") for m, limit in ((2, 1.35), (8, 1.5))),
    *(_backward("lora", m, limit, "cuda") for m, limit in ((2, 1.05), (8, 1.15))),
    *(_backward("full", m, limit, "cuda") for m, limit in ((2, 1.15), (4, 1.35))),
    *(_backward("full", m, 1.25, "cuda", "gram_first, keep_dy") for m in (2, 4, 8)),
    *(goal for device in ("cpu", "cuda") for goal in _training(device)),
    *(_memory("gram_first", 1.02, device) for device in ("cpu", "cuda")),
    *(_memory("gram_first, step_in_backward", 0.85, device) for device in ("cpu", "cuda")),
)


@dataclass(frozen=True)
class Verdict:
    """A goal beside one record, or None where nothing was measured.

    `adamw`: the record of the suite's `adamw` in the same case, where there is one.
    """

    goal: Goal
    record: Record | None
    adamw: Record | None = None

    @property
    def figure(self) -> float | None:
        """What the record says; None where it says nothing."""
        if self.record is None:
            return None
        if self.goal.figure == "of adamw":
            return None if self.adamw is None else self.record["p50"] / self.adamw["p50"]
        if self.goal.figure == "1/ratio":
            return 1 / self.record["ratio"]
        figure: float | None = self.record.get(self.goal.figure)
        return figure

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
        judged = [Verdict(goal, r, _adamw(r, records)) for r in records if _is_about(goal, r)]
        found += judged or [Verdict(goal, None)]
    return found


def _adamw(record: Record, records: Sequence[Record]) -> Record | None:
    name = record["name"].split("/")[0] + "/adamw"
    same = (r for r in records if r["name"] == name and r["params"] == record["params"])
    return next((r for r in same if "p50" in r), None)


def _is_about(goal: Goal, record: Record) -> bool:
    params = record["params"]
    return (
        record["name"] == goal.name
        and "p50" in record
        and device_of(record) == goal.device
        and all(params.get(k) == v for k, v in goal.params.items())
        and params.get("elements", 0) >= goal.elements
    )
