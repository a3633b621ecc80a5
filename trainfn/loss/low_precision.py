"""A wrapper for losses that were written without low-precision outputs in mind.

    low_precision_safe(base)(outputs, batch) = base(outputs in float32, batch)

The losses of this room need no such thing: they make their sums in float32 themselves, and are marked so.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from trainfn.batch import Batch
from trainfn.loss.base import Loss, LossSum, marked_like, widens
from trainfn.loss.registry import resolve
from trainfn.tree import map_outputs


def low_precision_safe(base: str | Loss) -> Loss:
    """Return ``base`` with outputs in floats of 16 or 8 bits, or quantized, converted to float32 before it sees them.

    A loss that carries the mark of :func:`trainfn.loss.widens`, as all losses of this package do, is returned as it is:
    a float32 copy of all logits is what their ``chunk_size`` avoids. The outputs keep their form: a tensor, tuple,
    list, dict or record of tensors, a Hugging Face model output, or an object with tensors for attributes, of which a
    shallow copy is changed.

    Args:
        base: a registered name or a function ``loss(outputs, batch)``.

    Raises:
        ConfigError: ``base`` is neither.

    >>> import torch
    >>> loss = low_precision_safe(lambda outputs, batch: (outputs["x"] * 300).square().mean())
    >>> loss({"x": torch.ones(2, dtype=torch.float16)}, None)           # in float16 this would be infinite
    tensor(90000.)
    """
    strategy = resolve(base)
    if getattr(strategy, "widens", False):
        return strategy

    @widens
    @marked_like(strategy)
    def loss(outputs: Any, batch: Batch) -> LossSum | Tensor:
        return strategy(map_outputs(_widen_leaf, outputs), batch)

    return loss


def _widen_leaf(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    if leaf.is_quantized:
        return leaf.dequantize()
    return leaf.float() if leaf.dtype.is_floating_point and leaf.dtype.itemsize < 4 else leaf
