"""Host time of a tap: what one backward pass costs beside torch's where arithmetic is nothing.

    python -m bench.suites.host --out runs/host [--layers 28] [--m 2 4] [--seconds 60]

A Llama of width 64 with LoRA (r = 8) on every linear layer, 14 trained matrices a layer, one
thread. Forward: the prepared model's pass beside the bare model's. Backward: `backward(losses,
scores=...)` of the prepared model beside one plain backward pass of the weighted sum, and beside m
of them (`ratio`). Both models take turns in one process. `ms_per_tap` is the CPU time beyond
that of plain torch, a trained matrix; it compares the smallest of many rounds, which say most on a
loaded machine.
"""

import warnings
from argparse import ArgumentParser
from collections import defaultdict
from collections.abc import Callable, Sequence
from time import perf_counter, thread_time
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import raco_fast
from bench.harness.records import Records
from bench.harness.session import Session
from raco_fast.settings.paths import expanded

NAME = "host"
_SEQUENCES, _TOKENS, _VOCABULARY = 8, 24, 200
_WARM, _ROUNDS = 2, 40
# Sizes -> layers.
SIZES = {"gpu": 28, "cpu": 28, "cpu-whole": 28, "tiny": 1}
T = TypeVar("T")


def run(session: Session) -> None:
    measure(session.records, SIZES[session.sizes], 2, session.until)


def measure(records: Records, layers: int, m: int, until: float) -> None:
    """Records of forward and backward, until that `perf_counter`."""
    bare, prepared = _model(layers), _model(layers)
    with raco_fast.prepare(prepared, strict=True, check_every=None):
        seconds = _seconds(bare, prepared, m, until)
    taps = sum(p.requires_grad for p in prepared.parameters())
    params = {"m": m, "layers": layers, "taps": taps}
    for name, unit in (("forward", "plain forward"), ("backward", "passes")):
        of_ours, of_plain = np.array(seconds[name]), np.array(seconds[f"plain {name}"])
        low, middle, high = 1e3 * np.quantile(of_ours, [0.2, 0.5, 0.8])
        records.add(
            f"{NAME}/{name}",
            params,
            **{"unit": "ms", "p20": low, "p50": middle, "p80": high, "rounds": len(of_ours)},
            ratio=float(np.median(of_ours) / np.median(seconds[unit])),
            least=1e3 * of_ours.min(),
            ms_per_tap=1e3 * (of_ours.min() - of_plain.min()) / taps,
        )


def _seconds(bare: nn.Module, prepared: nn.Module, m: int, until: float) -> dict[str, list[float]]:
    taken: defaultdict[str, list[float]] = defaultdict(list)
    names = [str(i) for i in range(m)]
    of_bare, of_prepared = (
        raco_fast.ObjectiveGradients(
            [p for p in model.parameters() if p.requires_grad], dict.fromkeys(names, 1 / m)
        )
        for model in (bare, prepared)
    )

    def timed(name: str, call: Callable[[], T]) -> T:
        started = thread_time()
        found = call()
        taken[name].append(thread_time() - started)
        return found

    for number in range(_WARM + _ROUNDS):
        if number > _WARM + 3 and perf_counter() > until:
            break
        scores = timed("plain forward", lambda: _scores(bare))
        total = torch.stack(_losses(scores, m)).mean()
        timed("plain backward", total.backward)
        bare.zero_grad()
        scores = timed("forward", lambda: _scores(prepared))
        losses = _losses(scores, m)
        timed("backward", lambda: of_prepared.backward(losses, scores=scores))  # noqa: B023
        of_prepared.zero()
        losses = _losses(_scores(bare), m)
        timed("passes", lambda: of_bare.backward(losses))  # noqa: B023
        of_bare.zero()
    return {name: seconds[_WARM:] for name, seconds in taken.items()}


def _model(layers: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    found: nn.Module = get_peft_model(
        LlamaForCausalLM(config), LoraConfig(r=8, target_modules="all-linear")
    )
    return found


def _scores(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, _VOCABULARY, (_SEQUENCES, _TOKENS), generator=generator)
    logps = model(input_ids=ids).logits.log_softmax(-1)[:, :-1]
    return logps.gather(-1, ids[:, 1:, None])[..., 0].sum(1)


def _losses(scores: Tensor, m: int) -> list[Tensor]:
    pairs = _SEQUENCES // 2
    margins = 0.1 * (scores[:pairs] - scores[pairs:])
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, 2, (m, pairs), generator=generator) * 2.0 - 1.0
    return [-F.logsigmoid(of_objective * margins).mean() for of_objective in labels]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m bench.suites.host", description=__doc__)
    parser.add_argument("--out", type=expanded, required=True, help="folder of report.json")
    parser.add_argument("--layers", type=int, default=SIZES["cpu"])
    parser.add_argument("--m", nargs="+", type=int, default=(2,))
    parser.add_argument("--seconds", type=float, default=60.0, help="for each m")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    records = Records(options.out, "cpu")
    for m in options.m:
        measure(records, options.layers, m, perf_counter() + options.seconds)


if __name__ == "__main__":
    main()
