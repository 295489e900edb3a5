"""The head that cuts the vocabulary, against cross-entropy on full logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import raco_fast
from raco_fast.engine import contributions
from raco_fast.engine.lm_head import LogitShape, _block_of, token_logps

N, D, VOCAB = 20, 6, 31
SHAPES = {
    "plain": LogitShape(),
    "factor": LogitShape(0.3),
    "softcap": LogitShape(cap=2.0),
    "both": LogitShape(3.0, 1.5),
}
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


def inputs(dtype: torch.dtype, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    """hidden, weight, bias; bias and hidden large enough to matter."""
    generator = torch.Generator().manual_seed(4)
    shapes = [(N, D), (VOCAB, D), (VOCAB,)][: 2 + bias]
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    leaves = [x.to(dtype).requires_grad_() for x in made]
    return leaves[0], leaves[1], leaves[2] if bias else None


def targets() -> Tensor:
    drawn = torch.randint(0, VOCAB, (N,), generator=torch.Generator().manual_seed(5))
    drawn[:2] = torch.tensor([0, VOCAB - 1])
    return drawn


def by_cross_entropy(hidden, weight, bias, shape: LogitShape) -> Tensor:
    y = F.linear(hidden, weight, bias)
    z = shape.factor * (y if y.dtype == torch.float64 else y.float())
    z = z if shape.cap is None else shape.cap * torch.tanh(z / shape.cap)
    return -F.cross_entropy(z, targets(), reduction="none")


def with_gradients(logps: Tensor, *leaves: Tensor | None) -> list[Tensor]:
    """The value and the gradients of unequal multiples of its entries, in float64."""
    factors = torch.linspace(-1, 1.7, N, dtype=logps.dtype)
    grads = torch.autograd.grad((factors * logps).sum(), [x for x in leaves if x is not None])
    return [logps.detach().double(), *(g.double() for g in grads)]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("block", [1, 7, VOCAB, 10 * VOCAB])
def test_values_and_gradients_for_any_size_of_block(block, shape, bias, dtype):
    leaves = inputs(dtype, bias)
    wide = [None if x is None else x.detach().double().requires_grad_() for x in leaves]
    truth = with_gradients(by_cross_entropy(*wide, shape), *wide)
    plain = with_gradients(by_cross_entropy(*leaves, shape), *leaves)
    logps = token_logps(*leaves, targets(), shape=shape, max_logits=block * N)
    assert logps.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    ours = with_gradients(logps, *leaves)
    for exact, theirs, mine in zip(truth, plain, ours, strict=True):
        if dtype == torch.float64:
            torch.testing.assert_close(mine, exact, rtol=1e-12, atol=1e-13)
        else:
            assert (mine - exact).norm() <= 2 * (theirs - exact).norm()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_of_a_head_that_is_a_module(shape):
    """What `dpo` does where an adapter sits inside the head."""
    leaves = inputs(torch.float64)
    z = shape(F.linear(*leaves))
    logps = -F.cross_entropy(z, targets(), reduction="none")
    ours = with_gradients(logps, *leaves)
    theirs = with_gradients(by_cross_entropy(*leaves, shape), *leaves)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


class WidestRows(TorchDispatchMode):
    """The most columns of any tensor that has a row for every token."""

    def __init__(self) -> None:
        super().__init__()
        self.columns = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, Tensor) and x.ndim == 2 and len(x) == N:
                self.columns = max(self.columns, x.shape[1])
        return result


@pytest.mark.parametrize("block", [D, 10])
def test_no_more_logits_exist_than_were_asked_for(block):
    leaves = inputs(torch.float32)
    with WidestRows() as seen:
        token_logps(*leaves, targets(), max_logits=block * N + N - 1).sum().backward()
    assert seen.columns == block
    with WidestRows() as seen:  # the test sees what it looks for
        by_cross_entropy(*leaves, LogitShape()).sum().backward()
    assert seen.columns == VOCAB


@pytest.mark.parametrize(("block", "on_cuda"), [(9, 9), (16, 16), (8388, 8384)])
def test_blocks_are_whole_vectors_on_a_gpu(block, on_cuda):
    limits = [block * N, block * N + N - 1]
    assert [_block_of(limit, N, cuda=False) for limit in limits] == [block] * 2
    assert [_block_of(limit, N, cuda=True) for limit in limits] == [on_cuda] * 2
    assert _block_of(3, N, cuda=True) == 1


class TiedLM(nn.Module):
    """An embedding that is the head as well; scores of sequences in a packed row."""

    def __init__(self, block: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.mix = nn.Embedding(VOCAB, D), nn.Linear(D, D)
        self.head, self.block = nn.Linear(D, VOCAB), block
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor, index: Tensor) -> Tensor:
        with raco_fast.sequences(index):
            hidden = self.mix(self.words(ids)).tanh()
            logps = token_logps(
                hidden, self.head.weight, self.head.bias, targets(), max_logits=self.block * N
            )
        return logps.new_zeros(int(index.max()) + 1).index_add(0, index, logps)


@pytest.mark.parametrize("keep_dy", [True, False])
def test_no_more_logits_exist_for_several_objectives_of_a_tied_head(monkeypatch, keep_dy):
    monkeypatch.setattr(contributions, "_FEW", 0)  # a small matrix's gradients lie in one row
    model, index = TiedLM(7), torch.arange(N) % 5
    ids = torch.randint(0, VOCAB, (N,), generator=torch.Generator().manual_seed(6))
    gradients = raco_fast.ObjectiveGradients(model.parameters(), [0.2, 0.3, 0.5])
    raco_fast.prepare(model, strict=True)

    def losses(scores: Tensor) -> list[Tensor]:
        return [scores[:3].sin().sum(), scores[2:].cos().sum(), scores.square().sum()]

    for way in ("one_backward", "gram_first"):
        with WidestRows() as seen:
            scores = model(ids, index)
            if way == "one_backward":
                gradients.backward(losses(scores), scores=scores)
            else:
                raco_fast.gram_first(gradients, losses(scores), scores, keep_dy=keep_dy)
        # Token pairs may be as many as tokens: their products are no logits.
        assert seen.columns in (7, N)
        gradients.zero()


@pytest.mark.parametrize(
    "trained", [(True, False, False), (False, True, False), (False, False, True)]
)
def test_what_is_frozen_gets_nothing(trained):
    leaves = inputs(torch.float64)
    expected = with_gradients(by_cross_entropy(*leaves, LogitShape()), *leaves)[1:]
    for x, on in zip(leaves, trained, strict=True):
        x.requires_grad_(on)
    logps = token_logps(*leaves, targets(), max_logits=7 * N)
    (torch.linspace(-1, 1.7, N, dtype=torch.float64) * logps).sum().backward()
    for x, grad, on in zip(leaves, expected, trained, strict=True):
        if on:
            torch.testing.assert_close(x.grad, grad)
        else:
            assert x.grad is None


def test_under_autocast_the_head_multiplies_in_its_dtype():
    leaves = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = with_gradients(token_logps(*leaves, targets(), max_logits=7 * N), *leaves)
        plain = with_gradients(by_cross_entropy(*leaves, LogitShape()), *leaves)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    truth = with_gradients(by_cross_entropy(*wide, LogitShape()), *wide)
    for exact, theirs, mine in zip(truth, plain, ours, strict=True):
        error = (mine - exact).norm()
        assert error <= 2 * (theirs - exact).norm()
        assert error > 1e-5 * exact.norm()  # bfloat16, not float32


def test_no_rows_at_all():
    hidden, weight, bias = inputs(torch.float32)
    logps = token_logps(hidden[:0], weight, bias, targets()[:0])
    assert logps.shape == (0,)
    logps.sum().backward()
    assert not weight.grad.any()
    assert not bias.grad.any()
    assert not hidden.grad.any()


@pytest.mark.parametrize("block", [1, 7, VOCAB])
def test_gradients_of_every_objective(block):
    model, index = TiedLM(block).double(), torch.tensor([2, 0, 1, 1] * 5)
    ids = torch.randint(0, VOCAB, (N,), generator=torch.Generator().manual_seed(6))
    params = list(model.parameters())
    gradients = raco_fast.ObjectiveGradients(params, [0.2, 0.3, 0.5])

    def run() -> tuple[list[Tensor], Tensor]:
        scores = model(ids, index)
        return [scores[:2].sin().sum(), scores[1:].cos().sum(), torch.tensor(1.0)], scores

    truth = [torch.autograd.grad(run()[0][i], params) for i in range(2)]
    with raco_fast.prepare(model, strict=True):
        losses, scores = run()
        gradients.backward(losses, scores=scores)
    for k, p in enumerate(params):
        of_p = gradients.of(p)
        for i in range(2):
            torch.testing.assert_close(of_p[str(i)], truth[i][k])
        assert not of_p["2"].any()


def test_rows_of_sequences_without_a_gradient_change_nothing():
    """All of a call's rows may be of sequences that no objective has anything for."""
    model, ids = TiedLM(7), torch.arange(N) % VOCAB
    gradients = raco_fast.ObjectiveGradients(model.parameters(), [0.4, 0.6])
    raco_fast.prepare(model, strict=True)
    found = []
    for extra in (False, True):
        scores = model(ids, torch.arange(N) % 4)
        losses = [scores[:2].sin().sum(), scores[1:3].square().sum()]
        if extra:
            more = model(ids, torch.full((N,), 4))
            scores = torch.cat([scores, more[4:]])
            losses = [scores[:2].sin().sum(), scores[1:3].square().sum()]
        gradients.backward(losses, scores=scores)
        found.append([g.clone() for p in model.parameters() for g in gradients.of(p).values()])
        gradients.zero()
    torch.testing.assert_close(found[1], found[0])
