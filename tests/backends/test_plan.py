"""What tensors look like, read in one pass, and findings that must not outlive it."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import numpy as np
import pytest
import torch

from raco_fast import _C
from raco_fast.backends import cpu, plan, reference


def lists() -> list[list[torch.Tensor | None]]:
    parameter = torch.nn.Parameter(torch.ones(2))
    return [[torch.zeros(3, 4), None, torch.zeros(())], [parameter, None, None]]


def test_addresses_are_the_tensors():
    tensors = lists()
    addresses, _ = plan.describe(tensors)
    expected = [0 if t is None else t.data_ptr() for one in tensors for t in one]
    assert np.frombuffer(addresses, np.int64).tolist() == expected


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(4, 3),
        torch.zeros(4, 3).t(),
        torch.zeros(12),
        torch.zeros(3, 4, dtype=torch.bfloat16),
        torch.zeros(3, 4, dtype=torch.float16),
        torch.zeros(3, 4, dtype=torch.int32),
        torch.zeros(3, 8)[:, ::2],
        None,
    ],
    ids=str,
)
def test_another_shape_stride_or_dtype_is_another_layout(other):
    first = plan.describe([[torch.zeros(3, 4)]])
    assert plan.describe([[torch.ones(3, 4)]])[1] == first[1]
    assert plan.describe([[other]])[1] != first[1]


def test_views_of_one_memory_differ_where_data_is_swapped():
    p = torch.nn.Parameter(torch.zeros(6, 2))
    before = plan.describe([[p]])
    p.data = p.data.view(2, 6)
    after = plan.describe([[p]])
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_what_is_no_plain_dense_tensor_is_not_described():
    class Mine(torch.Tensor):
        pass

    for odd in (torch.zeros(2, 2).to_sparse(), torch.zeros(2).as_subclass(Mine)):
        assert plan.describe([[torch.zeros(2), odd]]) is None
    assert plan.describe([[torch.zeros(2)], []]) is None
    assert plan.describe([]) is not None
    with pytest.raises(TypeError):
        _C.describe([[torch.zeros(2)]], (torch.Tensor,), object())


def test_without_the_exchange_interface_everything_is_checked_anew(monkeypatch):
    monkeypatch.setattr(plan, "_EXCHANGE", None)
    assert plan.describe(lists()) is None
    steps = [torch.tensor(2.0), torch.tensor(5.0)]
    assert plan.advance(steps).tolist() == [3.0, 6.0] == [s.item() for s in steps]


def test_findings_hold_for_equal_tensors_only_and_keep_none_alive():
    known = plan.Plan()
    tensor = torch.zeros(3)
    seen = plan.describe([[tensor]])
    finding = known.note("gram", seen, [[tensor]], cpu)
    finding.built["stream"] = ["table"]
    assert known.find("gram", seen, [[tensor]]) is finding
    assert known.find("combine", seen, [[tensor]]) is None
    other = torch.zeros(3)
    moved = plan.describe([[other]])
    assert known.find("gram", moved, [[other]]) is finding
    assert not finding.built  # the tables were those of other addresses
    alive = weakref.ref(tensor)
    del tensor
    gc.collect()
    assert alive() is None


def test_nothing_is_concluded_from_or_for_negated_views():
    known = plan.Plan()
    tensor, negated = torch.zeros(3), torch._neg_view(torch.ones(3))
    seen, looks_alike = plan.describe([[tensor]]), plan.describe([[negated]])
    assert looks_alike[1] == seen[1]
    finding = known.note("gram", seen, [[tensor]], cpu)
    assert known.find("gram", looks_alike, [[negated]]) is None
    known.note("gram", looks_alike, [[negated]], reference)
    assert known.find("gram", seen, [[tensor]]) is finding


def test_a_copy_begins_anew():
    known, tensor = plan.Plan(), torch.zeros(3)
    seen = plan.describe([[tensor]])
    known.note("gram", seen, [[tensor]], cpu)
    for other in (copy.deepcopy(known), pickle.loads(pickle.dumps(known))):
        assert other.find("gram", seen, [[tensor]]) is None


def test_only_the_latest_findings_of_a_key_are_kept(monkeypatch):
    monkeypatch.setattr(plan, "_KEPT", 8)
    known = plan.Plan()
    seen = [plan.describe([[torch.zeros(n)]]) for n in range(1, 11)]
    for s in seen:
        known.note("gram", s, [], cpu)
    found = [known.find("gram", s, []) is not None for s in seen]
    assert found == [False] * 2 + [True] * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_step_counts_advance_in_place(dtype):
    steps = [torch.tensor(k, dtype=dtype) for k in (0.0, 7.0, 2.0**24 - 2)]
    counts = plan.advance(steps)
    assert counts.dtype == torch.float64
    assert counts.tolist() == [1.0, 8.0, 2.0**24 - 1] == [s.item() for s in steps]


def test_step_counts_that_are_no_float_scalars_advance_in_torch():
    odd = [torch.tensor(3.0), torch.tensor(4)]
    assert plan.advance(odd).tolist() == [4.0, 5.0]
    assert [s.item() for s in odd] == [4.0, 5]
