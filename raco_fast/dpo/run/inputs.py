"""What a run starts from: its pairs as token ids, and the model that is to learn from them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from raco_fast.distributed.processes import Processes
from raco_fast.dpo.causality import check_causal
from raco_fast.dpo.data.batches import pair_length
from raco_fast.dpo.data.data_source import DataSource
from raco_fast.dpo.data.files import STDIN
from raco_fast.dpo.data.pairs import ConciseRule
from raco_fast.dpo.data.sources import read_sources
from raco_fast.dpo.data.tokenization import EncodedPair, encode_pairs, token_counter
from raco_fast.dpo.launch import launched, share_of_cores
from raco_fast.dpo.losses.registry import check_soft
from raco_fast.dpo.models import decoder_layers, pick_device
from raco_fast.dpo.policy import KeepBase, Policy, load_base_model, load_tokenizer, make_policy
from raco_fast.dpo.run.base_folder import keep_base
from raco_fast.dpo.run.config import TrainConfig
from raco_fast.dpo.run.divergence import names_of_not_finite
from raco_fast.dpo.run.template_date import keep_date, with_date
from raco_fast.dpo.run.together import by_first, together
from raco_fast.dpo.saved_adapters import find_adapter
from raco_fast.dpo.sharded import device_of, shard

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_WORTH_STARTING = 12_000  # pairs: 3 s / 0.25 ms
_MOST_WORKERS = 8


@dataclass(frozen=True)
class RunInputs:
    """Tokenizer, encoded pairs and policy of a run.

    Args:
        pad_id: of the padding, which is masked: any id will do for a tokenizer without one.
        training, held_out: the pairs to learn from and to evaluate on (none without `eval_data`).
        policy: the model before training, and how its reference is computed.
        prints_date: whether the chat template writes the date into the pairs.
    """

    tokenizer: PreTrainedTokenizerBase
    pad_id: int
    training: list[EncodedPair]
    held_out: list[EncodedPair]
    policy: Policy
    prints_date: bool = False

    @property
    def model(self) -> nn.Module:
        """The policy's model."""
        return self.policy.model

    def check_causal(self) -> None:
        """Run the model on a pair; ValueError if it cannot, or sees the tokens to be predicted."""
        probe = torch.tensor(self.training[0].prompt_ids + self.training[0].a_ids)
        check_causal(self.model, probe.to(device_of(self.model)))


def load_inputs(
    config: TrainConfig, device: torch.device | None = None, keep_base: KeepBase | None = None
) -> RunInputs:
    """Load what a config names and check that it fits together; seeds torch's generators.

    Args:
        device: where the model is put instead of its own place.
        keep_base: as in `make_policy`.
    Raises:
        ValueError, FileNotFoundError: bad model path; unreadable files, bad rows (file and line
            named), an objective for which no training pair is labelled, soft labels for a loss that
            has no form for them; pairs that the model cannot read; weights that are not finite; a
            `reference` that an adapter cannot have.
    """
    torch.manual_seed(config.seed)
    tokenizer = load_tokenizer(config.model)
    training, held_out, prints_date = load_pairs(config, tokenizer)
    base = load_base_model(config.model, device)
    _check_can_be_cut(config, base)
    check_pairs_fit(base, [*training, *held_out], len(tokenizer))
    pad_id = tokenizer.pad_token_id
    pad_id = pad_id if isinstance(pad_id, int) and pad_id < _known_tokens(base) else 0
    policy = make_policy(base, config.model, keep_base)
    _check_finite(config.model.name, policy.model)
    return RunInputs(tokenizer, pad_id, training, held_out, policy, prints_date)


def load_pairs(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[EncodedPair], list[EncodedPair], bool]:
    """The training pairs, those held out, and whether the chat template writes the date.

    Raises:
        ValueError, OSError: as `load_inputs`, of the data and of what an adapter cannot have.
    """
    if config.reference is not None:
        config.reference.check_policy(config.model, find_adapter(config.model))
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
    best = config.keep_best
    if best is not None and not any(pair.labels[best] for pair in held_out):
        raise ValueError(
            f"`keep_best` names {best!r}, but no pair of `eval_data` is labelled for it; add some "
            f"that are or leave `keep_best` out"
        )
    return training, held_out, printed or printed_too


