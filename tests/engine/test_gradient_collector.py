"""Small parameters that wait for each other get what each would get by itself."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from raco_fast.engine import gradient_collector
from raco_fast.engine.contributions import EntryUse, MatrixUse, Use
from raco_fast.engine.gradient_collector import GradientCollector
from raco_fast.engine.sequences import Factored, Segments
from raco_fast.engine.tap import EVERY_ROW
from raco_fast.gradients.accumulation import Accumulation
from raco_fast.gradients.buffer_pool import HostMemory

NAMES = ("a", "b", "c")
A = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
A[:, 4] = 0.0
SHAPES = [(16,), (4, 8), (3, 16), (5,), (2, 32)]  # 5 numbers are no multiple of an address


class FakeCall:
    """A layer's call whose t of each entry is known."""

    layer, entries = "layer", (None, 1)

    def __init__(self, p: Tensor, t: Tensor) -> None:
        self.p, self.t, self.dy = p, t, t

    def uses(self, segments: Segments) -> Iterator[tuple[Tensor, slice, Use]]:
        yield self.p, EVERY_ROW, EntryUse(self.t.float(), segments)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def calls(request) -> list[FakeCall]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for shape in SHAPES:
        p = torch.nn.Parameter(torch.zeros(shape, dtype=request.param))
        found.append(FakeCall(p, torch.randn(6, *shape, generator=generator)))
    again = found[1]  # a layer that is called twice
    return [*found, FakeCall(again.p, torch.randn(6, *SHAPES[1], generator=generator))]


def collected(calls: list[FakeCall], into: Accumulation) -> None:
    collector = GradientCollector(Factored.of(A), into, [call.p for call in calls])
    for call in calls:
        collector.collect(call)
    collector.finish()


@pytest.mark.parametrize("together", [(1 << 16, 1 << 18), (1 << 16, 300), (0, 0)])
def test_what_waits_is_what_is_added_at_once(calls, monkeypatch, together):
    monkeypatch.setitem(gradient_collector._LIMITS, "cpu", together)
    params, memory = list(dict.fromkeys(call.p for call in calls)), HostMemory()
    truth = {p: torch.zeros(3, *p.shape, dtype=torch.float64) for p in params}
    bound = dict.fromkeys(params, 0)
    for _ in range(2):  # two micro-batches
        into = Accumulation(params, NAMES, memory)
        collected(calls, into)
        into.store()
        for call in calls:
            truth[call.p] += torch.einsum("mb,b...->m...", of_entries(), call.t.double())
            bound[call.p] += 1
    for p in params:
        found = torch.stack(p.grad.buffers).double()
        eps = torch.finfo(p.dtype).eps
        # One rounding for each sum that is stored.
        assert (found - truth[p]).norm() <= bound[p] * eps * truth[p].norm()
        assert all(g.is_contiguous() for g in p.grad.buffers)
        assert all(g.data_ptr() % 16 == 0 for g in p.grad.buffers if p.numel() != 5)


def of_entries() -> Tensor:
    factored = Factored.of(A)
    return factored.segments(None, torch.device("cpu")).spread(factored.coefficients, A)


def test_small_parameters_share_one_product(calls, monkeypatch):
    params = []
    add = Accumulation.add_products
    monkeypatch.setattr(
        Accumulation,
        "add_products",
        lambda self, ps, U, t: (params.append(ps), add(self, ps, U, t)),
    )
    into = Accumulation([], NAMES, HostMemory())
    collected(calls, into)
    kept = [call.p for call in calls if call.p.numel() != 5]
    assert [id(p) for ps in params for p in ps] == [id(p) for p in kept]
    assert [len(ps) for ps in params] == [4, 1]  # a parameter waits once
    assert into.gradients().keys() == {call.p for call in calls}


def test_rows_that_belong_together_are_not_mistaken(monkeypatch):
    """Coefficients of entries are made once a pass, for each way in which rows are told apart."""
    factored, made = Factored.of(A), []
    monkeypatch.setattr(
        Segments,
        "_spread_over",
        lambda self, U, inner, make=Segments._spread_over: (
            made.append(inner) or make(self, U, inner)
        ),
    )
    segments, like = factored.segments(None, torch.device("cpu")), torch.zeros(1)
    U = factored.coefficients
    assert segments.spread(U, like) is segments.spread(U, like)
    torch.testing.assert_close(segments.spread(U, A) * factored.seeds, A)
    by_row = segments.spread(U, like, 3)
    assert torch.equal(by_row, segments.spread(U, like).repeat_interleave(3, dim=1))
    assert not torch.equal(segments.spread(2 * U, like), segments.spread(U, like))
    assert made == [1, 1, 3, 1]


def test_matrices_do_not_wait():
    segments = Segments(6, None, (0, 6))
    use = MatrixUse(torch.ones(6, 1, 16), torch.ones(6, 1, 16), segments)
    p, into = torch.nn.Parameter(torch.zeros(16, 16)), Accumulation([], NAMES, HostMemory())
    call = FakeCall(p, torch.ones(6, 16, 16))
    call.uses = lambda segments: [(p, EVERY_ROW, use)]
    factored = Factored.of(torch.ones(3, 6, dtype=torch.float64))
    GradientCollector(factored, into, [p]).collect(call)
    assert torch.equal(into.gradients()[p], torch.full((3, 16, 16), 6.0))
