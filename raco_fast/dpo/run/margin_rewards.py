"""Rewards that trained models give the responses: what `modpo` knows of the other objectives.

A model trained by DPO has the implicit reward beta (log p(y) - log p_ref(y)), but for a constant of
the prompt, which a pair does not see. Its reference is its base, or a model that the config names.

Before the training each of them is loaded, scores all pairs and goes; the scores are cached as the
reference's are. They are of padded rows, which every model can be run on, whatever the policy's
are. The token ids are the policy's, so the vocabularies have to be the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from raco_fast.distributed.processes import Processes
from raco_fast.dpo.data.layout import Layout
from raco_fast.dpo.data.tokenization import EncodedPair
from raco_fast.dpo.loading import load_causal_lm, to_device
from raco_fast.dpo.models import ModelOptions, fingerprint
from raco_fast.dpo.policy import load_base_model, load_tokenizer, make_policy
from raco_fast.dpo.run.config import TrainConfig
from raco_fast.dpo.run.failures import memory_named, to_hold_a_model
from raco_fast.dpo.run.inputs import RunInputs, check_pairs_fit, first_device, spread
from raco_fast.dpo.run.reference_cache import compute_reference, reference_logps
from raco_fast.dpo.run.reward_source import RewardSource
from raco_fast.dpo.run.together import together
from raco_fast.dpo.saved_adapters import find_adapter
from raco_fast.dpo.scoring import ReferenceLogps, adapter_off

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

AsModel = Callable[[nn.Module], AbstractContextManager[None]]

_SOURCE = "`margin_rewards`"


@dataclass(frozen=True)
class MarginRewards:
    """What a run knows of other objectives.

    Args:
        of_sets: for each set of pairs, objective -> the weighted sum of rewards by pair id, of
            (response a, response b).
        hashes: objective -> hashes of its sources and of their references.
    """

    of_sets: list[dict[str, ReferenceLogps]]
    hashes: dict[str, list[str]]


def margin_rewards(
    config: TrainConfig,
    inputs: RunInputs,
    processes: Processes,
    *sets: Sequence[EncodedPair],
    cached: bool = True,
) -> MarginRewards:
    """Score some sets of pairs with the reward sources of a config.

    Args:
        inputs: of the run, whose tokens these are.
        sets: pairs, each set with unique ids; may be empty.
        cached: read and write `config.cache_dir`.
    Raises:
        ValueError: a source that cannot be loaded, of another vocabulary, or without a reference;
            scores that are not finite. Names the source.
        MemoryError: no room for another model beside the policy.
    """
    ratios = _Ratios(config, inputs, processes, sets, cached)
    found: list[dict[str, ReferenceLogps]] = [{} for _ in sets]
    hashes: dict[str, list[str]] = {}
    for objective, sources in config.margin_rewards.items():
        each = [ratios.of(source) for source in sources]
        hashes[objective] = [one for of_source, _ in each for one in of_source]
        for k, pairs in enumerate(sets):
            total = torch.zeros(len(pairs), 2, dtype=torch.float64)
            for source, (_, of_sets) in zip(sources, each, strict=True):
                total += source.weight * source.beta * of_sets[k]
            rows = zip(pairs, total.tolist(), strict=True)
            found[k][objective] = ReferenceLogps({pair.id: (a, b) for pair, (a, b) in rows})
    return MarginRewards(found, hashes)


class _Ratios:
    """log p(y) - log p_ref(y) of the sources, each model loaded once.

    Arguments as of `margin_rewards`.
    """

    def __init__(
        self,
        config: TrainConfig,
        inputs: RunInputs,
        processes: Processes,
        sets: Sequence[Sequence[EncodedPair]],
        cached: bool,
    ) -> None:
        self._config, self._inputs, self._processes = config, inputs, processes
        self._sets, self._cached = sets, cached
        # Without a graph twice as many fit at once.
        self._layout = Layout("padded", 2 * config.pairs_per_micro_batch, math.inf, inputs.pad_id)
        self._known: dict[tuple[str | None, ...], tuple[list[str], list[Tensor]]] = {}

    def of(self, source: RewardSource) -> tuple[list[str], list[Tensor]]:
        """Hashes of the model and its reference; float64 [n, 2] for each set."""
        place = (source.name, source.base, source.reference)
        if place not in self._known:
            with memory_named(f"scoring with {source.name!r}", to_hold_a_model(self._config)):
                named = self._of_adapter if source.reference is None else self._of_model
                with _named(source):
                    hashes, model, reference = named(source)
            self._known[place] = hashes, [m - r for m, r in zip(model, reference, strict=True)]
        return self._known[place]

    def _of_adapter(self, source: RewardSource) -> tuple[list[str], list[Tensor], list[Tensor]]:
        def load() -> tuple[nn.Module, list[str]]:
            (options,) = _options_of(source, self._config)
            base = load_base_model(options, first_device(self._config))
            self._check_tokens(options, base)
            policy = make_policy(base, replace(options, reference="base"))
            return policy.model, [policy.model_hash, policy.reference_hash]

        model, hashes = together(self._processes, load)
        spread(model, self._config, self._processes)
        own, of_base = hashes
        scores = self._scores(model, own, lambda _: nullcontext())
        return hashes, scores, self._scores(model, of_base, adapter_off)

    def _of_model(self, source: RewardSource) -> tuple[list[str], list[Tensor], list[Tensor]]:
        found = []
        for options in together(self._processes, lambda: _options_of(source, self._config)):
            model, one = together(self._processes, partial(self._load_model, options))
            spread(model, self._config, self._processes)
            found.append((one, self._scores(model, one, adapter_off)))
        (of_model, scores), (of_reference, reference) = found
        return [of_model, of_reference], scores, reference

    def _load_model(self, options: ModelOptions) -> tuple[nn.Module, str]:
        model = load_causal_lm(options.name, options, changed_by=None)
        self._check_tokens(options, model)
        return to_device(model, first_device(self._config)), fingerprint(model)

    def _check_tokens(self, options: ModelOptions, model: PreTrainedModel) -> None:
        _check_vocabulary(options, self._inputs.tokenizer)
        for pairs in self._sets:
            check_pairs_fit(model, pairs, len(self._inputs.tokenizer))

    def _scores(self, model: nn.Module, content: str, way: AsModel) -> list[Tensor]:
        """float64 [n, 2] of each set, of the model as it is in the context that `way` gives."""
        return [self._of_set(model, pairs, content, way) for pairs in self._sets]

    def _of_set(
        self, model: nn.Module, pairs: Sequence[EncodedPair], content: str, way: AsModel
    ) -> Tensor:
        if not pairs:
            return torch.zeros(0, 2, dtype=torch.float64)
        chunk = self._config.chunk_tokens
        if self._cached:
            known = reference_logps(
                model,
                pairs,
                self._layout.rounds(pairs, self._processes.size),
                self._layout,
                model_hash=content,
                cache_dir=self._config.cache_folder,
                chunk_tokens=chunk,
                as_reference=way,
            )[1.0]
        else:
            known = compute_reference(model, pairs, self._layout, chunk, as_reference=way)[1.0]
        return torch.tensor([known.by_id[pair.id] for pair in pairs], dtype=torch.float64)


def check_sources(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError where a reward source would fail, as far as can be seen without weights.

    Args:
        tokenizer: of the policy.
    """
    for source in (each for sources in config.margin_rewards.values() for each in sources):
        with _named(source):
            for options in _options_of(source, config):
                _check_vocabulary(options, tokenizer)


