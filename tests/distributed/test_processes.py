"""`Processes`: sums, comparisons and decisions are the same on all, and errors reach all."""

import copy
import pickle

import pytest
import torch
from processes import assert_all_failed
from torch import distributed as dist

from raco_fast.distributed.processes import Processes


def sums() -> list[torch.Tensor]:
    group, rank = Processes(), dist.get_rank()
    numbers = torch.tensor([0.1, -(10.0**rank), 3.0], dtype=torch.float64)
    kept = numbers.clone()
    found = [group.sum(numbers), group.largest(numbers), group.largest(-numbers)]
    assert torch.equal(numbers, kept)
    return [*found, group.largest(torch.tensor([rank, -rank]))]


def test_sums_and_largest(run) -> None:
    exact = [[0.4, -1111.0, 12.0], [0.1, -1.0, 3.0], [-0.1, 1000.0, -3.0], [3, 0]]
    found = run(4, sums)
    for of_rank in found:
        for ours, same, true in zip(of_rank, found[0], exact, strict=True):
            assert torch.equal(ours, same)
            torch.testing.assert_close(ours, torch.tensor(true, dtype=ours.dtype))


def comparisons() -> list[bool]:
    group, rank = Processes(), dist.get_rank()
    nan, inf = torch.nan, torch.inf
    last_bit = 1.0 if rank else 1.0 + 2.0**-52
    mine = [[1.0, -2.0], [last_bit], [nan, inf, -inf], [nan if rank else inf], [rank], [-inf], []]
    return [group.alike(torch.tensor(numbers, dtype=torch.float64)) for numbers in mine]


def test_alike_is_bit_by_bit(run) -> None:
    expected = [True, False, True, True, False, True, True]
    assert run(2, comparisons) == [expected] * 2


def nan_is_the_largest() -> float:
    value = torch.nan if dist.get_rank() else 1.0
    return float(Processes().largest(torch.tensor([value])))


def test_nan_counts_as_infinite(run) -> None:
    assert run(2, nan_is_the_largest) == [torch.inf] * 2


def decisions() -> tuple[list[bool], str | None, str | None]:
    group, rank = Processes(), dist.get_rank()
    words = {1: "one", 2: "two"}.get(rank)
    return group.agree(lambda: [rank == 1, False, True], 3), group.say(words), group.say(None)


def test_what_one_decides_holds_for_all(run) -> None:
    assert run(3, decisions) == [([True, False, True], "one", None)] * 3


def one_fails(kind: type[Exception]) -> None:
    def decide() -> list[bool]:
        if dist.get_rank() == 1:
            raise kind("no such pair")
        return [True, False]

    Processes().agree(decide, 2)


@pytest.mark.parametrize("kind", [ValueError, TypeError, RuntimeError, KeyError])
def test_an_error_on_one_is_raised_on_all(outcomes, kind: type[Exception]) -> None:
    first, failed, last = outcomes(3, one_fails, kind)
    assert failed.kind == kind.__name__
    assert "no such pair" in failed.message
    assert_all_failed(
        [first, last], "OtherProcessError", f"process 1 of 3 .*{kind.__name__}: .*no such"
    )


def members() -> list[tuple[int, int]]:
    rank = dist.get_rank()
    halves = [dist.new_group([0, 1]), dist.new_group([2])]
    dist.barrier()  # who ended now would break off connections that others are still making
    return [(g.size, g.rank) for g in (Processes(), Processes(None), Processes(halves[rank // 2]))]


def test_members(run) -> None:
    expected = [[(3, 0), (1, 0), (2, 0)], [(3, 1), (1, 0), (2, 1)], [(3, 2), (1, 0), (1, 0)]]
    assert run(3, members) == expected


def group_of_others() -> None:
    others = dist.new_group([1])
    if dist.get_rank() == 0:
        Processes(others)


def test_a_group_of_others_is_refused(outcomes) -> None:
    refused, fine = outcomes(2, group_of_others)
    assert fine is None
    assert refused.kind in ("TypeError", "ValueError")  # newer torch gives a number for the group
    assert "`process_group` must" in refused.message


def copies() -> None:
    group = Processes(dist.new_group([0, 1]))
    assert copy.deepcopy(group).group is group.group
    pickle.dumps(group)


def test_a_group_cannot_be_pickled(outcomes) -> None:
    assert_all_failed(outcomes(2, copies), "TypeError", "save their state_dict")


def test_alone() -> None:
    group = Processes()
    assert (group.group, group.size, group.rank, group.device.type) == (None, 1, 0, "cpu")
    numbers = torch.tensor([1.0, torch.nan], dtype=torch.float64)
    assert group.sum(numbers) is numbers
    assert group.alike(numbers)
    assert group.agree(lambda: [True], 1) == [True]
    assert (group.say("words"), group.say(None)) == ("words", None)
    for given in ("world", None):
        assert pickle.loads(pickle.dumps(Processes(given))).size == 1
    with pytest.raises(TypeError, match=r"`process_group` must be a torch.*got 3"):
        Processes(3)  # type: ignore[arg-type]
