"""What a data set is to the loader: a number of examples, and a way to fetch some of them as one batch.

There are two kinds. A tree of tensors is gathered, one ``index_select`` a leaf. A map-style data set is asked for its
items, which are collated; if it defines ``__getitems__`` (PyTorch's batched fetch) it is asked once a batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from itertools import islice
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from trainfn.data.collate import stacked
from trainfn.data.collators import Collate, choose_collator
from trainfn.data.draws import seeded
from trainfn.data.forms import as_tensors, is_array, is_frame
from trainfn.data.grouping import length_of
from trainfn.errors import ConfigError, DataError, listed
from trainfn.tree import Tree, batch_length, map_leaves, named_leaves

Batch = Tree
"""A tensor, a tuple of tensors, or a dict of tensors; the first dimension of each counts examples."""

SUPPORTED = (
    "a tensor or array, a tuple or dict of them, a map-style data set (__len__ and __getitem__), "
    "or a function batch(index)"
)

_STREAM = "fit takes it as it is; here, trainfn.data.Stream(data, batch_size=...) makes batches of it"
RAGGED = "items that differ in shape or fields need a function of yours: collate="
_HINTS: dict[Any, str] = {
    DataLoader: "fit takes it as it is; here, pass its data set: data=loader.dataset, batch_size=loader.batch_size",
    (str, bytes, bytearray): "trainfn.data.ByteText(text, length=128) makes windows of a text",
    (IterableDataset, Iterator): _STREAM,
}


class Source(Protocol):
    """A data set, seen by the loader."""

    def __len__(self) -> int: ...

    def fetch(self, indices: Tensor, *, seed: int, cursor: int) -> Batch:
        """Return the examples at ``indices`` as batch number ``cursor`` of the run with this seed."""

    def sample(self, indices: list[int]) -> Tree:
        """Return the examples at ``indices`` as a tree whose digest is stable between processes."""


def make_source(data: object, collate: str | Collate | None = None) -> Source:
    """Return the source that reads ``data``.

    Args:
        data: a tensor or NumPy array, a tuple or dict of them, a ``TensorDataset``, a map-style data set, or a
            function ``batch(index)``.
        collate: makes a batch of a list of items, for map-style data sets; stacks them if None. Of a
            :class:`trainfn.data.Collator`, or the name of one, the finishing is done to tensors and to batches that
            come whole too.

    Raises:
        DataError: data of another kind, without examples, or with tensors that disagree in length.
        ConfigError: ``collate`` that can only collate, with data that has no items.

    >>> source = make_source((torch.arange(3), torch.ones(3, 2)))
    >>> len(source), source.fetch(torch.tensor([2, 0]), seed=0, cursor=0)[0]
    (3, tensor([2, 0]))
    """
    collate = choose_collator(collate)
    if type(data) is TensorDataset and not (collate and whole_of(collate) is None):
        data = data.tensors  # a subclass may have a __getitem__ of its own
    if isinstance(data, Mapping) and not isinstance(data, dict):
        data = dict(data)  # BatchEncoding, for one: its own len() counts fields
    if is_frame(data):
        raise DataError(
            "Which column of the frame is the target?",
            got=kind_of(data),
            hint="data=trainfn.data.read_frame(frame, target=...), or a task with target=",
        )
    if isinstance(data, (tuple, dict)) or is_array(data):
        data = as_tensors(data)
    endless = is_function(data)
    if isinstance(data, (Tensor, tuple, dict)) or endless:
        finish = None if collate is None else whole_of(collate)
        if collate is not None and finish is None:
            raise ConfigError(
                "Data that comes in batches has nothing to collate.",
                where="collate",
                hint="drop collate, or pass a data set that returns one item at a time",
            )
        made: Source = Function(cast(Any, data)) if endless else Tensors(cast(Tree, data))
        source = made if finish is None else Finished(made, finish, draws=getattr(collate, "draws", True))
    else:
        source = Items(data, collate)
    if len(source) == 0:
        raise DataError("The data set is empty.", expected="at least one example", got=f"len({kind_of(data)}) = 0")
    return source


def is_function(data: object) -> bool:
    """Return whether data is a function ``batch(index)``, and no data set that can also be called.

    >>> is_function(lambda index: torch.ones(2)), is_function([1, 2])
    (True, False)
    """
    known = hasattr(type(data), "__len__") or hasattr(type(data), "__getitem__") or hasattr(type(data), "__next__")
    if inspect.isgeneratorfunction(data):
        return False
    return callable(data) and not known and not isinstance(data, (type, DataLoader, IterableDataset))


def whole_of(collate: Collate) -> Callable[[Batch], Batch] | None:
    """Return what a collator does to a batch that came whole; None if it is a function of items only.

    >>> whole_of(list) is None
    True
    """
    return getattr(collate, "whole", None)


class Function:
    """A function ``batch(index) -> batch``, of which there are as many as anyone asks for.

    Each batch is one example of this source. The global generators are seeded around the call from (seed, index).

    >>> Function(lambda index: torch.full((2,), index)).fetch(torch.tensor([3]), seed=0, cursor=3)
    tensor([3, 3])
    """

    def __init__(self, function: Callable[[int], Any]) -> None:
        self._function = function

    def __len__(self) -> int:
        return 2**62

    def fetch(self, indices: Tensor, *, seed: int, cursor: int) -> Batch:
        number = int(indices[0])
        with seeded(seed, cursor):
            try:
                batch = as_tensors(self._function(number))
            except Exception as error:
                raise DataError(
                    "The function that makes batches failed.",
                    where=f"batch {number}",
                    got=f"{type(error).__name__}: {error}",
                ) from error
        batch_length(batch)  # raises unless it is a batch
        return batch

    def sample(self, indices: list[int]) -> Tree:
        return [map_leaves(bits, self.fetch(torch.tensor([number]), seed=0, cursor=number)) for number in (0, 1)]


class Finished:
    """A source of whole batches, each of which goes through the finishing of a collator.

    >>> source = Finished(Tensors(torch.arange(3)), lambda batch: batch * 2, draws=False)
    >>> source.fetch(torch.tensor([2]), seed=0, cursor=0)
    tensor([4])
    """

    def __init__(self, source: Source, finish: Callable[[Batch], Batch], *, draws: bool) -> None:
        self.source, self._finish, self._draws = source, finish, draws

    def __len__(self) -> int:
        return len(self.source)

    def fetch(self, indices: Tensor, *, seed: int, cursor: int) -> Batch:
        batch = self.source.fetch(indices, seed=seed, cursor=cursor)
        with seeded(seed, cursor) if self._draws else nullcontext():
            try:
                return self._finish(batch)
            except Exception as error:
                raise _failed("Finishing a batch", error, indices.tolist(), cursor) from error

    def sample(self, indices: list[int]) -> Tree:
        return self.source.sample(indices)


class Tensors:
    """A tree of tensors whose first dimension counts examples.

    >>> Tensors({"x": torch.arange(4) * 10}).fetch(torch.tensor([3, 1]), seed=0, cursor=0)
    {'x': tensor([30, 10])}
    """

    def __init__(self, tree: Tree) -> None:
        wrong = (
            f"{name or 'it'}: {'a 0-d tensor' if isinstance(leaf, Tensor) else type(leaf).__name__}"
            for name, leaf in named_leaves(tree)
            if not isinstance(leaf, Tensor) or leaf.ndim == 0
        )
        if first := list(islice(wrong, 5)):
            raise DataError(
                f"A {type(tree).__name__} of data must hold tensors only.",
                expected="tensors whose first dimension counts examples",
                got=", ".join(first),
                hint=_remedy(tree),
            )
        self._examples = batch_length(tree)
        self._tree = map_leaves(Tensor.detach, tree)

    def __len__(self) -> int:
        return self._examples

    def fetch(self, indices: Tensor, *, seed: int, cursor: int) -> Batch:
        return map_leaves(lambda leaf: leaf.index_select(0, indices.to(leaf.device)), self._tree)

    def sample(self, indices: list[int]) -> Tree:
        return {type(self._tree).__name__: self.fetch(torch.tensor(indices), seed=0, cursor=0)}


class Items:
    """A map-style data set.

    An item may be drawn at random (an augmentation): around each batch the global generators of ``random``, numpy and
    PyTorch (CPU) are seeded from (seed, cursor) and put back, so a batch is the same whenever and wherever it is
    fetched. That costs 0.15 ms a batch; a data set with the attribute ``draws = False`` promises to draw nothing and is
    spared it.

    >>> Items(["a", "b", "c"]).fetch(torch.tensor([2, 0]), seed=0, cursor=0)
    ['c', 'a']
    """

    def __init__(self, data: object, collate: Collate | None = None) -> None:
        _check_map_style(data)
        self._data: Any = data
        self._collate = collate

    def __len__(self) -> int:
        return len(self._data)

    def fetch(self, indices: Tensor, *, seed: int, cursor: int) -> Batch:
        chosen = indices.tolist()
        draws = getattr(self._data, "draws", True) or (
            self._collate is not None and getattr(self._collate, "draws", True)
        )
        with seeded(seed, cursor) if draws else nullcontext():
            items = self._items(chosen, cursor)
            return self._collated(items, chosen, cursor) if isinstance(items, list) else self._ready(items)

    def sample(self, indices: list[int]) -> Tree:
        with seeded(0, 0):
            return {"items": [map_leaves(bits, self._item(index, indices)) for index in indices]}

    def lengths(self) -> Tensor:
        """Return how long each item is, [items] int64: what the data set's ``lengths`` says, or by looking at each.

        Raises:
            DataError: ``lengths`` has another number of entries, or no item has a length.

        >>> Items(["to", "be", "or not"]).lengths()
        tensor([2, 2, 6])
        """
        known = getattr(self._data, "lengths", None)
        if known is None:
            with seeded(0, 0):
                known = [length_of(self._item(index, [index])) for index in range(len(self))]
        found = torch.as_tensor(known, dtype=torch.int64)
        if found.shape != (len(self),) or not bool(found.any()):
            raise DataError(
                "The examples have no lengths to group them by.",
                where="group_by_length",
                expected=f"{len(self)} lengths",
                got=f"{list(found.shape)} of them, the longest {int(found.max()) if found.numel() else 0}",
                hint="items with lists, tensors or texts in them; or an attribute lengths of the data set",
            )
        return found

    def _items(self, chosen: list[int], cursor: int) -> Any:
        fetch_all = getattr(self._data, "__getitems__", None)
        if fetch_all is None:
            return [self._item(index, chosen, cursor) for index in chosen]
        try:
            return fetch_all(chosen)
        except Exception as error:
            raise _failed("The data set's __getitems__", error, chosen, cursor) from error

    def _item(self, index: int, chosen: list[int], cursor: int | None = None) -> Any:
        try:
            return self._data[index]
        except Exception as error:
            raise _failed(f"The data set's example {index}", error, chosen, cursor) from error

    def _collated(self, items: list[Any], chosen: list[int], cursor: int) -> Batch:
        try:
            return collated(items, self._collate)
        except Exception as error:
            hint = None if self._collate else RAGGED
            raise _failed("Collating a batch", error, chosen, cursor, hint) from error

    def _ready(self, batch: Any) -> Batch:
        batch = as_tensors(dict(batch) if isinstance(batch, Mapping) else batch)
        if self._collate is None:
            return batch
        finish = whole_of(self._collate)
        if finish is None:
            raise ConfigError(
                "collate has nothing to collate: the data set's __getitems__ returns finished batches.",
                expected="a list of items",
                got=kind_of(batch),
                hint="drop collate, or let __getitems__ return a list",
            )
        return finish(batch)


def collated(items: list[Any], collate: Collate | None) -> Batch:
    """Return a batch of items, stacked if there is no function that collates them.

    >>> collated([1, 2], None)
    tensor([1, 2])
    """
    batch = stacked(items) if collate is None else collate(items)
    return dict(batch) if isinstance(batch, Mapping) else batch


def _remedy(tree: Tree) -> str:
    parts = list(tree) if isinstance(tree, dict) else []
    sets = [name for name in parts if hasattr(type(tree[name]), "__getitems__")]
    if sets and len(sets) == len(parts):  # a DatasetDict
        return f"these are data sets: pass one of them, data[{sets[0]!r}], and another as val_data"
    return "torch.as_tensor turns numbers into tensors; pass items, one an example, as a list"


def _check_map_style(data: object) -> None:
    hint = next((hint for kind, hint in _HINTS.items() if isinstance(data, kind)), None)
    if hint is not None or not (hasattr(type(data), "__len__") and hasattr(type(data), "__getitem__")):
        raise DataError("Training cannot read data of this kind.", expected=SUPPORTED, got=kind_of(data), hint=hint)


def _failed(
    subject: str, error: Exception, chosen: list[int], cursor: int | None, hint: str | None = None
) -> DataError:
    some = f"examples [{listed(chosen)}]"
    where = some if cursor is None else f"batch {cursor}, {some}"
    if isinstance(error, DataError):  # one of ours knows more
        where = where if error.where is None else f"{error.where}, {where}"
        return DataError(error.what, where=where, expected=error.expected, got=error.got, hint=error.hint or hint)
    return DataError(f"{subject} failed.", where=where, got=f"{type(error).__name__}: {error}", hint=hint)


def bits(leaf: Any) -> Any:
    """Return a leaf of an example as something whose digest is stable between processes.

    >>> bits(3), bits(object)
    (3, 'type')
    """
    if hasattr(leaf, "tobytes") and str(getattr(leaf, "dtype", "")) != "object":  # numpy arrays, PIL images
        return leaf.tobytes()
    return leaf if isinstance(leaf, (Tensor, str, bytes, int, float)) else type(leaf).__qualname__


def kind_of(data: object) -> str:
    """Return what data is called in a message.

    >>> kind_of([])
    'list'
    """
    return f"{type(data).__module__}.{type(data).__qualname__}".removeprefix("builtins.")
