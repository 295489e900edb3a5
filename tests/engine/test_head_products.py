"""Logits of half-precision operands are float32: values, gradients, what exists on the way."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import raco_fast
from raco_fast.backends import weight_grad
from raco_fast.backends.weight_grad import widened
from raco_fast.dpo.given_logits import unrounded
from raco_fast.engine import contributions, head_products, lm_head
from raco_fast.engine.lm_head import LogitShape, token_logps

N, D, VOCAB, BLOCK = 28, 48, 131, 50
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
TARGETS = torch.randint(0, VOCAB, (N,), generator=torch.Generator().manual_seed(5))
SHAPES = {"plain": LogitShape(), "scaled, capped": LogitShape(1.5, 6.0)}


@pytest.fixture(autouse=True)
def fresh_memory_is_nan():
    """An element that nobody wrote fails."""
    torch.use_deterministic_algorithms(True)  # torch.empty then fills with NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Every block of W is widened in several pieces, the last one smaller."""
    monkeypatch.setattr(weight_grad, "_BLOCK_BYTES", 4 * D * 16)


@pytest.fixture(params=["cpu", "as on a GPU"])
def device_way(request, monkeypatch):
    """Products of this CPU, or those of a GPU: half-precision operands, a float32 result."""
    if request.param == "as on a GPU":
        for module in (lm_head, head_products, contributions):
            monkeypatch.setattr(module, "operand", lambda x: x)

        def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
            assert a.dtype == b.dtype  # as a GPU's products demand
            return torch.mm(widened(a), widened(b), out=out)

        monkeypatch.setattr(head_products, "product", product)
    return request.param


def leaves(dtype: torch.dtype, bias: bool = True) -> list[Tensor | None]:
    """hidden, weight, bias with logits of about ±20, which half precision rounds by sixteenths."""
    generator = torch.Generator().manual_seed(4)
    shapes = [(N, D), (VOCAB, D), (VOCAB,)]
    made = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    return made if bias else [*made[:2], None]


def plain(hidden, weight, bias, shape: LogitShape) -> Tensor:
    return -F.cross_entropy(shape(F.linear(hidden, weight, bias)), TARGETS, reduction="none")


def results(logps: Tensor, given: list[Tensor | None]) -> list[Tensor]:
    """The value and the gradients of unequal multiples of its entries."""
    factors = torch.linspace(-1, 1.7, N, dtype=logps.dtype)
    grads = torch.autograd.grad((factors * logps).sum(), [x for x in given if x is not None])
    return [logps.detach(), *grads]


@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_errors_are_those_of_a_head_in_float32(shape, bias, dtype, device_way):
    """Its values, and its gradients rounded once.

    A GPU reads ∂L/∂z rounded, as that of plain torch in half precision is; from better logits.
    """
    given = leaves(dtype, bias)
    exact, single, half = (
        results(plain(*copies, shape), copies)
        for copies in (
            [None if x is None else x.detach().to(kind).requires_grad_() for x in given]
            for kind in (torch.float64, torch.float32, dtype)
        )
    )
    ours = results(token_logps(*given, TARGETS, shape=shape, max_logits=BLOCK * N), given)
    assert ours[0].dtype == torch.float32
    error, of_single, of_half = ((x[0].double() - exact[0]).norm() for x in (ours, single, half))
    assert error <= 2 * of_single
    assert of_half > 100 * error  # the test sees what it looks for
    for truth, wide, plain_half, mine in zip(exact, single, half, ours, strict=True):
        best = wide.to(mine.dtype) if device_way == "cpu" else plain_half
        assert (mine.double() - truth).norm() <= 2 * (best.double() - truth).norm()
    assert {x.dtype for x in ours[1:]} == {dtype}


class Halves(TorchDispatchMode):
    """The most numbers in any half-precision tensor that holds no rows of D numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, Tensor) and x.dtype in HALVES.values() and x.numel() % D:
                self.most = max(self.most, x.numel())
        return result


class TiedLM(nn.Module):
    """An embedding that is the head as well; four sequences."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.mix = nn.Embedding(VOCAB, D), nn.Linear(D, D)

    def forward(self, ids: Tensor) -> Tensor:
        hidden, index = self.mix(self.words(ids)), torch.arange(4).repeat_interleave(N // 4)
        with raco_fast.sequences(index):
            logps = token_logps(
                hidden.flatten(0, 1), self.words.weight, None, TARGETS, max_logits=BLOCK * N
            )
        return logps.view(4, -1).sum(1)


def losses(scores: Tensor) -> list[Tensor]:
    return [scores[:3].sin().sum(), scores[1:].square().mean()]


@pytest.mark.parametrize("way", ["one_backward", "gram_first"])
def test_no_logit_exists_in_half_precision_whatever_the_mode(way):
    model = TiedLM().bfloat16()
    ids = torch.randint(0, VOCAB, (4, N // 4), generator=torch.Generator().manual_seed(6))

    gradients = raco_fast.ObjectiveGradients(model.parameters(), [0.3, 0.7])
    with raco_fast.prepare(model, strict=True), Halves() as seen:
        scores = model(ids)
        if way == "one_backward":
            gradients.backward(losses(scores), scores=scores)
        else:
            raco_fast.gram_first(gradients, losses(scores), scores)
    assert seen.most < N
    with Halves() as seen:  # the test sees what it looks for
        plain(model.mix(model.words(ids)).flatten(0, 1), model.words.weight, None, LogitShape())
    assert seen.most == N * VOCAB


def test_a_model_s_own_logits_in_half_precision_are_said_once(caplog):
    head, logits = nn.Linear(2, 3), torch.randn(4, 3)
    with caplog.at_level(logging.WARNING, "raco_fast"):
        assert unrounded(head, logits) is logits
        assert not caplog.records
        assert unrounded(head, logits.bfloat16()).dtype == torch.float32
        unrounded(head, logits.bfloat16())
    (record,) = caplog.records
    assert "the logits of Linear come in bfloat16: rounded to it" in record.getMessage()
