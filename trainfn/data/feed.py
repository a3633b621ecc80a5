"""``Feed``: where a run's batches come from. A ``Loader`` finds them by number, a ``Stream`` takes them as they come.

The two differ in one thing, the *position*. The batches of a Loader are a function of their number: its position is the
number, and there is nothing to save. A Stream has a position, which checkpoints keep and a resume goes back to.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from trainfn.data.forms import is_array
from trainfn.data.loader import Loader
from trainfn.data.passes import Batched, is_loader
from trainfn.data.stream import Stream

Feed = Loader | Stream
"""Both have ``batches``, ``batch``, ``indices``, ``epoch``, ``one_pass``, ``sample``, ``position``, ``seek``, ..."""

_NO_ITERABLES = (str, bytes, bytearray, memoryview, set, frozenset, tuple, Mapping, Tensor, np.ndarray, type)


def is_stream(data: object) -> bool:
    """Return whether data can only be iterated over, or keeps its own position.

    >>> is_stream(iter([1])), is_stream([1]), is_stream(DataLoader([1, 2])), is_stream({1, 2})
    (True, False, False, False)
    """
    if isinstance(data, (Batched, IterableDataset)) or inspect.isgeneratorfunction(data):
        return True
    if isinstance(data, _NO_ITERABLES) or is_array(data):
        return False
    if isinstance(data, DataLoader):
        return isinstance(data.dataset, IterableDataset) or hasattr(data, "load_state_dict")
    by_number = hasattr(type(data), "__len__") and hasattr(type(data), "__getitem__")
    return hasattr(type(data), "__iter__") and not by_number


def make_feed(data: Any, *, shuffle: bool = True, keep: int = 1, **settings: Any) -> Feed:
    """Return a ``Stream`` of a stream, and a ``Loader`` of anything else.

    Args:
        data: anything that ``fit`` takes.
        shuffle, **settings: as for :class:`trainfn.data.Loader`; a stream is in its own order.
        keep: as for :class:`trainfn.data.Stream`.

    >>> type(make_feed(iter([1, 2]), batch_size=2)).__name__, type(make_feed([1, 2], batch_size=2)).__name__
    ('Stream', 'Loader')
    """
    if not is_stream(data):
        return Loader(data, shuffle=shuffle, **settings)
    settings.pop("group_by_length", None)
    return Stream(data, keep=keep, **settings)


__all__ = ["Batched", "Feed", "is_loader", "is_stream", "make_feed"]
