"""The kernel of weight gradients as the package calls it: one backward pass, and who gets it."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import raco_fast
from raco_fast import ObjectiveGradients
from raco_fast.backends import choose, cpu, cuda, ops, reference, self_test
from raco_fast.backends.types import Call
from raco_fast.kernels import tables

pytestmark = pytest.mark.usefixtures("as_on_cuda")

bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
LENGTHS = (33, 5, 0, 40, 1, 17)  # of the sequences of a packed row; a k-block has 32 rows
D_IN, WIDTH, D_OUT = 48, 144, 32
# The interpreter's tensors are on the CPU, whose backend has plain torch's weight gradients too.
PLAIN = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "reference"


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """The backend of every call of `weight_grad` for several objectives."""
    calls: list[str] = []

    def spied(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def spy(x, dy, bounds, U, *rest) -> Any:
            if U is not None:
                calls.append(name)
            return function(x, dy, bounds, U, *rest)

        return spy

    for module in (cuda, reference, cpu):
        monkeypatch.setattr(module, "weight_grad", spied(module.name, module.weight_grad))
    return calls


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class PerToken(nn.Module):
    """Two Linear layers whose tokens do not meet; one score for each packed sequence."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(D_IN, WIDTH), nn.Linear(WIDTH, D_OUT, bias=False)
        self.to(device, bf16)

    def forward(self, tokens: Tensor) -> Tensor:
        with raco_fast.sequences(cu_seqlens=[0, *torch.tensor(LENGTHS).cumsum(0).tolist()]):
            rows = self.down(self.up(tokens[None]).tanh())[0]
        of_token = torch.repeat_interleave(torch.tensor(LENGTHS)).to(rows.device)
        wide = rows.float() if rows.dtype == bf16 else rows
        return wide.new_zeros(len(LENGTHS)).index_add(0, of_token, wide.sin().sum(1))


def tokens(micro_batch: int, device: torch.device) -> Tensor:
    return randn(sum(LENGTHS), D_IN, seed=micro_batch).to(device, bf16)


def losses(scores: Tensor, m: int) -> list[Tensor]:
    """Scores 0 and 1 share a direction, and the last objective lacks score 3."""
    weights = randn(m, len(LENGTHS), seed=m).to(scores)
    weights[-1, 3] = 0.0
    joined = torch.cat([scores[:1] - 2 * scores[1:2], scores[2:]])
    return [(w[1:] * (joined / 8 + w[0]).sin()).sum() for w in weights]


def by_autograd(model: nn.Module, batches: list[Tensor], m: int) -> dict[str, Tensor]:
    """Parameter name -> [m, *shape] float64, the gradients of micro-batches added up in .grad."""
    found = {}
    for i in range(m):
        model.zero_grad()
        for batch in batches:
            losses(model(batch), m)[i].backward()
        for name, p in model.named_parameters():
            found.setdefault(name, []).append(p.grad.double())
    return {name: torch.stack(of_name) for name, of_name in found.items()}


@pytest.mark.parametrize("m", [2, *(pytest.param(m, marks=pytest.mark.slow) for m in (3, 8))])
def test_one_backward_over_two_micro_batches(m, device, ran):
    model = PerToken(device)
    batches = [tokens(k, device) for k in (1, 2)]
    plain = by_autograd(copy.deepcopy(model), batches, m)
    truth = by_autograd(copy.deepcopy(model).double(), [b.double() for b in batches], m)
    gradients = ObjectiveGradients(model.parameters(), [1.0 / m] * m)
    with raco_fast.prepare(model, strict=True, check_every=None), raco_fast.backend("triton"):
        for batch in batches:
            scores = model(batch)
            gradients.backward(losses(scores, m), scores=scores)
    assert ran == ["triton"] * 4  # two layers, two micro-batches
    for name, p in model.named_parameters():
        found = torch.stack(list(gradients.of(p).values())).double()
        error, theirs = [(g - truth[name]).flatten(1).norm(dim=1) for g in (found, plain[name])]
        assert (error <= 2 * theirs).all(), name


