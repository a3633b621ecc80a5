"""``Collator``: how items become a batch, and what is done to data that is in batches already.

A list of items is stacked and then finished; tensors, and batches that a data set makes itself, are finished only. So
``collate="mlm"`` masks the tokens of a list of ragged sequences and those of one large tensor alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from trainfn.batch import Batch
from trainfn.errors import DataError

Stack = Callable[[list[Any]], Batch]
"""Makes one batch of a list of items."""


def unchanged(value: Any) -> Any:
    """Return what was given.

    >>> unchanged(3)
    3
    """
    return value


@attrs.frozen
class Collator:
    """A collate function in parts.

    Attributes:
        stack: makes a batch of a list of items.
        finish: what is done to a batch after that: masking, normalising.
        draws: whether ``finish`` or ``stack`` draws from the global generators, which the loader then seeds for each
            batch from (seed, number of the batch).
        select: done to an item, or to a whole batch that needs no stacking, before anything else: fields by name.

    >>> Collator(stack=lambda items: torch.tensor(items), finish=lambda batch: batch * 2)([1, 2])
    tensor([2, 4])
    """

    stack: Stack
    finish: Callable[[Batch], Batch] = unchanged
    draws: bool = False
    select: Callable[[Any], Any] = unchanged

    def __call__(self, items: list[Any]) -> Batch:
        return self.finish(self.stack([self.select(item) for item in items]))

    def whole(self, batch: Batch) -> Batch:
        """Return a batch that came whole, finished.

        >>> Collator(stack=list, finish=lambda batch: batch * 2).whole(torch.tensor([3]))
        tensor([6])
        """
        return self.finish(self.select(batch))


def default() -> Collator:
    """Return the collator that stacks: every field of every item has one shape.

    >>> default()([{"x": [1.0, 2.0], "y": 0}, {"x": [3.0, 4.0], "y": 1}])
    {'x': tensor([[1., 2.],
            [3., 4.]]), 'y': tensor([0, 1])}
    """
    return Collator(stack=stacked)


def stacked(items: list[Any]) -> Batch:
    """Return items as one batch, field by field: PyTorch's ``default_collate``, but for lists of numbers.

    Python's numbers, and lists of them, become what ``torch.tensor`` makes of them: a list of numbers is one row, not
    several fields (``default_collate`` would transpose it), and a float is a float32.

    Raises:
        DataError: items that differ in their fields or their shapes, with the collator that would take them.

    >>> stacked([([1, 2], "a"), ([3, 4], "b")])
    (tensor([[1, 2],
            [3, 4]]), ('a', 'b'))
    """
    rows = [_as_row(item) for item in items]
    ragged = _difference(rows)
    if ragged is not None:
        raise ragged
    batch = default_collate(rows)
    return tuple(batch) if isinstance(rows[0], tuple) and isinstance(batch, list) else batch


def _as_row(item: Any) -> Any:
    if isinstance(item, Mapping):
        return {name: _as_row(value) for name, value in item.items()}
    if isinstance(item, tuple):
        parts = [_as_row(value) for value in item]
        return type(item)(*parts) if hasattr(item, "_fields") else tuple(parts)
    if isinstance(item, float) or (isinstance(item, list) and item and _is_numbers(item)):
        try:
            return torch.tensor(item)
        except (ValueError, TypeError, RuntimeError):
            return item
    return item


def _is_numbers(values: Any) -> bool:
    return isinstance(values, (int, float)) or (isinstance(values, list) and all(map(_is_numbers, values)))


def _difference(rows: Sequence[Any]) -> DataError | None:
    first = _shapes(rows[0])
    for at, row in enumerate(rows):
        other = _shapes(row)
        if other.keys() != first.keys():
            return DataError(
                "Items differ in their fields.",
                expected=", ".join(first) or "no fields",
                got=f"{', '.join(other) or 'no fields'} (item {at} of the batch)",
            )
        unlike = next((name for name in first if first[name] != other[name]), None)
        if unlike is not None:
            place = f"field {unlike}" if unlike else None
            seen = (tuple(first[unlike]), tuple(other[unlike]))
            return DataError(
                "Items differ in shape, so they cannot be stacked.",
                where=place,
                expected=f"items of shape {list(seen[0])}",
                got=f"shape {list(seen[1])} (item {at} of the batch)",
                hint=_remedy(seen),
            )
    return None


def _shapes(row: Any, name: str = "") -> dict[str, tuple[int, ...]]:
    if isinstance(row, Mapping):
        pairs = list(row.items())
    elif isinstance(row, tuple):
        pairs = list(enumerate(row))
    elif isinstance(row, (Tensor, np.ndarray)):
        return {name: tuple(row.shape)}
    else:
        return {name: ()}
    return {
        key: shape
        for field, value in pairs
        for key, shape in _shapes(value, f"{name}.{field}" if name else str(field)).items()
    }


def _remedy(shapes: tuple[tuple[int, ...], ...]) -> str:
    if all(len(shape) == 1 for shape in shapes):
        return 'collate="text" pads sequences to one length; or pass a function of your own: collate='
    if all(len(shape) in (2, 3) for shape in shapes):
        return "resize images where the data set is made: trainfn.data.ImageFolder(path, size=(32, 32)); or collate="
    return "items that differ in shape need a function of yours: collate="
