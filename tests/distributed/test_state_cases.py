"""What a saved state must not do to an optimizer, and how else states are kept."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    AFTER,
    BEFORE,
    NARROW,
    OPTIONS,
    PROBLEM,
    RULE,
    assert_same,
    here,
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
from joined_batch import WEIGHTS, batch
from parallel_models import trained, whole
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import Shard

import raco_fast


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
