"""What a float32 weight becomes in bfloat16 memory: three roundings, as device functions.

At the learning rates of preference tuning most updates are smaller than half a unit in the last
place of a bfloat16 weight, and round-to-nearest drops them:

- "nearest"     the plain way.
- "stochastic"  up or down with the probability that makes it right on average. The 16 random bits
                are a hash of (element, tensor, step, seed), so they depend on neither grid nor
                chunks; 56 instructions for 4 elements, a tenth of Philox. A shard's elements are
                numbered as in the whole tensor. Where the numbers of a chunk are consecutive and
                share their high half, so do its elements the keys of the hash; else (ROWS, a
                variant of the kernel) every element has keys of its own.
- "split"       weight and int16 residual are the two halves of a float32 master weight: exact, in
                4 bytes instead of 6. The halves are formed in integers, rounding half up; nearest
                even would leave +32768 on a tie, which int16 cannot hold.

`opened` gives the float32 weight that memory stands for, `store_rounded` writes it back.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _mixed(x):
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0x735A2D97
    return x ^ (x >> 15)


@triton.jit
def _keys_of(of_step, tensor, high):
    """Two keys: with one, the bits of two tensors would be the same sequence in another order."""
    place = (tensor * 0x9E3779B1 + high * 0x85EBCA77).to(tl.uint32)
    first = _mixed(of_step ^ place)
    return (first, _mixed(first ^ place))


@triton.jit
def random_keys(seed, step, place, start, CHUNK: tl.constexpr, ROWS: tl.constexpr):
    """What `_random_bits` needs in the chunk that begins at element `start` of a shard.

    `place` points at the shard's row of `places`. With ROWS the divisions by the width, of 64 bits,
    are done here, once: in units of the chunk, what is left of the row that it begins in and the
    width fit 32 bits, as a row that is longer than the chunk ends at most once in it.
    """
    of_step = _mixed(seed.to(tl.uint32) ^ (step.to(tl.int32).to(tl.uint32) * 0xC2B2AE35))
    tensor = tl.load(place)
    number = tl.load(place + 1) + start
    if ROWS:
        width = tl.load(place + 2)
        gap = tl.load(place + 3) - width  # from the end of a row to the next
        width = tl.where(width == 0, start + CHUNK, width)  # one run: a row that does not end
        row = start // width
        rest = tl.minimum((row + 1) * width - start, CHUNK).to(tl.int32)
        width = tl.minimum(width, CHUNK).to(tl.int32)
        keys = (of_step, tensor, number + row * gap, rest, width, gap)
    else:
        keys = _keys_of(of_step, tensor, number >> 32) + (number.to(tl.uint32),)
    return keys


@triton.jit
def _random_bits(at, keys, ROWS: tl.constexpr):
    """16 random bits in the low half of a uint32, for the elements at the offsets `at`."""
    if ROWS:
        rest = keys[3]
        rows = tl.where(at < rest, 0, 1 + (at - rest) // keys[4])
        number = keys[2] + at + rows * keys[5]
        of_number = _keys_of(keys[0], keys[1], number >> 32)
        x = number.to(tl.uint32) ^ of_number[0]
        second = of_number[1]
    else:
        x = (at.to(tl.uint32) + keys[2]) ^ keys[0]
        second = keys[1]
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) + second
    x = x * 0x846CA68B
    return (x ^ (x >> 16)) & 0xFFFF


@triton.jit
def opened(w, low, ROUNDING: tl.constexpr):
    """The float32 weight of a stored weight `w` and, for "split", its residual `low`."""
    w = w.to(tl.float32)
    if ROUNDING == "split":
        w = (w.to(tl.int32, bitcast=True) + low.to(tl.int32)).to(tl.float32, bitcast=True)
    return w


@triton.jit
def store_rounded(w, p, residual, at, mask, keys, ROUNDING: tl.constexpr, ROWS: tl.constexpr):
    """Store the float32 weight `w`, and what its rounding leaves behind."""
    PARAM: tl.constexpr = p.dtype.element_ty
    if ROUNDING == "nearest":
        tl.store(p + at, w.to(PARAM), mask=mask)
    elif ROUNDING == "stochastic":
        bits = w.to(tl.uint32, bitcast=True)
        # A device's NaN, 0x7FFFFFFF, would carry into -0.
        noise = tl.where(w == w, _random_bits(at, keys, ROWS), 0)
        half = ((bits + noise) >> 16).to(tl.uint16)
        tl.store(p + at, half.to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.static_assert(ROUNDING == "split")
        bits = w.to(tl.int32, bitcast=True)
        high = tl.where(w == w, (bits + 0x8000) >> 16, 0x7FC0)  # NaN stays NaN
        tl.store(residual + at, (bits - (high << 16)).to(tl.int16), mask=mask)
        tl.store(p + at, high.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=mask)
