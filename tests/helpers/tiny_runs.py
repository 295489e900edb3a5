"""Fixtures of runs: a tiny model, its tokenizer and learnable preferences, saved once a session."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raco_fast.dpo.run import trainer
from raco_fast.dpo.run.checkpoint import latest
from raco_fast.dpo.run.metrics_file import read_records

TOPICS = ("tea", "rain", "chess", "bread", "music")
ANSWERS = ("yes", "no", "sure", "calm", "mad", "fine")
WORDS = ("what", "do", "you", "think", "of", *TOPICS, *ANSWERS)
CHAT = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def build_tokenizer(chat_template: str | None = None):
    """One token a word; the ids are those of the order of appearance."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "Human", "Assistant", ":", *WORDS]
    core = Tokenizer(models.WordLevel({w: k for k, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def build_model(seed: int = 0, **settings: Any):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = {
        "vocab_size": 32,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.15,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**(config | settings)))


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    """A function that builds a tiny Llama: `make_model(seed, **settings_of_its_config)`."""
    return build_model


@pytest.fixture(scope="session")
def save_tiny(tmp_path_factory) -> Callable[..., Path]:
    """A function that saves a tiny Llama and its tokenizer and returns the folder."""

    def save(seed: int = 0, chat_template: str | None = None, **settings: Any) -> Path:
        folder = tmp_path_factory.mktemp("tiny")
        build_model(seed, **settings).save_pretrained(folder)
        build_tokenizer(chat_template).save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def tiny(save_tiny) -> Path:
    """The folder of the tiny model; attention dropout on, so that resuming must restore it."""
    return save_tiny(attention_dropout=0.1)


def build_rows(n: int, seed: int, objectives: dict[str, str]) -> list[dict[str, Any]]:
    """Rows whose labels follow words: {"kind": "calm"} prefers the response that says "calm"."""
    draw = random.Random(seed)
    rows = []
    for k in range(n):
        topic = draw.choice(TOPICS)
        texts = [" ".join(draw.choices(ANSWERS, k=draw.randint(2, 6))) for _ in range(2)]
        if texts[0] == texts[1]:
            texts[1] += " fine"
        counts = {name: [t.split().count(w) for t in texts] for name, w in objectives.items()}
        rows.append(
            {
                "id": f"pair-{seed}-{k}",
                "prompt": [{"role": "user", "content": f"what do you think of {topic}"}],
                "response_a": texts[0],
                "response_b": texts[1],
                "preferences": {name: (a > b) - (a < b) for name, (a, b) in counts.items()},
            }
        )
    return rows


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def write_pairs(tmp_path) -> Callable[..., Path]:
    """A function that writes rows: `write_pairs(name, n, seed, {objective: word})`."""

    def write(name: str, n: int, seed: int, objectives: dict[str, str]) -> Path:
        return write_rows(tmp_path / name, build_rows(n, seed, objectives))

    return write


@pytest.fixture(scope="session")
def preference_files(tmp_path_factory) -> tuple[Path, Path]:
    """Training and held-out files with the objectives `sure` and `kind`."""
    folder = tmp_path_factory.mktemp("pairs")
    words = {"sure": "yes", "kind": "calm"}
    return (
        write_rows(folder / "train.jsonl", build_rows(40, 1, words)),
        write_rows(folder / "test.jsonl", build_rows(16, 2, words)),
    )


@pytest.fixture
def settings(tiny, preference_files, tmp_path) -> dict[str, Any]:
    """Settings of a short run, as a YAML file would hold them."""
    train, test = preference_files
    return {
        "model": {"name": str(tiny), "device": "cpu", "dropout": True},
        "data": [{"path": str(train)}],
        "eval_data": [{"path": str(test)}],
        "weights": {"sure": 0.7, "kind": 0.3},
        "lr": 0.01,
        "weight_decay": 0.02,
        "schedule": "linear",
        "pairs_per_step": 8,
        "pairs_per_micro_batch": 3,
        "chunk_tokens": 11,
        "epochs": 2,
        "seed": 4,
        "output_dir": str(tmp_path / "run"),
        "cache_dir": str(tmp_path / "cache"),
        "report": False,  # a second of drawing
    }


@pytest.fixture
def make_config(settings) -> Callable[..., Any]:
    """A function that makes a TrainConfig of `settings`, changed by its arguments."""
    from raco_fast.dpo.data.data_source import DataSource
    from raco_fast.dpo.data.rendering import TokenOptions
    from raco_fast.dpo.models import LoraOptions, ModelOptions
    from raco_fast.dpo.run.config import TrainConfig

    def make(model: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
        values = settings | changes
        options = settings["model"] | (model or {})
        if options.get("lora") is not None:
            options["lora"] = LoraOptions(**options["lora"])
        values["model"] = ModelOptions(**options)
        for name in ("data", "eval_data"):
            values[name] = [DataSource(**source) for source in values[name]]
        if "tokens" in values:
            values["tokens"] = TokenOptions(**values["tokens"])
        return TrainConfig(**values)

    return make


_TIMING = ("seconds", "tokens_per_second")


def records(config) -> list[dict]:
    """metrics.jsonl without what a clock says."""
    return [
        {name: value for name, value in record.items() if name not in _TIMING}
        for record in read_records(config.folder / "metrics.jsonl")
    ]


def steps(config) -> list[dict]:
    return [record for record in records(config) if "learning_rate" in record]


def evaluations(config) -> list[dict]:
    return [record for record in records(config) if "learning_rate" not in record]


def weights(config) -> dict[str, torch.Tensor]:
    return load_file(latest(config.folder / "checkpoints") / "model.safetensors")


def assert_equal(a, b) -> None:
    """Equal to the last bit, tensors in nested containers included."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


def assert_same_run(a, b) -> None:
    """Two finished runs agree in everything a checkpoint and the metrics hold."""
    one, two = latest(a.folder / "checkpoints"), latest(b.folder / "checkpoints")
    assert_equal(load_file(one / "model.safetensors"), load_file(two / "model.safetensors"))
    for name in ("optimizer.pt", "rng.pt"):
        assert_equal(*(torch.load(folder / name, weights_only=True) for folder in (one, two)))
    assert records(a) == records(b)


class Stop:
    """In place of `Interrupt`: as if Ctrl-C had been pressed during a step."""

    requested = False

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        pass


def interrupt_after(monkeypatch, steps: int | None) -> None:
    """Stop a run that starts from now on after so many of its steps."""
    stop, taken, step = Stop(), [], trainer.Trainer._step

    def watched(self, *given) -> None:
        step(self, *given)
        taken.append(1)
        stop.requested = len(taken) == steps

    monkeypatch.setattr(trainer.Trainer, "_step", watched)
    monkeypatch.setattr(trainer, "Interrupt", lambda: stop)


@pytest.fixture(scope="session")
def runs() -> SimpleNamespace:
    """What the tests of whole runs read from and compare between output folders."""
    return SimpleNamespace(
        records=records,
        steps=steps,
        evaluations=evaluations,
        weights=weights,
        assert_equal=assert_equal,
        assert_same_run=assert_same_run,
        interrupt_after=interrupt_after,
    )
