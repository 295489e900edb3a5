"""Every way to m gradients on a CUDA device, against float64."""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

import raco_fast
from raco_fast import ObjectiveGradients, gram_first
from raco_fast.engine.lm_head import token_logps
from raco_fast.kernels.weight_grad_plan import pays

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

KINDS = {"full": None, "lora": "lora"}


@pytest.fixture
def on_cuda(lm):
    """A function that gives a model and a batch on the device."""

    def make(family: str, dtype: torch.dtype, kind: str, attention: str = "eager"):
        model = lm.build(family, dtype, KINDS[kind], attention).cuda()
        batch = lm.batch()
        for name, t in vars(batch).items():
            setattr(batch, name, t.cuda())
        return model, batch

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_one_backward_pass_in_float32(lm, family, layout, kind, on_cuda):
    model, batch = on_cuda(family, torch.float32, kind)
    truth = lm.in_float64(model, lambda model: lm.losses(layout(model, batch)))
    gradients = ObjectiveGradients(lm.trained(model).values(), lm.weights(3))
    raco_fast.prepare(model, strict=True)
    scores = layout(model, batch)
    gradients.backward(lm.losses(scores), scores=scores)
    assert max(lm.errors(lm.held(gradients, model), truth).values()) <= 2e-5


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_backward_pass_in_bfloat16_is_at_most_twice_as_far_off_as_torch(
    lm, family, kind, attention, on_cuda
):
    model, batch = on_cuda(family, torch.bfloat16, kind, attention)
    plain = lm.by_autograd(model, lm.losses(lm.by_head(model, batch)))
    truth = lm.in_float64(model, lambda model: lm.losses(lm.by_head(model, batch)))
    gradients = ObjectiveGradients(lm.trained(model).values(), lm.weights(3))
    raco_fast.prepare(model, strict=True)
    scores = lm.by_head(model, batch)
    gradients.backward(lm.losses(scores), scores=scores)
    ours, torchs = lm.errors(lm.held(gradients, model), truth), lm.errors(plain, truth)
    for name, error in ours.items():
        assert error <= 2 * torchs[name] + 1e-3, name


@pytest.mark.parametrize("keep_dy", [False, True], ids=["two passes", "keep dy"])
@pytest.mark.parametrize("kind", KINDS)
def test_gram_first_in_float32(lm, family, kind, keep_dy, on_cuda):
    model, batch = on_cuda(family, torch.float32, kind)

    def losses(model) -> list[Tensor]:
        return lm.losses(lm.by_head(model, batch))

    truth = lm.in_float64(model, losses)
    G = torch.cat([g.flatten(1) for g in truth.values()], 1)
    gradients = ObjectiveGradients(lm.trained(model).values(), lm.weights(3))
    raco_fast.prepare(model, strict=True)
    scores = lm.by_head(model, batch)
    solution = gram_first(gradients, lm.losses(scores), scores, c=0.5, keep_dy=keep_dy)
    exact = (G @ G.T).cpu()
    size = exact.diagonal().sqrt()
    assert float(((solution.gram - exact).abs() / (size[:, None] * size)).max()) <= 1e-5
    direction = torch.as_tensor(solution.coefficients).to(G) @ G
    found = torch.cat([p.grad.flatten() for p in lm.trained(model).values()]).double()
    assert float((found - direction).norm() / direction.norm()) <= 1e-4


@pytest.fixture
def wide(lm):
    """A model in bfloat16 that is wide enough for the kernel of layers, and a batch."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 8}
    assert all(pays(16 * 256, 16, 4, *shape) for shape in ((1024, 1024), (1024, 2048)))
    model = lm.build("llama", torch.bfloat16, head_dim=128, **sizes).cuda()
    generator = torch.Generator().manual_seed(0)
    batch = lm.batch(rows=16)
    batch.ids = torch.randint(3, 61, (16, 256), generator=generator).cuda()
    batch.mask = torch.ones_like(batch.ids, dtype=torch.bool)
    batch.scored = batch.mask.clone()
    batch.scored[:, :4] = False
    return model, batch


def test_the_kernel_of_layers_is_what_torch_computes(lm, wide):
    """One backward pass beside the plain products."""
    model, batch = wide
    plain = lm.by_autograd(model, lm.losses(lm.by_head(model, batch), 4))
    truth = lm.in_float64(model, lambda model: lm.losses(lm.by_head(model, batch), 4))
    torchs = lm.errors(plain, truth)
    for forced in (None, "reference"):
        gradients = ObjectiveGradients(lm.trained(model).values(), lm.weights(4))
        with raco_fast.prepare(model, strict=True), warnings.catch_warnings():
            warnings.simplefilter("error")  # the self-test's, which would put torch in its place
            scores = lm.by_head(model, batch)
            with nullcontext() if forced is None else raco_fast.backend(forced):
                gradients.backward(lm.losses(scores, 4), scores=scores)
        for parameter, error in lm.errors(lm.held(gradients, model), truth).items():
            assert error <= 2 * torchs[parameter] + 1e-3, (forced, parameter)
        model.zero_grad()


def test_a_step_takes_the_products_that_the_kernel_of_layers_has_left(lm, wide):
    model, batch = wide
    params, weights = list(lm.trained(model).values()), lm.weights(4)
    opt = raco_fast.ClippedCAGradAdamW(params, weights=weights, lr=0.0)
    grams = []
    with raco_fast.prepare(model, strict=True):
        for _ in range(2):
            opt.zero_grad()
            scores = lm.by_head(model, batch)
            opt.backward(lm.losses(scores, 4), scores=scores)
            kept = [p for p in params if p.grad.products is not None]
            assert {(1024, 2048), (2048, 1024), (1024, 1024)} <= {tuple(p.shape) for p in kept}
            assert all(p.grad.products.values.is_cuda for p in kept)
            opt.step()
            grams.append(torch.as_tensor(opt.solution.gram))
    assert torch.equal(*grams)
    G = torch.cat([torch.stack(p.grad.buffers).double().flatten(1) for p in params], 1)
    truth = (G @ G.T).cpu()
    size = truth.diagonal().sqrt()
    assert ((grams[0] - truth).abs() <= 1e-6 * torch.outer(size, size)).all()


@pytest.mark.parametrize("vocabulary", [512, 515])
def test_the_head_s_results_in_bfloat16_are_those_of_float32(vocabulary):
    generator = torch.Generator().manual_seed(2)
    hidden, weight = (
        torch.randn(rows, 64, generator=generator).bfloat16().cuda().requires_grad_()
        for rows in (40, vocabulary)
    )
    targets = torch.randint(0, vocabulary, (40,), generator=generator).cuda()
    seeds = torch.linspace(-1, 1.7, 40, device="cuda")

    def by_cross_entropy(dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight)]
        logits = leaves[0] @ leaves[1].T
        wide = logits.float() if dtype == torch.bfloat16 else logits
        logps = -torch.nn.functional.cross_entropy(wide, targets, reduction="none")
        return [logps, *torch.autograd.grad((seeds.to(logps) * logps).sum(), leaves)]

    exact, single, half = map(by_cross_entropy, (torch.float64, torch.float32, torch.bfloat16))
    logps = token_logps(hidden, weight, None, targets, max_logits=40 * 128)
    ours = [logps, *torch.autograd.grad((seeds * logps).sum(), (hidden, weight))]
    for k, (truth, found) in enumerate(zip(exact, ours, strict=True)):
        rival = half[k] if k else single[k]
        assert (found.double() - truth).norm() <= 2 * (rival.double() - truth).norm()
