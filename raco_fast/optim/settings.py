"""What `ClippedCAGradAdamW` is asked for beyond AdamW's arguments, and how it is kept.

Each setting is checked whenever it is set, so schedules may change it between steps, and travels in
copies, pickles and checkpoints. A checkpoint has it twice: under "raco", and as JSON in every
parameter group, because torch.distributed.checkpoint keeps nothing of a state_dict but the state
and the groups (with all their keys; a dict among them would be taken to pieces). A second key of
every group names the objectives: `dcp.load` writes into an optimizer's states before the optimizer
hears of it, but looks first whether the files have all its keys.
"""

import json
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import AdamW, Optimizer

from raco_fast.backends.rounding import check_rounding, check_seed
from raco_fast.distributed.processes import GroupLike, Processes
from raco_fast.gradients.expectation import Expectation
from raco_fast.gradients.objective_gradients import ObjectiveGradients
from raco_fast.gradients.rule_memory import RuleMemory
from raco_fast.optim.adamw_part import make_residuals
from raco_fast.optim.saved_state import fitting
from raco_fast.solver.gram_options import GramOptions
from raco_fast.solver.registry import RuleLike, check_rule, spec_of
from raco_fast.solver.weights import ReadOnlyWeights, check_c, check_max_grad_norm, weights_of

_KEY = "raco"
"""Of our part of a state_dict and of its groups. In groups of an optimizer it is None: a flattened
state_dict is read by the keys that the optimizer's own groups have."""

_OBJECTIVES = f"{_KEY}, objectives: "
"""Begins the key of state_dict's groups that checkpoints of other objectives do not have."""

_OF_ALL_GROUPS = (
    *("weights", "c", "rule", "max_grad_norm", "seed"),
    *("gram", "gram_ema", "c_mode", "metric"),
)


