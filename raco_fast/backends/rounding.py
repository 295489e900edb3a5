"""What a float32 weight becomes in bfloat16 memory: the plain twin of `kernels/rounding.py`.

At the learning rates of preference tuning most updates are smaller than half a unit in the last
place of a bfloat16 weight, and round-to-nearest drops them. Two other ways keep them:

    "stochastic"  up or down, with the probability that makes it right on average. The random bits
                  are a hash of (element, parameter, step, seed): equal seeds give equal runs. A
                  shard's elements count as those of the whole parameter (`Place`).
    "split"       weight and residual are the two halves of a float32 weight: exact.

A residual is an int16 in memory that is declared bfloat16: torch's `load_state_dict` casts every
state to its parameter's dtype, and would round an int16.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ROUNDINGS = ("nearest", "stochastic", "split")

_LOW32 = 0xFFFFFFFF
_BLOCK = 1 << 17  # elements hashed at one time: int64 indices of a whole embedding are too much


@dataclass(frozen=True)
class Place:
    """Where the elements of a parameter lie in the whole tensor of which it is a shard.

    A shard is a rectangle of rows of `width` elements, `pitch` elements from one to the next in
    the whole tensor: its element e is number offset + (e // width) * pitch + e % width there.
    Random bits follow these numbers, so all ways to cut a tensor round it alike.

    Attributes:
        tensor: number of the whole tensor, hashed with its elements' numbers.
        offset: the whole tensor's number of the first element.
        width, pitch: in elements; both 0 where the shard is one run, element e at offset + e.
    Raises:
        ValueError: a negative number, or rows that overlap.
    """

    tensor: int
    offset: int = 0
    width: int = 0
    pitch: int = 0

    def __post_init__(self) -> None:
        if min(self.tensor, self.offset, self.width, self.pitch) < 0 or self.pitch < self.width:
            raise ValueError(
                f"a `Place` must have numbers >= 0 and `pitch` >= `width`, got {self}; two "
                f"elements would share their random bits"
            )

    def element(self, e: int) -> int:
        """Element e's number in the whole tensor."""
        return self.offset + (e // self.width * self.pitch + e % self.width if self.width else e)

    def elements(self, start: int, stop: int, device: torch.device) -> Tensor:
        """`element` of start .. stop - 1: int64 [stop - start]."""
        e = torch.arange(start, stop, device=device)
        if self.width:
            e = e // self.width * self.pitch + e % self.width
        return e + self.offset

    def below(self, number: int) -> int:
        """How many of the shard's elements, if it had no end, have a number below this one."""
        beyond = max(number - self.offset, 0)
        if not self.width:
            return beyond
        rows, column = divmod(beyond, self.pitch)
        return rows * self.width + min(column, self.width)


@dataclass(frozen=True)
class Rounding:
    """How the weights of one call of `combine_adamw` are stored.

    `name` is one of `ROUNDINGS`, and all parameters are bfloat16 unless it is "nearest";
    `residuals` are n bfloat16 tensors like the parameters for "split", zeros before the first
    step, and else none; `seed` is that of "stochastic" (its low 32 bits count), and `places` are
    the n parameters' for it: () where parameter k is the whole of tensor k.
    """

    name: str = "nearest"
    residuals: Sequence[Tensor] = ()
    seed: int = 0
    places: Sequence[Place] = ()

    def place(self, k: int) -> Place:
        """That of parameter number k."""
        return self.places[k] if self.places else Place(k)

    def place_table(self, n: int) -> NDArray[np.int64]:
        """The places of n parameters for a kernel, [n, 4]: tensor, offset, width, pitch."""
        if self.places:
            rows = [(p.tensor, p.offset, p.width, p.pitch) for p in self.places]
            return np.array(rows, dtype=np.int64)
        table = np.zeros((n, 4), dtype=np.int64)
        table[:, 0] = np.arange(n)
        return table

    def opened(self, p: Tensor, k: int) -> Tensor:
        """The float32 weight that parameter number k, `p`, stands for, in new memory."""
        w = p.float()
        if self.name == "split":
            low = self.residuals[k].view(torch.int16)
            return (w.view(torch.int32) + low).view(torch.float32)
        return w

    def store(self, w: Tensor, p: Tensor, k: int, step: Tensor) -> None:
        """Write the float32 weight `w`, which is used up, to parameter number k and its residual.

        Args:
            w: as `opened` gave it, updated in place.
            p: the parameter, bfloat16.
            k: its place in the call.
            step: scalar tensor, its step count after this update.
        """
        if self.name == "stochastic":
            _add_noise(w, self.seed, self.place(k), step)
            p.copy_(w)
        else:
            assert self.name == "split", "to nearest, torch rounds by itself"
            bits = w.view(torch.int32)
            # Half up, not to even: a tie would leave +32768, which int16 cannot hold.
            high = torch.where(w.isnan(), 0x7FC0, (bits + 0x8000) >> 16)
            self.residuals[k].view(torch.int16).copy_(bits - (high << 16))
            p.copy_(high.to(torch.int16).view(torch.bfloat16))


NEAREST = Rounding()


def check_rounding(name: str, differentiable: bool = False) -> str:
    """`name`, or ValueError unless it is a rounding that can be used."""
    if name == "kahan":
        raise ValueError(
            f"`rounding` must be one of {ROUNDINGS}, got 'kahan', which is gone: it took the "
            f"memory of 'split' and lost digits; use rounding='split'"
        )
    if name not in ROUNDINGS:
        raise ValueError(
            f"`rounding` must be one of {ROUNDINGS}, got {name!r}; correct the spelling"
        )
    if differentiable and name != "nearest":
        raise ValueError(
            f"`rounding`={name!r} has no derivative, so `differentiable` must be False, got True; "
            f"use rounding='nearest'"
        )
    return name


def check_seed(seed: int) -> int:
    """`seed`, or TypeError unless it is an integer."""
    if not isinstance(seed, int):
        raise TypeError(f"`seed` must be an integer, got {seed!r}; use int(seed)")
    return seed


def random_bits(elements: Tensor, seed: int, tensor: int, step: Tensor) -> Tensor:
    """16 random bits for each of some elements of a tensor.

    Args:
        elements: int64 [count], the elements' numbers, all between the same multiples of 2^32.
        seed: its low 32 bits count.
        tensor: the tensor's number.
        step: scalar tensor on the elements' device.
    Returns:
        int32 [count], from 0 to 65535.
    """
    of_step = _mixed((seed & _LOW32) ^ (step.long() * 0xC2B2AE35 & _LOW32))
    place = tensor * 0x9E3779B1 + (elements[:1] >> 32) * 0x85EBCA77 & _LOW32
    first = _mixed(of_step ^ place)
    second = _mixed(first ^ place)
    x = (elements & _LOW32) ^ first
    x = (x ^ (x >> 16)) * 0x7FEB352D & _LOW32
    x = ((x ^ (x >> 15)) + second) * 0x846CA68B & _LOW32
    return ((x ^ (x >> 16)) & 0xFFFF).int()


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ (x >> 16)) * 0x21F0AAAD & _LOW32
    x = (x ^ (x >> 15)) * 0x735A2D97 & _LOW32
    return x ^ (x >> 15)


def _add_noise(w: Tensor, seed: int, place: Place, step: Tensor) -> None:
    """Round `w` in place, stochastically, to float32 numbers that bfloat16 can hold."""
    flat = w.as_strided((w.numel(),), (1,))  # in the order of memory, in which the kernel counts
    step = step.to(w.device)
    start = 0
    while start < len(flat):
        edge = ((place.element(start) >> 32) + 1) << 32
        stop = min(start + _BLOCK, len(flat), place.below(edge))
        block = flat[start:stop]
        noise = random_bits(place.elements(start, stop, w.device), seed, place.tensor, step)
        noise.masked_fill_(block.isnan(), 0)  # a device's NaN, 0x7FFFFFFF, would carry into -0
        block.view(torch.int32).add_(noise).bitwise_and_(-0x10000)
        start = stop
