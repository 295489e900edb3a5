"""FSDP2: which DTensor a gathered parameter stands for, by public interfaces alone.

During a forward pass `fully_shard` puts gathered parameters, plain tensors, in the place of its
DTensors: those are what layers use and what autograd's graph ends in, and the optimizer has never
seen them. But a module and a name have one DTensor and one gathered tensor, and both stay the same
objects. The DTensor is noted while the model is sharded (when it is prepared, and when an optimizer
is made), and looked up when a layer is called with the gathered one.
"""

from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from raco_fast.distributed.dtensor import is_dtensor

_watched: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
"""Module of a prepared model -> its name there."""
_sharded: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()
_owners = WeakIdKeyDictionary()
"""Gathered tensor -> DTensor."""
_names = WeakIdKeyDictionary()


def watch(model: nn.Module) -> None:
    """Note the parameters of a model that is being prepared, also those it will be sharded to."""
    _watched.update((module, name) for name, module in model.named_modules() if module._parameters)
    note_sharded()


def note_sharded() -> None:
    """Note the DTensors of watched models that are sharded now."""
    for module, prefix in _watched.items():
        found = {name: p for name, p in module._parameters.items() if is_dtensor(p)}
        if found:
            _sharded.setdefault(module, {}).update(found)
            _names.update((p, f"{prefix}.{name}".lstrip(".")) for name, p in found.items())


def noted_name(p: Tensor) -> str | None:
    """What the prepared model calls a DTensor; None if it has none such."""
    name: str | None = _names.get(p)  # type: ignore[no-untyped-call]
    return name


def owner_of(p: Tensor) -> Tensor:
    """The DTensor that p was gathered from, as far as it is known while p is in use; else p."""
    if not _sharded or is_dtensor(p):
        return p
    if p not in _owners:
        owner = _found(p)
        if owner is None:
            return p
        _owners[p] = owner
    known: Tensor = _owners[p]
    return known


def owners_of(leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """`owner_of` of each."""
    return tuple(map(owner_of, leaves)) if _sharded else leaves


def _found(p: Tensor) -> Tensor | None:
    for module, names in _sharded.items():
        for name, owner in names.items():
            if module._parameters.get(name) is p:
                return owner
    return None
