"""Rules by name: `rule=` takes a name, a `Rule`, or {"name": name, option: value}."""

import dataclasses
import difflib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, TypeAlias

from raco_fast.solver.rule import Rule
from raco_fast.solver.rules.aligned_mtl import AlignedMTL
from raco_fast.solver.rules.capped_mgda import CappedMGDA
from raco_fast.solver.rules.chebyshev import Chebyshev
from raco_fast.solver.rules.conflict_averse import DUAL_RULES
from raco_fast.solver.rules.cr_mogm import CRMOGM
from raco_fast.solver.rules.dualproj import DualProj
from raco_fast.solver.rules.fairgrad import FairGrad
from raco_fast.solver.rules.gapo import GAPO
from raco_fast.solver.rules.gradvac import GradVac
from raco_fast.solver.rules.imtl_g import IMTLG
from raco_fast.solver.rules.mgda_decoupled import MGDADecoupled
from raco_fast.solver.rules.modo import MoDo
from raco_fast.solver.rules.nash import Nash
from raco_fast.solver.rules.pcd import PCD
from raco_fast.solver.rules.pcgrad import PCGrad
from raco_fast.solver.rules.sdmgrad import SDMGrad
from raco_fast.solver.rules.upgrad import UPGrad

RuleLike: TypeAlias = str | Mapping[str, Any] | Rule

OURS: dict[str, type[Rule]] = {
    **{rule.name: rule for rule in DUAL_RULES},
    "capped-mgda": CappedMGDA,
    "mgda-decoupled": MGDADecoupled,
    "gapo": GAPO,
    "chebyshev": Chebyshev,
    "nash": Nash,
    "fairgrad": FairGrad,
    "pcgrad": PCGrad,
    "gradvac": GradVac,
    "dualproj": DualProj,
    "upgrad": UPGrad,
    "imtl-g": IMTLG,
    "aligned-mtl": AlignedMTL,
    "pcd": PCD,
    "sdmgrad": SDMGrad,
    "modo": MoDo,
    "cr-mogm": CRMOGM,
}
"""Name -> class of the rules that come with the library."""

_TYPES = dict(OURS)
_BUILT: dict[str, Rule] = {}
"""Rules by name alone: they are immutable, and asked for at every step."""


def register_combination_rule(name: str, rule_type: type[Rule]) -> None:
    """Give a rule of one's own a name, which configs, checkpoints and `rule=` then know.

    Not `register_rule`: that is the old name of `register_layer_rule`.

    Args:
        name: not one of ours. Registering a name again replaces the class.
        rule_type: a frozen dataclass that derives from `raco_fast.Rule`.
    Raises:
        TypeError, ValueError: an argument breaks a rule above.
    """
    if not isinstance(name, str) or not name or name in OURS:
        raise ValueError(
            f"`name` must be a text that is not one of {', '.join(OURS)}, got {name!r}"
        )
    if not (isinstance(rule_type, type) and issubclass(rule_type, Rule)):
        raise TypeError(
            f"`rule_type` must be a class that derives from raco_fast.Rule, got {rule_type!r}"
        )
    _check_frozen(rule_type)
    _TYPES[name] = rule_type
    _BUILT.pop(name, None)
    label_of.cache_clear()


def check_rule(rule: RuleLike) -> Rule:
    """The rule that `rule=` asks for.

    Args:
        rule: a registered name, a mapping with that name under "name" and options beside it, or a
            `Rule`.
    Raises:
        ValueError: an unknown name (lists those there are) or option, or an option out of range.
        TypeError: none of these, or an option of the wrong kind.
    """
    if isinstance(rule, str):
        if (built := _BUILT.get(rule)) is None:
            built = _BUILT[rule] = _build(rule, {})
        return built
    if isinstance(rule, Rule):
        return _checked(rule)
    if isinstance(rule, Mapping) and isinstance(rule.get("name"), str):
        options = dict(rule)
        return _build(options.pop("name"), options)
    raise TypeError(
        f"`rule` must be a name, a raco_fast.Rule or {{'name': name, option: value}}, got "
        f"{rule!r}; names are {', '.join(_TYPES)}"
    )


def spec_of(rule: Rule) -> str | dict[str, Any]:
    """What `check_rule` makes this rule of, as plain JSON: its name, or a dict with the options
    that are not at their defaults.

    A class that is not registered has its dotted path for a name, which cannot be built again.
    """
    kind, fields = type(rule), _fields(type(rule))
    name = next((n for n, known in _TYPES.items() if known is kind), None)
    given = {f.name: getattr(rule, f.name) for f in fields if getattr(rule, f.name) != f.default}
    options = {k: spec_of(v) if isinstance(v, Rule) else v for k, v in given.items()}
    if name is None:
        return {"name": f"{kind.__module__}.{kind.__qualname__}", **options}
    return {"name": name, **options} if options else name


@lru_cache(maxsize=256)
def label_of(rule: Rule) -> str:
    """The rule in a word or two, for tables: "fairgrad(alpha=2.0)"."""
    spec = spec_of(rule)
    if isinstance(spec, str):
        return spec
    values = {key: getattr(rule, key) for key in spec if key != "name"}
    texts = {k: label_of(v) if isinstance(v, Rule) else repr(v) for k, v in values.items()}
    options = ", ".join(f"{key}={text}" for key, text in texts.items())
    return f"{spec['name']}({options})"


def _build(name: str, options: dict[str, Any]) -> Rule:
    if (kind := _TYPES.get(name)) is None:
        near = difflib.get_close_matches(name, _TYPES, 1)
        raise ValueError(
            f"`rule` must be one of {', '.join(_TYPES)}, got {name!r}; "
            + (f"did you mean {near[0]!r}? " if near else "")
            + "raco_fast.register_combination_rule adds one"
        )
    fields = _fields(kind)
    required = {f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING}
    names = [f.name for f in fields]
    unknown, missing = sorted(options.keys() - set(names)), sorted(required - options.keys())
    if unknown or missing:
        raise ValueError(
            f"the rule {name!r} has the options {names}, got {options}: unknown {unknown}, "
            f"missing {missing}"
        )
    rules = {f.name for f in fields if isinstance(f.default, Rule)}  # options that are rules
    return _checked(kind(**{k: check_rule(v) if k in rules else v for k, v in options.items()}))


def _fields(kind: type[Rule]) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(kind)  # type: ignore[arg-type]  # _check_frozen sees to it


def _checked(rule: Rule) -> Rule:
    _check_frozen(type(rule))
    for field in _fields(type(rule)):
        value = getattr(rule, field.name)
        if isinstance(value, Rule):
            _checked(value)
        elif not isinstance(value, int | float | str | None):
            raise TypeError(
                f"the options of a rule must be numbers, strings, booleans or rules, got "
                f"{field.name} = {value!r}; put what is computed from them into a method"
            )
    return rule


def _check_frozen(kind: type[Rule]) -> None:
    parameters = getattr(kind, "__dataclass_params__", None)
    if "__dataclass_fields__" not in vars(kind) or parameters is None or not parameters.frozen:
        raise TypeError(
            f"a rule must be a frozen dataclass, so that its options can be compared and saved, "
            f"got {kind.__qualname__}; write @dataclass(frozen=True) above it"
        )
