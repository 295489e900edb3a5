"""One optimizer step of multi-objective DPO, the plain way and every way this library offers.

The model has the shape of SmolLM2-135M (`--layers` shortens it) and random weights, the batch
random tokens: time and memory depend on neither.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import raco_fast
from raco_fast.dpo.logps import sequence_logps

SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
PROMPT = 8  # tokens of every sequence that are not scored
BETA = 0.1


UNPREPARED = ("plain", "passes", "torchjd")
"""The steps that know nothing of this library's engine; the others want a prepared model."""


@dataclass(frozen=True)
class Setting:
    """What a step is measured on: `kind` is "full" or "lora", `dtype` the name of torch's."""

    kind: str = "full"
    layers: int = 30
    sequences: int = 8
    tokens: int = 64
    dtype: str = "float32"
    device: str = "cpu"

    def params(self, m: int) -> dict[str, Any]:
        """As it stands in the records."""
        return {"m": m, **{k: v for k, v in asdict(self).items() if k != "device"}}


class Problem:
    """A model, a batch of pairs (responses a, then b), and m losses with labels of their own."""

    def __init__(self, setting: Setting, prepared: bool = False) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        device, dtype = torch.device(setting.device), getattr(torch, setting.dtype)
        sequences, tokens = setting.sequences, setting.tokens
        config = LlamaConfig(**SHAPE, num_hidden_layers=setting.layers)
        model: nn.Module = LlamaForCausalLM(config).to(device, dtype)
        self.model = _with_adapter(model) if setting.kind == "lora" else model
        if prepared:
            raco_fast.prepare(self.model, strict=True)
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.ids = torch.randint(0, SHAPE["vocab_size"], (sequences, tokens), device=device)
        self.mask = torch.ones_like(self.ids)
        self.scored = torch.ones(sequences, tokens, dtype=torch.long)
        self.scored[:, :PROMPT] = 0
        # Objective 1 disagrees with objective 0 on every other pair; the further ones are random.
        self.labels = torch.randint(0, 2, (32, sequences // 2)) * 2.0 - 1
        self.labels[1] = self.labels[0] * (-1.0) ** torch.arange(sequences // 2)

    def scores(self) -> Tensor:
        """Summed log-probabilities [B], with their graph."""
        chunk = self.ids.numel()
        return sequence_logps(self.model, self.ids, self.mask, self.scored, chunk)

    def losses(self, scores: Tensor, m: int) -> list[Tensor]:
        """DPO's loss of each objective; the reference's log-probabilities are zero."""
        a, b = scores.chunk(2)
        labels = self.labels[:m].to(scores)
        return list(-torch.nn.functional.logsigmoid(BETA * labels * (a - b)).mean(1))

    def clear(self) -> None:
        """Drop every gradient."""
        for p in self.params:
            p.grad = None


def _with_adapter(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    adapted: nn.Module = get_peft_model(model, lora)
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.01)  # zeros would leave A without a gradient
    return adapted


def plain(problem: Problem, m: int) -> Callable[[], None]:
    """Plain DPO: one loss, one backward pass, torch's fused AdamW. The unit of every figure."""
    optimizer = torch.optim.AdamW(problem.params, lr=1e-6, fused=True)

    def step() -> None:
        problem.losses(problem.scores(), 1)[0].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def passes(problem: Problem, m: int) -> Callable[[], None]:
    """m passes as published code has them: autograd.grad with retain_graph, dots by parameter."""
    optimizer = torch.optim.AdamW(problem.params, lr=1e-6, fused=True)
    weights = [1 / m] * m

    def step() -> None:
        losses = problem.losses(problem.scores(), m)
        grads = [torch.autograd.grad(loss, problem.params, retain_graph=True) for loss in losses]
        M = torch.zeros(m, m, dtype=torch.float64)
        for i in range(m):
            for j in range(i, m):
                dots = [(a * b).sum() for a, b in zip(grads[i], grads[j], strict=True)]
                M[i, j] = M[j, i] = float(sum(dots))
        alpha = raco_fast.solve_dual(M, weights, 0.4).coefficients.tolist()
        for p, *column in zip(problem.params, *grads, strict=True):
            p.grad = sum(a * g for a, g in zip(alpha, column, strict=True))
        optimizer.step()
        optimizer.zero_grad()

    return step


def torchjd(problem: Problem, m: int) -> Callable[[], None]:
    """TorchJD's engine and its CAGrad (cvxpy and Clarabel), the memory-saving way it recommends.

    One loss after the other: its default, all at once under vmap, does not pass through autograd
    functions that have no rule for it, such as this head's.
    """
    from torchjd.aggregation import CAGrad
    from torchjd.autojac import backward, jac_to_grad

    optimizer = torch.optim.AdamW(problem.params, lr=1e-6, fused=True)

    def step() -> None:
        losses = problem.losses(problem.scores(), m)
        backward(losses, inputs=problem.params, parallel_chunk_size=1)
        jac_to_grad(problem.params, CAGrad(c=0.4), optimize_gramian_computation=True)
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(mode: str, **options: bool) -> Callable[[Problem, int], Callable[[], None]]:
    """`ClippedCAGradAdamW` with one of its gradient modes."""

    def build(problem: Problem, m: int) -> Callable[[], None]:
        optimizer = raco_fast.ClippedCAGradAdamW(problem.params, lr=1e-6, weights=[1 / m] * m)

        def step() -> None:
            scores = problem.scores()
            losses = problem.losses(scores, m)
            optimizer.backward(losses, scores=scores, mode=mode, **options)
            optimizer.step()
            optimizer.zero_grad()

        return step

    return build


STEPS: dict[str, Callable[[Problem, int], Callable[[], None]]] = {
    "plain": plain,
    "passes": passes,
    "torchjd": torchjd,
    "autograd": ours("autograd"),
    "one_backward": ours("one_backward"),
    "gram_first": ours("gram_first"),
    "gram_first, keep_dy": ours("gram_first", keep_dy=True),
    "gram_first, step_in_backward": ours("gram_first", step_in_backward=True),
}
"""Name -> (problem, m) -> one whole step."""


def disagreement(problem: Problem, m: int) -> float:
    """Largest relative error of a parameter's m gradients, one backward pass against m.

    Args:
        problem: with a prepared model.
    """
    found = []
    for scored in (False, True):
        problem.clear()
        gradients = raco_fast.ObjectiveGradients(problem.params, [1 / m] * m)
        scores = problem.scores()
        gradients.backward(problem.losses(scores, m), scores=scores if scored else None)
        found.append([torch.stack(list(gradients.of(p).values())) for p in problem.params])
    problem.clear()
    errors = [float((a - b).norm() / a.norm()) for a, b in zip(*found, strict=True)]
    return max(errors)