def load_on_all(config: TrainConfig, processes: Processes) -> RunInputs:
    """`load_inputs` on every process, the model sharded over them if the config says so.

    Raises:
        ValueError, OSError: as `load_inputs`, on any process; no causal language model; data from
            standard input, which only one process can read.
    """
    from transformers.utils.logging import disable_progress_bar

    if processes.rank > 0:
        disable_progress_bar()
    if processes.size > 1 and STDIN in [s.path for s in (*config.data, *config.eval_data)]:
        raise ValueError(
            f"`data.path` must be no standard input ({STDIN!r}) where several processes run, got "
            f"{processes.size}: each would read a part of it; write it to a file"
        )
    keep = partial(keep_base, config.folder, writes=processes.rank == 0)
    dated = with_date(config, processes)
    inputs = together(processes, lambda: load_inputs(dated, first_device(config), keep))
    if inputs.prints_date and (day := dated.tokens.date):
        logger.info("the chat template prints the date; it is %s in this run", day)
        by_first(processes, lambda: keep_date(config, day))
    spread(inputs.model, config, processes)
    inputs.check_causal()
    if processes.size > 1:
        # Until here all have drawn the same: an adapter's first values. Dropout is each one's own.
        torch.manual_seed(config.seed + processes.rank)
    return inputs


def first_device(config: TrainConfig) -> torch.device:
    """Where a model is loaded to: one that is to be sharded may have room on no GPU."""
    return (
        torch.device("cpu") if config.parallel.kind == "fsdp2" else pick_device(config.model.device)
    )


def spread(model: nn.Module, config: TrainConfig, processes: Processes) -> None:
    """Shard a model over the processes, in place, if the config says so."""
    parallel = config.parallel
    if parallel.kind == "fsdp2":
        shard(
            model,
            decoder_layers(model),
            pick_device(config.model.device),
            parallel.mesh_shape(processes.size),
            cpu_offload=parallel.cpu_offload,
            reshard=parallel.reshard,
        )


def workers_to_tokenize(pairs: int, cores: int) -> int:
    """How many processes are the fastest; 0: this one.

    A worker takes about 3 seconds to start (it imports torch and transformers) and 0.3 GiB of
    memory. Without workers the tokenizer's threads use all cores, but not what renders the
    conversations, 0.25 ms a pair, which workers therefore save (1 - 1 / cores) of.
    """
    return min(cores, _MOST_WORKERS) if pairs * (1 - 1 / cores) > _WORTH_STARTING else 0


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
    workers = config.workers
    if workers is None:
        workers = workers_to_tokenize(len(pairs), share_of_cores())
    launch = launched()
    encoded, report = encode_pairs(
        tokenizer,
        pairs,
        config.tokens,
        workers=workers,
        progress=launch is None or launch.rank == 0,
    )
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


def check_pairs_fit(model: PreTrainedModel, pairs: Sequence[EncodedPair], tokens: int) -> None:
    """Raise ValueError if a pair is longer than the model can read or uses tokens it lacks.

    Without this the embedding or the head would fail with an index out of range, in the middle of
    the run. `tokens` are those of the tokenizer, of which the pairs may use the known ones only.
    """
    known = _known_tokens(model)
    if tokens > known:
        logger.warning(
            "`model.tokenizer` has %d tokens and the model knows %d: a text with one of the others "
            "makes the model fail",
            tokens,
            known,
        )
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
                f"of its {tokens} for pair {pair.id!r}; use the tokenizer that belongs to the model"
            )


def _known_tokens(model: PreTrainedModel) -> int:
    """The tokens that a model can both read and predict."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return min(int(end.weight.shape[0]) for end in ends if hasattr(end, "weight"))


def _check_can_be_cut(config: TrainConfig, model: PreTrainedModel) -> None:
    if config.parallel.kind == "fsdp2" and getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            f"`parallel.kind` 'fsdp2' cannot cut the quantized weights of {config.model.name!r}; "
            f"use 'ddp', or the model that they were made from"
        )
