"""Parameters that only some processes, or only some objectives, have a gradient for."""

import pytest
import torch
from joined_batch import ADAMW
from torch import Tensor, nn
from torch import distributed as dist

import raco_fast

WEIGHTS = [0.6, 0.4]
SHAPES = {"both": (5, 3), "only 0": (7,), "only 1, one objective": (4, 2), "none": (3,)}


def losses(params: dict[str, Tensor], rank: int, step: int) -> list[Tensor]:
    """Of this process's batch."""
    x = torch.full((3,), 1.0 + rank + 2 * step, dtype=torch.float64)
    fit = (params["both"] @ x).square().mean()
    small = -(params["both"] @ x).tanh().sum()
    if rank == 0:
        fit = fit + params["only 0"].square().sum()
        small = small + params["only 0"].exp().sum()
    else:
        fit = fit + 3 * params["only 1, one objective"].square().sum()
    return [fit, small]


def stepped(ranks: list[int]) -> dict[str, Tensor]:
    """Three steps on the mean of these processes' losses."""
    torch.manual_seed(0)
    params = {n: nn.Parameter(torch.randn(s, dtype=torch.float64)) for n, s in SHAPES.items()}
    opt = raco_fast.ClippedCAGradAdamW(params.values(), weights=WEIGHTS, **ADAMW)
    for step in range(3):
        of_each = zip(*(losses(params, rank, step) for rank in ranks), strict=True)
        opt.backward([sum(parts) / len(ranks) for parts in of_each])
        opt.step()
        opt.zero_grad()
    assert "exp_avg" not in opt.state[params["none"]]
    return {name: p.detach() for name, p in params.items()}


def on_this_process() -> dict[str, Tensor]:
    return stepped([dist.get_rank()])


def test_a_missing_gradient_is_zero(run) -> None:
    one = stepped([0, 1])
    found = run(2, on_this_process)
    for name, p in one.items():
        assert torch.equal(found[0][name], found[1][name]), name
        torch.testing.assert_close(found[0][name], p, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["only 0", "only 1, one objective"])
def test_the_truth_moves_them(name: str) -> None:
    torch.manual_seed(0)
    before = {n: torch.randn(s, dtype=torch.float64) for n, s in SHAPES.items()}
    assert not torch.equal(stepped([0, 1])[name], before[name])
    assert torch.equal(stepped([0, 1])["none"], before["none"])
