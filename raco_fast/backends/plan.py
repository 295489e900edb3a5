"""Where a step's tensors are and how they look, read in one pass, and what was concluded for them.

Checking 300 parameters one attribute at a time takes milliseconds, and from step to step nothing
changes. `describe` reads addresses, dtypes, shapes, strides and devices in C++ (through DLPack's
exchange interface, some ten nanoseconds a tensor); a `Plan`, of one optimizer or `combine`, hands
out what was concluded for equal ones. No tensor is kept alive, and a swapped or reshaped one is
another description.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from raco_fast import _C
from raco_fast.backends.types import Backend, Built

_PLAIN = (Tensor, torch.nn.Parameter)
_EXCHANGE: Any = getattr(Tensor, "__dlpack_c_exchange_api__", None)
_KEPT = 64  # layouts per key: parameter groups, and sets of parameters that alternate


@dataclass
class Finding:
    """The backend for tensors laid out like this, and what it has built for these addresses."""

    layout: bytes
    addresses: bytes
    backend: Backend
    built: Built = field(default_factory=dict)


def describe(lists: Sequence[Sequence[Tensor | None]]) -> tuple[bytes, bytes] | None:
    """(addresses, layout) of K lists of n tensors; None if some tensor is not a plain dense one."""
    if _EXCHANGE is None:
        return None
    return _C.describe([list(one) for one in lists], _PLAIN, _EXCHANGE)


def advance(steps: Sequence[Tensor]) -> Tensor:
    """Add 1 to the step counts; the new ones as float64 [n], on their device."""
    counts = None if _EXCHANGE is None else _C.advance(list(steps), _PLAIN, _EXCHANGE)
    if counts is not None:
        return torch.from_numpy(counts)
    torch._foreach_add_(list(steps), 1)
    return torch.stack(list(steps)).reshape(-1).to(torch.float64)


class Plan:
    """The latest findings for each kind of call."""

    def __init__(self) -> None:
        self._of: dict[Hashable, list[Finding]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Plan, ()  # a copy's tensors are elsewhere

    def find(
        self, key: Hashable, seen: tuple[bytes, bytes], lists: Sequence[Sequence[Tensor | None]]
    ) -> Finding | None:
        """The finding for tensors that look like `seen`; what was built for others is dropped.

        Lazily negated views look like what they are views of, so new addresses are asked for them.
        """
        addresses, layout = seen
        finding = next((f for f in self._of.get(key, ()) if f.layout == layout), None)
        if finding is None or finding.addresses == addresses:
            return finding
        if _negated(lists):
            return None
        finding.addresses = addresses
        finding.built.clear()
        return finding

    def note(
        self,
        key: Hashable,
        seen: tuple[bytes, bytes],
        lists: Sequence[Sequence[Tensor | None]],
        backend: Backend,
    ) -> Finding:
        """A new finding, which takes the place of the oldest; that of negated views is not kept."""
        addresses, layout = seen
        finding = Finding(layout, addresses, backend)
        if not _negated(lists):
            self._of[key] = [finding, *self._of.get(key, [])][:_KEPT]
        return finding


def _negated(lists: Sequence[Sequence[Tensor | None]]) -> bool:
    return any(t is not None and t.is_neg() for one in lists for t in one)
