"""Wrapped models on a CUDA device: one process over NCCL, two on the same device over gloo.

NCCL refuses two processes on one device, and gloo cannot reduce-scatter tensors of a device.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from joined_batch import Learnt, Problem, assert_equal, batch
from learning import Course, backward, learnt, optimizer_for
from parallel_models import build, laid_out
from torch import distributed as dist

import raco_fast

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

MODES = ("autograd", "one_backward", "gram_first")


@pytest.fixture
def nccl(tmp_path: Path) -> Iterator[None]:
    device = torch.device("cuda", torch.cuda.current_device())
    store = f"file://{tmp_path}/store"
    dist.init_process_group("nccl", init_method=store, rank=0, world_size=1, device_id=device)
    yield
    dist.destroy_process_group()


def learn_on_cuda(problem: Problem, course: Course) -> Learnt:
    """As `learning.learn`, with the model and the batches on this process's device."""
    model = build(problem.model, problem.dtype).cuda()
    if course.mode != "autograd":
        raco_fast.prepare(model)
    net = laid_out(model, course.how)
    opt = optimizer_for(net, problem, course)
    grams, coefficients = [], []
    for step in range(5):
        pairs = batch(problem, step)
        backward(net, opt, pairs._replace(ids=pairs.ids.cuda()), course)
        opt.step()
        opt.zero_grad()
        grams.append(torch.as_tensor(opt.solution.gram).cpu())
        coefficients.append(torch.as_tensor(opt.solution.coefficients).cpu())
    found = learnt(net, grams, coefficients)
    return found._replace(parameters={n: p.cpu() for n, p in found.parameters.items()})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
@pytest.mark.parametrize("model", ["llama tied", "llama lora"])
def test_one_process_over_nccl(nccl, how, mode, model):
    problem = Problem(model, torch.float32)  # rotary angles are, and differ from the CPU's by 1e-8
    assert_equal([learn_on_cuda(problem, Course(how, mode))], problem)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["replicas", "ddp"])
def test_two_processes_on_one_device(run, how, mode):
    problem = Problem("llama", torch.float32)
    assert_equal(run(2, learn_on_cuda, problem, Course(how, mode), timeout=90.0), problem)
