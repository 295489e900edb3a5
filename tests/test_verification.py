"""`verify` tells good models from bad ones, and leaves both as they were."""

import pytest
import torch
from process_group import process_group_of_one
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import raco_fast
from raco_fast import verify
from raco_fast.engine import layer_rules


@pytest.fixture
def batch_of(lm):
    """A function that gives `verify` its batch."""

    def make(scores_of):
        batch = lm.batch()

        def run(model):
            scores = scores_of(model, batch)
            return dict(zip("abc", lm.losses(scores), strict=True)), scores

        return run

    return make


@pytest.mark.parametrize("prepared", [False, True])
def test_an_exact_model(lm, family, layout, batch_of, prepared):
    model = lm.build(family)
    if prepared:
        raco_fast.prepare(model)
    errors = verify(model, batch_of(layout), quiet=True)
    assert errors.keys() == lm.trained(model).keys()
    assert list(errors.values()) == sorted(errors.values(), reverse=True)
    assert 1e-9 < max(errors.values()) < 1e-5


def test_bfloat16_shows_its_own_precision(lm, batch_of):
    errors = verify(lm.build(dtype=torch.bfloat16), batch_of(lm.by_head), quiet=True)
    assert 1e-4 < max(errors.values()) < 0.1


def test_dropout_starts_alike_and_the_generator_is_left_alone(lm, batch_of):
    model = lm.adapted(lm.build(attention_dropout=0.3), "lora", dropout=0.3).train()
    state = torch.get_rng_state()
    errors = verify(model, batch_of(lm.by_logits), quiet=True)
    assert max(errors.values()) < 1e-5
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


@pytest.mark.parametrize("prepared", [False, True])
def test_a_wrong_rule_is_found(monkeypatch, lm, batch_of, prepared):
    def wrong(module, x, dy, segments):
        return layer_rules.linear(module, x, 1.01 * dy, segments)

    monkeypatch.setattr(layer_rules, "_RULES", {**layer_rules._RULES, nn.Linear: wrong})
    model = lm.build()
    if prepared:
        raco_fast.prepare(model)
    errors = verify(model, batch_of(lm.by_logits), quiet=True)
    for name, error in errors.items():
        if "proj" in name or "lm_head" in name:
            assert errors.modes["one_backward"][name] == pytest.approx(0.01, rel=1e-3)
            assert error > 0.009
            assert name in errors.wrong
        else:
            assert error < 1e-5


def test_the_table(capsys, lm, batch_of):
    model = lm.build("gpt2")
    errors = verify(model, batch_of(lm.by_head))
    *lines, one, two, three = capsys.readouterr().out.splitlines()
    layers = {}
    for name, error in errors.items():
        layers.setdefault(name.rpartition(".")[0], f"{error:.1e}")
    assert dict(line.split() for line in lines) == layers
    assert len({line.rindex("  ") for line in lines}) == 1  # the numbers stand in a column
    modes = ["one_backward", "gram_first", "gram_first, keep_dy"]
    assert list(errors.modes) == modes
    for line, mode in zip([one, two, three], modes, strict=True):
        assert line == f"mode {mode}: at most {max(errors.modes[mode].values()):.1e}"
    verify(model, batch_of(lm.by_head), quiet=True)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("prepared", [False, True])
def test_gradients_and_taps_are_left_as_they_were(lm, batch_of, prepared):
    model = lm.build()
    if prepared:
        raco_fast.prepare(model)
    for k, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, k) if k % 2 else None
    before = [(p, p.grad) for p in model.parameters()]
    taps = [len(module._forward_hooks) for module in model.modules()]
    verify(model, batch_of(lm.by_head), quiet=True)
    with pytest.raises(ZeroDivisionError):
        verify(model, lambda model: 1 / 0, quiet=True)
    assert all(p.grad is grad for p, grad in before)
    assert all(grad is None or bool((grad == k).all()) for k, (_, grad) in enumerate(before))
    assert [len(module._forward_hooks) for module in model.modules()] == taps
    assert any(taps) == prepared


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)[:, 0]
        return y * y.sum()


def by_rows(model: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
    scores = model(torch.arange(12.0).reshape(4, 3) / 6).reshape(4)
    return {"a": scores[:2].sum(), "b": scores.square().sum()}, scores


def test_a_model_for_which_one_pass_is_wrong():
    prepared = Mixing()
    raco_fast.prepare(prepared)
    for model in (Mixing(), prepared):
        result = verify(model, by_rows, quiet=True)
        assert set(result.wrong) == {"layer.weight", "layer.bias"}
        assert min(result.values()) > 0.01
        assert "in layer 'layer' a score depends on rows of another sequence" in result.reason
        assert "more than rounding: layer." in str(result)
    with pytest.raises(ValueError, match=r"trained parameters in layers without a rule: \['1.weig"):
        verify(nn.Sequential(nn.Linear(3, 1), nn.PReLU()), by_rows, quiet=True)


def test_shards_are_not_compared(monkeypatch):
    with process_group_of_one(monkeypatch):
        model = Mixing()
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="`model` must have plain parameters, got DTensors"):
            verify(model, by_rows, quiet=True)
