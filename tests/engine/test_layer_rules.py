"""Which layer gets which rule, and every rule against autograd in float64."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma3.modeling_gemma3 import (
    Gemma3RMSNorm,
    Gemma3TextScaledWordEmbedding,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.nemotron.modeling_nemotron import NemotronLayerNorm1P
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.pytorch_utils import Conv1D

import raco_fast
from raco_fast.engine import layer_rules
from raco_fast.engine.contributions import vector_use
from raco_fast.engine.layer_rules import register_layer_rule, rule_for
from raco_fast.engine.sequences import Segments

D, D_OUT, VOCAB = 6, 4, 11
GROUPED = Segments(5, torch.tensor([0, 4, 1, 3]), (0, 2, 3, 4))  # row 2 belongs to no group
LAYERS = {
    "linear": lambda: nn.Linear(D, D_OUT),
    "linear without bias": lambda: nn.Linear(D, D_OUT, bias=False),
    "conv1d": lambda: Conv1D(D_OUT, D),
    "square conv1d": lambda: Conv1D(D, D),
    "embedding": lambda: nn.Embedding(VOCAB, D),
    "embedding with padding": lambda: nn.Embedding(VOCAB, D, padding_idx=3),
    "gemma embedding": lambda: Gemma3TextScaledWordEmbedding(VOCAB, D, 9, embed_scale=2.5),
    "layer norm": lambda: nn.LayerNorm(D, eps=0.3),
    "layer norm without bias": lambda: nn.LayerNorm(D, bias=False),
    "layer norm of cohere": lambda: CohereLayerNorm(D, eps=0.3),
    "layer norm of nemotron": lambda: NemotronLayerNorm1P(D, eps=0.3),
    "rms norm": lambda: nn.RMSNorm(D),
    "rms norm with eps": lambda: nn.RMSNorm(D, eps=0.3),
    "llama norm": lambda: LlamaRMSNorm(D, eps=0.3),
    "qwen norm": lambda: Qwen3RMSNorm(D, eps=0.3),
    "gemma norm": lambda: Gemma3RMSNorm(D, eps=0.3),
}
EXPECTED = {"linear": "linear", "conv1d": "conv1d", "embedding": "embedding", "layer": "layer_norm"}


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(name: str) -> nn.Module:
    """A layer whose parameters are nothing special."""
    layer = LAYERS[name]()
    for k, p in enumerate(layer.parameters()):
        nn.init._no_grad_normal_(p, 0.3, 1.0, generator=torch.Generator().manual_seed(k))
    return layer


def input_of(layer: nn.Module) -> Tensor:
    if isinstance(layer, nn.Embedding):
        return torch.randint(0, VOCAB, (5, 7), generator=torch.Generator().manual_seed(1))
    return randn(5, 7, D, seed=1) + 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_known_by_what_they_compute(name, dtype):
    rule = rule_for(make(name).to(dtype))
    kind = next((kind for word, kind in EXPECTED.items() if word in name), "rms_norm")
    assert getattr(rule, "func", rule) is getattr(layer_rules, kind)
    if isinstance(rule, partial):
        assert rule.keywords == {"scale": 2.5}


@pytest.mark.parametrize("name", LAYERS)
def test_rules_agree_with_autograd(name):
    layer = make(name).double()
    x = input_of(layer)
    x = x if isinstance(layer, nn.Embedding) else x.double()
    y = layer(x)
    dy = randn(*y.shape, seed=2).double()
    uses = rule_for(layer)(layer, x, dy, GROUPED)
    assert set(uses) == {n for n, _ in layer.named_parameters()}
    for parameter, use in uses.items():
        truth = []
        for rows in torch.split(GROUPED.order, [2, 1, 1]):
            of_group = torch.zeros_like(dy).index_copy_(0, rows, dy[rows])
            p = getattr(layer, parameter)
            truth.append(torch.autograd.grad(y, p, of_group, retain_graph=True)[0])
        truth = torch.stack(truth)
        found = torch.empty_like(truth)
        use.add_to(found, torch.eye(3), fresh=True)
        # Hugging Face norms compute in float32 whatever they are given.
        tolerance = 1e-6 if "transformers" in type(layer).__module__ else 1e-13
        torch.testing.assert_close(found, truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_default_eps_is_the_one_that_torch_uses(dtype):
    layer, x = nn.RMSNorm(D).to(dtype), (0.01 * randn(5, 7, D, seed=1)).to(dtype)
    dy, found = randn(5, 7, D, seed=2).to(dtype), torch.empty(1, D)
    everything = Segments(1, None, (0, 1))
    rule_for(layer)(layer, x, dy, everything)["weight"].add_to(found, None, fresh=True)
    normed = F.rms_norm(x, (D,)).float()
    error = (found[0] - (dy.float() * normed).sum((0, 1))).abs().max()
    assert error <= 4 * torch.finfo(dtype).eps * (dy.float() * normed).abs().sum((0, 1)).max()


class Lookalike(nn.Module):
    """Has what an RMSNorm has and computes something else."""

    def __init__(self, compute) -> None:
        super().__init__()
        self.weight, self.eps, self.compute = nn.Parameter(torch.ones(512)), 1e-6, compute

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x, self.weight, self.eps)


def outside(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return w * x / (x.square().mean(-1, keepdim=True).sqrt() + eps)


LOOKALIKES = {
    "epsilon outside the root": lambda: Lookalike(outside),
    "mean over all rows": lambda: Lookalike(lambda x, w, eps: w * x / x.square().mean().sqrt()),
    "no norm": lambda: Lookalike(lambda x, w, eps: w * x),
    "squared weight": lambda: Lookalike(lambda x, w, eps: w**2 * F.rms_norm(x, (512,), eps=eps)),
    "half": lambda: Lookalike(lambda x, w, eps: 0.5 * w * F.rms_norm(x, (512,), eps=eps)),
    "integers": lambda: Lookalike(lambda x, w, eps: x.long()),
    "two results": lambda: Lookalike(lambda x, w, eps: (x, w)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", LOOKALIKES)
def test_a_norm_that_computes_something_else_is_not_recognised(name, dtype):
    assert rule_for(LOOKALIKES[name]().to(dtype)) is None


class Unwilling(nn.Module):
    """A layer that fails, in its own way, when it is given one tensor of floats."""

    def __init__(self, failure: Exception) -> None:
        super().__init__()
        self.weight, self.eps, self.failure = nn.Parameter(torch.ones(3)), 1e-6, failure

    def forward(self, x: Tensor) -> Tensor:
        raise self.failure


@pytest.mark.parametrize(
    "failure",
    [TypeError(), ValueError(), IndexError(), KeyError(), AttributeError(), AssertionError()],
)
def test_a_layer_that_wants_other_arguments_is_another_layer(failure):
    assert rule_for(Unwilling(failure)) is None


class Shifted(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + 1.0


class Reversed(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(self.num_embeddings - 1 - ids)


class Times(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight + self.bias).relu()


def replaced() -> nn.Module:
    layer = nn.Linear(3, 2)
    layer.forward = lambda x: F.linear(x, 2 * layer.weight, layer.bias)
    return layer


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Embedding(VOCAB, D, max_norm=1.0),
        lambda: nn.Embedding(VOCAB, D, scale_grad_by_freq=True),
        lambda: nn.Embedding(VOCAB, D, sparse=True),
        lambda: nn.LayerNorm([3, 4]),
        lambda: nn.RMSNorm([3, 4]),
        lambda: OPTLearnedPositionalEmbedding(VOCAB, D),
        lambda: Shifted(VOCAB, D),
        lambda: Reversed(VOCAB, D),
        Times,
        lambda: nn.Conv1d(3, 3, 1),
        lambda: nn.PReLU(),
        replaced,
        lambda: nn.utils.spectral_norm(nn.Linear(3, 2)),
    ],
)
def test_no_rule(layer):
    assert rule_for(layer()) is None


@pytest.mark.parametrize(
    ("module_type", "rule", "message"),
    [
        (
            nn.Linear(2, 2),
            layer_rules.linear,
            r"`module_type` must be a subclass of nn.Module, got Linear",
        ),
        (
            int,
            layer_rules.linear,
            r"`module_type` must be a subclass of nn.Module, got <class 'int'>",
        ),
        (
            nn.Bilinear,
            "linear",
            r"`rule` must be a function \(module, x, dy, segments\), got 'linear'",
        ),
    ],
)
def test_register_layer_rule_refuses(module_type, rule, message):
    with pytest.raises(TypeError, match=message):
        register_layer_rule(module_type, rule)
    assert nn.Bilinear not in layer_rules._RULES


class Scale(nn.Module):
    """A layer of the user's own: no rule of ours fits."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.linspace(0.5, 2.0, D))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def scale_rule(module, x, dy, segments):
    return {"factor": vector_use(x * dy, segments)}


