"""``split``: some examples held out, as a view of the data, a pure function of (data, fraction, seed)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from trainfn.data.forms import is_array
from trainfn.data.order import order
from trainfn.data.source import is_function
from trainfn.errors import ConfigError, DataError
from trainfn.tree import batch_length, map_leaves


class Split(NamedTuple):
    """Data in two parts.

    Attributes:
        train: what is left to train on.
        held_out: what is kept back.
    """

    train: Any
    held_out: Any

    @property
    def sizes(self) -> tuple[int, int]:
        """How many examples each part has.

        >>> split(torch.arange(10), 0.2).sizes
        (8, 2)
        """
        return _length(self.train), _length(self.held_out)

    def __repr__(self) -> str:
        train, held_out = self.sizes
        return f"Split({train:,} examples to train on, {held_out:,} held out)"


class View:
    """Some of the examples of a map-style data set, under numbers of their own.

    >>> view = View(["a", "b", "c"], torch.tensor([2, 0]))
    >>> len(view), view[0]
    (2, 'c')
    """

    def __init__(self, data: Any, indices: Tensor) -> None:
        self._data, self._indices = data, indices
        self.draws = getattr(data, "draws", True)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Any:
        return self._data[int(self._indices[index])]

    def __getattr__(self, name: str) -> Any:
        if name == "__getitems__" and "_data" in self.__dict__:  # asked a whole batch at once only if the data is
            fetch_all: Callable[[list[int]], Any] = getattr(self._data, name)
            return lambda indices: fetch_all(self._indices[indices].tolist())
        raise AttributeError(name)


def split(data: Any, fraction: float, seed: int = 0) -> Split:
    """Return the data in two parts: what is left, and a ``fraction`` of its examples that are held out.

    Which examples are held out is drawn without replacement from (number of examples, seed); each part keeps the order
    that they had. Tensors and arrays are copied, by ``index_select``; of a data set there are two views, and nothing is
    fetched.

    Args:
        data: a tensor, an array, a tuple or dict of them, a frame, or a map-style data set.
        fraction: share of the examples to hold out, in (0, 1); rounded, to one example at least, on both sides.
        seed: in [0, 2**63).

    Raises:
        ConfigError: a fraction or a seed that is out of range.
        DataError: data without numbered examples, or fewer than 2 of them.

    >>> train, held_out = split((torch.arange(10), torch.ones(10)), 0.3, seed=1)
    >>> train[0], held_out[0]
    (tensor([1, 2, 5, 6, 7, 8, 9]), tensor([0, 3, 4]))
    >>> split(list(range(1000)), 0.1)
    Split(900 examples to train on, 100 held out)
    """
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction < 1:
        raise ConfigError("The fraction is out of range.", expected="a number in (0, 1)", got=repr(fraction))
    if isinstance(data, Mapping) and not isinstance(data, dict):
        data = dict(data)
    numbered = isinstance(data, (Tensor, tuple, dict)) or (hasattr(data, "__len__") and hasattr(data, "__getitem__"))
    if is_function(data) or isinstance(data, (DataLoader, IterableDataset, str, bytes)) or not numbered:
        raise DataError(
            "There are no numbered examples to split.",
            expected="tensors, arrays, or a map-style data set",
            got=type(data).__name__,
            hint="split the data set that it reads",
        )
    length = _length(data)
    if length < 2:
        raise DataError("There is nothing to split.", expected="at least 2 examples", got=f"{length}")
    held_out = min(max(1, round(fraction * length)), length - 1)
    chosen = torch.zeros(length, dtype=torch.bool)
    chosen[order(torch.arange(held_out), length, seed=seed)] = True
    return Split(_take(data, (~chosen).nonzero()[:, 0]), _take(data, chosen.nonzero()[:, 0]))


def _take(data: Any, indices: Tensor) -> Any:
    def rows(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.index_select(0, indices.to(leaf.device))
        return leaf.iloc[indices.numpy()] if hasattr(leaf, "iloc") else leaf[indices.numpy()]

    if isinstance(data, (Tensor, tuple, dict)) or is_array(data):
        return map_leaves(rows, data)
    return View(data, indices)


def _length(data: Any) -> int:
    if isinstance(data, (Tensor, tuple, dict)):
        lengths = map_leaves(lambda leaf: torch.empty(len(leaf), 0) if is_array(leaf) else leaf, data)
        return batch_length(lengths)
    return len(data)
