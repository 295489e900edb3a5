"""Messages of any size: tensors in pieces, each alone, or packed; the models here fit into one."""

import pytest
from joined_batch import Learnt, Problem, assert_equal
from learning import Course, learn
from quick_cases import matrix

from raco_fast.distributed import replicas, scatter


def in_messages(problem: Problem, course: Course, limit: int) -> Learnt:
    """Buckets of `limit` bytes, which is also what is sent alone."""
    replicas.BUCKET_BYTES = max(limit, 1000)  # of every float64, a message would take minutes
    scatter._SMALL, scatter._PACKED = limit, 3 * limit
    return learn(problem, course)


@pytest.mark.parametrize(
    ("how", "mode", "limit"),
    matrix(
        ("replicas", "fsdp2", "hsdp"),
        ("one_backward", "gram_first"),
        (0, 1000, 20_000),
        quick=[
            ("replicas", "one_backward", 1000),
            ("replicas", "gram_first", 0),
            ("fsdp2", "one_backward", 0),
            ("fsdp2", "gram_first", 20_000),
        ],
    ),
)
@pytest.mark.parametrize("model", ["llama tied", "llama lora"])
def test_sizes_change_nothing(run, model: str, how: str, mode: str, limit: int) -> None:
    world = 4 if how == "hsdp" else 2
    problem = Problem(model)
    assert_equal(run(world, in_messages, problem, Course(how, mode), limit), problem)
