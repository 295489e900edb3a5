"""`raco_fast.dpo.train`: a run whose model and data may be objects of the caller.

Where a YAML file has a name or a path, Python may have the thing itself. All else is as in the
file, is checked as there, and goes the same road (`raco_fast.dpo.run.trainer`).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from raco_fast.dpo.data.data_source import DataSource
from raco_fast.dpo.data.memory_rows import MEMORY, is_data_set
from raco_fast.dpo.decoders import unwrap
from raco_fast.dpo.loaded_policy import memory_name
from raco_fast.dpo.loading import with_padding
from raco_fast.dpo.models import DTYPES
from raco_fast.dpo.run.callbacks import Callback
from raco_fast.dpo.run.config import TrainConfig
from raco_fast.dpo.run.given import Given
from raco_fast.dpo.run.trainer import run_training
from raco_fast.settings.parsing import from_settings
from raco_fast.settings.plain import fields_of, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from raco_fast.dpo.data.memory_rows import Rows
    from raco_fast.dpo.loaded_policy import LoadedModel

_OF_SOURCE = {field.name for field in dataclasses.fields(DataSource)}


@dataclass(frozen=True)
class TrainedRun:
    """What a run has come to.

    Args:
        model: the trained model, in evaluation mode; that which was given, if one was. None where
            it lies cut on several devices (`parallel: {kind: fsdp2}`).
        tokenizer: with which its pairs were read.
        metrics: the last evaluation, as in metrics.jsonl; empty without `eval_data`, and on every
            process but the first.
        folder: `output_dir`, with the saved model in `model`.
    """

    model: nn.Module | None
    tokenizer: PreTrainedTokenizerBase
    metrics: dict[str, Any]
    folder: Path


def train(
    model: Any,
    tokenizer: Any = None,
    *,
    data: Any,
    weights: Mapping[str, float],
    eval_data: Any = (),
    callbacks: Sequence[Callback] = (),
    resume: bool = False,
    overwrite: bool = False,
    **settings: Any,
) -> TrainedRun:
    """Train a model on preference data, as `raco-fast train` does.

    Args:
        model: a hub name, a folder, a .gguf file; a causal LM of transformers in memory, or one
            with an adapter of PEFT, which are trained in place, in the dtype that they have; or
            what a YAML file has under `model`, whose `name` may be any of these.
        tokenizer: a name, a folder or a tokenizer in memory; None: the model's own.
        data, eval_data: a path, rows (a list of dicts, or a data set of `datasets`), what a YAML
            file has for a source (`DataSource`), whose `path` may be rows; or a list of such.
        weights: objective -> weight.
        callbacks: told of the run's course, on the first process.
        resume: go on from the newest checkpoint in `output_dir`, with the model and the data that
            the run began with.
        overwrite: remove the run that `output_dir` holds.
        settings: of `TrainConfig`, as in a YAML file.
    Raises:
        TypeError: `model`, `tokenizer`, a source or a callback of another kind.
        ValueError: an unknown setting; and as `raco_fast.dpo.run.trainer.train`.
        DivergedError, Interrupted, OSError, MemoryError: as there.
    """
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise TypeError(
                f"`callbacks` must be objects of raco_fast.dpo.Callback, got a "
                f"{type(callback).__name__}; make it a subclass"
            )
    unknown = sorted(settings.keys() - fields_of(TrainConfig).keys())
    if unknown:  # here, as no message may quote what it was given: it may be rows
        near = difflib.get_close_matches(unknown[0], [*fields_of(TrainConfig)], 1)
        raise ValueError(
            f"`{unknown[0]}` is no setting of TrainConfig; "
            + (f"did you mean {near[0]!r}?" if near else "docs/configuration.md lists them")
        )
    rows: dict[str, Rows] = {}
    options, loaded, read_by = _of_model(model, tokenizer)
    plain = {
        **{name: _plain(name, value) for name, value in settings.items()},
        "model": options,
        "data": _sources("data", data, rows),
        "eval_data": _sources("eval_data", eval_data, rows),
        "weights": _plain("weights", dict(weights)),
    }
    config = from_settings(TrainConfig, plain)
    given = Given(loaded, read_by, rows)
    inputs, metrics = run_training(config, resume, overwrite, given, callbacks)
    trained = None if config.parallel.kind == "fsdp2" else inputs.model.eval()
    return TrainedRun(trained, inputs.tokenizer, metrics, config.folder)


def _of_model(
    model: Any, tokenizer: Any
) -> tuple[dict[str, Any], LoadedModel | None, PreTrainedTokenizerBase | None]:
    """The settings of the group `model`, and what of them is in memory."""
    options = dict(model) if isinstance(model, Mapping) else {"name": model}
    if tokenizer is not None and options.get("tokenizer") is not None:
        raise ValueError("`tokenizer` must be given once, got it in `model` as well; remove one")
    read_by = options.pop("tokenizer", None) if tokenizer is None else tokenizer
    name, loaded = options.pop("name", None), None
    if isinstance(name, (str, PathLike)):
        options["name"] = fspath(name)
    else:
        loaded = _checked_model(name)
        options |= {"name": memory_name(loaded), "dtype": _dtype_of(loaded, options.get("dtype"))}
    options = {key: _plain(f"model.{key}", value) for key, value in options.items()}
    if isinstance(read_by, (str, PathLike)):
        options["tokenizer"] = fspath(read_by)
        return options, loaded, None
    if read_by is None and loaded is not None:
        raise ValueError(
            "`tokenizer` must be given with a model in memory, which does not say what its tokens "
            "are; give the one that belongs to it, or its name"
        )
    if read_by is None:
        return options, None, None
    options["tokenizer"] = MEMORY + type(read_by).__name__
    return options, loaded, _checked_tokenizer(read_by)


def _checked_model(given: Any) -> LoadedModel:
    from transformers import PreTrainedModel

    if not isinstance(unwrap(given), PreTrainedModel):
        raise TypeError(
            f"`model` must be a name, a folder, or a causal LM of transformers, with or without an "
            f"adapter of PEFT, got a {type(given).__name__}; take it out of what is around it"
        )
    return cast("LoadedModel", given)


def _dtype_of(loaded: LoadedModel, asked: Any) -> str:
    has = unwrap(loaded).dtype
    name = next((name for name, dtype in DTYPES.items() if dtype == has), None)
    if name is None or asked not in (None, name):
        raise ValueError(
            f"`model` must be in {' or '.join(DTYPES) if asked is None else asked}, got one that "
            f"was loaded in {has}; load it with another dtype, or call its `.to`"
        )
    return name


def _checked_tokenizer(given: Any) -> PreTrainedTokenizerBase:
    """A copy, as the saved one has a chat template that the caller's may not have."""
    from transformers import PreTrainedTokenizerBase

    if not isinstance(given, PreTrainedTokenizerBase):
        raise TypeError(
            f"`tokenizer` must be a name, a folder or a tokenizer of transformers, got a "
            f"{type(given).__name__}; of a processor give its `.tokenizer`"
        )
    return with_padding(deepcopy(given))


