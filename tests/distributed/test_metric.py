"""`metric="adam"` on several processes: one process in float64 on the joined batch is the truth."""

import pytest
import torch
from joined_batch import STEPS, WEIGHTS, Learnt, Problem, assert_equal, batch, truth
from learning import Course, backward, learn, learnt, own_losses, set_up, share_of
from quick_cases import matrix

METRIC = {"metric": "adam", "max_grad_norm": 0.5}


@pytest.mark.parametrize(
    ("how", "mode", "model"),
    matrix(
        ("replicas", "ddp", "fsdp2", "hsdp"),
        ("one_backward", "autograd"),
        ("llama lora", "llama tied"),
        quick=[("replicas", "one_backward", "llama tied")],
    ),
)
def test_equals_one_process(run, how: str, mode: str, model: str) -> None:
    problem = Problem(model, options=METRIC)
    cut = 2 if mode == "one_backward" else 1
    found = run(4 if how == "hsdp" else 2, learn, problem, Course(how, mode, cut))
    assert_equal(found, problem)
    plain = truth(Problem(model, options={"max_grad_norm": 0.5}))
    ours, theirs = truth(problem).coefficients, plain.coefficients
    assert max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) > 1e-3


@pytest.mark.slow
def test_tensor_parallelism(run) -> None:
    problem = Problem("perceptron with a plain layer", options=METRIC)
    assert_equal(run(2, learn, problem, Course("tp", "autograd")), problem)


def by_blocks(problem: Problem, course: Course) -> Learnt:
    """Each objective's pass by itself: the wrapper has averaged it, and says so."""
    net, opt = set_up(problem, course)
    grams, coefficients = [], []
    for step in range(STEPS):
        joined = batch(problem, step)
        part = share_of(joined, course)
        for name in WEIGHTS:
            with opt.objective(name):
                own_losses(net(part.ids), part, joined, course)[name].backward()
        opt.step()
        opt.zero_grad()
        grams.append(torch.as_tensor(opt.solution.gram).clone())
        coefficients.append(opt.solution.coefficients)
    return learnt(net, grams, coefficients)


@pytest.mark.slow
def test_gradients_that_a_wrapper_has_averaged(run) -> None:
    problem = Problem(options=METRIC)
    assert_equal(run(2, by_blocks, problem, Course("ddp", "autograd")), problem)


def refused(problem: Problem) -> str:
    mine = "adam" if torch.distributed.get_rank() == 0 else "euclidean"
    course = Course(options={"metric": mine})
    net, opt = set_up(problem, course)
    backward(net, opt, batch(problem, 0), course)
    with pytest.raises(RuntimeError, match="settings of the optimizer must be the same") as found:
        opt.step()
    return str(found.value)


@pytest.mark.slow
def test_another_metric_on_one_process_is_an_error_on_all(run) -> None:
    messages = run(2, refused, Problem("llama"))
    assert "'metric': 'adam'" in messages[0]
    assert "'metric': 'euclidean'" in messages[1]
