"""`with opt.objective(name): loss.backward()`: the wrapper reduces, a guard looks at the result.

With a forward pass inside each block, DDP reduces every objective. With one forward pass for all it
reduces the first alone: without the guard, the processes would drift apart in silence.
"""

import pytest
import torch
from joined_batch import (
    ADAMW,
    STEPS,
    WEIGHTS,
    Learnt,
    Problem,
    assert_equal,
    batch,
    counts_of,
    losses_of,
)
from learning import Course, learnt, own_losses, quietly, set_up, share_of
from learning import micro_batches as parts_of
from parallel_models import DDP, build, laid_out, trained, whole
from processes import assert_all_failed

import raco_fast

OWN = "autograd"


def by_blocks(problem: Problem, course: Course, shared_forward: bool = False) -> Learnt:
    net, opt = set_up(problem, course)
    grams, coefficients = [], []
    for step in range(STEPS):
        joined = batch(problem, step)
        parts = parts_of(share_of(joined, course), course.micro_batches)
        scores = net(parts[0].ids) if shared_forward else None
        for name in WEIGHTS:
            for k, part in enumerate(parts):
                with opt.objective(name), quietly(net, course.quiet and k + 1 < len(parts)):
                    of_part = net(part.ids) if scores is None else scores
                    loss = own_losses(of_part, part, joined, course)[name]
                    loss.backward(retain_graph=shared_forward)
        opt.step()
        opt.zero_grad()
        grams.append(torch.as_tensor(opt.solution.gram).clone())
        coefficients.append(opt.solution.coefficients)
    return learnt(net, grams, coefficients)


@pytest.mark.parametrize("how", [*DDP, "fsdp2"])
def test_with_a_forward_pass_in_each_block(run, how: str) -> None:
    problem = Problem()
    assert_equal(run(2, by_blocks, problem, Course(how, OWN)), problem)


@pytest.mark.parametrize("how", ["ddp", "ddp, buckets", "fsdp2"])
def test_micro_batches(run, how: str) -> None:
    problem = Problem()
    assert_equal(run(2, by_blocks, problem, Course(how, OWN, micro_batches=2)), problem)
    quiet = Course(how, OWN, micro_batches=4, quiet=True)
    assert_equal(run(2, by_blocks, problem, quiet), problem)


def test_fsdp2_with_one_forward_pass_for_all_blocks(run) -> None:
    """It reduces every backward pass, unlike DDP."""
    problem = Problem()
    assert_equal(run(2, by_blocks, problem, Course("fsdp2", OWN), True), problem)


@pytest.mark.parametrize("how", ["ddp", "ddp, unused"])
def test_one_forward_pass_for_all_blocks_raises(outcomes, how: str) -> None:
    found = outcomes(2, by_blocks, Problem(), Course(how, OWN), True)
    assert_all_failed(found, "RuntimeError", "differ")


@pytest.mark.parametrize("world", [2, 4])
def test_without_a_wrapper_raises(outcomes, world: int) -> None:
    found = outcomes(world, by_blocks, Problem(), Course("replicas", OWN))
    assert_all_failed(found, "RuntimeError", "differ")


def mixed(problem: Problem, course: Course) -> None:
    """One micro-batch by `backward`, which leaves own gradients, and one by blocks."""
    net, opt = set_up(problem, course)
    joined = batch(problem, 0)
    first, second = parts_of(share_of(joined, course), 2)
    opt.backward(own_losses(net(first.ids), first, joined, course))
    for name in WEIGHTS:
        with opt.objective(name):
            own_losses(net(second.ids), second, joined, course)[name].backward()
    opt.step()


def test_reduced_gradients_on_top_of_own_ones_raise(outcomes) -> None:
    found = outcomes(2, mixed, Problem(), Course("ddp", OWN))
    assert_all_failed(found, "RuntimeError", "objective")


def one_objective(how: str, by_optimizer: bool) -> dict[str, torch.Tensor]:
    """By `opt.backward`, or as with `torch.optim.AdamW`: `loss.backward()` outside of any block."""
    problem, course = Problem(), Course(how)
    net = laid_out(build(), how)
    opt = raco_fast.ClippedCAGradAdamW(trained(net).values(), weights={"one": 1.0}, c=0.0, **ADAMW)
    for step in range(STEPS):
        joined = batch(problem, step)
        own = share_of(joined, course)
        loss = own_losses(net(own.ids), own, joined, course)["harmless"]
        if by_optimizer:
            opt.backward({"one": loss})
        else:
            loss.backward()
        opt.step()
        opt.zero_grad()
    return {name: whole(p) for name, p in trained(net).items()}


@pytest.mark.parametrize(
    ("how", "by_optimizer"),
    [("replicas", True), ("ddp", True), ("ddp", False), ("fsdp2", True), ("fsdp2", False)],
)
def test_one_objective_is_adamw(run, how: str, by_optimizer: bool) -> None:
    model = build()
    adamw = torch.optim.AdamW(trained(model).values(), **ADAMW)
    for step in range(STEPS):
        joined = batch(Problem(), step)
        losses_of(model(joined.ids), joined, counts_of(joined))["harmless"].backward()
        adamw.step()
        adamw.zero_grad()
    a, b = run(2, one_objective, how, by_optimizer)
    for name, p in trained(model).items():
        assert torch.equal(a[name], b[name]), name
        torch.testing.assert_close(a[name], p.detach(), rtol=0, atol=1e-12)


def both_kinds(first: str, cleared: bool) -> bool:
    """backward(losses) and blocks in one step, or with zeros between them; whether it is finite."""
    net, opt = set_up(Problem(), Course("ddp", OWN))
    own = share_of(batch(Problem(), 0), Course("ddp"))

    def losses() -> dict[str, torch.Tensor]:
        return own_losses(net(own.ids), own, batch(Problem(), 0), Course("ddp"))

    for kind in (first, "blocks" if first == "backward" else "backward"):
        if kind == "backward":
            opt.backward(losses())
        else:
            for name in losses():
                with opt.objective(name):
                    losses()[name].backward()
        if cleared:
            opt.step()
            opt.zero_grad(set_to_none=False)
    return bool(opt.solution.finite)


@pytest.mark.parametrize("first", ["backward", "blocks"])
def test_both_kinds_of_gradients_in_one_step(run, outcomes, first: str) -> None:
    found = outcomes(2, both_kinds, first, False)
    assert_all_failed(found, "RuntimeError", "use one of both between two zero_grad")
    assert run(2, both_kinds, first, True) == [True, True]


def replaced_by_hand() -> None:
    net, opt = set_up(Problem(), Course("replicas", OWN))
    own = share_of(batch(Problem(), 0), Course())
    opt.backward(own_losses(net(own.ids), own, batch(Problem(), 0), Course()))
    p = next(iter(trained(net).values()))
    p.grad = torch.zeros_like(p)
    opt.step()


def test_a_gradient_that_is_replaced_by_hand(outcomes) -> None:
    found = outcomes(2, replaced_by_hand)
    assert_all_failed(found, "RuntimeError", "some gradients of this step are from backward")


def sparse() -> None:
    words = torch.nn.Embedding(5, 3, sparse=True)
    opt = raco_fast.ClippedCAGradAdamW(words.parameters(), weights=[1.0])
    opt.backward([words(torch.arange(3)).sum()])


def test_a_sparse_gradient_of_one_objective(outcomes) -> None:
    assert_all_failed(outcomes(2, sparse), "TypeError", "must be a dense tensor")
