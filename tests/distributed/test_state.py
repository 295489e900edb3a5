"""The optimizer's state through torch.distributed.checkpoint, on any number of processes."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    AFTER,
    BEFORE,
    OPTIONS,
    PROBLEM,
    adamw,
    assert_same,
    moments,
    network,
    other,
    parameters,
    read,
    run_on,
    settings,
    used,
    write,
)
from joined_batch import Problem, assert_equal
from learning import Course, learnt, optimizer_for
from parallel_models import trained, whole
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)


def saves(how: str, folder: Path, problem: Problem = PROBLEM) -> Any:
    """(where the undisturbed run ends, settings and moments of what was saved)."""
    net = network(how, problem)
    opt = optimizer_for(net, problem, Course(how))
    get_optimizer_state_dict(net, opt)  # of a fresh optimizer: the run goes on as if it were not
    grams = run_on(net, opt, how, BEFORE, problem)
    opt.seed, opt.skipped_steps = 2**40 + 3, 5
    write(folder, net, opt)
    kept = settings(opt), moments(net, opt, whole)
    grams += run_on(net, opt, how, AFTER, problem)
    return learnt(net, grams, []), *kept


def goes_on(how: str, folder: Path, problem: Problem = PROBLEM) -> Any:
    """(where the resumed run ends, settings and moments that it began with)."""
    net, opt = other(how, problem)
    read(folder, net, opt)
    kept = settings(opt), moments(net, opt, whole)
    grams = run_on(net, opt, how, AFTER, problem)
    return learnt(net, grams, []), *kept


def check_saved_and_read(
    run: Any, folder: Path, saver: str, readers: list, savers: int = 4
) -> None:
    place = folder / "saved"
    (end, kept, of_adamw), *_ = saved = run(savers, saves, saver, place)
    assert kept["memory"]["values"]["steps"] == 3.0
    assert kept["skipped_steps"] == 5
    if "tp" not in saver:  # there is no plain truth with a frozen layer
        assert_equal([x for x, _, _ in saved], PROBLEM)
    for how, world in readers:
        for resumed, again, states in run(world, goes_on, how, place):
            assert again == kept
            assert_same(states, of_adamw)
            same = how == saver and world == savers
            assert_same(resumed.parameters, end.parameters, 0.0 if same else 1e-12)


def test_saved_by_four_processes_and_read_by_two_and_one(run, tmp_path):
    check_saved_and_read(run, tmp_path, "fsdp2", [("fsdp2", 2), ("replicas", 1)])


@pytest.mark.slow
@pytest.mark.parametrize("saver", ["replicas", "ddp", "fsdp2", "hsdp"])
def test_saved_and_read_by_every_layout(saver, run, tmp_path):
    readers = [(how, w) for how in ("replicas", "ddp", "fsdp2", "hsdp") for w in (4, 2)]
    check_saved_and_read(run, tmp_path, saver, [*readers, ("replicas", 1), ("fsdp2", 1)])


@pytest.mark.slow
@pytest.mark.parametrize(("saver", "savers"), [("tp", 2), ("fsdp x tp", 4)])
def test_saved_and_read_under_tensor_parallelism(saver, savers, run, tmp_path):
    readers = [("tp", 2), ("fsdp x tp", 4)]
    check_saved_and_read(run, tmp_path, saver, readers, savers)


def every_option(how: str, names: list[str]) -> None:
    net, opt = used(how)
    given = {}
    for name in names:
        asked = StateDictOptions(**OPTIONS[name])
        # torch hands out the state itself, which would be shared with whoever loads it.
        given[name] = copy.deepcopy(get_optimizer_state_dict(net, opt, options=asked))
    kept, of_adamw = settings(opt), moments(net, opt)
    weights = copy.deepcopy(get_model_state_dict(net))
    run_on(net, opt, how, AFTER)
    for name, state in given.items():
        again, fresh = other(how)
        set_model_state_dict(again, copy.deepcopy(weights))
        asked = StateDictOptions(**OPTIONS[name])
        set_optimizer_state_dict(again, fresh, state, options=asked)
        assert settings(fresh) == kept, name
        assert_same(moments(again, fresh), of_adamw)
        run_on(again, fresh, how, AFTER)
        assert_same(parameters(again), parameters(net))


def test_every_option_of_a_state_dict(run):
    run(2, every_option, "fsdp2", list(OPTIONS))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "world"), [("replicas", 2), ("ddp", 2), ("hsdp", 4), ("tp", 2), ("fsdp x tp", 4)]
)
def test_every_option_of_a_state_dict_in_every_layout(how, world, run):
    # torch cannot cut whole tensors for FSDP2 on top of tensor parallelism, but broadcasts them.
    names = [name for name in OPTIONS if (how, name) != ("fsdp x tp", "full")]
    run(world, every_option, how, names)


def adamw_and_ours(folder: Path) -> None:
    """Each reads what the other has saved, under FSDP2; so does the one on one process."""
    net, opt = used("fsdp2")
    write(folder / "ours", net, opt)
    torch_net = network("fsdp2")
    torch_opt = adamw(torch_net)
    read(folder / "ours", torch_net, torch_opt)
    assert_same(parameters(torch_net), parameters(net))
    assert_same(moments(torch_net, torch_opt), moments(net, opt))
    for p in trained(torch_net).values():
        p.grad = torch.ones_like(p)
    torch_opt.step()
    assert {float(state["step"]) for state in torch_opt.state.values()} == {4.0}
    torch_opt.zero_grad()
    write(folder / "adamw", torch_net, torch_opt)
    net, opt = other("fsdp2")
    before = settings(opt)
    with pytest.raises(dcp.api.CheckpointException, match=r"Missing key .*groups\.0\.raco"):
        read(folder / "adamw", net, opt)
    partly = dcp.DefaultLoadPlanner(allow_partial_load=True)
    read(folder / "adamw", net, opt, partly)
    assert settings(opt) == before
    assert_same(moments(net, opt), moments(torch_net, torch_opt))
    in_memory_from_adamw(torch_net, torch_opt, before)


def in_memory_from_adamw(torch_net: nn.Module, torch_opt: Any, before: dict[str, Any]) -> None:
    for name in ("flat", "full", "broadcast"):
        asked = StateDictOptions(**OPTIONS[name])
        state = get_optimizer_state_dict(torch_net, torch_opt, options=asked)
        net, opt = other("fsdp2")
        if "flat" in name:
            for key in list(trained(net)):
                state[f"param_groups.{key}.raco"] = None
        set_optimizer_state_dict(net, opt, state, options=asked)
        assert settings(opt) == before, name
        assert_same(moments(net, opt), moments(torch_net, torch_opt))


def alone_reads(folder: Path) -> Any:
    net = network("replicas")
    opt = adamw(net)
    read(folder, net, opt)
    return parameters(net, whole), moments(net, opt, whole)


def test_adamw_and_ours_read_each_other(run, tmp_path):
    run(2, adamw_and_ours, tmp_path)
    (found,) = run(1, alone_reads, tmp_path / "ours")
    for part, expected in zip(found, run(1, whole_run)[0], strict=True):
        assert_same(part, expected, 1e-12)


def whole_run() -> Any:
    net, opt = used("replicas")
    return parameters(net, whole), moments(net, opt, whole)


def ours_to_adamw_in_memory() -> None:
    net, opt = used("fsdp2")
    for name in ("flat", "full", "broadcast"):
        asked = StateDictOptions(**OPTIONS[name])
        state = get_optimizer_state_dict(net, opt, options=asked)
        again = network("fsdp2")
        fresh = adamw(again)
        if name == "full":
            with pytest.raises(KeyError, match=r"param_groups\.0\.raco"):
                set_optimizer_state_dict(again, fresh, copy.deepcopy(state), options=asked)
            for group in state["param_groups"]:
                for key in [key for key in group if key.startswith("raco")]:
                    del group[key]
        set_optimizer_state_dict(again, fresh, state, options=asked)
        assert_same(moments(again, fresh), moments(net, opt))


def test_adamw_takes_ours_in_memory(run):
    run(2, ours_to_adamw_in_memory)
