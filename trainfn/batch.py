"""How a batch is read: its inputs, its target, and its division into micro-batches.

A batch is a tensor, a tuple of tensors whose last one is the target, or a dict of tensors. In a dict the target is the
field called ``labels``, ``label``, ``targets``, ``target`` or ``y``; everything else is input, but for
``teacher_logits``, which are for the loss alone.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from trainfn.errors import DataError
from trainfn.tree import Tree, batch_length, describe, map_leaves

Batch = Tree
"""A tensor, a tuple of tensors, or a dict of tensors; the first dimension of each counts examples."""

TARGET_NAMES = ("labels", "label", "targets", "target", "y")
_FOR_THE_LOSS = (*TARGET_NAMES, "teacher_logits")


def inputs(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the batch's inputs as ``(positional, named)``.

    >>> inputs({"x": 1, "y": 2}), inputs((1, 2)), inputs(1)
    (((), {'x': 1}), ((1,), {}), ((1,), {}))
    """
    if isinstance(batch, dict):
        return (), {name: value for name, value in batch.items() if name not in _FOR_THE_LOSS}
    if isinstance(batch, (tuple, list)):
        return (tuple(batch[:-1]) if len(batch) > 1 else tuple(batch)), {}
    return (batch,), {}


def target(batch: Batch) -> Tensor:
    """Return the batch's target.

    Raises:
        DataError: there is none, or more than one field could be meant.

    >>> target({"x": 1, "y": 2}), target((1, 2))
    (2, 2)
    """
    if isinstance(batch, dict):
        found = [name for name in TARGET_NAMES if name in batch]
        if len(found) == 1:
            return cast(Tensor, batch[found[0]])
        if len(found) > 1:
            raise DataError(
                "The batch has more than one target.",
                expected=f"one of {', '.join(TARGET_NAMES)}",
                got=f"{', '.join(found)} in ({describe(batch)})",
                hint="drop the others, or pass a loss function of your own: loss(outputs, batch)",
            )
    elif isinstance(batch, (tuple, list)) and len(batch) > 1:
        return cast(Tensor, batch[-1])
    raise DataError(
        "The batch has no target.",
        expected=f"a tuple (inputs, target), or a dict with one of {', '.join(TARGET_NAMES)}",
        got=describe(batch),
    )


def micro_batches(batch: Batch, count: int) -> list[Batch]:
    """Divide a batch into at most ``count`` micro-batches, in order, as views; all but the last are equally long.

    A short batch gives fewer micro-batches rather than shorter ones. Leaves without a batch dimension go into each.

    >>> import torch
    >>> [part["x"].tolist() for part in micro_batches({"x": torch.arange(5)}, 3)]
    [[0, 1], [2, 3], [4]]
    """
    if count == 1:
        return [batch]
    length = batch_length(batch)
    size = max(1, -(-length // count))

    def part(start: int) -> Batch:
        return map_leaves(
            lambda leaf: leaf[start : start + size] if isinstance(leaf, Tensor) and leaf.ndim else leaf, batch
        )

    return [part(start) for start in range(0, max(length, 1), size)]
