"""One backward pass together with what training scripts use."""

import warnings

import pytest
import torch
from torch import Tensor, nn

import raco_fast
from raco_fast import ClippedCAGradAdamW, ObjectiveGradients
from raco_fast.dpo.models import enable_checkpointing


def in_one(lm, model, scores_of, m: int = 3, context=torch.enable_grad) -> dict[str, Tensor]:
    """Gradients of m objectives by one pass of a prepared model; inside `context` altogether."""
    gradients = ObjectiveGradients(lm.trained(model).values(), lm.weights(m))
    with raco_fast.prepare(model, strict=True), context():
        scores = scores_of(model)
        gradients.backward(lm.losses(scores, m), scores=scores)
    return lm.held(gradients, model)


@pytest.mark.parametrize("adapter", [None, "lora"], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["llama, tied, biased", "gpt2"])
def test_checkpointing(lm, layout, family, adapter):
    model, batch = lm.build(family, adapter=adapter), lm.batch()
    truth = lm.in_float64(model, lambda model: lm.losses(layout(model, batch)))
    model.train()
    decoder = getattr(model, "get_base_model", lambda: model)().get_decoder()
    enable_checkpointing(decoder)
    runs = []
    decoder.register_forward_hook(lambda *_: runs.append("forward"))
    block = next(m for n, m in model.named_modules() if n.endswith("1.mlp"))
    block.register_forward_pre_hook(lambda *_: runs.append("block"))
    found = in_one(lm, model, lambda model: layout(model, batch))
    assert runs.count("block") > runs.count("forward") > 0  # it was computed again
    assert max(lm.errors(found, truth).values()) <= 1e-5


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
@pytest.mark.parametrize("adapter", [None, "lora"], ids=["full", "lora"])
def test_autocast(lm, family, layout, adapter, inside):
    model, batch = lm.build(family, adapter=adapter), lm.batch()

    def scores_of(model) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return layout(model, batch)

    def context():
        return torch.autocast("cpu", torch.bfloat16, enabled=inside)

    truth = lm.in_float64(model, lambda model: lm.losses(layout(model, batch)))
    plain = lm.errors(lm.by_autograd(model, lm.losses(scores_of(model))), truth)
    ours = lm.errors(in_one(lm, model, scores_of, context=context), truth)
    assert max(plain.values()) > 1e-3  # autocast was on
    for name, error in ours.items():
        assert error <= 2 * plain[name], name


@pytest.mark.parametrize("checkpointed", [False, True])
def test_dropout_draws_the_same_masks(lm, layout, checkpointed):
    model, batch = lm.build("llama", attention_dropout=0.3), lm.batch()
    if checkpointed:
        enable_checkpointing(model)
    model = lm.adapted(model, "lora", dropout=0.4).train()

    def scores_of(model) -> Tensor:
        torch.manual_seed(8)
        return layout(model, batch)

    with raco_fast.prepare(model, strict=True):
        assert not torch.equal(layout(model, batch), layout(model, batch))
    truth = lm.by_autograd(model, lm.losses(scores_of(model)))
    found = in_one(lm, model, scores_of)
    assert max(lm.errors(found, truth).values()) <= 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_frozen_parameters(lm, family, layout):
    model, batch = lm.build(family), lm.batch()
    for k, p in enumerate(model.parameters()):
        p.requires_grad_(k % 3 == 1)
    truth = lm.in_float64(model, lambda model: lm.losses(layout(model, batch)))
    found = in_one(lm, model, lambda model: layout(model, batch))
    assert max(lm.errors(found, truth).values()) <= 1e-5
    assert all(p.requires_grad or p.grad is None for p in model.parameters())


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_an_adapter_on_a_bfloat16_base(lm, family, layout):
    model, batch = lm.build(family, torch.bfloat16, "lora"), lm.batch()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.float32}
    truth = lm.in_float64(model, lambda model: lm.losses(layout(model, batch)))
    plain = lm.errors(lm.by_autograd(model, lm.losses(layout(model, batch))), truth)
    ours = lm.errors(in_one(lm, model, lambda model: layout(model, batch)), truth)
    for name, error in ours.items():
        assert error <= 2 * plain[name], name


def test_sdpa_attention(lm, family, layout):
    model, batch = lm.build(family, attention="sdpa"), lm.batch()
    assert model.config._attn_implementation == "sdpa"
    truth = lm.in_float64(model, lambda model: lm.losses(layout(model, batch)))
    found = in_one(lm, model, lambda model: layout(model, batch))
    assert max(lm.errors(found, truth).values()) <= 1e-5


