"""A Gram matrix of which some tensors' products are known and lie on a device."""

import pytest
import torch
from far_device import FarTensor, Waits
from torch import Tensor

from raco_fast.backends import ops

M, SIZES = 3, (5, 70, 33, 400)
NONE, SOME, ALL = (), (1, 3), range(len(SIZES))


@pytest.fixture
def grads() -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(n, generator=generator) for n in SIZES] for _ in range(M)]


def products_of(grads: list[list[Tensor]], k: int) -> Tensor:
    rows = torch.stack([one[k].double() for one in grads])
    return rows @ rows.T


def as_on_device(products: Tensor) -> Tensor:
    return FarTensor(products)


@pytest.mark.parametrize("known", [SOME, ALL])
def test_known_products_and_the_gram_of_the_rest_are_the_gram(grads, known):
    kept = [as_on_device(products_of(grads, k)) if k in known else None for k in ALL]
    with Waits() as waits:
        found = ops.gram_where_it_is(grads, known=kept)
        # What the host has to add to it comes from a CPU here; of one device nothing is read.
        assert waits.of("read") == ({} if known is ALL else {"backends/ops.py": 1})
        here = found.cpu()
    truth = torch.stack([products_of(grads, k) for k in ALL]).sum(0)
    norms = truth.diagonal().sqrt()
    assert ((here - truth).abs() <= 2.0**-23 * torch.outer(norms, norms)).all()


def test_no_known_products_are_read_while_a_graph_is_captured(grads, monkeypatch):
    """It would read at every replay what had been known at its capture."""
    monkeypatch.setattr(ops, "_capturing", lambda: True)
    wrong = [as_on_device(torch.full((M, M), torch.nan, dtype=torch.float64)) for _ in ALL]
    assert torch.equal(ops.gram_where_it_is(grads, known=wrong), ops.gram(grads))


def test_on_the_cpu_known_products_change_no_bit(grads):
    of_each = ops.products(grads)
    for known in (NONE, SOME, ALL):
        kept = [of_each[k] if k in known else None for k in ALL]
        assert torch.equal(ops.gram_where_it_is(grads, known=kept), ops.gram(grads))
