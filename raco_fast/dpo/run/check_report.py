"""`raco-fast check`: what a run would read and take, and with what it would fail."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING, TypeVar

from raco_fast.distributed.processes import Processes
from raco_fast.dpo.data.tokenization import EncodedPair
from raco_fast.dpo.policy import load_tokenizer
from raco_fast.dpo.run.check_picture import draw
from raco_fast.dpo.run.config import TrainConfig
from raco_fast.dpo.run.data_check import SHARES, DataCheck, examine
from raco_fast.dpo.run.inputs import check_pairs_fit, load_pairs
from raco_fast.dpo.run.length import odd_settings
from raco_fast.dpo.run.margin_rewards import check_sources
from raco_fast.dpo.run.model_check import ModelCheck, fastest_products, measured, outline
from raco_fast.dpo.run.places import check_writable
from raco_fast.dpo.run.resuming import checkpoint_to_resume
from raco_fast.dpo.run.template_date import with_date
from raco_fast.report import markdown_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
Found = TypeVar("Found")

_PROMPT_SHOWN = 400  # characters of an example's prompt, from its end
_RESPONSE_SHOWN = 600


@dataclass
class Checked:
    """What `check` found.

    Attributes:
        paragraphs: to print.
        failures: errors that a training run would end with, in the order in which it would.
    """

    paragraphs: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def check(config: TrainConfig) -> Checked:
    """Read data and tokenizer as a run would, and the model's config; trains and loads nothing.

    Writes check.png, with matplotlib, into `output_dir/check`.
    """
    found = Checked()
    places = (("output_dir", config.folder), ("cache_dir", config.cache_folder))
    for name, folder in places:
        _tried(found, partial(check_writable, folder, name))
    _tried(found, lambda: checkpoint_to_resume(config, False, False, Processes()))
    tokenizer = _tried(found, lambda: load_tokenizer(config.model))
    if tokenizer is None:
        return found
    _tried(found, lambda: check_sources(config, tokenizer))
    loaded = _tried(found, lambda: load_pairs(with_date(config, Processes()), tokenizer))
    if loaded is None:
        return found
    training, held_out, _ = loaded
    data = examine(training, held_out, config.objectives)
    found.paragraphs += [*_of_data(data), *_examples(training, config, tokenizer)]
    steps = config.epochs * -(-len(training) // config.pairs_per_step)
    total = min(steps, config.max_steps or steps)
    model = _tried(found, lambda: outline(config))
    if model is not None:
        pairs = [*training, *held_out]
        _tried(found, lambda: check_pairs_fit(model, pairs, len(tokenizer)))
        sizes = _tried(found, lambda: measured(model, config))
        if sizes is not None:
            found.paragraphs.append(_of_model(sizes, data, config, total / steps))
    found.paragraphs += odd_settings(config, len(training), total)
    folder = config.folder / "check"
    picture = folder / "check.png"
    missing = _tried(found, lambda: draw(data, training, config.tokens.max_length, picture))
    if missing is not None:  # else it is among the failures
        found.paragraphs.append(missing or f"saved {picture}")
    return found


def _tried(found: Checked, step: Callable[[], Found]) -> Found | None:
    """What a step gives; None and a failure more where it raises what a run would end with."""
    try:
        return step()
    except (ValueError, OSError) as error:
        found.failures.append(str(error))
        return None


def _of_data(data: DataCheck) -> Iterator[str]:
    yield f"{data.pairs} training pairs, {data.held_out} held out."
    rows = []
    for name, (a, b) in data.preferred.items():
        none = data.pairs - a - b
        cells = (str(a), str(b), str(none), str(data.soft[name]), str(data.contradictions[name]))
        rows.append((name, *cells))
    titles = ("objective", "prefer a", "prefer b", "no label", "soft", "contradict a duplicate")
    yield markdown_table(titles, rows)
    if len(data.preferred) > 1:
        yield markdown_table(("objectives", "on common pairs", "agree", "conflict"), _meet(data))
    shares = ("half", *(f"{share:.0%}" for share in SHARES[1:-1]), "longest")
    lengths = [(what, *map(str, at)) for what, at in data.lengths.items()]
    yield markdown_table(("tokens", *shares), lengths)
    yield from _repeated(data)


def _meet(data: DataCheck) -> Iterator[tuple[str, ...]]:
    names, labels = list(data.preferred), data.labels
    for (i, one), (j, other) in combinations(enumerate(names), 2):
        common = int(labels.common[i, j])
        if not common:
            yield f"{one} : {other}", "0", "-", "-"
            continue
        counts = (int(labels.agree[i, j]), int(labels.conflict[i, j]))
        cells = (f"{n} ({n / common:.0%})" for n in counts)
        yield (f"{one} : {other}", str(common), *cells)


def _repeated(data: DataCheck) -> Iterator[str]:
    counts = {
        f"{data.duplicates} training pairs are there before, in this order of responses or the "
        "other": data.duplicates,
        f"{data.shared_prompts} training pairs share their prompt with an earlier one": (
            data.shared_prompts
        ),
        f"{data.leaked} of {data.held_out} held-out pairs are training pairs": data.leaked,
        f"{data.leaked_prompts} of {data.held_out} held-out pairs have a training pair's prompt": (
            data.leaked_prompts
        ),
    }
    yield from (f"{sentence}." for sentence, count in counts.items() if count)


def _of_model(sizes: ModelCheck, data: DataCheck, config: TrainConfig, part: float) -> str:
    shared = config.batching in ("auto", "pairs")
    tokens = data.once if shared else data.twice
    hours = sizes.operations(tokens, part * config.epochs) / fastest_products(config) / 3600
    gib = [n / 2**30 for n in (sizes.bytes_of_weights, sizes.bytes_of_training)]
    return (
        f"{sizes.parameters / 1e6:.1f} M parameters, {sizes.trained / 1e6:.1f} M trained. Memory: "
        f"{gib[0]:.2f} GiB of weights, {gib[1]:.2f} GiB of gradients (one an objective) and AdamW, "
        f"and activations. Time: no less than {_duration(hours)} for {part * config.epochs:.3g} "
        f"epoch(s) of {tokens} tokens, as long as the matrix products alone take at this device's "
        "best."
    )


def _duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:.1f} hours"
    return f"{60 * hours:.1f} minutes" if hours >= 1 / 60 else f"{3600 * hours:.0f} seconds"


def _examples(
    training: Sequence[EncodedPair], config: TrainConfig, tokenizer: PreTrainedTokenizerBase
) -> Iterator[str]:
    """The first pair, and the first on which two objectives want opposite responses."""
    at_odds = [p for p in training[1:] if min(p.labels.values()) < 0 < max(p.labels.values())]
    for pair in (training[0], *(at_odds or training[1:])[:1]):
        prompt = str(tokenizer.decode(pair.prompt_ids))
        cut = "... " if len(prompt) > _PROMPT_SHOWN else ""
        labels = ", ".join(f"{name} {pair.labels[name]:+g}" for name in config.objectives)
        lines = [f"pair {pair.id!r}: {labels}; scored tokens are between >>> and <<<"]
        lines.append(f"    {cut}{prompt[-_PROMPT_SHOWN:]!r}")
        for name, ids in (("a", pair.a_ids), ("b", pair.b_ids)):
            text = str(tokenizer.decode(ids))
            rest = f" ... {len(text)} characters" if len(text) > _RESPONSE_SHOWN else ""
            lines.append(f"  {name} >>>{text[:_RESPONSE_SHOWN]!r}{rest}<<<")
        yield "\n".join(lines)
