"""A device that is far away: which operations would have the host wait for it, without a GPU.

Its tensors are wrappers around tensors of the CPU that say they are on the device "meta", and are
computed on the CPU. Where the host would know a number, or the size of a result, only when the
device is done, and where ordinary memory is copied there, that is noted, with its place in
raco_fast.
"""

from __future__ import annotations

import traceback
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
FAR = torch.device("meta")
# What gives the host a number, or a tensor whose size depends on numbers.
_READS = (
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten._unique2.default,
    aten.unique_dim.default,
)
_INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)


class FarTensor(Tensor):
    """A tensor of the far device; `here` is where its values are."""

    here: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, here: Tensor) -> FarTensor:
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            here.shape,
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=FAR,
        )
        self.here = here
        return self

    def __repr__(self, **_: Any) -> str:
        return f"FarTensor({self.here!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _computed(func, args, kwargs or {})


class Waits(TorchDispatchMode):
    """Context that counts where the host waits for the far device: {(kind, place): times}.

    Kinds: "read", a value of the device on the host; "sent", ordinary memory that is copied to it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        kind = _kind(func, args, kwargs)
        if kind is not None:
            self.counts[kind, _place()] += 1
        return _computed(func, args, kwargs)

    def of(self, kind: str) -> dict[str, int]:
        """Place -> times, of one kind."""
        return {place: n for (k, place), n in sorted(self.counts.items()) if k == kind}


def _kind(func: Any, args: Any, kwargs: dict[str, Any]) -> str | None:
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    far = [t for t in tensors if isinstance(t, FarTensor)]
    if func is aten._to_copy.default:
        goes = torch.device(kwargs.get("device") or tensors[0].device)
        if far and goes != FAR:
            return "read"
        return "sent" if not far and goes == FAR and not kwargs.get("non_blocking") else None
    if func is aten.copy_.default and 0 < len(far) < len(tensors):
        blocking = not (kwargs.get("non_blocking") or args[2:3] == (True,))
        if not isinstance(args[0], FarTensor):
            return "read"
        return "sent" if blocking and tensors[1].ndim else None
    if not far:
        return None
    if func is aten.repeat_interleave.Tensor:
        return None if kwargs.get("output_size") is not None else "read"
    if func in _INDEXED:
        indices = [i for i in args[1] if i is not None]
        if any(i.dtype is torch.bool and isinstance(i, FarTensor) for i in indices):
            return "read"
        return "sent" if not all(isinstance(i, FarTensor) for i in indices) else None
    return "read" if func in _READS else None


def _place() -> str:
    """The file of raco_fast that asked for the operation under way."""
    frames = reversed(traceback.extract_stack())
    files = (f.filename.rpartition("/raco_fast/")[2] for f in frames if "/raco_fast/" in f.filename)
    return next(files, "elsewhere")


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    leaves = tree_leaves((args, kwargs))
    wrappers = {id(t.here): t for t in leaves if isinstance(t, FarTensor)}
    goes = kwargs.get("device")
    to_far = goes is not None and torch.device(goes) == FAR
    args, kwargs = tree_map(lambda t: t.here if isinstance(t, FarTensor) else t, (args, kwargs))
    if to_far:
        kwargs["device"] = "cpu"
    result = func(*args, **kwargs)
    if not (to_far or (wrappers and goes is None)):
        return result
    if func is aten.copy_.default and id(result) not in wrappers:
        return result  # to the host

    def wrapped(t: Any) -> Any:
        """What an operation changed and returns is the tensor that it was given."""
        if not isinstance(t, Tensor):
            return t
        return wrappers[id(t)] if id(t) in wrappers else FarTensor(t)

    return tree_map(wrapped, result)


def send_away(model: nn.Module) -> nn.Module:
    """The model with its parameters and buffers on the far device; `prepare` it before."""
    known: dict[Tensor, Tensor] = {}  # tied ones stay tied
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                new = nn.Parameter(FarTensor(p.detach()), requires_grad=p.requires_grad)
                module._parameters[name] = known.setdefault(p, new)
        for name, b in module._buffers.items():
            module._buffers[name] = None if b is None else FarTensor(b)
    return model


def autocast_as_on_cpu(monkeypatch: Any) -> None:
    """torch knows no autocast for "meta"; code that asks for it is answered for the CPU."""
    for name in ("is_autocast_enabled", "get_autocast_dtype", "autocast"):
        real = getattr(torch, name)

        def asked(kind: str = "cpu", *args: Any, real: Any = real, **kwargs: Any) -> Any:
            return real("cpu" if kind == "meta" else kind, *args, **kwargs)

        monkeypatch.setattr(torch, name, asked)
