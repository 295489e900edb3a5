"""What `raco_fast` makes of a family: the gradients of one model in one mode, against float64.

A verdict is `exact` (every parameter's gradients are those of float64 autograd to 1e-5, or to twice
what plain float32 autograd makes of them), `fallback` (the same, after a warning that names a layer
or parameter that took one pass per objective), or a failure: `wrong`, `raises`, `outputs differ`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import model_zoo
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import raco_fast

TOLERANCE = 1e-5
WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.2}
KINDS = ("full", "lora")
MODES = ("one_backward", "gram_first")
PASSED = ("exact", "fallback", "no LoRA")


@dataclass(frozen=True)
class Verdict:
    """Of one family, kind of training and mode.

    `error`: the largest of a parameter whose gradients plain float32 gets to 1e-5;
    `excess`: the largest over all parameters, in what is allowed of it.
    """

    family: str
    kind: str
    mode: str
    outcome: str
    detail: str = ""
    error: float = 0.0
    excess: float = 0.0
    parameters: int = 0

    @property
    def passed(self) -> bool:
        return self.outcome in PASSED


class Widened(TorchFunctionMode):
    """float64 where a model asks for float32 by name, as norms, softmax and routers do."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        wide = [torch.float64 if a is torch.float32 else a for a in args]
        named = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*wide, **named)


@contextmanager
def widened() -> Iterator[None]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Widened():
            yield
    finally:
        torch.set_default_dtype(default)


@dataclass
class Subject:
    """A family's model, what it says and what its gradients are."""

    model: nn.Module
    batch: SimpleNamespace
    logits: Tensor
    truth: dict[str, Tensor]
    plain: dict[str, Tensor]


def scores_of(logits: Tensor, batch: SimpleNamespace) -> Tensor:
    """[B] summed log-probabilities of the scored tokens."""
    wide = logits[:, :-1] if logits.dtype == torch.float64 else logits[:, :-1].float()
    logps = wide.log_softmax(-1).gather(-1, batch.ids[:, 1:, None])[..., 0]
    return logps.masked_fill(~batch.scored[:, 1:], 0).sum(-1)


def losses_of(scores: Tensor) -> list[Tensor]:
    """A DPO, an IPO and an SFT loss of adjacent pairs, with labels that disagree."""
    margins = 0.2 * (scores[0::2] - scores[1::2])
    labels = margins.new_tensor([1.0, -1.0])
    return [
        -(0.5 * margins).sigmoid().log().mean(),
        (labels * margins - 0.5).square().mean(),
        -(scores[0::2] / 5).mean(),
    ]


def subject(family: str, kind: str) -> Subject:
    """The model of a family, never prepared yet; "lora": with an adapter on every linear layer."""
    model, batch = model_zoo.build(family), model_zoo.batch_of()
    if kind == "lora":
        model = model_zoo.adapted(model)
    with model_zoo.quiet():
        oracle = copy.deepcopy(model).double()  # some keep tensors of a forward pass
        logits = model_zoo.forward(model, batch)
        plain = by_autograd(model, losses_of(scores_of(logits, batch)))
        with widened():
            # Grouped matrix products know no float64.
            model_zoo.base(oracle).set_experts_implementation("eager")
            exact = model_zoo.forward(oracle, batch)
            assert exact.dtype == torch.float64
            truth = by_autograd(oracle, losses_of(scores_of(exact, batch)))
    return Subject(model, batch, logits.detach(), truth, plain)


def by_autograd(model: nn.Module, losses: list[Tensor]) -> dict[str, Tensor]:
    """Parameter name -> [m, *shape] float64, from one backward pass for each loss."""
    params = trained(model)
    columns = [
        torch.autograd.grad(loss, list(params.values()), retain_graph=True, allow_unused=True)
        for loss in losses
    ]
    return {
        name: stacked(p, grads)
        for (name, p), grads in zip(params.items(), zip(*columns, strict=True), strict=True)
    }


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def stacked(p: Tensor, grads: Any) -> Tensor:
    return torch.stack([torch.zeros_like(p) if g is None else g for g in grads]).double()


