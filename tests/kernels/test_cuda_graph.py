"""A captured step: on a CUDA device only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from raco_fast import ClippedCAGradAdamW

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("static_gradients", [True, False])
def test_a_captured_step_replays(static_gradients):
    device = torch.device("cuda")

    def make() -> tuple[list[torch.nn.Parameter], ClippedCAGradAdamW, Tensor]:
        params = [
            torch.nn.Parameter(torch.linspace(-1, 1, n, device=device)) for n in (407, 513, 1)
        ]
        lr = torch.tensor(0.02, device=device)
        weights = {"a": 0.6, "b": 0.4}
        opt = ClippedCAGradAdamW(
            params, lr, weight_decay=0.1, weights=weights, max_grad_norm=20.0, capturable=True
        )
        return params, opt, lr

    def work(params: Any, opt: Any, x: Tensor) -> None:
        opt.zero_grad(set_to_none=not static_gradients)
        opt.backward([sum((p * x).square().sum() for p in params),
                      sum((p - x).square().sum() for p in params)])  # fmt: skip
        opt.step()

    (ours, opt, lr), (theirs, plain, plain_lr) = make(), make()
    x = torch.tensor(0.7, device=device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work(ours, opt, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work(ours, opt, x)
    for _ in range(3):
        work(theirs, plain, x)
    for t in range(6):
        x.fill_(float("inf") if t == 3 else 0.5 + t / 7)
        lr.fill_(0.02 / (t + 1))
        plain_lr.copy_(lr)
        graph.replay()
        work(theirs, plain, x)
        torch.testing.assert_close(opt.solution.coefficients, plain.solution.coefficients,
                                   equal_nan=True)  # fmt: skip
    assert opt.skipped_steps == plain.skipped_steps == 1
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q)
        assert opt.state[p]["step"].item() == 8.0


def test_what_cannot_be_captured_says_so():
    p = torch.nn.Parameter(torch.ones(5, device="cuda"))
    for settings, reason in [
        ({"weights": [0.4, 0.6]}, "capturable=False"),
        ({"weights": [0.25] * 4, "capturable": True}, "m = 4 objectives is solved on the host"),
    ]:
        opt = ClippedCAGradAdamW([p], **settings)
        opt.backward([(k * p).sum() for k in range(len(settings["weights"]))])
        opt.step()
        refused = pytest.raises(
            RuntimeError, match=f"cannot be captured in a CUDA graph: .*{reason}"
        )
        with refused, torch.cuda.graph(torch.cuda.CUDAGraph()):
            opt.step()
        opt.zero_grad()
