"""compute-sanitizer over every kernel: memory accesses, races, uninitialised reads.

The process it watches is `python -m bench.harness.sanitizer`, which launches every kernel that the
package calls, through public operations, on small lists: sizes around a vector, a block and a
chunk, missing gradients, addresses that are no multiple of 16. The checkers slow a kernel down a
hundredfold.
"""

import ast
import sys
from collections.abc import Iterator
from shutil import which

import torch
from torch import Tensor

import raco_fast
from bench.harness.jobs import Done
from bench.harness.machine import ROOT
from bench.harness.records import Records
from raco_fast.backends import ops
from raco_fast.backends.types import AdamWOptions, Update

TOOLS = ("memcheck", "racecheck", "initcheck")
FINISHED = "all kernels launched"
_SIZES = (1, 7, 8, 1023, 1025, 4097)


def kernels() -> list[str]:
    """Names of the functions in kernels/*.py that are launched, as in `name[grid](...)`."""
    trees = [ast.parse(f.read_text(encoding="utf-8")) for f in (ROOT / "kernels").glob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    called = [node.func for node in nodes if isinstance(node, ast.Call)]
    launched = {ast.unparse(f.value) for f in called if isinstance(f, ast.Subscript)}
    return sorted(defined & launched)


def commands() -> dict[str, list[str]]:
    """Record name -> command; none where compute-sanitizer is not installed."""
    if which("compute-sanitizer") is None:
        return {}
    common = ["--target-processes", "application-only", "--report-api-errors", "no"]
    ours = [option for name in kernels() for option in ("--kernel-name", f"kns={name}")]
    return {
        f"sanitizer/{tool}": [
            # Without torch's cache every tensor is an allocation of its own, whose end is guarded.
            *("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"),
            *("compute-sanitizer", "--tool", tool, *common),
            # Filtered, initcheck would not see what other kernels initialise.
            *([] if tool == "initcheck" else ours),
            *(sys.executable, "-m", "bench.harness.sanitizer"),
        ]
        for tool in TOOLS
    }


def record(records: Records, name: str, done: Done) -> None:
    """Write what one tool reported; a tool that could not do its work is a failure."""
    lines = done.output.splitlines()
    reports = [x for x in lines if x.startswith("=====") and any(k in x for k in kernels())]
    if done.code is None:
        records.add(name, {}, failure="not finished in time")
    elif reports:
        records.add(name, {}, reports=len(reports), failure="\n".join(reports[:5]))
    elif FINISHED not in lines:
        records.add(name, {}, failure=done.output[-1500:])
    else:
        records.add(name, {}, reports=0, seconds=round(done.seconds, 1))


def launch_all(device: torch.device) -> None:
    """Every kernel, in every variant that accesses memory in its own way."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for m, dtype in ((2, bf16), (3, fp32), (8, bf16), (12, fp16)):
        for grads in _lists(m, dtype, device):
            assert torch.isfinite(ops.gram(grads)).all()
            if m <= 3:
                _combined(grads)
    for sizes in ((48, 80), (144, 272), (37, 61)):
        for m, dtype, out in ((2, bf16, bf16), (3, fp16, fp32), (9, bf16, fp32)):
            _layer_gradients(sizes, dtype, torch.empty(m, *sizes[::-1], dtype=out, device=device))


def _combined(grads: list[list[Tensor | None]]) -> None:
    """G0 alone, and an AdamW step along it."""
    like = [next(g for g in column if g is not None) for column in zip(*grads, strict=True)]
    out, params, exp_avgs, exp_avg_sqs = ([g.clone() for g in like] for _ in range(4))
    torch._foreach_mul_(exp_avg_sqs, exp_avg_sqs)
    alpha = torch.full((len(grads),), 1.0 / len(grads), dtype=torch.float64)
    ops.combine(grads, alpha, out)
    steps, options = [torch.zeros(()) for _ in params], AdamWOptions(lr=0.01, weight_decay=0.1)
    ops.combine_adamw(Update(params, grads, exp_avgs, exp_avg_sqs, [], steps, options), alpha)
    assert all(torch.isfinite(t).all() for t in (*out, *params))


def _layer_gradients(sizes: tuple[int, int], dtype: torch.dtype, out: Tensor) -> None:
    """Written and added to, from ragged groups; rows that are no whole vectors among them."""
    m, bounds = len(out), [0, 1, 66, 66, 99, 163]
    g = torch.Generator().manual_seed(m)
    x, dy = (torch.randn(bounds[-1], d, generator=g).to(out.device, dtype) for d in sizes)
    U = torch.randn(m, len(bounds) - 1, generator=g, dtype=torch.float64)
    for fresh in (True, False):
        products = ops.weight_grad(x, dy, bounds, U, out, fresh, products=True)
        assert torch.isfinite(out).all()
        assert products is None or torch.isfinite(products).all()


def _lists(m: int, dtype: torch.dtype, device: torch.device) -> Iterator[list[list[Tensor | None]]]:
    """m lists: complete, with missing gradients, and at addresses that are no multiple of 16."""
    generator = torch.Generator().manual_seed(m)
    values = [[torch.randn(n + 1, generator=generator) for n in _SIZES] for _ in range(m)]
    on_device = [[v.to(device, dtype) for v in one] for one in values]
    yield [[g[:-1].clone() for g in one] for one in on_device]
    holes = enumerate(on_device)
    yield [[None if (i + k) % m == 0 else g for k, g in enumerate(one)] for i, one in holes]
    yield [[g[1:] for g in one] for one in on_device]


if __name__ == "__main__":
    with raco_fast.backend("triton"):
        launch_all(torch.device("cuda"))
    torch.cuda.synchronize()
    print(FINISHED)
