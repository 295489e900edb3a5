"""Models and optimizers that torch.distributed.checkpoint saves and reads, and what they hold."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from joined_batch import Problem, batch
from learning import Course, backward, optimizer_for
from parallel_models import build, laid_out, trained
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

RULE = {"name": "gradvac", "beta": 0.3}
PROBLEM = Problem("perceptron", options={"rule": RULE, "max_grad_norm": 0.2, "amsgrad": True})
NARROW = Problem("perceptron", dtype=torch.bfloat16)
BEFORE, AFTER = range(3), range(3, 5)
SETTINGS = ("weights", "c", "rule", "max_grad_norm", "rounding", "seed", "skipped_steps")
OPTIONS = {
    "shards": {},
    "on the CPU": {"cpu_offload": True},
    "flat": {"flatten_optimizer_state_dict": True},
    "flat, on the CPU": {"flatten_optimizer_state_dict": True, "cpu_offload": True},
    "full": {"full_state_dict": True},
    "broadcast": {"full_state_dict": True, "broadcast_from_rank0": True},
    "broadcast, on the CPU": {
        "full_state_dict": True,
        "broadcast_from_rank0": True,
        "cpu_offload": True,
    },
}


def network(how: str, problem: Problem = PROBLEM) -> nn.Module:
    model = build(problem.model, problem.dtype)
    if "tp" in how:  # the plan leaves `final` on one dimension of the mesh, or on none
        model.final.requires_grad_(False)
    return laid_out(model, how)


def adamw(net: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(trained(net).values(), lr=1e-3, weight_decay=0.1, amsgrad=True)


def run_on(net: nn.Module, opt: Any, how: str, steps: range, problem: Problem = PROBLEM) -> list:
    grams = []
    for step in steps:
        backward(net, opt, batch(problem, step), Course(how, "autograd"))
        opt.step()
        opt.zero_grad()
        grams.append(torch.as_tensor(opt.solution.gram).clone())
    return grams


def used(how: str, problem: Problem = PROBLEM, steps: range = BEFORE, **options: Any) -> Any:
    """(model, optimizer) that have trained, with settings that are not the constructor's."""
    net = network(how, problem)
    opt = optimizer_for(net, problem, Course(how, options=options))
    run_on(net, opt, how, steps, problem)
    opt.seed, opt.skipped_steps = 2**40 + 3, 5
    return net, opt


def other(how: str, problem: Problem = PROBLEM, **options: Any) -> Any:
    """(model, optimizer) with other weights and settings, never used."""
    net = network(how, problem)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.9)
    opt = optimizer_for(net, problem, Course(how, options={"lr": 0.5, **options}))
    opt.weights, opt.c, opt.rule, opt.max_grad_norm = [0.1, 0.2, 0.7], 0.1, "mgda", None
    return net, opt


def here(t: Tensor) -> Tensor:
    """What lies on this process."""
    t = t.detach()
    return t.to_local() if isinstance(t, DTensor) else t


def parameters(net: nn.Module, of: Callable[[Tensor], Tensor] = here) -> dict[str, Tensor]:
    return {name: of(p).clone() for name, p in trained(net).items()}


def moments(net: nn.Module, opt: Any, of: Callable[[Tensor], Tensor] = here) -> dict[str, Tensor]:
    """Every state that is not a step count."""
    return {
        f"{name} {key}": of(x).clone()  # one shard's `whole` is the shard itself
        for name, p in trained(net).items()
        for key, x in opt.state[p].items()
        if key != "step"
    }


def settings(opt: Any) -> dict[str, Any]:
    return {**{name: getattr(opt, name) for name in SETTINGS}, "memory": opt.rule_state}


def write(folder: Path, net: nn.Module, opt: Any) -> None:
    weights, state = get_state_dict(net, opt)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)


def read(folder: Path, net: nn.Module, opt: Any, planner: Any = None) -> None:
    weights, state = get_state_dict(net, opt)
    loaded = {"model": weights, "optimizer": state}
    dcp.load(loaded, checkpoint_id=folder, planner=planner)
    set_state_dict(net, opt, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], limit: float = 0.0) -> None:
    assert found.keys() == expected.keys()
    for name, x in found.items():
        if x.numel() == 0:
            continue  # an uneven shard
        error = float((x.double() - expected[name].double()).abs().max())
        assert error <= limit, f"{name} off by {error:.1e}"
