"""What DPO steps are measured on: one model, one batch, m losses, for every rival.

The model has the shape of a real one and random weights, the batch random tokens: time and memory
depend on neither. The two responses of a pair share their prompt. All pairs have full length:
padding, or the lack of it, is in no figure. (pairs_problem.py has pairs of real lengths.)
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import raco_fast
from bench.harness.parameters import MODELS, SMALL
from raco_fast.dpo.logps import sequence_logps

_NAMES = ("SmolLM2-135M", *SMALL, "Qwen3-0.6B", "Llama-3-8B")
SHAPES = {name: (MODELS | SMALL)[name] for name in _NAMES}
KINDS = ("lora", "full")
DTYPES = ("float32", "bfloat16")

PROMPT = 8  # tokens of every sequence that are not scored
BETA = 0.1
MAX_OBJECTIVES = 32


_USUAL_SHAPE = "SmolLM2-135M"


class ModelSetting:
    """What settings have in common: the model that is trained, and how.

    `kind` is one of `KINDS`, `shape` of `SHAPES`, `dtype` of `DTYPES`. The dataclasses below it
    have these fields and those of their own data, each with a default.
    """

    kind: str
    shape: str
    layers: int
    dtype: str
    device: str

    def params(self, m: int) -> dict[str, Any]:
        """As it stands in the records: their machine says which device, and the shape is the usual
        one where it is not named.
        """
        implied = {"device", "shape"} if self.shape == _USUAL_SHAPE else {"device"}
        return {"m": m, **{k: v for k, v in vars(self).items() if k not in implied}}

    def options(self, *ms: int) -> list[str]:
        """Itself and numbers of objectives, as a `parser` reads them."""
        own = [word for k, v in vars(self).items() for word in (f"--{k}", str(v))]
        return ["--m", *map(str, ms), *own]


S = TypeVar("S", bound=ModelSetting)


@dataclass(frozen=True)
class Setting(ModelSetting):
    """With sequences that have as many tokens each."""

    kind: str = "full"
    shape: str = _USUAL_SHAPE
    layers: int = 30
    sequences: int = 8
    tokens: int = 64
    dtype: str = "float32"
    device: str = "cpu"


def of_kinds(setting: S) -> tuple[S, ...]:
    """The setting with every kind of training."""
    return tuple(replace(setting, kind=kind) for kind in KINDS)  # type: ignore[type-var]


# Large enough that the device is busy: where a step of SmolLM2-135M is launched, it waits.
GPU = Setting("full", "Qwen3-0.6B", 28, 16, 1024, "bfloat16", "cuda")
GPU_KINDS = (replace(GPU, kind="lora", shape="Llama-3-8B", layers=32, tokens=512), GPU)
TINY = Setting(shape="tiny", layers=1, sequences=4, tokens=12)


def parser(
    suite: str,
    about: str | None,
    kinds: Sequence[str],
    ms: Sequence[int],
    of: type[ModelSetting] = Setting,
) -> ArgumentParser:
    """Of the command of a suite: settings of a class, and numbers of objectives."""
    found = ArgumentParser(prog=f"python -m bench.suites.{suite}", description=about)
    found.add_argument("--m", nargs="+", type=int, default=ms, help="numbers of objectives")
    # Records of a former version say `--kinds`.
    found.add_argument("--kind", "--kinds", nargs="+", default=kinds, choices=KINDS)
    choices = {"shape": SHAPES, "dtype": DTYPES}
    for f in fields(of)[1:]:  # type: ignore[arg-type]
        name, default = f"--{f.name}", f.default
        found.add_argument(name, type=type(default), default=default, choices=choices.get(f.name))
    return found


def chosen(options: Namespace, of: type[S]) -> list[S]:
    """The settings that were asked for, one for each kind."""
    of_all = {f.name: getattr(options, f.name) for f in fields(of)}  # type: ignore[arg-type]
    return [of(**{**of_all, "kind": kind}) for kind in options.kind]


def only(options: Namespace, of: type[S]) -> tuple[S, int]:
    """The setting and number of objectives of a process: memory of others would be measured too."""
    if len(options.kind) > 1 or len(options.m) > 1:
        asked = f"{options.kind} and {options.m}; run one after the other"
        raise SystemExit(f"`--kind` and `--m` must name one each here, got {asked}")
    return chosen(options, of)[0], options.m[0]


def model_of(
    setting: ModelSetting, adapter_std: float = 0.0, attention: str | None = None
) -> nn.Module:
    """A model with random weights, always the same.

    Args:
        adapter_std: deviation of the adapter's B; a fresh one has a B of zeros.
        attention: how transformers computes it; None is its choice.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    shape = SHAPES[setting.shape]
    config = LlamaConfig(**shape.config(), num_hidden_layers=setting.layers)
    dtype = getattr(torch, setting.dtype)
    with torch.device(setting.device):  # initialised where it is used: a CPU takes minutes
        model: nn.Module = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention
        )
    if setting.kind == "lora":
        from peft import get_peft_model

        model = get_peft_model(model, lora())
        for name, p in model.named_parameters():
            if "lora_B" in name and adapter_std:
                nn.init.normal_(p, std=adapter_std)
    return model


class Problem:
    """A model, a batch of pairs (responses a, then b) and m losses, in the midst of training.

    The reference's scores are zero, so that margins differ from pair to pair, as they do after the
    first step. An adapter's B is random: behind a B of zeros, its A would have no gradient. The
    head takes all its rows at once.
    """

    def __init__(self, setting: Setting, prepared: bool = False) -> None:
        self.setting = setting
        self.model = model_of(setting, adapter_std=0.01)
        if prepared:
            raco_fast.prepare(self.model, strict=True, check_every=None)  # a suite has few steps
        self.stop = SHAPES[setting.shape].vocabulary - 1  # closes every response
        pairs = setting.sequences // 2
        ids = torch.randint(0, self.stop, (setting.sequences, setting.tokens))
        ids[pairs:, :PROMPT] = ids[:pairs, :PROMPT]
        ids[:, -1] = self.stop
        self.ids = ids.to(setting.device)
        self.mask = torch.ones_like(self.ids)
        self.scored = torch.ones_like(ids)
        self.scored[:, :PROMPT] = 0
        self.labels = labels(pairs)
        self.reference = torch.zeros(setting.sequences, device=setting.device)

    @property
    def params(self) -> list[nn.Parameter]:
        """The parameters that learn."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def scores(self) -> Tensor:
        """Summed log-probabilities, float32 [B], with their graph."""
        return sequence_logps(self.model, self.ids, self.mask, self.scored, 1 << 30)

    def losses(self, scores: Tensor, m: int) -> list[Tensor]:
        """DPO's loss of the first m objectives."""
        a, b = (scores - self.reference).chunk(2)
        labels = self.labels[:m].to(scores)
        return list(-torch.nn.functional.logsigmoid(BETA * labels * (a - b)).mean(1))


def labels(pairs: int) -> Tensor:
    """float32 [MAX_OBJECTIVES, pairs], 1 where an objective prefers a, else -1.

    Objective 0 prefers a everywhere, objective 1 on every other pair; further ones anything.
    """
    found = torch.randint(0, 2, (MAX_OBJECTIVES, pairs)) * 2.0 - 1
    found[0] = 1
    found[1] = (-1.0) ** torch.arange(pairs)
    return found


def lora() -> Any:
    """The adapter's `peft.LoraConfig`."""
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