def micro_batches(batch, pairs: int):
    """Parts of a batch with so many pairs each."""
    rows = [slice(k, k + 2 * pairs) for k in range(0, len(batch.ids), 2 * pairs)]
    return [type(batch)(**{name: x[r] for name, x in vars(batch).items()}) for r in rows]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mixed", [False, True], ids=["scores", "scores and objective()"])
def test_micro_batches_give_what_the_whole_batch_gives(lm, layout, dtype, mixed):
    model, batch = lm.build("llama, tied, biased", dtype), lm.batch(16)
    gradients = ObjectiveGradients(model.parameters(), {"a": 0.2, "b": 0.3, "c": 0.5})
    raco_fast.prepare(model, strict=True)

    def losses(scores: Tensor) -> dict[str, Tensor]:
        margins = scores[0::2] - scores[1::2]  # sums, so that parts add up to the whole
        return {
            "a": margins.tanh().sum(),
            "b": margins.square().sum() / 9,
            "c": scores[1::2].sum() / 5,
        }

    def by_autograd(*parts) -> list[Tensor]:
        for part in parts:
            gradients.backward(losses(layout(model, part)))
        return held()

    def held() -> list[Tensor]:
        found = [g.clone() for p in model.parameters() for g in gradients.of(p).values()]
        gradients.zero()
        return found

    def error(found: list[Tensor]) -> float:
        return max(float((a - b).norm() / b.norm()) for a, b in zip(found, whole, strict=True))

    scores = layout(model, batch)
    gradients.backward(losses(scores), scores=scores)
    whole = held()
    for k, part in enumerate(micro_batches(batch, 1)):
        scores = layout(model, part)
        if mixed and k % 2:
            for name, loss in losses(scores).items():
                with gradients.objective(name):
                    loss.backward(retain_graph=name != "c")
        else:
            gradients.backward(losses(scores), scores=scores)
    apart = held()
    assert error(apart) <= max(1e-5, 2 * error(by_autograd(*micro_batches(batch, 1))))


@pytest.mark.parametrize("layout", ["logits", "head"], indirect=True)
def test_steps_on_micro_batches_are_steps_on_the_whole_batch(lm, layout):
    """In float64 and with a large eps, for a step magnifies rounding: a conflict is solved by a
    small difference of gradients, and AdamW divides by theirs. (Packed, attention's float32 softmax
    makes the scores of a part differ by 2e-8 before any of this, which steps make 1e-5 of.)
    """
    batch, runs = lm.batch(16), []
    for pairs in (8, 1):
        model = lm.build("llama, tied, biased", torch.float64)
        opt = raco_fast.ClippedCAGradAdamW(
            model.parameters(), lr=1e-2, eps=1e-3, weights=[0.2, 0.3, 0.5]
        )
        raco_fast.prepare(model, strict=True)
        for _ in range(3):
            for part in micro_batches(batch, pairs):
                scores = layout(model, part)
                margins = scores[0::2] - scores[1::2]
                losses = [margins.tanh().sum(), margins.square().sum() / 9, -scores[1::2].sum() / 5]
                opt.backward(losses, scores=scores)
            opt.step()
            opt.zero_grad()
        runs.append([*model.parameters()])
    start = lm.build("llama, tied, biased", torch.float64).parameters()
    for whole, apart, before in zip(*runs, start, strict=True):
        moved = (whole - before).norm()
        assert moved > 0
        assert (whole - apart).norm() <= 1e-9 * moved


@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(lm, unscale):
    batch, weights = lm.batch(), {"a": 0.3, "b": 0.7}
    runs = []
    for scale in (1.0, 2.0**12):
        model = lm.build()
        raco_fast.prepare(model, strict=True)
        opt = ClippedCAGradAdamW(
            model.parameters(), lr=0.01, weight_decay=0.1, weights=weights, max_grad_norm=1.0
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
        for _ in range(3):
            scores = lm.by_head(model, batch)
            losses = [scaler.scale(loss) for loss in lm.losses(scores, 2)]
            opt.backward(losses, scores=scores)
            if unscale:
                scaler.unscale_(opt)
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
        assert scaler.get_scale() == 2 * scale
        runs.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-5, atol=1e-6)


