"""Rounding to nearest drops small updates of 16-bit weights: the optimizer says so, once."""

import copy
import pickle
import re
import warnings

import pytest
import torch

from raco_fast import ClippedCAGradAdamW
from raco_fast.optim import lost_updates

LOST = r"rounding to nearest loses (9\d|100)% of the updates of (bfloat16|float16) weights at "


def optimizer(dtype=torch.bfloat16, shape=(40, 30), **options):
    torch.manual_seed(3)
    p = torch.nn.Parameter(torch.randn(shape).to(dtype))
    return ClippedCAGradAdamW([p], **({"lr": 5e-6, "weights": [1.0], "c": 0.0} | options))


def take_steps(opt, n: int) -> list[str]:
    """Messages of n steps along random gradients."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(n):
            for group in opt.param_groups:
                for p in group["params"]:
                    p.grad = torch.randn(p.shape).to(p.dtype)
            opt.step()
    return [str(w.message) for w in caught]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(40, 30), (1200,), (), (3, 7, 5)])
def test_it_warns_once_with_the_share_and_the_cures(dtype, shape):
    (message,) = take_steps(optimizer(dtype, shape), 9)
    assert re.match(LOST + "learning rate 5e-06", message)
    assert "rounding='split'" in message
    assert "'stochastic'" in message
    assert "larger learning rate" in message


@pytest.mark.parametrize(
    "options",
    [
        {"rounding": "split"},
        {"rounding": "stochastic"},
        {"dtype": torch.float32},
        {"lr": 1e-2},
        {"lr": 0.0},
    ],
    ids=str,
)
def test_it_is_silent_where_updates_are_kept(options):
    assert take_steps(optimizer(**options), 9) == []


def test_the_share_is_that_of_the_weights_that_stay():
    """A third of the weights is so large that no update moves them, the others so small that
    every one does; weights without a gradient are not counted."""
    small, large = torch.full((20, 30), 1e-4), torch.full((10, 30), 1.0)
    p = torch.nn.Parameter(torch.cat([small, large]).bfloat16())
    still = torch.nn.Parameter(torch.ones(500, 30, dtype=torch.bfloat16))
    opt = ClippedCAGradAdamW([p, still], lr=1e-5, weights=[1.0], c=0.0, weight_decay=0.0)

    def moved(n: int) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(n):
                p.grad, still.grad = torch.randn(p.shape).bfloat16(), torch.zeros_like(still)
                opt.step()
        return [str(w.message) for w in caught]

    assert moved(4) == []
    with torch.no_grad():
        p[:15] = 1.0
    (message,) = moved(4)
    assert re.search(r"loses 8\d% of", message)


def test_a_warm_up_is_no_reason_to_warn():
    opt = optimizer(lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: min(1.0, 1e-4 * 2**step))
    for _ in range(12):
        assert take_steps(opt, 1) == []
        schedule.step()


def test_groups_may_round_in_their_own_way():
    p, q = (torch.nn.Parameter(torch.ones(30, dtype=torch.bfloat16)) for _ in range(2))
    groups = [{"params": [p], "rounding": "split"}, {"params": [q]}]
    opt = ClippedCAGradAdamW(groups, lr=1e-6, weights=[1.0], c=0.0, rounding="stochastic")
    assert take_steps(opt, 4) == []
    opt.rounding = "nearest"
    assert len(take_steps(opt, 16)) == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_watches_anew(copied):
    assert len(take_steps(copied(optimizer()), 4)) == 1


def test_looking_makes_no_copy_of_a_parameter():
    """A view is sampled, of transposed memory too."""
    for t in (torch.empty(3000, 2000), torch.empty(2000, 3000).T, torch.empty(0, 3)):
        sample = lost_updates._sample(t)
        assert sample.untyped_storage().data_ptr() == t.untyped_storage().data_ptr()
        assert sample.numel() <= 4 * 512