def judge(of: Subject, family: str, kind: str, mode: str) -> Verdict:
    """Prepare the model, take one step's gradients in a mode, and compare."""

    def verdict(outcome: str, detail: str = "", **numbers: float) -> Verdict:
        size = sum(p.numel() for p in of.model.parameters())
        return Verdict(family, kind, mode, outcome, detail, parameters=size, **numbers)

    try:
        with model_zoo.quiet(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with raco_fast.prepare(of.model):
                logits = model_zoo.forward(of.model, of.batch)
                if not torch.equal(logits, of.logits):
                    return verdict("outputs differ", f"{(logits - of.logits).abs().max():.1e}")
                found, truth, plain = MODE[mode](of, scores_of(logits, of.batch))
    except Exception as error:  # noqa: BLE001
        return verdict("raises", f"{type(error).__name__}: {' '.join(str(error).split())}")
    finally:
        of.model.zero_grad(set_to_none=True)
    error, excess, worst = compared(found, truth, plain)
    said = [str(w.message) for w in caught if "one pass per objective" in str(w.message)]
    names = [n for n, _ in [*of.model.named_parameters(), *of.model.named_modules()] if n]
    if excess > 1:
        return verdict("wrong", "; ".join([f"{worst} by {error_text(excess)}", *said]), error=error, excess=excess)
    if said and not any(name in text for name in names for text in said):
        return verdict("fallback without a name", said[0], error=error, excess=excess)
    return verdict("fallback" if said else "exact", "; ".join(said), error=error, excess=excess)


def error_text(excess: float) -> str:
    return f"{excess:.1e} x what is allowed"


Gradients = dict[str, Tensor]


def one_backward(of: Subject, scores: Tensor) -> tuple[Gradients, Gradients, Gradients]:
    """All gradients, theirs in float64, and theirs by plain autograd."""
    params = trained(of.model)
    gradients = raco_fast.ObjectiveGradients(list(params.values()), WEIGHTS)
    gradients.backward(losses_of(scores), scores=scores)
    found = {name: stacked(p, gradients.of(p).values()) for name, p in params.items()}
    return found, of.truth, of.plain


def gram_first(of: Subject, scores: Tensor) -> tuple[Gradients, Gradients, Gradients]:
    """G0 of every parameter, and the Gram matrix as an array beside them."""
    params = trained(of.model)
    gradients = raco_fast.ObjectiveGradients(list(params.values()), WEIGHTS)
    solution = raco_fast.gram_first(gradients, losses_of(scores), scores, c=0.4)
    coefficients = torch.as_tensor(solution.coefficients)
    found = {name: stacked(p, [p.grad]) for name, p in params.items()}
    found["Gram matrix"] = cosines(torch.as_tensor(solution.gram), of.truth)[None]

    def combined(gradients: Gradients) -> Gradients:
        result = {n: torch.tensordot(coefficients, g, 1)[None] for n, g in gradients.items()}
        result["Gram matrix"] = cosines(gram(gradients), of.truth)[None]
        return result

    return found, combined(of.truth), combined(of.plain)


MODE = {"one_backward": one_backward, "gram_first": gram_first}


def gram(gradients: Gradients) -> Tensor:
    flat = torch.cat([g.flatten(1) for g in gradients.values()], dim=1)
    return flat @ flat.T


def cosines(M: Tensor, truth: Gradients) -> Tensor:
    """M in units of the true norms."""
    norms = gram(truth).diag().sqrt()
    return M / norms / norms[:, None]


def compared(found: Gradients, truth: Gradients, plain: Gradients) -> tuple[float, float, str]:
    """(largest error where plain float32 stays below 1e-5, largest excess, the parameter of that)."""
    error, excess, worst = 0.0, 0.0, ""
    for name, exact in truth.items():
        ours, theirs = relative(found[name], exact), relative(plain[name], exact)
        if theirs <= TOLERANCE:
            error = max(error, ours)
        allowed = max(TOLERANCE, 2 * theirs)
        if not ours / allowed <= excess:
            excess, worst = ours / allowed, name
    return error, excess, worst


def relative(found: Tensor, exact: Tensor) -> float:
    """The largest relative error over the objectives."""
    size, error = (g.flatten(1).norm(dim=1) for g in (exact, found - exact))
    return float(torch.where(error == 0, 0, error / size).max())
