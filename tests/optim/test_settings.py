"""Settings are checked when they are set, and every kind of checkpoint carries them."""

import copy
import gc
import io
import json
import pickle
import weakref
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

import raco_fast
from raco_fast.optim.clipped_cagrad_adamw import ClippedCAGradAdamW

WEIGHTS = {"x": 0.7, "y": 0.2, "z": 0.1}
OTHERWISE = {
    "weights": {"z": 0.5, "x": 0.3, "y": 0.2},
    "c": 0.7,
    "rule": "cagrad",
    "max_grad_norm": 0.3,
    "rounding": "split",
    "seed": 2**40 + 3,
}


def network(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def losses_of(model: nn.Module, t: int) -> dict[str, Tensor]:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(t))
    y = model(x.to(model[0].weight)).float()
    return {"x": y[:, 0].sum(), "y": (y[:, 1] - y[:, 0]).square().sum(), "z": y[:, 2].exp().sum()}


def optimizer_of(model: nn.Module, **settings) -> ClippedCAGradAdamW:
    groups = [
        {"params": model[0].parameters(), "lr": 0.03},
        {"params": model[2].parameters(), "weight_decay": 0.2},
    ]
    return ClippedCAGradAdamW(groups, lr=0.02, **{"weights": WEIGHTS, **settings})


def train(model: nn.Module, opt: ClippedCAGradAdamW, steps: range) -> None:
    for t in steps:
        opt.zero_grad()
        opt.backward(losses_of(model, t))
        opt.step()


def settings_of(opt: ClippedCAGradAdamW) -> dict:
    return {name: getattr(opt, name) for name in OTHERWISE}


def set_all(opt: ClippedCAGradAdamW) -> None:
    for name, value in OTHERWISE.items():
        setattr(opt, name, value)


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_settings_set_between_steps_are_those_of_the_constructor():
    ours, theirs = network(), network()
    ordered = {name: OTHERWISE["weights"][name] for name in WEIGHTS}
    a, b = optimizer_of(ours), optimizer_of(theirs, **{**OTHERWISE, "weights": ordered})
    set_all(a)
    for opt, model in ((a, ours), (b, theirs)):
        assert settings_of(opt) == OTHERWISE
        assert list(opt.weights) == list(WEIGHTS)
        train(model, opt, range(4))
    assert equal(ours, theirs)
    unset = network()
    train(unset, optimizer_of(unset), range(4))
    assert not equal(ours, unset)


@pytest.mark.parametrize("through", ["optimizer", "gradients"])
@pytest.mark.parametrize("order", [("x", "y", "z"), ("z", "x", "y"), ("y", "z", "x")])
def test_weights_belong_to_names(order, through):
    p = nn.Parameter(torch.zeros(3))
    opt = ClippedCAGradAdamW([p], weights=dict.fromkeys("xyz", 1 / 3), rule="linear")
    target = opt if through == "optimizer" else opt.gradients
    target.weights = {name: WEIGHTS[name] for name in order}
    assert opt.weights == WEIGHTS
    opt.backward({"x": p[0], "y": p[1], "z": p[2]})
    opt.step()
    assert opt.solution.names == opt.objective_names == ("x", "y", "z")
    assert opt.solution.coefficients.tolist() == [0.7, 0.2, 0.1]
    target.weights = [0.1, 0.2, 0.7]  # in the order of the names
    assert opt.weights == {"x": 0.1, "y": 0.2, "z": 0.7}


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        (
            "weights",
            {"x": 0.5, "y": 0.5},
            ValueError,
            r"missing \['z'\], unknown \[\]; a weight of",
        ),
        (
            "weights",
            {**WEIGHTS, "u": 0.0},
            ValueError,
            r"missing \[\], unknown \['u'\]; .* new opt",
        ),
        ("weights", [0.5, 0.5], ValueError, r"must be of the objectives \('x', 'y', 'z'\), got"),
        ("weights", {"x": 0.5, "y": 0.5, "z": 0.5}, ValueError, "must sum to 1, got 1.5"),
        ("weights", {"x": -1.0, "y": 1.0, "z": 1.0}, ValueError, "must not be negative"),
        ("weights", None, TypeError, "`weights` must be a mapping"),
        ("c", 1.0, ValueError, r"`c` must be in \[0, 1\), got 1.0"),
        ("c", "0.4", TypeError, "`c` must be a number, got '0.4'"),
        ("rule", "pcgrab", ValueError, "`rule` must be one of .*'pcgrab'; did you mean 'pcgrad'"),
        ("max_grad_norm", 0.0, ValueError, "`max_grad_norm` must be a positive number, got 0.0"),
        ("max_grad_norm", float("nan"), ValueError, "must be a positive number, got nan; None"),
        ("max_grad_norm", "1.0", TypeError, "`max_grad_norm` must be a number or None, got '1.0'"),
        ("rounding", "up", ValueError, "`rounding` must be one of .* got 'up'"),
        ("seed", 0.5, TypeError, "`seed` must be an integer, got 0.5"),
    ],
)
def test_a_wrong_setting_is_refused_and_the_old_one_stays(name, value, error, message):
    opt = optimizer_of(network())
    before = settings_of(opt)
    with pytest.raises(error, match=message):
        setattr(opt, name, value)
    assert settings_of(opt) == before


