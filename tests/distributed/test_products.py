"""Products are kept of shards as they arrive; those of replicas' sums are a step's to take."""

from typing import NamedTuple

import torch
from joined_batch import STEPS, Learnt, Problem, assert_equal, batch
from learning import Course, backward, learnt, set_up

from raco_fast.backends import cpu


class Reads(NamedTuple):
    """Elements that were read for their products alone, in the passes and in the steps."""

    learnt: Learnt
    in_passes: list[int]
    in_steps: list[int]


def learn_and_count(problem: Problem, course: Course, scaled_by_hand: bool) -> Reads:
    net, opt = set_up(problem, course)
    plain, reads = cpu.products, []
    cpu.products = lambda grads, built: (
        reads.append(sum(g.numel() for one in grads for g in one if g is not None)),
        plain(grads, built),
    )[1]
    grams, coefficients, in_passes, in_steps = [], [], [], []
    for step in range(STEPS):
        reads.clear()
        backward(net, opt, batch(problem, step), course)
        in_passes.append(sum(reads))
        if scaled_by_hand:  # twice, by powers of two: the same bits as never
            for factor in (2.0, 0.5):
                for p in net.parameters():
                    torch._foreach_mul_([g.to_local() for g in p.grad.present], factor)
        reads.clear()
        opt.step()
        in_steps.append(sum(reads))
        opt.zero_grad()
        grams.append(torch.as_tensor(opt.solution.gram).clone())
        coefficients.append(opt.solution.coefficients)
    return Reads(learnt(net, grams, coefficients), in_passes, in_steps)


def test_of_shards(run) -> None:
    problem, course = Problem("llama tied"), Course("fsdp2", micro_batches=2)
    found = run(2, learn_and_count, problem, course, False)
    assert_equal([reads.learnt for reads in found], problem)
    for reads in found:
        assert all(reads.in_passes)
        # Two passes a step are known of after the first step.
        assert [count > 0 for count in reads.in_steps] == [True, *[False] * (STEPS - 1)]


def test_of_shards_that_were_written_since(run) -> None:
    problem = Problem("llama tied")
    found = run(2, learn_and_count, problem, Course("fsdp2"), True)
    assert_equal([reads.learnt for reads in found], problem)
    assert all(reads.in_steps == reads.in_passes for reads in found)


def test_of_replicas(run) -> None:
    problem = Problem("llama tied")
    found = run(2, learn_and_count, problem, Course("replicas"), False)
    assert_equal([reads.learnt for reads in found], problem)
    for reads in found:
        assert not any(reads.in_passes)
        assert all(reads.in_steps)
