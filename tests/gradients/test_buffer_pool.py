"""Memory of gradient buffers on the CPU is used again, and never while somebody looks at it."""

import copy
import pickle

import pytest
import torch
from torch import nn

import raco_fast
from raco_fast.gradients.buffer_pool import HostMemory

LARGE = 1 << 19  # elements


@pytest.mark.parametrize("rows", [5, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_is_ordinary_memory(dtype, rows):
    t = HostMemory().empty((2, 3, rows), dtype)
    assert t.shape == (2, 3, rows)
    assert t.dtype == dtype
    assert t.is_contiguous()
    assert t.data_ptr() % 64 == 0
    assert t._base is None
    assert torch.equal(t.fill_(1), torch.ones(2, 3, rows, dtype=dtype))
    assert HostMemory().empty((0, 4), dtype).shape == (0, 4)


def test_memory_comes_back_when_the_last_tensor_on_it_is_gone():
    memory = HostMemory()
    first = memory.empty((4, LARGE), torch.float32)
    place = first.data_ptr()
    part = first[1].detach()
    del first
    assert memory.empty((4, LARGE), torch.float32).data_ptr() != place
    del part
    again = [memory.empty((LARGE, 4), torch.float32) for _ in range(2)]
    assert place in {t.data_ptr() for t in again}


def test_copies_start_empty():
    memory = HostMemory()
    memory.empty((LARGE,), torch.float32)
    assert len(pickle.dumps(memory)) < 1000
    assert copy.deepcopy(memory)._free == {}


WIDE = 1 << 17  # the gradients of a layer with 3 outputs are large


def gradients_after(step: int, opt: raco_fast.ClippedCAGradAdamW, model: nn.Module) -> dict:
    x = torch.randn(4, WIDE, generator=torch.Generator().manual_seed(step))
    scores = model(x).sum(1)
    opt.backward([scores.sum(), -2 * scores[0]], scores=scores)
    return opt.gradients.of(model[0].weight)


def test_what_a_user_keeps_is_not_written_over():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDE, 3))
    raco_fast.prepare(model)
    opt = raco_fast.ClippedCAGradAdamW(model.parameters(), lr=0.1, weights=[0.5, 0.5])
    kept = gradients_after(0, opt, model)["0"]
    value, place = kept.clone(), kept.data_ptr()
    opt.zero_grad()
    other = gradients_after(1, opt, model)["0"].data_ptr()
    assert other != place
    assert torch.equal(kept, value)
    opt.zero_grad()
    assert gradients_after(2, opt, model)["0"].data_ptr() == other
