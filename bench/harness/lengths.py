"""Token counts of preference pairs: of real ones where they are at hand, and of published shapes.

    python -m bench.harness.lengths        # count the pairs of ../shared/data once, print a table

Real counts are those of SmolLM2's tokenizer with its chat template, of the test files that
`bench/real_run` uses; they are kept in runs/lengths, and nothing but numbers is. The other shapes:

    ultrafeedback-like, tldr-like   prompts and responses are log-normal. Published are the median
                                    of a sequence and the ratio of prompt to completion (arXiv
                                    2410.20305); the spread is ours, and the seed is fixed
    ratio-R-T                       every sequence has T tokens, the prompt R times its completion
    fixed-T                         every sequence has T tokens, the prompt 8 of them
"""

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from math import log
from pathlib import Path
from typing import NamedTuple

from bench.harness.machine import ROOT

DATA = ROOT.parent / "shared" / "data"
TOKENIZER = ROOT / "models" / "SmolLM2-135M-Instruct"
KEPT = ROOT / "runs" / "lengths"
# Data set -> the objectives that its rows are labelled for.
REAL = {
    "hh_rlhf": ("helpful", "harmless"),
    "qa_feedback": ("helpful", "grounded"),
    "nlg_ratings": ("informative", "natural"),
}
# Shape -> (median tokens of a sequence, tokens of the prompt over those of the completion).
PUBLISHED = {"ultrafeedback-like": (409, 0.42), "tldr-like": (416, 11.14)}
_SIGMA = 0.5  # of the logarithms; our choice, as medians alone are published
_POPULATION = 1000
_FIXED_PROMPT = 8


class Lengths(NamedTuple):
    """Tokens of a pair's prompt and of its responses, their stop tokens included."""

    prompt: int
    a: int
    b: int

    @property
    def once(self) -> int:
        """Tokens of the pair where its responses share their prompt: P + A + B."""
        return sum(self)

    @property
    def twice(self) -> int:
        """Tokens of its two sequences: 2P + A + B."""
        return self.prompt + sum(self)

    @property
    def longer(self) -> int:
        """Tokens of the longer sequence."""
        return self.prompt + max(self.a, self.b)


def token_ratio(lengths: Sequence[Lengths]) -> float:
    """(P + A + B) / (2P + A + B) of all together: the tokens that are left of packed sequences'."""
    return sum(x.once for x in lengths) / sum(x.twice for x in lengths)


def prompt_ratio(lengths: Sequence[Lengths]) -> float:
    """Tokens of the prompts over those of a mean completion."""
    return 2 * sum(x.prompt for x in lengths) / sum(x.a + x.b for x in lengths)


def sample(data: str, pairs: int) -> list[Lengths]:
    """So many pairs that stand for a distribution: the middles of as many equal parts of it.

    Args:
        data: one of `REAL` that `obstacle` has nothing against, of `PUBLISHED`, ratio-R-T or
            fixed-T.
    Returns:
        In a fixed random order.
    Raises:
        ValueError: no such data.
    """
    population = sorted(_population(data), key=lambda x: (x.twice, x))
    middles = [population[(2 * k + 1) * len(population) // (2 * pairs)] for k in range(pairs)]
    random.Random(0).shuffle(middles)
    return middles


def obstacle(data: str) -> str | None:
    """Why there are no counts of some data here, with the cure; None if there are.

    Counts them where that has not been done.
    """
    if data not in REAL:
        return None
    if not _file(data).is_file():
        return f"not run: there is no {_file(data).name} in ../shared/data"
    if not _kept(data).is_file():
        if find_spec("transformers") is None:
            return "not run: transformers missing; pip install transformers"
        if not TOKENIZER.is_dir():
            return "not run: there is no tokenizer; python -m bench.real_run.fetch_model"
        _count(data)
    return None


def _population(data: str) -> list[Lengths]:
    if data in REAL:
        return [Lengths(*counts) for counts in json.loads(_kept(data).read_text("ascii"))]
    if data in PUBLISHED:
        return _log_normal(*PUBLISHED[data])
    kind, *numbers = data.split("-")
    shapes: dict[str, Callable[..., Lengths]] = {"ratio": _of_ratio, "fixed": _of_fixed}
    if kind not in shapes:
        known = ", ".join((*REAL, *PUBLISHED, "ratio-R-T", "fixed-T"))
        raise ValueError(f"`data` must be one of {known}, got {data!r}")
    return [shapes[kind](*numbers)]


def _of_ratio(ratio: str, tokens: str) -> Lengths:
    completion = round(int(tokens) / (1 + float(ratio)))
    return Lengths(int(tokens) - completion, completion, completion)


def _of_fixed(tokens: str) -> Lengths:
    completion = int(tokens) - _FIXED_PROMPT
    return Lengths(_FIXED_PROMPT, completion, completion)


def _log_normal(median: int, ratio: float) -> list[Lengths]:
    numbers, completion = random.Random(0), median / (1 + ratio)
    middles = (median - completion, completion, completion)
    return [
        Lengths(*(max(2, round(numbers.lognormvariate(log(x), _SIGMA))) for x in middles))
        for _ in range(_POPULATION)
    ]


def _file(data: str) -> Path:
    return DATA / f"{data}.test.jsonl.gz"


def _kept(data: str) -> Path:
    """Where the counts of the file as it is now are kept."""
    return KEPT / f"{data}-{hashlib.sha256(_file(data).read_bytes()).hexdigest()[:12]}.json"


def _count(data: str) -> None:
    from raco_fast.dpo.data.data_source import DataSource
    from raco_fast.dpo.data.sources import read_sources
    from raco_fast.dpo.data.tokenization import encode_pairs
    from raco_fast.dpo.loading import load_tokenizer_of

    pairs = read_sources([DataSource(str(_file(data)))], REAL[data])
    encoded, _ = encode_pairs(load_tokenizer_of(str(TOKENIZER), "tokenizer"), pairs)
    counts = [(len(x.prompt_ids), len(x.a_ids), len(x.b_ids)) for x in encoded]
    KEPT.mkdir(parents=True, exist_ok=True)
    _kept(data).write_text(json.dumps(counts), "ascii")


def main() -> None:
    for data in (*REAL, *PUBLISHED):
        reason = obstacle(data)
        if reason is not None:
            print(f"{data}: {reason}")
            continue
        found = _population(data)
        means = " + ".join(f"{sum(column) / len(found):.0f}" for column in zip(*found, strict=True))
        print(
            f"{data}: {len(found)} pairs, P + A + B = {means} tokens on average, prompt over "
            f"completion {prompt_ratio(found):.2f}, (P+A+B)/(2P+A+B) = {token_ratio(found):.3f}"
        )


if __name__ == "__main__":
    main()
