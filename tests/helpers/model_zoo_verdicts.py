"""What raco_fast makes of a family: the gradients of one model in one mode, against float64.

A verdict is `exact` (every parameter's gradients are those of float64 autograd, to 1e-5 or twice
what plain float32 makes of them), `fallback` (the same, after a warning that names the parameter
or layer for which one pass per objective was taken), or a failure: `wrong`, `raises`, `outputs
differ`, `fallback without a name`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeAlias

import model_zoo
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import raco_fast

TOLERANCE = 1e-5
WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.2}
KINDS = ("full", "lora")
PASSED = ("exact", "fallback")

Gradients: TypeAlias = dict[str, Tensor]  # parameter name -> [m, *shape] float64


@dataclass(frozen=True)
class Verdict:
    """Of one family, kind of training and mode.

    `error`: the largest, of parameters whose gradients plain float32 gets to 1e-5; `excess`: the
    largest of all, in units of what is allowed.
    """

    family: str
    kind: str
    mode: str
    outcome: str
    detail: str = ""
    error: float = 0.0
    excess: float = 0.0
    parameters: int = 0


@dataclass(frozen=True)
class Subject:
    """A family's model, what it says before it is prepared, and what its gradients are."""

    family: str
    kind: str
    model: nn.Module
    batch: SimpleNamespace
    logits: Tensor
    truth: Gradients
    plain: list[Gradients]