def test_products_of_layers_that_the_kernel_has_written_come_with_them(device, monkeypatch):
    read, plain = set(), cuda.products

    def spy(grads, built) -> Tensor:
        read.update(id(g) for one in grads for g in one)
        return plain(grads, built)

    monkeypatch.setattr(cuda, "products", spy)
    model = PerToken(device)
    opt = raco_fast.ClippedCAGradAdamW(model.parameters(), weights=[0.4, 0.6], lr=1e-3)
    matrices = [model.up.weight, model.down.weight]
    with raco_fast.prepare(model, strict=True, check_every=None), raco_fast.backend("triton"):
        scores = model(tokens(1, device))
        opt.backward(losses(scores, 2), scores=scores)
        for p in matrices:
            rows = torch.stack([g.double().flatten() for g in p.grad.buffers])
            truth, found = rows @ rows.T, p.grad.products.values
            assert found.device == p.device
            assert ((found - truth).abs() <= 2.0**-22 * truth.diagonal().max()).all()
            assert not read & {id(g) for g in p.grad.buffers}
        opt.step()
    G = torch.cat([torch.stack(p.grad.buffers).double().flatten(1) for p in model.parameters()], 1)
    torch.testing.assert_close(torch.as_tensor(opt.solution.gram), (G @ G.T).cpu())


OTHERS = ["reference"] if torch.cuda.is_available() else ["reference", "cpu"]


@pytest.mark.parametrize("name", OTHERS)
def test_with_another_backend_forced_plain_torch_runs(name, device, ran):
    model = PerToken(device)
    gradients = ObjectiveGradients(model.parameters(), [0.4, 0.6])
    with raco_fast.prepare(model, strict=True, check_every=None), raco_fast.backend(name):
        scores = model(tokens(1, device))
        gradients.backward(losses(scores, 2), scores=scores)
    assert ran == [name] * 2


class Layer:
    """Rows of a layer in groups, U as `segments.Factored` leaves it, and the truth in float64."""

    def __init__(self, device, m=2, dtype=bf16, lengths=LENGTHS, d_in=48, d_out=80, out=bf16):
        rows = sum(lengths)
        self.bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
        self.x = randn(rows, d_in, seed=1).to(device, dtype)
        self.dy = randn(rows, d_out, seed=2).to(device, dtype)
        self.U = randn(len(lengths), m, seed=3).T
        self.out = randn(m, d_out, d_in, seed=4).to(device, out)

    def arguments(self) -> tuple[Tensor, Tensor, list[int], Tensor, Tensor]:
        return self.x, self.dy, self.bounds, self.U, self.out

    def truth(self) -> Tensor:
        t = [
            self.dy[a:b].double().T.cpu() @ self.x[a:b].double().cpu()
            for a, b in pairwise(self.bounds)
        ]
        return torch.einsum("ig,gkl->ikl", self.U, torch.stack(t))

    def call(self) -> Call:
        return Call(
            "weight_grad", len(self.U), [[self.out]], [[self.x], [self.dy]], None, self.bounds
        )

    def backend(self) -> str:
        return choose.chosen(self.call()).name

    def obstacle(self) -> str | None:
        return cuda.obstacle(self.call(), False)


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize(
    ("m", "dtype", "out"), [(2, bf16, bf16), (3, fp16, fp32), (8, bf16, fp32), (9, bf16, bf16)]
)
def test_as_exact_as_plain_torch(m, dtype, out, fresh, device, ran):
    layer = Layer(device, m, dtype, out=out)
    truth = layer.truth() + (0 if fresh else layer.out.double().cpu())
    plain = layer.out.clone()
    reference.weight_grad(*layer.arguments()[:4], plain, fresh)
    with raco_fast.backend("triton"):
        ops.weight_grad(*layer.arguments(), fresh)
    assert ran == ["reference", "triton"]
    for ours, theirs, exact in zip(layer.out, plain, truth, strict=True):
        error, limit = [float((g.cpu().double() - exact).norm()) for g in (ours, theirs)]
        assert error <= 2 * max(limit, 2.0**-24 * float(exact.norm()))


def test_rows_with_gaps_and_a_part_of_a_weight(device, ran):
    """A block of a head, and output gradients that lie transposed."""
    layer = Layer(device)
    whole = torch.full((2, 100, 48), 3.0, device=device, dtype=bf16)
    layer.out, layer.dy = whole[:, 16:96], layer.dy.T.contiguous().T
    with raco_fast.backend("triton"):
        ops.weight_grad(*layer.arguments(), True)
    assert ran == ["triton"]
    error = (layer.out.cpu().double() - layer.truth()).norm()
    assert error <= torch.finfo(bf16).eps * layer.truth().norm()
    assert (whole[:, :16] == 3).all()
    assert (whole[:, 96:] == 3).all()


LARGE = {"m": 8, "lengths": (256, 256), "d_in": 512, "d_out": 512}