def test_rounding_has_no_derivative_when_it_is_set_either():
    p = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    opt = ClippedCAGradAdamW([p], weights=[1.0], differentiable=True, foreach=False)
    with pytest.raises(ValueError, match="`differentiable` must be False"):
        opt.rounding = "split"
    assert opt.rounding == "nearest"


@pytest.mark.parametrize(
    "edit",
    [
        lambda w: w.__setitem__("x", 1.0),
        lambda w: w.__delitem__("x"),
        lambda w: w.update(x=0.6, y=0.3),
        lambda w: w.pop("x"),
        lambda w: w.popitem(),
        lambda w: w.clear(),
        lambda w: w.setdefault("u", 0.0),
        lambda w: w.__ior__({"x": 1.0}),
    ],
)
def test_weights_are_not_edited_in_place(edit):
    opt = optimizer_of(network())
    for weights in (opt.weights, opt.gradients.weights):
        with pytest.raises(TypeError, match=r"cannot be edited in place, .*set all of them: weig"):
            edit(weights)
    assert opt.weights == WEIGHTS
    for copied in (copy.copy, copy.deepcopy, dict, lambda w: pickle.loads(pickle.dumps(w))):
        twin = copied(opt.weights)
        assert type(twin) is dict
        assert twin == WEIGHTS
    assert json.loads(json.dumps(opt.weights)) == WEIGHTS


@pytest.mark.parametrize("name", ["weights", "c", "rule", "max_grad_norm", "seed"])
def test_groups_cannot_have_what_holds_for_all_of_them(name):
    model, value = network(), OTHERWISE[name]
    message = rf"`{name}` holds for all parameter groups together, got .*opt.{name} = "
    with pytest.raises(ValueError, match=message):
        ClippedCAGradAdamW([{"params": model.parameters(), name: value}], weights=WEIGHTS)
    opt = optimizer_of(model)
    with pytest.raises(ValueError, match=message):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2))], name: value})
    assert len(opt.param_groups) == 2
    saved = opt.state_dict()
    saved["param_groups"][1][name] = value
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(saved)
    opt.param_groups[1][name] = value
    opt.backward(losses_of(model, 0))
    with pytest.raises(ValueError, match=message):
        opt.step()
    del opt.param_groups[1][name]
    opt.step()  # the mistake did not lose the gradients


def by_torch_save(model, opt, fresh, fresh_opt):
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    fresh_opt.load_state_dict(torch.load(file, weights_only=True))


def by_old_format(model, opt, fresh, fresh_opt):
    saved = opt.state_dict()
    for group in saved["param_groups"]:
        del group["raco"]
    fresh_opt.load_state_dict(saved)


def through_adamw(model, opt, fresh, fresh_opt):
    between = torch.optim.AdamW([{"params": m.parameters()} for m in (fresh[0], fresh[2])])
    between.load_state_dict(opt.state_dict())
    fresh_opt.load_state_dict(between.state_dict())


def by_dcp(**options):
    def pass_on(model, opt, fresh, fresh_opt):
        asked = StateDictOptions(**options)
        state = get_optimizer_state_dict(model, opt, options=asked)
        set_optimizer_state_dict(fresh, fresh_opt, state, options=asked)

    return pass_on


def by_dcp_files(planner=None, **options):
    def pass_on(model, opt, fresh, fresh_opt, folder):
        asked = StateDictOptions(**options)
        weights, state = get_state_dict(model, opt, options=asked)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder, no_dist=True)
        weights, state = get_state_dict(fresh, fresh_opt, options=asked)
        loaded = {"model": weights, "optimizer": state}
        dcp.load(loaded, checkpoint_id=folder, no_dist=True, planner=planner)
        set_state_dict(
            fresh,
            fresh_opt,
            model_state_dict=loaded["model"],
            optim_state_dict=loaded["optimizer"],
            options=asked,
        )

    return pass_on


