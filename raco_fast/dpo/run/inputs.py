"""What a run starts from: its pairs as token ids, and the model that is to learn from them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from raco_fast.distributed.processes import Processes
from raco_fast.dpo.data.batches import pair_length
from raco_fast.dpo.data.pairs import ConciseRule
from raco_fast.dpo.data.sources import DataSource, read_sources
from raco_fast.dpo.data.tokenization import EncodedPair, encode_pairs, token_counter
from raco_fast.dpo.losses.registry import check_soft
from raco_fast.dpo.models import (
    add_adapter,
    decoder_layers,
    fingerprint,
    load_base_model,
    load_tokenizer,
    pick_device,
)
from raco_fast.dpo.run.config import TrainConfig
from raco_fast.dpo.run.divergence import names_of_not_finite
from raco_fast.dpo.run.template_date import keep_date, with_date
from raco_fast.dpo.run.together import by_first, together
from raco_fast.dpo.sharded import shard

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunInputs:
    """Tokenizer, encoded pairs and policy of a run.

    Args:
        pad_id: of the padding, which is masked: any id will do for a tokenizer without one.
        training, held_out: the pairs to learn from and to evaluate on (none without `eval_data`).
        model: the policy, its adapter fresh.
        model_hash: `raco_fast.dpo.models.fingerprint` of the policy without an adapter.
        prints_date: whether the chat template writes the date into the pairs.
    """

    tokenizer: PreTrainedTokenizerBase
    pad_id: int
    training: list[EncodedPair]
    held_out: list[EncodedPair]
    model: nn.Module
    model_hash: str
    prints_date: bool = False


def load_inputs(config: TrainConfig, device: torch.device | None = None) -> RunInputs:
    """Load what a config names and check that it fits together; seeds torch's generators.

    Args:
        device: where the model is put instead of its own place.
    Raises:
        ValueError, FileNotFoundError: bad model path; unreadable files, bad rows (file and line
            named), an objective for which no training pair is labelled, soft labels for a loss that
            has no form for them; pairs that the model cannot read; weights that are not finite.
    """
    torch.manual_seed(config.seed)
    tokenizer = load_tokenizer(config.model)
    training, printed = _encoded(config, tokenizer, config.data, "data")
    held_out, printed_too = _encoded(config, tokenizer, config.eval_data, "eval_data")
    for name, loss in config.objective_losses.items():
        if any(abs(pair.labels[name]) not in (0, 1) for pair in (*training, *held_out)):
            check_soft(name, loss)
    for name in config.objectives:
        if not any(pair.labels[name] for pair in training):
            raise ValueError(
                f"`weights` names {name!r}, but no training pair is labelled for it; "
                "check the data's label fields or take the objective out"
            )
    base = load_base_model(config.model, device)
    _check_pairs_fit(base, [*training, *held_out])
    model_hash, model = fingerprint(base), add_adapter(base, config.model.lora)
    _check_finite(config.model.name, model)
    pad_id = tokenizer.pad_token_id
    pad_id = pad_id if isinstance(pad_id, int) else 0
    prints_date = printed or printed_too
    return RunInputs(tokenizer, pad_id, training, held_out, model, model_hash, prints_date)


def load_on_all(config: TrainConfig, processes: Processes) -> RunInputs:
    """`load_inputs` on every process, the model sharded over them if the config says so.

    Raises:
        ValueError, OSError: as `load_inputs`, on any process.
    """
    from transformers.utils.logging import disable_progress_bar

    if processes.rank > 0:
        disable_progress_bar()
    device, parallel = pick_device(config.model.device), config.parallel
    sharded = parallel.kind == "fsdp2"
    # A model that is to be sharded may have room on no GPU.
    first = torch.device("cpu") if sharded else device
    dated = with_date(config, processes)
    inputs = together(processes, lambda: load_inputs(dated, first))
    if inputs.prints_date and (day := dated.tokens.date):
        logger.info("the chat template prints the date; it is %s in this run", day)
        by_first(processes, lambda: keep_date(config, day))
    if sharded:
        shard(
            inputs.model,
            decoder_layers(inputs.model),
            device,
            parallel.mesh_shape(processes.size),
            cpu_offload=parallel.cpu_offload,
            reshard=parallel.reshard,
        )
    if processes.size > 1:
        # Until here all have drawn the same: an adapter's first values. Dropout is each one's own.
        torch.manual_seed(config.seed + processes.rank)
    return inputs


def _encoded(
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[DataSource],
    argument: str,
) -> tuple[list[EncodedPair], bool]:
    """The pairs of some sources, and whether the chat template writes the date into them."""
    if not sources:
        return [], False
    concise = None
    if config.concise is not None:
        concise = ConciseRule(token_counter(tokenizer), config.concise)
    pairs = read_sources(sources, config.objectives, concise=concise)
    encoded, report = encode_pairs(tokenizer, pairs, config.tokens)
    logger.info("%s: %s", argument, report)
    for sentence in report.warnings():
        logger.warning("%s: %s", argument, sentence)
    if not encoded:
        raise ValueError(
            f"`{argument}` holds no usable pair ({report}); raise `tokens.max_length` or mend it"
        )
    return encoded, report.prints_date


def _check_finite(name: str, model: nn.Module) -> None:
    """Raise ValueError, naming the first, if weights are not finite before any training."""
    wrong = names_of_not_finite(model.named_parameters())
    if wrong:
        raise ValueError(
            f"`model.name` must name a model with finite weights, got {name!r} with a NaN or an "
            f"infinity in {len(wrong)} parameter(s), the first {wrong[0]!r}; it may have diverged "
            f"in training, or be too large for `model.dtype`: take another checkpoint of it"
        )


def _check_pairs_fit(model: PreTrainedModel, pairs: Sequence[EncodedPair]) -> None:
    """Raise ValueError if a pair is longer than the model can read or uses tokens it lacks.

    Without this the embedding would fail with an index out of range, in the middle of the run.
    """
    known = model.get_input_embeddings().weight.shape[0]
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for pair in pairs:
        length, largest = pair_length(pair), max(pair.prompt_ids + pair.a_ids + pair.b_ids)
        if limit is not None and 0 < limit < length:  # XLNet says -1: no limit
            raise ValueError(
                f"`tokens.max_length` must be at most the model's {limit} positions, got a pair of "
                f"{length} tokens ({pair.id!r}); lower `tokens.max_length`"
            )
        if largest >= known:
            raise ValueError(
                f"`model.tokenizer` must give token ids below the model's {known}, got {largest} "
                f"for pair {pair.id!r}; use the tokenizer that belongs to the model"
            )