def test_a_layer_that_the_model_of_costs_gives_to_the_kernel(device):
    assert Layer(device, **LARGE).obstacle() is None
    assert Layer(device, **LARGE).backend() == "triton"
    alone = Layer(device, **{**LARGE, "m": 1})
    assert alone.obstacle() == "one product is a plain product"
    assert alone.backend() == PLAIN


def shifted(layer: Layer) -> None:
    layer.x = torch.cat([layer.x.flatten(), layer.x.new_zeros(1)])[1:].view_as(layer.x)


def subclassed(layer: Layer) -> None:
    layer.dy = layer.dy.as_subclass(type("Mine", (torch.Tensor,), {}))


def with_gaps(layer: Layer) -> None:
    layer.out = layer.out.repeat(1, 1, 2)[..., ::2]


def transposed(layer: Layer) -> None:
    layer.out = layer.out.mT.contiguous().mT


def mixed(layer: Layer) -> None:
    layer.dy = layer.dy.half()


@pytest.mark.parametrize(
    ("given", "change", "reason"),
    [
        ({"dtype": fp32}, None, "takes bfloat16 or float16 inputs .* torch.float32 and torch.fl"),
        ({}, mixed, "of one dtype, got torch.bfloat16 and torch.float16"),
        ({"out": torch.float64}, None, "take bfloat16, float16 and float32, got torch.float64"),
        ({}, subclassed, "take plain tensors, got a Mine"),
        ({}, with_gaps, r"contiguous .* strides \(1024, 2\)"),
        ({}, transposed, r"contiguous .* strides \(1, 512\)"),
        ({"m": 33, "d_in": 16, "d_out": 16}, None, "at most 32 objectives, got 33"),
    ],
)
def test_what_the_kernel_cannot_do_is_done_by_plain_torch(given, change, reason, device):
    layer = Layer(device, **{**LARGE, **given})
    if change is not None:
        change(layer)
    assert layer.backend() == PLAIN
    assert layer.obstacle() is not None
    forced = pytest.raises(RuntimeError, match=f"'triton' cannot run this weight_grad: .*{reason}")
    with raco_fast.backend("triton"), forced:
        layer.backend()


@pytest.mark.parametrize(
    ("given", "change", "reason"),
    [
        ({"d_out": 520}, None, "m = 8 plain products are .* 512 rows in 2 groups, 512 by 520 fea"),
        ({"lengths": (1,) * 300}, None, "modelled to be faster for 300 rows in 300 groups"),
        ({"lengths": (0,) * 8}, None, "for 0 rows in 0 groups"),
        ({}, shifted, "no multiple of 16 are read one by one"),
    ],
)
def test_what_is_slower_on_the_kernel_runs_there_only_if_forced(given, change, reason, device):
    layer = Layer(device, **{**LARGE, **given})
    if change is not None:
        change(layer)
    assert re.search(reason, str(layer.obstacle()))
    assert layer.backend() == PLAIN
    with raco_fast.backend("triton"):
        assert layer.backend() == "triton"


def test_its_proof_is_asked_once_and_leaves_the_other_kernels(device, monkeypatch):
    layer, asked = Layer(device, **LARGE), []

    def found(*call: object) -> str:
        asked.append(call)
        return "`weight_grad` differs"

    monkeypatch.setattr(self_test, "disagreement", found)
    monkeypatch.setattr(choose, "_disagreements", {("triton", layer.x.device, "step"): None})
    with pytest.warns(UserWarning, match="kernel of weight_grad is not used on .*`weight_grad` di"):
        assert layer.backend() == PLAIN
    assert layer.backend() == PLAIN  # warnings are errors here
    assert asked == [(cuda, "weight_grad", layer.x.device)]
    assert choose.chosen(Call("gram", 2, (), [[layer.x], [layer.x]])) is cuda


def test_a_small_layer_is_neither_compiled_nor_proved(device, monkeypatch):
    monkeypatch.setattr(choose, "_disagreements", {})
    monkeypatch.setattr(self_test, "disagreement", None)
    assert Layer(device).backend() == PLAIN


@pytest.mark.parametrize("fresh", [True, False])
def test_the_table_and_the_coefficients_are_sent_once_for_all_layers(fresh, device, monkeypatch):
    sent, to_device = [], tables.to_device
    monkeypatch.setattr(
        tables, "to_device", lambda values, to: (sent.append(values), to_device(values, to))[1]
    )
    tables._uploads.clear()
    layers = [Layer(device, d_in=16 * k, d_out=32) for k in (1, 2, 3)]
    for layer in layers:
        cuda.weight_grad(*layer.arguments(), fresh)
    on_cpu = device.type == "cpu"  # where the coefficients are already
    assert len(sent) == 2 - on_cpu