ROADS = {
    "torch.save": by_torch_save,
    "only the key raco": by_old_format,
    "through AdamW": through_adamw,
    "dcp": by_dcp(),
    "dcp, flat": by_dcp(flatten_optimizer_state_dict=True),
    "dcp, full": by_dcp(full_state_dict=True),
    "dcp, on the CPU": by_dcp(full_state_dict=True, cpu_offload=True),
    "dcp files": by_dcp_files(),
    "dcp files, flat": by_dcp_files(flatten_optimizer_state_dict=True),
}


@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed")
@pytest.mark.parametrize("road", ROADS)
def test_every_checkpoint_carries_them(road, tmp_path):
    whole, model, fresh = network(), network(), network(seed=1)
    for m in (whole, model):
        opt = optimizer_of(m)
        train(m, opt, range(2))
        set_all(opt)  # a schedule
        opt.skipped_steps = 5
        train(m, opt, range(2, 5 if m is whole else 3))
    # What dcp loads is what the optimizer has already, so it must have the residuals of "split".
    rounding = "split" if "files" in road or "flat" in road else "stochastic"
    fresh_opt = optimizer_of(fresh, c=0.1, seed=9, rounding=rounding)
    more = [tmp_path] if "files" in road else []
    ROADS[road](model, opt, fresh, fresh_opt, *more)
    assert settings_of(fresh_opt) == OTHERWISE
    assert fresh_opt.skipped_steps == 5
    assert [group["lr"] for group in fresh_opt.param_groups] == [0.03, 0.02]
    fresh.load_state_dict(model.state_dict())
    train(fresh, fresh_opt, range(3, 5))
    assert equal(fresh, whole)


@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed")
@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        ({"name": "gradvac", "beta": 0.3}, {"steps", "cosines"}),
        ({"name": "pcd", "tau": 0.1, "beta": 0.5}, {"steps", "squares"}),
    ],
)
def test_every_checkpoint_carries_the_state_of_a_rule(road, rule, kept, tmp_path):
    """Resumed with the objectives in another order, except for pcd: its first one is special."""
    whole, model, fresh = (network(seed, torch.float64) for seed in (0, 0, 1))
    for m in (whole, model):
        opt = optimizer_of(m, rule=rule)
        train(m, opt, range(5 if m is whole else 3))
    other = dict(reversed(WEIGHTS.items())) if rule["name"] == "gradvac" else WEIGHTS
    fresh_opt = optimizer_of(fresh, weights=other, rule="mgda")
    ROADS[road](model, opt, fresh, fresh_opt, *([tmp_path] if "files" in road else []))
    assert fresh_opt.rule == rule
    saved = fresh_opt.rule_state
    assert saved["objectives"] == list(other)
    assert set(saved["values"]) == kept
    assert saved["values"]["steps"] == 3.0
    fresh.load_state_dict(model.state_dict())
    if rule["name"] == "pcd":
        assert saved == opt.rule_state
        train(fresh, fresh_opt, range(3, 5))
        assert equal(fresh, whole)
    else:
        for i, row in enumerate(saved["values"]["cosines"]):
            assert row == opt.rule_state["values"]["cosines"][2 - i][::-1]
    fresh_opt.rule = "pcgrad"
    assert fresh_opt.rule_state == {}


def test_a_rule_that_is_not_registered_has_to_be_there_already():
    @dataclass(frozen=True)
    class Own(raco_fast.Rule):
        scale: float = 2.0

        def coefficients(self, problem):
            return self.scale * np.tile(problem.weights, (len(problem.gram), 1))

    opt = optimizer_of(network(), rule=Own(3.0))
    assert opt.rule["name"].endswith("Own")
    assert "Own(scale=3.0)" in repr(opt)
    twin = optimizer_of(network(), rule=Own(3.0))
    twin.load_state_dict(opt.state_dict())
    assert twin.rule == opt.rule
    for rule in (Own(2.0), "mgda"):
        with pytest.raises(ValueError, match=r"`rule` must be one of .*Own'; raco_fast.register_"):
            optimizer_of(network(), rule=rule).load_state_dict(opt.state_dict())


