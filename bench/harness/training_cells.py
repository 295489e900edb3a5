"""Who trains on what in the suite `train`: contestants, settings, sizes of micro-batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.harness.dpo_problem import of_kinds
from bench.harness.pairs_problem import PairsSetting
from bench.rivals.pair_ways import WAYS
from raco_fast.dpo.data.layout import Kind

TRL, TRL_AS_IT_COMES, PLAIN = "trl", "trl, as it comes", "plain padded"
PADDED, PACKED, PAIRS = (f"raco {way}" for way in WAYS)
CONTESTANTS = (TRL, TRL_AS_IT_COMES, PLAIN, PADDED, PACKED, PAIRS)
FEW, MANY = 2, 8
# (contestant, number of objectives), the most telling first: a run may be cut short.
_SHORT = ((TRL, 1), (PAIRS, FEW), (PACKED, FEW), (PLAIN, 1))
_ALL = (*_SHORT, (PADDED, FEW), (PAIRS, MANY), (TRL_AS_IT_COMES, 1))


@dataclass(frozen=True)
class Cell:
    """What is measured on one setting.

    Args:
        at_once: contestant, or else its way of `WAYS` -> sizes of a micro-batch that it tries, in
            pairs where it pads and in tokens where it packs.
        steps: that count, of each process.
    """

    setting: PairsSetting
    contestants: Sequence[tuple[str, int]]
    at_once: Mapping[str, tuple[int, ...]]
    rounds: int = 1
    steps: int = 2

    def sizes(self, contestant: str) -> tuple[int, ...]:
        if contestant == TRL_AS_IT_COMES:
            return (min(8, self.setting.pairs),)  # its default
        return self.at_once.get(contestant) or self.at_once[way_of(contestant)]


def way_of(contestant: str) -> Kind:
    """How it lays out pairs."""
    return next((way for way in WAYS if contestant.endswith(way)), "padded")


def _cells(data: Sequence[PairsSetting], plan: Sequence[Any], **counts: int) -> tuple[Cell, ...]:
    return tuple(Cell(setting, *plan, **counts) for setting in data)


# Products of 512 tokens run at full speed on two cores, and TRL's steps are no faster with more.
_ON_CPU = {TRL: (1, 2), "padded": (1,), "packed": (512,), "pairs": (512,)}
_ONCE = {**_ON_CPU, TRL: (1,)}
_ON_GPU = {"padded": (8, 16, 4), "packed": (16384, 8192), "pairs": (16384, 8192)}
_WHOLE = of_kinds(PairsSetting(data="hh_rlhf", pairs=4))
_LONG = ("tldr-like", "ultrafeedback-like")
_OTHERS = tuple(
    PairsSetting(data=data, pairs=pairs)
    for pairs, of_length in ((1, _LONG), (2, ("nlg_ratings", "qa_feedback")))
    for data in of_length
)
_GPU = PairsSetting("full", "Qwen3-0.6B", 28, "hh_rlhf", 64, "bfloat16", "cuda")
_GPUS = (replace(_GPU, kind="lora", shape="Llama-3-8B", layers=32, pairs=32), _GPU)
_TINY = PairsSetting(shape="tiny", layers=1, data="ratio-2-12", pairs=4)
_TINY_SIZES = {TRL: (4, 2), "padded": (2, 4), "packed": (96,), "pairs": (64,)}
# A process takes 5 to 10 s before it trains; "cpu-whole" is for 12 minutes on two cores.
SIZES: dict[str, tuple[Cell, ...]] = {
    "gpu": (
        *_cells(_GPUS, (_ALL, _ON_GPU), rounds=2, steps=10),
        *_cells(
            [replace(setting, data=data) for setting in _GPUS for data in _LONG],
            (_SHORT, _ON_GPU),
            steps=5,
        ),
    ),
    "cpu-whole": (
        Cell(_WHOLE[0], _ALL, _ON_CPU),
        Cell(_WHOLE[1], _SHORT, _ONCE),
        *_cells(_OTHERS, (_SHORT[:3], _ONCE)),
        *_cells([replace(x, kind="full") for x in _OTHERS], (_SHORT[:3], _ONCE)),
    ),
    "cpu": _cells(of_kinds(PairsSetting(layers=4, data="tldr-like", pairs=2)), (_SHORT, _ONCE)),
    "tiny": (
        Cell(_TINY, _ALL, _TINY_SIZES, rounds=2),
        Cell(replace(_TINY, kind="full"), _ALL[:5], _TINY_SIZES, rounds=1),
    ),
}