def test_overflow_of_float16_skips_the_step(lm):
    model, batch = lm.build(), lm.batch()
    raco_fast.prepare(model, strict=True)
    opt = ClippedCAGradAdamW(model.parameters(), lr=0.01, weights={"a": 0.3, "b": 0.7})
    before = [p.detach().clone() for p in model.parameters()]
    changed = []
    for scale in (2.0**40, 2.0**8):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        with torch.autocast("cpu", torch.float16):
            scores = lm.by_head(model, batch)
        opt.backward([scaler.scale(loss) for loss in lm.losses(scores, 2)], scores=scores)
        scaler.step(opt)
        opt.zero_grad()
        changed.append(
            any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        )
    assert changed == [False, True]
    assert opt.skipped_steps == 1


@pytest.mark.parametrize("mode", ["one_backward", "gram_first"])
def test_a_score_that_is_not_a_number_skips_the_step(lm, mode):
    model, batch = lm.build(), lm.batch()
    raco_fast.prepare(model, strict=True)
    opt = ClippedCAGradAdamW(model.parameters(), lr=0.01, weights={"a": 0.3, "b": 0.7})
    before = [p.detach().clone() for p in model.parameters()]
    scores = lm.by_head(model, batch) + torch.tensor([torch.nan] + [0.0] * 7)
    opt.backward(lm.losses(scores, 2), scores=scores, mode=mode)
    if mode == "one_backward":
        nowhere_finite = [not g[0].isfinite().any() for g in lm.held(opt.gradients, model).values()]
        assert sum(nowhere_finite) > len(before) / 2
    opt.step()
    assert opt.skipped_steps == 1
    assert not opt.solution.finite
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).tanh())


class Small(nn.Module):
    """Words, positions and two blocks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places = nn.Embedding(17, 6), nn.Embedding(9, 6)
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1])[None])
        return self.blocks(x).square().sum((1, 2))


def compile_blocks(model: Small, backend: str):
    for block in model.blocks:
        block.compile(backend=backend)
    return model


def compile_all(model: Small, backend: str):
    return torch.compile(model, backend=backend)


IDS = torch.randint(0, 17, (4, 7), generator=torch.Generator().manual_seed(4))


def small_losses(scores: Tensor) -> list[Tensor]:
    return [scores[:3].sin().sum(), scores[1:].square().sum() / 50]


@pytest.mark.slow
@pytest.mark.parametrize("when", ["after", "before", "after a run"])
@pytest.mark.parametrize("how", [compile_blocks, compile_all])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
# torch's compiler reads the .grad of its inputs, which warns where warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is")
def test_compiled_modules(lm, how, when, backend):
    """Prepared first, they are exact; compiled first, exact or left to autograd with a warning.

    So are positions whose sum with the words is in compiled code, where no graph shows it.
    """
    torch._dynamo.reset()
    model = Small()
    served = when == "after" and not (how is compile_all and backend == "aot_eager")
    truth = lm.in_float64(model, lambda model: small_losses(model(IDS)))
    if when == "after":
        raco_fast.prepare(model, strict=served)
        run = how(model, backend)
    else:
        run = how(model, backend)
        if when == "after a run":
            torch._functorch.config.donated_buffer = False  # as `prepare` leaves it
            run(IDS).sum().backward()
            model.zero_grad()
        raco_fast.prepare(model)
    gradients = ObjectiveGradients(model.parameters(), lm.weights(2))
    for _ in range(2):
        gradients.zero()
        scores = run(IDS)
        with warnings.catch_warnings(record=True) as seen:
            warnings.filterwarnings("always", "one backward pass for all objectives would be wrong")
            gradients.backward(small_losses(scores), scores=scores)
        assert not seen if served else all("one pass per obj" in str(w) for w in seen)
        assert max(lm.errors(lm.held(gradients, model), truth).values()) <= 1e-5
    model.zero_grad()
    small_losses(run(IDS))[0].backward()
    ordinary = {name: p.grad[None].double() for name, p in model.named_parameters()}
    first = {name: g[:1] for name, g in truth.items()}
    assert max(lm.errors(ordinary, first).values()) <= 1e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is")
def test_compiled_blocks_of_a_language_model(lm, family):
    torch._dynamo.reset()
    model, batch = lm.build(family), lm.batch()
    truth = lm.in_float64(model, lambda model: lm.losses(lm.by_head(model, batch)))
    raco_fast.prepare(model, strict=True)
    decoder = model.get_decoder()
    for block in getattr(decoder, "layers", None) or decoder.h:
        block.compile(backend="aot_eager")
    gradients = ObjectiveGradients(model.parameters(), lm.weights(3))
    scores = lm.by_head(model, batch)
    gradients.backward(lm.losses(scores), scores=scores)
    assert max(lm.errors(lm.held(gradients, model), truth).values()) <= 1e-5