@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed")
@pytest.mark.parametrize("road", ROADS)
def test_other_objectives_are_refused_before_anything_is_loaded(road, tmp_path):
    model, fresh = network(), network()
    opt = optimizer_of(model, weights={"x": 0.5, "v": 0.3, "z": 0.2})
    opt.backward(dict(zip("xvz", losses_of(model, 0).values(), strict=True)))
    opt.step()
    fresh_opt = optimizer_of(fresh, c=0.1)
    train(fresh, fresh_opt, range(1))
    before, more = copy.deepcopy(fresh_opt.state_dict()), [tmp_path] if "files" in road else []
    model.load_state_dict(fresh.state_dict())
    theirs, ours = "raco, objectives: v, x, z", "raco, objectives: x, y, z"
    error, message = {
        # torch.distributed.checkpoint compares the keys before it writes into a state.
        "dcp files": (dcp.api.CheckpointException, f"Missing key .*groups.0.{ours}"),
        "dcp files, flat": (dcp.api.CheckpointException, f"Missing key .*groups.0.weight.{ours}"),
        "dcp, full": (KeyError, f"param_groups.0.{theirs}"),
        "dcp, on the CPU": (KeyError, f"param_groups.0.{theirs}"),
    }.get(road, (ValueError, r"objectives \('x', 'v', 'z'\), this one has \('x', 'y'"))
    with pytest.raises(error, match=message):
        ROADS[road](model, opt, fresh, fresh_opt, *more)
    after = fresh_opt.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for k, state in before["state"].items():
        for name, value in state.items():
            assert torch.equal(after["state"][k][name], value)


@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed")
@pytest.mark.parametrize("road", ["torch.save", "dcp", "dcp, full", "dcp files"])
def test_checkpoints_of_adamw_leave_the_constructors_settings(road, tmp_path):
    model, fresh = network(), network(seed=1)
    opt = torch.optim.AdamW([{"params": m.parameters()} for m in (model[0], model[2])], lr=0.03)
    fresh_opt = optimizer_of(fresh, c=0.1, seed=9)
    sum(losses_of(model, 0).values()).backward()
    opt.step()
    opt.zero_grad()
    if road == "dcp files":
        with pytest.raises(dcp.api.CheckpointException, match=r"Missing key .*groups\.0\.raco"):
            ROADS[road](model, opt, fresh, fresh_opt, tmp_path)
        planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
        by_dcp_files(planner)(model, opt, fresh, fresh_opt, tmp_path)
    else:
        ROADS[road](model, opt, fresh, fresh_opt)
    assert fresh_opt.weights == WEIGHTS
    assert (fresh_opt.c, fresh_opt.seed) == (0.1, 9)
    moment, theirs = (
        o.state[m[0].weight]["exp_avg"] for o, m in ((fresh_opt, fresh), (opt, model))
    )
    assert torch.equal(moment, theirs)


@pytest.mark.parametrize("road", ["torch.save", "dcp", "dcp, flat"])
def test_adamw_loads_ours(road):
    model, fresh = network(), network(seed=1)
    opt = optimizer_of(model)
    train(model, opt, range(2))
    fresh_opt = torch.optim.AdamW([{"params": m.parameters()} for m in (fresh[0], fresh[2])])
    ROADS[road](model, opt, fresh, fresh_opt)
    sum(losses_of(fresh, 0).values()).backward()
    fresh_opt.step()
    assert fresh_opt.state[fresh[0].weight]["step"] == 3.0


def test_a_broken_setting_in_a_checkpoint_loads_nothing():
    opt = optimizer_of(network())
    saved = opt.state_dict()
    for name, value, message in [
        ("c", 2.0, "`c` must be in"),
        ("rule", "x", "`rule` must be one of"),
        ("rule_state", {"objectives": [], "values": {"a": 0.0}}, r"`state` must have \{\}"),
        ("weights", {**WEIGHTS, "x": 0.0}, "`weights` must sum to 1"),
        ("max_grad_norm", -1.0, "`max_grad_norm` must be a positive"),
        ("rounding", "up", "`rounding` must be one of"),
    ]:
        broken = {**saved, "raco": {**saved["raco"], "seed": 4, name: value}}
        with pytest.raises(ValueError, match=message):
            opt.load_state_dict(broken)
        assert opt.seed == 0
    del saved["raco"]
    saved["param_groups"][1]["raco"] = json.dumps({"seed": 1})
    with pytest.raises(ValueError, match="must have the same 'raco' in all param_groups, got"):
        opt.load_state_dict(saved)