class ParametersOf:
    """An optimizer's parameters, asked for anew at each call, without keeping the optimizer alive.

    With a bound method in its place the optimizer would be a reference cycle, and its memory would
    wait for the garbage collector.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer)

    def __call__(self) -> list[Tensor]:
        """Every parameter, in the order of the groups."""
        return [p for group in self._owner().param_groups for p in group["params"]]

    def __reduce__(self) -> tuple[Any, ...]:
        return ParametersOf, (self._owner(),)

    def _owner(self) -> Optimizer:
        optimizer = self._optimizer()
        if optimizer is None:
            raise RuntimeError(
                "the optimizer that these gradients belong to is gone; keep it as long as its "
                "`gradients` are used"
            )
        return optimizer


class AdamWWithSettings(AdamW):
    """AdamW and the settings of a common direction; `ClippedCAGradAdamW` says what they mean."""

    gradients: ObjectiveGradients
    skipped_steps: int

    def settle(
        self,
        weights: Mapping[str, float] | Sequence[float],
        c: float,
        rule: RuleLike,
        max_grad_norm: float | None,
        rounding: str,
        seed: int,
        process_group: GroupLike,
        options: GramOptions,
    ) -> None:
        """Take the first settings; before AdamW's own constructor, which adds groups."""
        self._c = check_c(c)
        self._rule = rule = check_rule(rule)
        self._max_grad_norm = check_max_grad_norm(max_grad_norm)
        self._rounding = check_rounding(rounding)
        self._seed = check_seed(seed)
        self.gradients = ObjectiveGradients(
            ParametersOf(self),
            weights,
            keep_losses=rule.needs_losses,
            process_group=process_group,
        )
        self.gradients.expectation.options = options

    @property
    def weights(self) -> ReadOnlyWeights:
        """Objective name -> weight, read-only; set all of them at once, in any order."""
        return self.gradients.weights

    @weights.setter
    def weights(self, weights: Mapping[str, float] | Sequence[float]) -> None:
        self.gradients.weights = weights

    @property
    def c(self) -> float:
        """The radius of the search around the weighted gradient."""
        return self._c

    @c.setter
    def c(self, c: float) -> None:
        self._c = check_c(c)

    @property
    def rule(self) -> str | dict[str, Any]:
        """The rule's name, or a dict with its name and options; set as a `raco_fast.Rule` too."""
        return spec_of(self._rule)

    @rule.setter
    def rule(self, rule: RuleLike) -> None:
        self._rule = check_rule(rule)
        self.gradients.for_rules.keep_losses = self._rule.needs_losses

    @property
    def rule_state(self) -> dict[str, Any]:
        """What a rule with a memory goes on from, as plain JSON; another rule begins anew."""
        return self.gradients.for_rules.state_of(self._rule, self.gradients.names)

    @rule_state.setter
    def rule_state(self, saved: Mapping[str, Any]) -> None:
        self.gradients.for_rules.restore(self._rule, self.gradients.names, saved)

    @property
    def gram(self) -> str:
        """Which Gram matrix is solved: "batch" or "unbiased"."""
        return self.gradients.expectation.options.gram

    @gram.setter
    def gram(self, gram: str) -> None:
        self.gram_options = {**self.gram_options, "gram": gram}

    @property
    def gram_ema(self) -> float | None:
        """What a step keeps of the average of gram="unbiased"; None: chosen from the noise."""
        return self.gradients.expectation.options.gram_ema

    @gram_ema.setter
    def gram_ema(self, gram_ema: float | None) -> None:
        self.gram_options = {**self.gram_options, "gram_ema": gram_ema}

    @property
    def c_mode(self) -> str:
        """Which norms the length of CAGrad's correction has: "batch" or "signal"."""
        return self.gradients.expectation.options.c_mode

    @c_mode.setter
    def c_mode(self, c_mode: str) -> None:
        self.gram_options = {**self.gram_options, "c_mode": c_mode}

    @property
    def metric(self) -> str:
        """Of the products in the matrix that is solved: "euclidean" or "adam"."""
        return self.gradients.expectation.options.metric

    @metric.setter
    def metric(self, metric: str) -> None:
        self.gram_options = {**self.gram_options, "metric": metric}

    @property
    def gram_options(self) -> dict[str, Any]:
        """`gram`, `gram_ema`, `c_mode` and `metric`, which mean something together."""
        return dict(vars(self.gradients.expectation.options))

    @gram_options.setter
    def gram_options(self, options: Mapping[str, Any]) -> None:
        self.gradients.expectation.options = GramOptions(**options)

    @property
    def gram_state(self) -> dict[str, Any]:
        """What gram="unbiased" goes on from, as plain JSON; {} without any step of it."""
        return self.gradients.expectation.state()

    @gram_state.setter
    def gram_state(self, saved: Mapping[str, Any]) -> None:
        self.gradients.expectation.restore(saved)

    @property
    def max_grad_norm(self) -> float | None:
        """The limit of ‖G0‖, or None."""
        return self._max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, max_grad_norm: float | None) -> None:
        self._max_grad_norm = check_max_grad_norm(max_grad_norm)

    @property
    def rounding(self) -> str:
        """Of bfloat16 parameters in groups that have no "rounding" of their own."""
        return self._rounding

    @rounding.setter
    def rounding(self, rounding: str) -> None:
        groups = [group for group in self.param_groups if "rounding" not in group]
        self._rounding = check_rounding(rounding, any(g["differentiable"] for g in groups))

    @property
    def seed(self) -> int:
        """Of stochastic rounding."""
        return self._seed

    @seed.setter
    def seed(self, seed: int) -> None:
        self._seed = check_seed(seed)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the group may have an own "rounding".

        Raises:
            ValueError: `rounding` is unknown, or not "nearest" in a differentiable group; or the
                group has a setting that holds for all groups together.
        """
        if isinstance(param_group, dict):  # else torch's error
            check_group(param_group)
            group = {**self.defaults, "rounding": self.rounding, **param_group}
            check_rounding(group["rounding"], group["differentiable"])
            _clear(param_group)  # the caller's dict, which torch fills and keeps
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """AdamW's state_dict plus the key "raco" (weights, c, rule and its state, ...).

        The groups have it as well, for what keeps nothing but state and groups. With "split"
        every bfloat16 parameter that has a state has its residual in it.
        """
        make_residuals(self.param_groups, self.state, self.rounding)
        state_dict: dict[str, Any] = super().state_dict()
        own = self._settings()
        state_dict[_KEY] = own
        objectives = _OBJECTIVES + ", ".join(sorted(self.gradients.names))
        for group in state_dict["param_groups"]:
            group |= {_KEY: json.dumps(own), objectives: True}
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this class or of `torch.optim.AdamW`.

        As torch does for lr, the saved weights, c, rule, max_grad_norm, rounding and seed replace
        the constructor's; a checkpoint of AdamW has none, and the constructor's stay. To
        torch.distributed.checkpoint one in files lacks keys, as it says: load it with
        `DefaultLoadPlanner(allow_partial_load=True)`. docs/distributed.md has its other roads.

        Raises:
            ValueError: the checkpoint is for other objectives, has a setting out of its range, or
                lacks a state, or a state has another shape than its parameter or lies otherwise
                over the processes (nothing has been loaded then); or its parameter groups do not
                fit.
        """
        saved = _own_part(state_dict)
        anew: dict[str, Any] = {"rule_state": {}, "gram_state": {}} if "rule" in saved else {}
        own = {**self._settings(), **anew, **saved}
        if set(own["weights"]) != set(self.gradients.names):
            raise ValueError(
                f"`state_dict` is of an optimizer for the objectives {tuple(own['weights'])}, this "
                f"one has {self.gradients.names}; build it with the checkpoint's `weights`, or "
                f"delete {_KEY!r} from the state_dict and its param_groups to keep only AdamW's "
                f"state"
            )
        groups = state_dict["param_groups"]
        for group in groups:
            check_group(group)
        plain = [group for group in groups if "rounding" not in group]
        weights_of(self.gradients.names, own["weights"])
        check_c(own["c"])
        # A checkpoint has no class for a rule that is not registered: it must be set already.
        rule = own["rule"] = self._rule if own["rule"] == self.rule else check_rule(own["rule"])
        fitted = fitting(state_dict, self.param_groups, saved.get("rounding"))
        RuleMemory(False, Processes(None)).restore(rule, self.gradients.names, own["rule_state"])
        names, options = self.gradients.names, GramOptions(**own["gram_options"])
        Expectation(names, options, Processes(None)).restore(own["gram_state"])
        check_max_grad_norm(own["max_grad_norm"])
        check_rounding(own["rounding"], any(group.get("differentiable") for group in plain))
        check_seed(own["seed"])
        super().load_state_dict(fitted)
        for name, value in own.items():
            setattr(self, name, value)

    def _settings(self) -> dict[str, Any]:
        return {
            "weights": dict(self.weights),
            "c": self.c,
            "rule": self.rule,
            "rule_state": self.rule_state,
            "gram_options": self.gram_options,
            "gram_state": self.gram_state,
            "max_grad_norm": self.max_grad_norm,
            "rounding": self.rounding,
            "seed": self.seed,
            "skipped_steps": self.skipped_steps,
        }

    def __getstate__(self) -> dict[str, Any]:
        names = ("gradients", "_c", "_rule", "_max_grad_norm", "_rounding", "_seed")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in names}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for group in self.param_groups:
            _clear(group)


def _clear(group: dict[str, Any]) -> None:
    """Leave nothing of a checkpoint in a group that is in use but the key by which it is read."""
    for key in [key for key in group if key.startswith(_OBJECTIVES)]:
        del group[key]
    group[_KEY] = None


def check_group(group: Mapping[str, Any]) -> None:
    """Raise ValueError if a parameter group has a setting that groups cannot differ in."""
    for name in _OF_ALL_GROUPS:
        if name in group:
            raise ValueError(
                f"`{name}` holds for all parameter groups together, got {group[name]!r} in one of "
                f"them; give it to the optimizer: ClippedCAGradAdamW(..., {name}=...), or later "
                f"opt.{name} = ..."
            )


def _own_part(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Our part of a state_dict, from wherever it is; empty for a checkpoint of AdamW."""
    if _KEY in state_dict:
        return dict(state_dict[_KEY])
    texts = {group[_KEY] for group in state_dict["param_groups"] if group.get(_KEY) is not None}
    if len(texts) > 1:
        raise ValueError(
            f"`state_dict` must have the same {_KEY!r} in all param_groups, got {sorted(texts)}; "
            f"they are of different runs: load the groups of one"
        )
    return dict(json.loads(texts.pop())) if texts else {}
