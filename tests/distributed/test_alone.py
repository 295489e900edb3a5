"""`process_group`: which processes train together; None for runs that are independent."""

import pickle

import pytest
from joined_batch import Problem, assert_equal
from learning import Course, learn, optimizer_for, set_up
from parallel_models import build
from processes import assert_all_failed
from torch import distributed as dist

import raco_fast
from bench.harness.payload import Payload

PROBLEMS = [Problem(labels="all"), Problem("llama lora", options={"amsgrad": True})]
STEPS = [5, 3]


def independent(mode: str):
    """A run of this process's own problem, of its own length, that sends nothing."""
    rank = dist.get_rank()
    with Payload() as payload:
        learnt = learn(
            PROBLEMS[rank], Course("alone", mode, options={"process_group": None}), STEPS[rank]
        )
    return learnt, payload.messages


@pytest.mark.parametrize("mode", ["autograd", "one_backward", "gram_first"])
def test_none_is_an_independent_run(run, mode: str) -> None:
    for (learnt, messages), problem, steps in zip(
        run(2, independent, mode), PROBLEMS, STEPS, strict=True
    ):
        assert messages == 0
        assert_equal([learnt], problem, steps)


def in_pairs(mode: str):
    """Processes 0 and 1 learn one problem, 2 and 3 another."""
    pair = dist.get_rank() // 2
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    options = {"process_group": groups[pair]}
    return learn(PROBLEMS[pair], Course("pair", mode, options=options), STEPS[pair])


@pytest.mark.parametrize("mode", ["autograd", "one_backward"])
def test_two_groups(run, mode: str) -> None:
    a, b, c, d = run(4, in_pairs, mode)
    assert_equal([a, b], PROBLEMS[0], STEPS[0])
    assert_equal([c, d], PROBLEMS[1], STEPS[1])


def with_a_group_of_others() -> None:
    optimizer_for(build(), Problem(), Course(options={"process_group": dist.new_group([0])}))


def test_a_group_without_this_process(outcomes) -> None:
    fine, failed = outcomes(2, with_a_group_of_others)
    assert fine is None
    assert failed.kind in ("TypeError", "ValueError")  # torch gives a number for such a group
    assert "process_group" in failed.message


def pickled_with_a_group() -> None:
    _, opt = set_up(Problem(), Course(options={"process_group": dist.new_group([0, 1])}))
    pickle.dumps(opt)


def test_a_group_cannot_be_pickled(outcomes) -> None:
    assert_all_failed(outcomes(2, pickled_with_a_group), "TypeError", "state_dict")


def test_wrong_kind() -> None:
    with pytest.raises(TypeError, match="`process_group` must be a torch"):
        raco_fast.ClippedCAGradAdamW(build().parameters(), weights=[1.0], process_group="all")
    with pytest.raises(TypeError, match="None for runs that are independent"):
        raco_fast.ObjectiveGradients(build().parameters(), [1.0], process_group=3)