def _sources(argument: str, given: Any, rows: dict[str, Rows]) -> list[dict[str, Any]]:
    """The sources as a YAML file has them; those in memory get a path, and a place in `rows`."""
    several = isinstance(given, (list, tuple)) and not _are_rows(given)
    sources = given if several else [given]
    return [
        _source(f"{argument}-{k}" if len(sources) > 1 else argument, source, rows)
        for k, source in enumerate(sources, start=1)
    ]


def _source(name: str, given: Any, rows: dict[str, Rows]) -> dict[str, Any]:
    if isinstance(given, DataSource):
        return dataclasses.asdict(given)
    source = dict(given) if _is_source(given) else {"path": given}
    path = source.pop("path")
    source = {key: _plain(f"{name}.{key}", value) for key, value in source.items()}
    if isinstance(path, (str, PathLike)):
        return {"path": fspath(path), **source}
    if not (is_data_set(path) or _are_rows(path)):
        raise TypeError(
            f"`{name}` must be a path, a list of rows (dicts) or a data set of `datasets`, got a "
            f"{type(path).__name__}; of a data set with splits give one, of a table its rows"
        )
    rows[MEMORY + name] = path
    return {"path": MEMORY + name, **source}


def _is_source(given: Any) -> bool:
    """Whether this is a source as in a YAML file: a row has other fields than `path` and these."""
    return isinstance(given, Mapping) and "path" in given and given.keys() <= _OF_SOURCE


def _are_rows(given: Any) -> bool:
    if not isinstance(given, (list, tuple)) or not given:
        return False
    sources = (isinstance(g, (str, PathLike, DataSource)) or _is_source(g) for g in given)
    return not any(sources) and not any(is_data_set(g) for g in given)


def _plain(name: str, value: Any) -> Any:
    """A setting's value as JSON has it."""
    if isinstance(value, PathLike):
        return fspath(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"`{name}` must be as in a YAML file, got {shown(value)} ({error}); write a name, a "
            f"number, or a list or mapping of them"
        ) from error
    return value