def _options_of(source: RewardSource, config: TrainConfig) -> list[ModelOptions]:
    """Of an adapter; or of a whole model, and of its reference."""
    policy = config.model
    of_policy = ModelOptions(
        policy.name,
        dtype=policy.dtype,
        device=policy.device,
        attention=policy.attention,
        trust_remote_code=policy.trust_remote_code,
    )
    if source.reference is None:
        options = replace(of_policy, name=source.name, base=source.base)
        if find_adapter(options) is None:
            raise ValueError(
                "it is a whole model; name the one that it was trained from as its `reference`"
            )
        return [options]
    found = [replace(of_policy, name=name) for name in (source.name, source.reference)]
    for options in found:
        if find_adapter(options) is not None:
            raise ValueError(
                f"{options.name!r} is an adapter, and `reference` is for whole models; an "
                f"adapter's reference is its base: leave `reference` out"
            )
    return found


def _check_vocabulary(options: ModelOptions, tokenizer: PreTrainedTokenizerBase) -> None:
    if load_tokenizer(options).get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            "it must have the vocabulary of the policy, whose token ids it is to score, got "
            "another; use a model of the policy's family"
        )


@contextmanager
def _named(source: RewardSource) -> Iterator[None]:
    """Say of an error which source it is about: loading speaks of `model.name`."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{_SOURCE}: {source.name!r}: {error}") from error
