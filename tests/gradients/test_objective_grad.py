"""Stand-ins under the conversions of a module: every objective's gradient goes along."""

import pytest
import torch
from torch import nn

from raco_fast.gradients.buffer_pool import HostMemory
from raco_fast.gradients.objective_grad import ObjectiveGrad
from raco_fast.gradients.objective_gradients import ObjectiveGradients
from raco_fast.optim.clipped_cagrad_adamw import ClippedCAGradAdamW

WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.2}
CONVERSIONS = {
    "to float64": lambda m: m.to(torch.float64),
    "double": lambda m: m.double(),
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "type": lambda m: m.type(torch.float64),
    "to the same": lambda m: m.to("cpu", torch.float32),
    "cpu": lambda m: m.cpu(),
    "to meta": lambda m: m.to("meta"),
    "to meta, float64": lambda m: m.to("meta", torch.float64),
    "channels last": lambda m: m.to(memory_format=torch.channels_last),
    "to_empty": lambda m: m.to_empty(device="cpu"),
    "to_empty on meta": lambda m: m.to_empty(device="meta"),
    "share_memory": lambda m: m.share_memory(),
    "there and back": lambda m: m.double().bfloat16().float(),
}
SWAP = pytest.mark.parametrize("swap", [False, True])


@pytest.fixture
def swapping(swap):
    """Whether modules swap tensors in place of setting `data`."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    yield
    torch.__future__.set_swap_module_params_on_conversion(before)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2))


def losses_of(model: nn.Module) -> dict[str, torch.Tensor]:
    x = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(7))
    y = model(x.to(model[3].weight))
    only_conv = model[0].bias.square().sum()  # an objective that touches one parameter
    return {"a": y[:, 0].sum(), "b": (y[:, 1] - y[:, 0]).square().sum(), "c": only_conv}


@SWAP
@pytest.mark.usefixtures("swapping")
@pytest.mark.parametrize("name", CONVERSIONS)
def test_every_buffer_is_converted_as_torch_converts_a_gradient(name):
    model = network()
    gradients = ObjectiveGradients(model.parameters(), WEIGHTS)
    gradients.backward(losses_of(model))
    plain = {}
    for objective in WEIGHTS:  # torch's own conversion of one plain gradient
        plain[objective] = network()
        losses_of(plain[objective])[objective].backward()
        CONVERSIONS[name](plain[objective])
    CONVERSIONS[name](model)
    for k, p in enumerate(model.parameters()):
        for objective, grad in gradients.of(p).items():
            expected = list(plain[objective].parameters())[k].grad
            if expected is None:
                assert grad is None
                continue
            for attribute in ("shape", "dtype", "device"):
                assert getattr(grad, attribute) == getattr(expected, attribute)
                assert getattr(p.grad, attribute) == getattr(expected, attribute)
            assert grad.stride() == expected.stride() or name == "to_empty"
            assert grad.is_shared() == expected.is_shared() or grad.is_meta
            if "empty" not in name and not grad.is_meta:
                torch.testing.assert_close(grad, expected)


@SWAP
@pytest.mark.usefixtures("swapping")
@pytest.mark.parametrize("when", ["before the step", "after the step"])
def test_training_goes_on_in_float64(when):
    model, twin = network(), network()
    for m in (model, twin):
        opt = ClippedCAGradAdamW(m.parameters(), weights=WEIGHTS, lr=0.1)
        if when == "after the step":
            opt.backward(losses_of(m))
            opt.step()
        if m is twin:
            opt.zero_grad()
            m.double()
        if when == "before the step" or m is twin:
            opt.backward(losses_of(m))
        if m is model:
            m.double()
        if when == "after the step" and m is model:
            opt.zero_grad()
            opt.backward(losses_of(m))
        opt.state.clear()  # torch leaves the moments of AdamW in their dtype, too
        opt.step()
    assert model[0].weight.dtype == torch.float64
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@SWAP
@pytest.mark.usefixtures("swapping")
def test_accumulation_goes_on_after_a_conversion():
    model = network()
    gradients = ObjectiveGradients(model.parameters(), WEIGHTS)
    gradients.backward(losses_of(model))
    model.double()
    gradients.backward(losses_of(model))
    once = ObjectiveGradients((twin := network().double()).parameters(), WEIGHTS)
    once.backward(losses_of(twin))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        for mine, other in zip(gradients.of(p).values(), once.of(q).values(), strict=True):
            assert (mine is None) is (other is None)
            if mine is not None:
                torch.testing.assert_close(mine, 2 * other, rtol=1e-5, atol=1e-6)


def test_what_is_no_conversion_names_the_cure():
    model = network()
    ObjectiveGradients(model.parameters(), WEIGHTS).backward(losses_of(model))
    with pytest.raises(RuntimeError, match=r"is not defined on it; .*call zero_grad\(\) before"):
        model._apply(lambda t: t * 2)
    with pytest.raises(RuntimeError, match="one gradient per objective"):
        model[0].weight.grad + 1
    with pytest.raises(TypeError, match=r"\('a', 'b', 'c'\), so its `data` .*set p.grad itself"):
        model[0].weight.grad.data = torch.zeros_like(model[0].weight)


def test_buffers_side_by_side_are_one_tensor():
    """Wherever they lie: by themselves, or in a block with other parameters' gradients."""
    p, block = torch.nn.Parameter(torch.zeros(2, 3)), torch.arange(3 * 20.0).view(3, 20)
    held = ObjectiveGrad(p, ("a", "b", "c"))
    held.buffers = [row[4:10].view(2, 3) for row in block]
    memory = held.stacked(HostMemory())
    assert memory.data_ptr() == held.buffers[0].data_ptr()
    assert torch.equal(memory, block[:, 4:10].view(3, 2, 3))
    for elsewhere in (block[1, 11:17].view(2, 3), torch.ones(2, 3), None):
        held.buffers = [row[4:10].view(2, 3) for row in block]
        held.buffers[1] = elsewhere
        memory = held.stacked(HostMemory())
        assert memory.data_ptr() != block[0, 4:].data_ptr()
        expected = torch.zeros(2, 3) if elsewhere is None else elsewhere
        assert torch.equal(memory[1], expected)
        assert torch.equal(memory[::2], block[::2, 4:10].reshape(2, 2, 3))