def test_the_states_of_a_fresh_optimizer_are_no_step():
    rule = {"name": "gradvac", "beta": 0.3}
    asked, whole = network(dtype=torch.float64), network(dtype=torch.float64)
    first, second = (optimizer_of(m, rule=rule) for m in (asked, whole))
    state = get_optimizer_state_dict(asked, first)
    assert {float(of_p["step"]) for of_p in state["state"].values()} == {0.0}
    assert first.rule_state == {}
    train(asked, first, range(2))
    train(whole, second, range(2))
    assert equal(asked, whole)
    assert first.rule_state == second.rule_state


def test_zeros_by_hand_are_no_step_of_several_objectives():
    model = network()
    opt = optimizer_of(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.raises(RuntimeError, match=r"step without backward: .* no gradients"):
        opt.step()
    assert not opt.state


@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed")
def test_a_state_that_does_not_fit_is_not_loaded(tmp_path):
    model, fresh = network(), network(seed=1)
    opt = optimizer_of(model, amsgrad=True, rounding="split")
    train(model, opt, range(2))
    for options, missing in [
        ({"rounding": "split"}, r"\['max_exp_avg_sq'\]"),
        ({"amsgrad": True}, r"\['split_residual'\]"),
    ]:
        other = optimizer_of(fresh, **options)
        for road in ("dcp files", "dcp files, flat"):
            message = rf"of shape \[6, 4\] must have {missing}, got only .*`amsgrad` and `rounding`"
            with pytest.raises(ValueError, match=message):
                ROADS[road](model, opt, fresh, other, tmp_path)
            assert other.rounding == options.get("rounding", "nearest")
    turned = ClippedCAGradAdamW([model[0].bias, model[0].weight], weights=WEIGHTS)
    saved = optimizer_of(model).state_dict()
    saved["state"] = opt.state_dict()["state"]
    del saved["param_groups"][1]
    with pytest.raises(ValueError, match=r"parameter 0 .*'exp_avg' of that shape, got \[6, 4\]"):
        turned.load_state_dict(saved)
    assert not turned.state


def test_residuals_that_a_flat_state_dict_lacks_are_zero():
    model, fresh = network(), network()
    opt = optimizer_of(model)
    train(model, opt, range(2))
    fresh_opt = optimizer_of(fresh, rounding="split")
    ROADS["dcp, flat"](model, opt, fresh, fresh_opt)
    assert fresh_opt.rounding == "nearest"
    assert set(fresh_opt.state[fresh[0].weight]) == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_carry_them_and_own_their_parameters(copied):
    model = network()
    opt = optimizer_of(model)
    set_all(opt)
    twin_model, twin, gradients = copied((model, opt, opt.gradients))
    assert settings_of(twin) == OTHERWISE
    assert gradients is twin.gradients
    assert gradients.parameters()[0] is twin_model[0].weight
    twin.c = 0.2
    twin.weights = WEIGHTS
    assert settings_of(opt) == OTHERWISE


def mode_autograd(opt, losses, scores):
    opt.backward(losses)


def mode_own_loop(opt, losses, scores):
    for name, loss in losses.items():
        with opt.objective(name):
            loss.backward(retain_graph=True)


def mode_one_backward(opt, losses, scores):
    opt.backward(losses, scores=scores)


def mode_gram_first(opt, losses, scores):
    opt.backward(losses, scores=scores, mode="gram_first")


def mode_step_in_backward(opt, losses, scores):
    opt.backward(losses, scores=scores, mode="gram_first", step_in_backward=True)


@pytest.mark.parametrize(
    "backward",
    [None, mode_autograd, mode_own_loop, mode_one_backward, mode_gram_first, mode_step_in_backward],
)
@pytest.mark.parametrize("weights", [{"x": 1.0}, {"x": 0.4, "y": 0.6}])
def test_an_optimizer_is_freed_at_once(weights, backward):
    model = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))
    raco_fast.prepare(model)
    opt = ClippedCAGradAdamW(model.parameters(), weights=weights)
    gc.collect()
    gc.disable()
    try:
        for _ in range(2 if backward else 0):
            scores = model(torch.randn(5, 4))
            losses = {"x": scores.sum(), "y": scores.square().sum()}
            backward(opt, {name: losses[name] for name in weights}, scores)
            opt.step()
            opt.zero_grad()
        repr(opt), opt.state_dict(), opt.solution
        alive = weakref.ref(opt)
        moments = [weakref.ref(state["exp_avg"]) for state in opt.state.values()]
        gradients = opt.gradients
        del opt
        assert alive() is None
        assert all(moment() is None for moment in moments)
    finally:
        gc.enable()
    with pytest.raises(RuntimeError, match="the optimizer that these gradients belong to is gone"):
        gradients.parameters()
