"""What `metric="adam"` costs: a whole optimizer step with the gradients at hand, beside others.

    python -m bench.metric_step > bench/results/cpu-DATE/metric_step.txt

One thread, CPU time, all in turn. `euclidean` is the step without a metric, `products kept` the
same behind a pass of mode `one_backward`, which has taken its products already. The rival, `scaled
copies`, takes the Euclidean step and forms the second matrix from m scaled copies of the gradients,
with the same kernel. Two minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from time import thread_time

import numpy as np
import torch
from torch import Tensor, nn

from bench.suites.step import optimizer, optimizer_with_products
from raco_fast import __version__
from raco_fast.backends import ops
from raco_fast.gradients.second_moments import metric_of
from raco_fast.optim.clipped_cagrad_adamw import ClippedCAGradAdamW
from raco_fast.optim.metric import second_moments

SHAPES = [(1024, 1024)] * 8 + [(1024,)] * 16  # 8.4 million numbers: no cache holds them
CASES = ((2, torch.float32), (3, torch.float32), (6, torch.float32), (2, torch.bfloat16))
ROUNDS = 15


def main() -> None:
    """Print a table."""
    torch.set_num_threads(1)
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"raco_fast {__version__}, torch {torch.__version__}, CPU ({capability}), one thread")
    print(f"ms of CPU time, median (least) of {ROUNDS} in turn; share: of the medians")
    for m, dtype in CASES:
        print(f"m = {m}, {str(dtype).removeprefix('torch.')}")
        times = in_turn(calls(m, dtype))
        plain = np.median(times["euclidean"])
        for name, of_one in times.items():
            middle, least = 1e3 * np.median(of_one), 1e3 * min(of_one)
            share = np.median(of_one) / plain
            print(f"  {name.ljust(14)} {middle:7.1f} ({least:.1f})   {share:.2f}")


def calls(m: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Name -> a step; each has parameters and states of its own, and the same gradients."""
    draw = torch.Generator().manual_seed(0)
    grads = [[torch.randn(s, generator=draw).to(dtype) for s in SHAPES] for _ in range(m)]

    def params() -> list[nn.Parameter]:
        return [nn.Parameter(torch.zeros(s, dtype=dtype)) for s in SHAPES]

    plain, adam = optimizer(params(), grads), optimizer(params(), grads)
    adam.metric = "adam"
    kept, scaled = optimizer_with_products(params(), grads), optimizer(params(), grads)
    found = {"euclidean": plain.step, "adam": adam.step, "products kept": kept.step}
    for step in found.values():
        step()  # makes the states
    scaled.step()
    return {**found, "scaled copies": lambda: with_copies(scaled, grads)}


@torch.no_grad()
def with_copies(opt: ClippedCAGradAdamW, grads: list[list[Tensor]]) -> Tensor:
    """The second matrix from copies, and the Euclidean step."""
    params = opt.param_groups[0]["params"]
    metric = metric_of(params, second_moments(opt.param_groups, opt.state))
    roots = []
    for v, (root, eps, factor) in zip(metric.moments, metric.numbers.tolist(), strict=True):
        assert v is not None, "every parameter has taken a step"
        roots.append((v.sqrt() * root + eps).reciprocal().mul(factor).sqrt())
    M = ops.gram([[g * s for g, s in zip(one, roots, strict=True)] for one in grads])
    opt.step()
    return M


def in_turn(steps: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Name -> seconds of CPU time of each round."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            begun = thread_time()
            step()
            times[name].append(thread_time() - begun)
    return times


if __name__ == "__main__":
    main()
