"""Losses by name, as a configuration gives them."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import Any, TypeVar

from raco_fast.dpo.losses.f_divergence_losses import AlphaDivergence, ForwardKl, JensenShannon
from raco_fast.dpo.losses.margin_losses import (
    Discopop,
    DpoPositive,
    Exo,
    Hinge,
    Ipo,
    LengthDesensitized,
    Modpo,
    Robust,
    Sigmoid,
    SigmoidNorm,
)
from raco_fast.dpo.losses.preference_loss import PreferenceLoss
from raco_fast.dpo.losses.reference_free_losses import AmopoStatic, Cpo, Orpo, Simpo
from raco_fast.dpo.losses.reward_losses import ApoDown, ApoZero, Bco, Nca, Sppo

LOSSES: dict[str, type[PreferenceLoss]] = {
    "sigmoid": Sigmoid,
    "sigmoid-norm": SigmoidNorm,
    "ld": LengthDesensitized,
    "modpo": Modpo,
    "robust": Robust,
    "exo": Exo,
    "hinge": Hinge,
    "ipo": Ipo,
    "discopop": Discopop,
    "dpo-positive": DpoPositive,
    "forward-kl": ForwardKl,
    "js": JensenShannon,
    "alpha": AlphaDivergence,
    "nca": Nca,
    "bco": Bco,
    "sppo": Sppo,
    "apo-zero": ApoZero,
    "apo-down": ApoDown,
    "simpo": Simpo,
    "amopo-static": AmopoStatic,
    "cpo": Cpo,
    "orpo": Orpo,
}
"""The losses by name; `register_loss` adds to them."""

LossClass = TypeVar("LossClass", bound=type[PreferenceLoss])


def register_loss(name: str) -> Callable[[LossClass], LossClass]:
    """Let a configuration name a loss of your own; decorates a dataclass.

    Raises:
        ValueError: the name is taken.
        TypeError: not a `PreferenceLoss`, or not a dataclass: its options would not be found.
    """
    if name in LOSSES:
        raise ValueError(
            f"`name` must be new, got {name!r}, which is {LOSSES[name].__name__}; choose another"
        )

    def register(loss: LossClass) -> LossClass:
        is_loss = isinstance(loss, type) and issubclass(loss, PreferenceLoss)
        if not (is_loss and "__dataclass_fields__" in vars(loss)):
            raise TypeError(
                f"`register_loss({name!r})` must decorate a dataclass derived from PreferenceLoss, "
                f"got {loss!r}; write @dataclass(frozen=True) below it"
            )
        LOSSES[name] = loss
        return loss

    return register


def loss_name(loss: PreferenceLoss) -> str:
    """The name a loss is registered under, else that of its class."""
    names = (name for name, known in LOSSES.items() if known is type(loss))
    return next(names, type(loss).__name__)


def described(loss: PreferenceLoss) -> dict[str, Any]:
    """Name and options of a loss; `make_loss` makes the same one of them."""
    return {"name": loss_name(loss), **asdict(loss)}


def check_soft(objective: str, loss: PreferenceLoss) -> None:
    """Raise ValueError unless the loss has a form for soft labels, which the objective has."""
    if not loss.soft:
        raise ValueError(
            f"labels of {objective!r} must be hard for its loss {loss_name(loss)!r}, got "
            f"probabilities between 0 and 1; round them, or use a loss for soft labels: "
            f"{sorted(name for name, known in LOSSES.items() if known.soft)}"
        )


def make_loss(
    spec: str | Mapping[str, Any], argument: str = "loss", options: Mapping[str, Any] | None = None
) -> PreferenceLoss:
    """The loss that a configuration describes.

    Args:
        spec: a key of `LOSSES`, or {"name": key, **options}.
        argument: what the configuration calls it, for messages.
        options: further options; `simpo_gamma` stands for `gamma` of simpo.
    Raises:
        ValueError: no such loss, an option it does not have or that is given twice, or a value out
            of range.
    """
    given = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = given.pop("name", None)
    if name not in LOSSES:
        raise ValueError(f"`{argument}` must be one of {sorted(LOSSES)}, got {name!r}")
    further = dict(options or {})
    if name == "simpo" and "simpo_gamma" in further and "gamma" not in further:
        further = {"gamma": further.pop("simpo_gamma"), **further}
    if given.keys() & further.keys():
        raise ValueError(
            f"`{argument}` and `loss_options` must not both set "
            f"{sorted(given.keys() & further.keys())}; remove one of them"
        )
    known = [field.name for field in fields(LOSSES[name])]
    for key, value in (given | further).items():
        if key not in known:
            raise ValueError(
                f"`{key}` is no option of the loss {name!r} (`{argument}`), got {value!r}; it has "
                f"{known}"
            )
    return LOSSES[name](**given, **further)