def subject(family: str, kind: str) -> Subject:
    """The model of a family, never prepared; "lora": with an adapter on every linear layer."""
    model, batch = model_zoo.build(family), model_zoo.batch_of()
    if kind == "lora":
        model = model_zoo.adapted(model)
    oracle = copy.deepcopy(model).double()  # before the first pass, whose tensors some keep
    with model_zoo.quiet():
        logits = model_zoo.logits_of(model, batch).detach()
        assert torch.equal(logits, model_zoo.logits_of(model, batch)), "not deterministic"
        plain = [by_autograd(model, batch, order) for order in (1, -1)]
        with widened():
            model_zoo.base(oracle).set_experts_implementation("eager")  # grouped: no float64
            truth = by_autograd(oracle, batch)
    off = [relative(plain[0][name], exact) for name, exact in truth.items()]
    assert sorted(off)[len(off) // 2] < 100 * TOLERANCE, "float64 computes something else"
    return Subject(family, kind, model, batch, logits, truth, plain)


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


def scores_of(logits: Tensor, batch: SimpleNamespace) -> Tensor:
    """[B] summed log-probabilities of the scored tokens."""
    logps = logits[:, :-1].log_softmax(-1).gather(-1, batch.ids[:, 1:, None])[..., 0]
    return logps.masked_fill(~batch.scored[:, 1:], 0).sum(-1)


def losses_of(scores: Tensor) -> list[Tensor]:
    """A DPO, an IPO and an SFT loss of adjacent pairs, on labels that disagree."""
    margins = 0.2 * (scores[0::2] - scores[1::2])
    return [
        -(0.5 * margins).sigmoid().log().mean(),
        (margins.new_tensor([1.0, -1.0]) * margins - 0.5).square().mean(),
        -scores[0::2].mean() / 5,
    ]


def by_autograd(model: nn.Module, batch: SimpleNamespace, order: int = 1) -> Gradients:
    """One backward pass for each loss; order -1 has the rows turned round, to round anew.

    By backward(), not grad(): reversible layers call backward() themselves.
    """
    if order < 0:
        batch = SimpleNamespace(**{name: value.flip(0) for name, value in vars(batch).items()})
    scores = scores_of(model_zoo.logits_of(model, batch), batch)
    params = trained(model)
    columns = []
    for loss in losses_of(scores.flip(0) if order < 0 else scores):
        loss.backward(retain_graph=True)
        columns.append([p.grad for p in params.values()])
        model.zero_grad(set_to_none=True)
    return {
        name: stacked(p, grads)
        for (name, p), grads in zip(params.items(), zip(*columns, strict=True), strict=True)
    }


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def stacked(p: Tensor, grads: Iterable[Tensor | None]) -> Tensor:
    return torch.stack([torch.zeros_like(p) if g is None else g for g in grads]).double()


def judge(of: Subject, mode: str) -> Verdict:
    """Prepare the model, take one step's gradients in a mode, and compare."""
    size = sum(p.numel() for p in of.model.parameters())

    def verdict(outcome: str, *detail: str, error: float = 0.0, excess: float = 0.0) -> Verdict:
        text = "; ".join(detail)
        return Verdict(of.family, of.kind, mode, outcome, text, error, excess, size)

    try:
        with model_zoo.quiet(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with raco_fast.prepare(of.model):
                logits = model_zoo.logits_of(of.model, of.batch)
                if not torch.equal(logits, of.logits):
                    return verdict("outputs differ", f"by {(logits - of.logits).abs().max():.1e}")
                found, expected, plain = MODES[mode](of, scores_of(logits, of.batch))
    except Exception as error:  # noqa: BLE001  # whatever it is, it is the verdict
        return verdict("raises", described(error))
    finally:
        of.model.zero_grad(set_to_none=True)
    plain += [expected(g) for g in of.plain]
    error, excess, worst = compared(found, expected(of.truth), plain)
    said = [str(w.message) for w in caught if "one pass per objective" in str(w.message)]
    if not excess <= 1:
        return verdict(
            "wrong", f"{worst}: {excess:.1e} x what is allowed", *said, error=error, excess=excess
        )
    named = [n for n, _ in (*of.model.named_parameters(), *of.model.named_modules()) if n]
    outcome = "fallback" if said else "exact"
    if any(not any(name in text for name in named) for text in said):
        outcome = "fallback without a name"
    return verdict(outcome, *said, error=error, excess=excess)


def described(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


Found: TypeAlias = tuple[Gradients, Callable[[Gradients], Gradients], list[Gradients]]
"""(What a mode gave, what it should be as a function of the gradients, further draws of plain
float32.)"""


def one_backward(of: Subject, scores: Tensor) -> Found:
    """All m gradients."""
    params = trained(of.model)
    gradients = raco_fast.ObjectiveGradients(list(params.values()), WEIGHTS)
    gradients.backward(losses_of(scores), scores=scores)
    return {n: stacked(p, gradients.of(p).values()) for n, p in params.items()}, dict, []


def gram_first(of: Subject, scores: Tensor) -> Found:
    """G0, with the Gram matrix as if it were one more parameter's gradients.

    Plain float32 makes G0 in two ways: of its m gradients, and by one backward pass of Σ α_i L_i.
    """
    params = trained(of.model)
    gradients = raco_fast.ObjectiveGradients(list(params.values()), WEIGHTS)
    solution = raco_fast.gram_first(gradients, losses_of(scores), scores, c=0.4)
    coefficients = torch.as_tensor(solution.coefficients)
    norms = gram(of.truth).diag().sqrt()

    def with_gram(combined: Gradients, M: Tensor) -> Gradients:
        return combined | {"Gram matrix": (M / norms / norms[:, None])[None]}

    def expected(gradients: Gradients) -> Gradients:
        combined = {n: torch.tensordot(coefficients, g, 1)[None] for n, g in gradients.items()}
        return with_gram(combined, gram(gradients))

    found = {n: stacked(p, [p.grad]) for n, p in params.items()}
    of.model.zero_grad(set_to_none=True)
    losses = losses_of(scores_of(model_zoo.logits_of(of.model, of.batch), of.batch))
    sum(a * loss for a, loss in zip(coefficients.tolist(), losses, strict=True)).backward()
    at_once = {n: stacked(p, [p.grad]) for n, p in params.items()}
    plain = with_gram(at_once, gram(of.plain[0]))
    return with_gram(found, torch.as_tensor(solution.gram)), expected, [plain]


MODES = {"one_backward": one_backward, "gram_first": gram_first}


def gram(gradients: Gradients) -> Tensor:
    flat = torch.cat([g.flatten(1) for g in gradients.values()], dim=1)
    return flat @ flat.T


def compared(
    found: Gradients, truth: Gradients, plain: list[Gradients]
) -> tuple[float, float, str]:
    """`Verdict.error`, `Verdict.excess`, and the parameter that has it.

    Allowed is 1e-5, or twice the error of plain float32. Where that has no digit right
    (the gradient of a key's bias, which softmax does not see, is 0), ten times: noise of any size.
    """
    error, excess, worst = 0.0, 0.0, ""
    for name, exact in truth.items():
        ours = relative(found[name], exact)
        theirs = max(relative(gradients[name], exact) for gradients in plain)
        if theirs <= TOLERANCE:
            error = max(error, ours)
        share = ours / max(TOLERANCE, (2 if theirs < 1 else 10) * theirs)
        if share > excess:
            excess, worst = share, name
    return error, excess, worst


def relative(found: Tensor, exact: Tensor) -> float:
    """The largest relative error over the objectives."""
    size, error = (g.flatten(1).norm(dim=1) for g in (exact, found - exact))
    return float(torch.where(error == 0, 0.0, error / size).nan_to_num(torch.inf).max())
