"""`gram="unbiased"` on several processes: the estimate of one process on the joined batch."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from joined_batch import Problem, batch
from learning import Course, micro_batches, own_losses, quietly, set_up, share_of
from quick_cases import matrix

STEPS = 5


def estimates(problem: Problem, course: Course) -> tuple[list[Any], str, list[Any]]:
    """(the averages after each step, the state in the end, the coefficients of each step)."""
    net, opt = set_up(problem, course)
    means, coefficients = [], []
    for step in range(STEPS):
        joined = batch(problem, step)
        parts = micro_batches(share_of(joined, course), course.micro_batches)
        for k, part in enumerate(parts):
            with quietly(net, course.quiet and k + 1 < len(parts)):
                scores = net(part.ids)
                losses = own_losses(scores, part, joined, course)
                said = {}
                if course.mode != "autograd":
                    samples = torch.arange(len(scores) // 2).repeat(2)
                    said = {"scores": scores, "samples": samples}
                opt.backward(losses, mode=course.mode, **said)
        opt.step()
        opt.zero_grad()
        means.append(opt.solution.expected.mean)
        coefficients.append(opt.solution.coefficients.tolist())
    return means, json.dumps(opt.gram_state), coefficients


UNBIASED = {"gram": "unbiased", "gram_ema": 0.9}


@pytest.mark.parametrize(
    ("how", "mode", "model"),
    matrix(
        ("replicas", "ddp", "fsdp2", "hsdp"),
        ("one_backward", "gram_first"),
        ("llama", "llama lora", "llama tied"),
        quick=[
            ("replicas", "one_backward", "llama tied"),
            ("fsdp2", "gram_first", "llama tied"),
        ],
    ),
)
def test_equals_one_process(run, how: str, mode: str, model: str) -> None:
    problem = Problem(model)
    cut = 2 if mode == "one_backward" else 1
    # Of four processes each has two of eight pairs: all run as many micro-batches.
    uneven = mode == "one_backward" and how != "hsdp"
    course = Course(how, mode, cut, uneven=uneven, options=UNBIASED)
    found = run(4 if how == "hsdp" else 2, estimates, problem, course)
    assert all(one[1:] == found[0][1:] for one in found), "processes differ"
    ((means, _, coefficients),) = run(
        1, estimates, problem, Course("replicas", mode, options=UNBIASED)
    )
    for ours, theirs in zip(found[0][0], means, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-8 * abs(theirs).max())
    np.testing.assert_allclose(found[0][2], coefficients, rtol=1e-6)


def test_processes_are_samples_where_passes_are(run) -> None:
    """Two processes with a pass each, in mode autograd: two samples."""
    problem = Problem("llama", labels="all")
    course = Course("replicas", "autograd", options=UNBIASED)
    found = run(2, estimates, problem, course)
    assert all(one[1:] == found[0][1:] for one in found)
    course = Course("replicas", "autograd", 2, options=UNBIASED)
    ((means, _, _),) = run(1, estimates, problem, course)
    for ours, theirs in zip(found[0][0], means, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-9 * abs(theirs).max())


def refused(problem: Problem, course: Course) -> None:
    with pytest.raises(RuntimeError, match="or parameters are sharded"):
        estimates(problem, course)


def test_passes_of_sharded_parameters_are_refused(run) -> None:
    run(2, refused, Problem("llama"), Course("fsdp2", "autograd", options=UNBIASED))
