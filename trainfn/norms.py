"""Norms of trees, of their leaves and of rows of tensors: in float64, and on a CPU at the speed of float32.

    norm      : tree -> []          2-norm of all leaves together
    leaf_norms: tree -> [leaves]    of each
    row_norms : [k, n] -> [k]       of each row

Each is finite exactly when every number is.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from trainfn.tree import Tree, leaves, wide_float

_LEAST_FAST = 2**18  # numbers: fewer are quicker widened to float64 than looked after
_ROW = 2**10  # numbers whose squares are summed in float32
_MOST_AGAIN = 2**19  # numbers that are copied at a time
_SAFE = (1e-12, 1e18)  # norms between which no square of float32 that counts has vanished, and none has overflowed


def norm(tree: Tree) -> Tensor:
    """Return the 2-norm over all leaves together, [] float64 (float32 where the device has no float64).

    Squares are summed in float64: four float32 values of 3e38 have the norm 6e38, and values of 1e-30 do not vanish.
    The result is finite exactly when every element is (float64 leaves above 1e154 excepted).

    >>> float(norm({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}))
    5.0
    """
    return cast(Tensor, torch.linalg.vector_norm(leaf_norms(tree)))


def leaf_norms(tree: Tree) -> Tensor:
    """Return the 2-norm of each leaf, [leaves] float64 (float32 where the device has no float64), in their order.

    >>> leaf_norms({"a": torch.tensor([3.0, 4.0]), "b": torch.zeros(2)})
    tensor([5., 0.], dtype=torch.float64)
    """
    found = leaves(tree)
    if not found:
        return torch.zeros(0, dtype=torch.float64)
    if any(_is_traced(leaf) or leaf.device.type != "cpu" or _is_fast(leaf) for leaf in found):
        return torch.stack([_norm(leaf) for leaf in found])
    return torch.stack(torch._foreach_norm(found, 2, dtype=torch.float64))


def row_norms(rows: Tensor) -> Tensor:
    """Return the 2-norm of each row of ``rows`` [k, n], [k] float64 (float32 where the device has no float64).

    >>> row_norms(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    tensor([5., 1.], dtype=torch.float64)
    """
    count, length = rows.shape
    short = length if length <= _ROW else math.gcd(length, _ROW)
    if not _is_fast(rows) or short < 16:
        return cast(Tensor, torch.linalg.vector_norm(rows, dim=1, dtype=wide_float(rows)))
    norms = _float32_norms(rows.reshape(-1, short))
    return norms if short == length else cast(Tensor, torch.linalg.vector_norm(norms.view(count, -1), dim=1))


def _norm(leaf: Tensor) -> Tensor:
    if not _is_fast(leaf):
        return cast(Tensor, torch.linalg.vector_norm(leaf, dtype=wide_float(leaf)))
    flat = leaf.reshape(-1)
    whole = flat.numel() // _ROW * _ROW
    rest = torch.linalg.vector_norm(flat[whole:], dtype=torch.float64)
    return cast(Tensor, torch.linalg.vector_norm(torch.cat([row_norms(flat[:whole].view(1, -1)), rest.view(1)])))


def _is_fast(values: Tensor) -> bool:
    """Whether squares are quicker summed in float32, short rows of them, than in float64, for which PyTorch copies all
    on a CPU: for 16 million numbers, 4 ms instead of 72."""
    is_plain = values.dtype == torch.float32 and values.device.type == "cpu"
    return is_plain and values.numel() >= _LEAST_FAST and not _is_traced(values)


def _is_traced(values: Tensor) -> bool:
    """Whether a compiler or ``torch.func`` looks on, which take no step that depends on numbers, and no list."""
    return torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(values)


def _float32_norms(rows: Tensor) -> Tensor:
    """Return the norm of each row, [k] float64, squares summed in float32.

    Rows whose squares may have vanished or overflowed there are measured once more, times a power of two, which changes
    no digit. Mostly there are none, but for rows of zeros.
    """
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    found = norms.double()
    doubtful = (norms.clamp(*_SAFE) != norms).nonzero().squeeze(1)  # NaN, too, which equals nothing
    for again in torch.split(doubtful, _MOST_AGAIN // rows.shape[1]) if len(doubtful) else ():
        factors = torch.where(norms[again] < _SAFE[0], 2.0**100, 2.0**-100)
        measured = torch.linalg.vector_norm(rows.index_select(0, again) * factors.unsqueeze(1), dim=1)
        found.index_copy_(0, again, measured.double() / factors.double())
    return found
