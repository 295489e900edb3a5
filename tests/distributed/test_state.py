"""The optimizer's state through torch.distributed.checkpoint, on any number of processes."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from joined_batch import WEIGHTS, Problem, assert_equal, batch
from learning import Course, backward, learnt, optimizer_for
from parallel_models import build, laid_out, trained, whole
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor, Shard

import raco_fast

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


def other_objectives(folder: Path) -> None:
    net, opt = used("fsdp2")
    write(folder, net, opt)
    again = network("fsdp2")
    names = ("helpful", "harmless", "short")
    live = raco_fast.ClippedCAGradAdamW(
        trained(again).values(), weights=dict.fromkeys(names, 1 / 3), amsgrad=True
    )
    scores = again(batch(PROBLEM, 0).ids)
    live.backward({name: scores.square().mean() * (k + 1) for k, name in enumerate(names)})
    live.step()
    live.zero_grad()
    before, kept = copy.deepcopy(moments(again, live)), parameters(again)
    missing = r"Missing key .*groups\.0\.raco, objectives: harmless, helpful, short"
    with pytest.raises(dcp.api.CheckpointException, match=missing):
        read(folder, again, live)
    with pytest.raises(ValueError, match=r"is of an optimizer for the objectives .*'concise'"):
        live.load_state_dict(opt.state_dict())
    assert_same(moments(again, live), before)
    assert_same(parameters(again), kept)


def test_a_checkpoint_of_other_objectives_changes_nothing(run, tmp_path):
    run(2, other_objectives, tmp_path / "saved")


def on_a_fresh_optimizer(how: str, every_rank: bool) -> Any:
    net, opt = other(how)
    before = parameters(net)
    if every_rank or dist.get_rank() == 0:
        state = get_optimizer_state_dict(net, opt)
        assert state["state"].keys() == trained(net).keys()
        steps = {float(of_p["step"]) for of_p in state["state"].values()}
        assert steps == {0.0}
        assert opt.solution is None
        assert opt.rule_state == {}
        assert [group["lr"] for group in opt.param_groups] == [0.5]
    assert_same(parameters(net), before)


def test_a_fresh_optimizer_has_states_to_read_into_and_no_step(run):
    run(2, on_a_fresh_optimizer, "fsdp2", True)
    # As with AdamW, replicas wait for nobody: process 0 may save alone.
    run(2, on_a_fresh_optimizer, "ddp", False)


def split_saves(folder: Path) -> Any:
    net, opt = used("fsdp2", NARROW, rounding="split")
    write(folder, net, opt)
    asked = StateDictOptions(full_state_dict=True)
    torch.save(get_optimizer_state_dict(net, opt, options=asked), folder / f"{dist.get_rank()}.pt")
    return parameters(net, whole), moments(net, opt, whole)


def split_reads(folder: Path) -> Any:
    net, opt = other("fsdp2", NARROW, rounding="split")
    read(folder, net, opt)
    found = parameters(net, whole), moments(net, opt, whole)
    run_on(net, opt, "fsdp2", AFTER, NARROW)
    for asked in ({"full_state_dict": True}, OPTIONS["broadcast"]):
        again, nearest = other("fsdp2", NARROW)
        state = torch.load(folder / f"{dist.get_rank()}.pt")
        with pytest.raises(ValueError, match=r"must have .*'split_residual'"):
            set_optimizer_state_dict(again, nearest, state, options=StateDictOptions(**asked))
    again, nearest = other("fsdp2", NARROW)
    with pytest.raises(ValueError, match=r"must have \['split_residual'\], got only .*`rounding`"):
        read(folder, again, nearest)
    return found


def test_split_residuals_are_kept_or_missed(run, tmp_path):
    (weights, states), *_ = run(4, split_saves, tmp_path / "saved")
    residuals = [x for name, x in states.items() if "residual" in name]
    assert any(x.view(torch.int16).any() for x in residuals)
    for found in run(2, split_reads, tmp_path / "saved"):
        for ours, saved in zip(found, (weights, states), strict=True):
            for name, x in ours.items():
                assert torch.equal(x.view(torch.int16), saved[name].view(torch.int16)), name


def plain_into_shards() -> None:
    net, opt = used("fsdp2")
    alone, plain = used("replicas", steps=range(0), process_group=None)
    get_optimizer_state_dict(alone, plain)
    before = moments(net, opt)
    cure = r"got a whole tensor for a DTensor \(Shard\(dim=0\),\); .*full_state_dict=True"
    with pytest.raises(ValueError, match=cure):
        opt.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match=r"got a DTensor \(Shard\(dim=0\),\) for a whole tensor"):
        plain.load_state_dict(opt.state_dict())
    wrong = copy.deepcopy(opt.state_dict())
    for state in wrong["state"].values():
        if state["exp_avg"].ndim == 2:
            for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
                state[name] = state[name].redistribute(placements=[Shard(1)])
    with pytest.raises(ValueError, match=r"Shard\(dim=1\),\) for a DTensor \(Shard\(dim=0\),\)"):
        opt.load_state_dict(wrong)
    assert_same(moments(net, opt), before)


def test_states_that_lie_otherwise_than_parameters_are_refused(run):
    run(2, plain_into_shards)


def copies_and_files(folder: Path) -> None:
    net, opt = used("fsdp2")
    file = folder / f"{dist.get_rank()}.pt"
    torch.save((net.state_dict(), opt.state_dict()), file)
    for copied in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert settings(copied) == settings(opt)
        for p, q in zip(trained(net).values(), copied.gradients.parameters(), strict=True):
            assert p is not q
            assert torch.equal(here(opt.state[p]["exp_avg"]), here(copied.state[q]["exp_avg"]))
    weights, state = torch.load(file, weights_only=True)
    again, fresh = other("fsdp2")
    again.load_state_dict(weights)
    fresh.load_state_dict(state)
    assert settings(fresh) == settings(opt)
    for twin, its in ((net, opt), (again, fresh)):
        run_on(twin, its, "fsdp2", AFTER)
    assert_same(parameters(again), parameters(net))


def test_copies_and_files_of_each_process_go_on(run, tmp_path):
    run(2, copies_and_files, tmp_path)


def groups_added_later(folder: Path) -> None:
    def halves(net: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        params = list(trained(net).values())
        return params[::2], params[1::2]

    ends = []
    for resumed in (False, True):
        net = network("fsdp2")
        first, second = halves(net)
        opt = raco_fast.ClippedCAGradAdamW(first, lr=1e-3, weights=WEIGHTS, rule=RULE)
        for p in second:
            p.requires_grad_(False)
        if not resumed:
            run_on(net, opt, "fsdp2", range(1))
        for p in second:
            p.requires_grad_(True)
        opt.add_param_group({"params": second, "lr": 2e-3})
        if not resumed:
            run_on(net, opt, "fsdp2", BEFORE)
            write(folder, net, opt)
        else:
            read(folder, net, opt)
        run_on(net, opt, "fsdp2", AFTER)
        steps = [{float(opt.state[p]["step"]) for p in half} for half in halves(net)]
        assert steps == [{6.0}, {5.0}]
        assert [group["lr"] for group in opt.param_groups] == [1e-3, 2e-3]
        ends.append(parameters(net))
    assert_same(ends[1], ends[0])


def test_a_group_added_later_is_saved_and_read(run, tmp_path):
    run(2, groups_added_later, tmp_path / "saved")
