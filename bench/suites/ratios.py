"""Pair rows beside packed sequences, against the ratio of prompt to completion.

All sequences of a step have as many tokens, of which the prompt has a share that grows. Both ways
take the same pairs, in turn in one process; a pair that shares its prompt has
(P + A + B) / (2P + A + B) of the tokens, which bounds what it saves. `ratio` is the time of pair
rows over that of packed sequences.
"""

from collections.abc import Sequence
from dataclasses import replace

import raco_fast
from bench.harness.lengths import prompt_ratio, token_ratio
from bench.harness.pairs_problem import PairsProblem, PairsSetting
from bench.harness.session import Session
from bench.harness.timing import Call, interleaved, shares
from bench.rivals import pair_steps
from bench.rivals.pair_ways import attention, parts
from raco_fast.dpo.data.layout import Kind

NAME = "ratios"
_WAYS: tuple[Kind, ...] = ("packed", "pairs")
_M = 2
_RATIOS = ("0.25", "0.5", "1", "2", "4", "8", "16")
# Sizes -> (setting, tokens of a sequence, ratios, tokens of a micro-batch).
SIZES: dict[str, tuple[PairsSetting, int, Sequence[str], int]] = {
    "gpu": (
        PairsSetting("full", "Qwen3-0.6B", 28, pairs=32, dtype="bfloat16", device="cuda"),
        *(512, _RATIOS, 8192),
    ),
    "cpu": (PairsSetting(layers=4, pairs=2), 128, ("0.5", "2", "8"), 512),
    "cpu-whole": (PairsSetting(pairs=1), 256, _RATIOS[::2], 512),
    "tiny": (PairsSetting(shape="tiny", layers=1, pairs=2), 12, ("1", "5"), 48),
}


def run(session: Session) -> None:
    setting, tokens, ratios, at_once = SIZES[session.sizes]
    command = f"python -m bench tests {NAME} --sizes {session.sizes} --out runs/{NAME}"
    for ratio, until in shares(ratios, session.until):
        of_ratio = replace(setting, data=f"ratio-{ratio}-{tokens}")
        problem = PairsProblem(of_ratio, attention("pairs", setting.device))
        raco_fast.prepare(problem.model, strict=True, check_every=None)
        calls: dict[str, Call] = {way: _step(problem, way, at_once) for way in _WAYS}
        times = interleaved(calls, session.device, until)
        unit = times["packed"].quantiles()[1]
        for way, taken in times.items():
            session.records.add(
                f"{NAME}/raco {way}",
                of_ratio.params(_M),
                **taken.summary(),
                ratio=taken.quantiles()[1] / unit,
                prompt_ratio=prompt_ratio(problem.lengths),
                token_ratio=token_ratio(problem.lengths),
                reproduce=command,
            )


def _step(problem: PairsProblem, way: Kind, at_once: int) -> Call:
    of_way = parts(problem, way, at_once)
    start = pair_steps.reference(problem, of_way)
    return pair_steps.ours(problem, of_way, start, _M, "cagrad-clip")