class Inherited(Scale):
    pass


class Changed(Scale):
    def forward(self, x: Tensor) -> Tensor:
        return x / self.factor


@pytest.fixture
def rules(monkeypatch) -> None:
    """Rules registered in a test end with it."""
    monkeypatch.setattr(layer_rules, "_RULES", dict(layer_rules._RULES))


@pytest.mark.usefixtures("rules")
def test_a_rule_holds_for_subclasses_that_keep_the_forward():
    assert rule_for(Scale()) is None
    register_layer_rule(Scale, scale_rule)
    assert rule_for(Scale()) is rule_for(Inherited()) is scale_rule
    assert rule_for(Changed()) is None


@pytest.mark.usefixtures("rules")
def test_the_old_name_works_and_says_the_new_one():
    with pytest.warns(DeprecationWarning, match=r"raco_fast.register_layer_rule now$") as caught:
        raco_fast.register_rule(Scale, scale_rule)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert rule_for(Scale()) is scale_rule


@pytest.mark.usefixtures("rules")
def test_a_rule_of_the_user_replaces_ours_and_its_conditions():
    register_layer_rule(nn.Embedding, scale_rule)
    assert rule_for(nn.Embedding(VOCAB, D, max_norm=1.0)) is scale_rule


@pytest.mark.usefixtures("rules")
def test_a_rule_of_the_user_at_work():
    register_layer_rule(Scale, scale_rule)
    model, x = nn.Sequential(nn.Linear(D, D), Scale(), nn.Tanh()), randn(4, 3, D, seed=1)
    gradients = raco_fast.ObjectiveGradients(model.parameters(), {"a": 0.4, "b": 0.6})
    scores = model(x).sum((1, 2))
    losses = {"a": scores[:2].square().sum(), "b": (scores[1:] - 1).square().sum()}
    truth = {
        n: torch.autograd.grad(loss, model[1].factor, retain_graph=True)
        for n, loss in losses.items()
    }
    with raco_fast.prepare(model, strict=True):
        scores = model(x).sum((1, 2))
        losses = {"a": scores[:2].square().sum(), "b": (scores[1:] - 1).square().sum()}
        gradients.backward(losses, scores=scores)
    for name, (expected,) in truth.items():
        torch.testing.assert_close(gradients.of(model[1].factor)[name], expected)


