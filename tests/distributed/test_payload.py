"""What one step sends, in units of the trained parameters: within the documented limits."""

import math

import pytest
from joined_batch import WEIGHTS, Problem, batch
from learning import Course, backward, set_up
from parallel_models import trained
from torch import distributed as dist

from bench.harness.payload import Payload

m = len(WEIGHTS)
SMALL = 8192  # bytes of Gram matrices, agreements and flags


def sent(problem: Problem, course: Course) -> tuple[int, int, int]:
    """Bytes that the third step sends, which has no spot check; of θ; of θ padded to shards."""
    net, opt = set_up(problem, course)
    for step in range(3):
        with Payload() as payload:
            backward(net, opt, batch(problem, step), course)
            opt.step()
        opt.zero_grad()
    size = padded = 0
    for p in trained(net).values():
        size += p.numel() * p.element_size()
        rows = math.ceil(p.shape[0] / dist.get_world_size()) * dist.get_world_size()
        padded += rows * p[0].numel() * p.element_size()
    return payload.bytes, size, padded


@pytest.mark.parametrize(
    ("how", "mode", "limit"),
    [
        ("replicas", "autograd", m + 1),
        ("replicas", "one_backward", m + 1),
        ("replicas", "gram_first", m + 2),
        ("ddp", "autograd", m + 1),
        ("ddp", "one_backward", m + 1),
        ("fsdp2", "autograd", 2 * m + 1),
        ("fsdp2", "one_backward", m + 2),
        ("fsdp2", "gram_first", m + 4),
    ],
)
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_of_one_step(run, world: int, how: str, mode: str, limit: int) -> None:
    for payload, size, padded in run(world, sent, Problem(), Course(how, mode)):
        # Half of the gradients at least have to be sent: a count that misses them proves nothing.
        assert size * m / 2 < payload <= padded * limit + SMALL


@pytest.mark.parametrize("mode", ["autograd", "one_backward"])
def test_accumulation_on_replicas_sends_once_a_step(run, mode: str) -> None:
    once = run(2, sent, Problem(), Course("replicas", mode))
    often = run(2, sent, Problem(), Course("replicas", mode, micro_batches=4))
    for (a, *_), (b, *_) in zip(once, often, strict=True):
        assert b <= a + SMALL
