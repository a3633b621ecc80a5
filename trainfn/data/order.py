"""The order of the data as a function: position in an epoch -> example, with no state and no list in memory.

A permutation of ``range(length)`` is computed element by element, the way a block cipher permutes its blocks. With
``rows * columns >= length``, both near ``sqrt(length)``, write a position as ``left * columns + right`` and alternate::

    left  <- (left  + F(right, key)) mod rows
    right <- (right + F(left,  key)) mod columns

Each line can be undone, so the whole is a permutation of ``range(rows * columns)``, whatever ``F`` is: a Feistel
network. A result that is ``>= length`` is sent through again until it falls inside ("cycle walking"), which leaves a
permutation of ``range(length)``. Fewer than ``rows`` results of ``rows * columns`` fall outside. ``F`` is a 32-bit
integer hash of ``half xor key``; the keys of one epoch are SHAKE-128 of the text ``seed:epoch``.

References:
    Luby & Rackoff, "How to construct pseudorandom permutations from pseudorandom functions",
        https://doi.org/10.1137/0217022, 1988.
    Black & Rogaway, "Ciphers with arbitrary finite domains" (section 5, the generalized Feistel cipher),
        https://doi.org/10.1007/3-540-45760-7_9, 2002.
    Lemire, "Fast random integer generation in an interval" (a range by multiplication instead of a remainder),
        https://arxiv.org/abs/1805.10941, 2019.
    Wellons, "Hash function prospecting" (the multipliers: its list of two-round functions),
        https://github.com/skeeto/hash-prospector, 2018.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from trainfn.errors import ConfigError

MAX_LENGTH = 2**62
"""The longest data set that has an order: halves stay below 2**31, and so every product below 2**63."""

# With six rounds the indices at two positions are visibly dependent for lengths below 20; with twelve, 60,000 epochs
# show nothing from length 7 on, and the 120 permutations of five elements are equally likely to within a few percent.
_ROUNDS = 12

_WORD = 2**32 - 1


@overload
def order(positions: int, length: int, *, seed: int, epoch: int = 0) -> int: ...
@overload
def order(positions: Tensor, length: int, *, seed: int, epoch: int | Tensor = 0) -> Tensor: ...
def order(positions: int | Tensor, length: int, *, seed: int, epoch: int | Tensor = 0) -> int | Tensor:
    """Return which example stands at each position of an epoch: a permutation of ``range(length)``, per seed and epoch.

    Integer arithmetic only: the same numbers on every platform, device and thread count. Meant for blocks of
    thousands of positions, which cost about 0.1 us each; a call costs about 0.5 ms however small the block is.

    Args:
        positions: in [0, length), any shape, int64.
        length: how many examples there are, in [0, 2**62].
        seed: the run's seed, in [0, 2**63).
        epoch: number of the pass over the data, >= 0; a tensor broadcasts with the positions.

    Returns:
        Indices of examples in [0, length): an int for an int, int64 of the broadcast shape for a tensor.

    Raises:
        ConfigError: an argument is out of range.

    >>> order(torch.arange(5), 5, seed=0)
    tensor([2, 0, 3, 4, 1])
    >>> order(3, 10**15, seed=0, epoch=7)
    503564727754329
    >>> order(torch.arange(3), 3, seed=0, epoch=torch.tensor([[0], [2]])).shape
    torch.Size([2, 3])
    """
    _check("length", length, 0, MAX_LENGTH)
    _check("seed", seed, 0, 2**63 - 1)
    if not isinstance(positions, Tensor):
        _check("position", positions, 0, length - 1)
        return int(order(torch.tensor([positions]), length, seed=seed, epoch=epoch))
    if positions.numel() == 0:
        return positions.to(torch.int64)
    _check("position", int(positions.min()), 0, length - 1)
    _check("position", int(positions.max()), 0, length - 1)

    rows = math.isqrt(length - 1) + 1  # ceil(sqrt(length))
    columns = -(-length // rows)
    keys = _keys(seed, epoch, positions.device)
    index = _network(positions.to(torch.int64), rows, columns, keys)
    while bool((outside := index >= length).any()):
        walked = [key.expand(index.shape)[outside] for key in keys]
        index[outside] = _network(index[outside], rows, columns, walked)
    return index


def _network(position: Tensor, rows: int, columns: int, keys: Sequence[Tensor]) -> Tensor:
    left = position // columns
    right = position - left * columns
    for left_key, right_key in zip(keys[::2], keys[1::2], strict=True):
        left = left + _draw(right, left_key, rows)
        left -= (left >= rows) * rows
        right = right + _draw(left, right_key, columns)
        right -= (right >= columns) * columns
    return left.mul_(columns).add_(right)


def _draw(half: Tensor, key: Tensor, size: int) -> Tensor:
    """F: a number in [0, size). Words are below 2**32, multipliers and sizes at most 2**31: no product overflows."""
    word = half ^ key
    word.mul_(0x4BDC9AA5).bitwise_and_(_WORD)
    word.bitwise_xor_(word >> 15)
    word.mul_(0x2729B469).bitwise_and_(_WORD)
    return word.mul_(size).bitwise_right_shift_(32)  # the top bits decide, so no last xorshift is needed


def _keys(seed: int, epoch: int | Tensor, device: torch.device) -> Sequence[Tensor]:
    """Return one 32-bit key a round, each int64 of the epoch's shape."""
    epochs, which = torch.unique(torch.as_tensor(epoch), return_inverse=True)
    _check("epoch", int(epochs.min()), 0, 2**63 - 1)
    streams = [hashlib.shake_128(f"{seed}:{number}".encode()).digest(4 * _ROUNDS) for number in epochs.tolist()]
    table = torch.tensor([struct.unpack(f"<{_ROUNDS}I", stream) for stream in streams])  # (epochs, rounds)
    return table.t()[:, which].to(device).unbind()


def _check(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"The {name} is out of range.", expected=f"an int in [{low}, {high}]", got=repr(value))