@pytest.mark.usefixtures("rules")
def test_a_rule_that_forgets_a_parameter_is_named():
    register_layer_rule(Scale, lambda module, x, dy, segments: {})
    model = nn.Sequential(Scale())
    raco_fast.prepare(model)
    gradients = raco_fast.ObjectiveGradients(model.parameters(), [0.4, 0.6])
    scores = model(randn(4, D, seed=1)).sum(1)
    with pytest.raises(
        ValueError, match=r"rule of layer '0' \(Scale\) gives nothing for \['factor'\]"
    ):
        gradients.backward([scores.sum(), scores.square().sum()], scores=scores)


def test_the_row_of_a_padding_token_has_no_gradient_whatever_comes_to_it():
    """As in torch, which leaves those rows of dY out: a product with zero would keep NaN."""
    layer, ids = nn.Embedding(VOCAB, D, padding_idx=3), torch.tensor([[1, 3], [3, 2]])
    dy = randn(2, 2, D, seed=1)
    dy[ids == 3] = torch.nan
    found = torch.empty(1, VOCAB, D)
    rule_for(layer)(layer, ids, dy, Segments(1, None, (0, 1)))["weight"].add_to(found, None, True)
    (expected,) = torch.autograd.grad(layer(ids), layer.weight, dy)
    torch.testing.assert_close(found[0], expected)
    assert found.isfinite().all()
