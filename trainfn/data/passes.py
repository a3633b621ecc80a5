"""Passes over an iterable: how what it yields becomes batches, once from its beginning to its end.

==================================  =========================================================================
an iterable of examples             so many of them are collated to a batch; the last one is short
the same, with workers              each worker iterates over the data, which shards itself by
                                    ``torch.utils.data.get_worker_info()``; it makes batches of its own shard, and
                                    they are taken from the workers in turn, so 0 and 1 workers give one order, and
                                    2 another
an iterable of batches              taken as they come, in the order of their loader
==================================  =========================================================================
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import attrs
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data.dataloader import _BaseDataLoaderIter

from trainfn.batch import Batch
from trainfn.data.collators import Collate
from trainfn.data.forms import as_tensors
from trainfn.data.parcel import Parcel, packed, unchanged
from trainfn.data.source import RAGGED, collated, whole_of
from trainfn.data.workers import POLL, delivered
from trainfn.errors import ConfigError, DataError
from trainfn.tree import batch_length


class Batched:
    """An iterable whose elements are batches already: they are taken as they come.

    What a ``DataLoader`` of a stream yields is known to be batches, and needs no such mark.

    Raises:
        DataError: it cannot be iterated over.

    >>> import torch
    >>> [len(batch) for batch in Batched([torch.ones(3), torch.ones(2)])]
    [3, 2]
    """

    def __init__(self, data: Iterable[Any] | Callable[[], Iterator[Any]]) -> None:
        if not hasattr(type(data), "__iter__") and not inspect.isgeneratorfunction(data):
            raise DataError("Batches have to be iterable.", got=type(data).__name__)
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        return iter(begun(self.data, 0))


def is_loader(data: object) -> bool:
    """Return whether an iterable yields batches by its kind: a ``DataLoader``, what is used like one, or the mark.

    >>> is_loader(DataLoader([1, 2])), is_loader([1, 2])
    (True, False)
    """
    like_one = hasattr(data, "dataset") and hasattr(data, "batch_size") and hasattr(type(data), "__iter__")
    return isinstance(data, (DataLoader, Batched, _BaseDataLoaderIter)) or (like_one and not isinstance(data, type))


def begun(data: Any, epoch: int) -> Iterable[Any]:
    """Return what to iterate over in this epoch; a generator function is called, with its number if it takes one.

    >>> def numbers(epoch):
    ...     yield epoch
    >>> list(begun(numbers, 3))
    [3]
    """
    if isinstance(data, Batched):
        return begun(data.data, epoch)
    for part in (data, getattr(data, "dataset", None)):
        set_epoch = getattr(part, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)
    if not inspect.isgeneratorfunction(data):
        return data  # type: ignore[no-any-return]
    takes = len(inspect.signature(data).parameters)
    return data(epoch) if takes else data()  # type: ignore[no-any-return]


@attrs.frozen
class Passes:
    """How to go through an iterable once.

    Attributes:
        data: the iterable, or a generator function.
        batch_size: examples in a batch; nothing to batches that come whole.
        drop_last: leave out a last batch that would be short.
        workers: processes that make batches of examples.
        timeout: seconds to wait for a batch from workers; None for ever.
        collate: makes a batch of a list of items, or finishes one that comes whole.
    """

    data: Any
    batch_size: int
    drop_last: bool
    workers: int
    timeout: float | None
    collate: Collate | None

    def begin(self, epoch: int, number: int) -> Windows | Whole:
        """Return the batches of a pass. What comes from the data itself is an error of the data.

        Args:
            epoch: number of the pass.
            number: of its first batch in the run, for messages.
        """
        data = begun(self.data, epoch)
        numbers = itertools.count(number)
        if is_loader(self.data):
            if getattr(data, "num_workers", 0) and isinstance(data, DataLoader):
                data = delivered(iter(data), numbers, limit=self.timeout or data.timeout or None)
            return Whole(data, self)
        if not self.workers:
            return Windows(data, self)
        parcels = DataLoader(
            _Shards(data, self), batch_size=None, collate_fn=unchanged, num_workers=self.workers, timeout=POLL
        )
        arriving = delivered(iter(parcels), numbers, limit=self.timeout)
        return Whole((parcel.open() for parcel in arriving), attrs.evolve(self, collate=None))


class Whole:
    """Batches that come whole, finished: lists of fields, as loaders make them, are tuples here.

    >>> import torch
    >>> list(Whole([[torch.ones(1), torch.zeros(1)]], Passes(None, 1, False, 0, None, None)))
    [(tensor([1.]), tensor([0.]))]
    """

    def __init__(self, data: Iterable[Any], passes: Passes) -> None:
        self._batches = iter(data)
        self._finish = None if passes.collate is None else whole_of(passes.collate)
        if passes.collate is not None and self._finish is None:
            raise ConfigError(
                "Data that comes in batches has nothing to collate.",
                where="collate",
                hint="drop collate, or pass an iterable of examples",
            )

    @property
    def has_ended(self) -> bool:
        """Whether it is known that no other batch comes; a loader without workers knows it after a short one."""
        return bool(getattr(getattr(self._batches, "_dataset_fetcher", None), "ended", False))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = next(self._batches)
        batch = dict(batch) if isinstance(batch, Mapping) else tuple(batch) if isinstance(batch, list) else batch
        batch = as_tensors(batch)
        return checked(batch if self._finish is None else self._finish(batch))


class Windows:
    """So many examples at a time, as batches; or passed over without being collated.

    >>> windows = Windows(range(5), Passes(None, 2, False, 0, None, None))
    >>> windows.skip(), [batch.tolist() for batch in windows]
    (True, [[2, 3], [4]])
    """

    def __init__(self, data: Iterable[Any], passes: Passes) -> None:
        self._items, self._passes = iter(data), passes
        self.has_ended = False

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        items = self._take()
        if not items:
            raise StopIteration
        try:
            return checked(collated(items, self._passes.collate))
        except DataError as error:
            raise DataError(
                error.what, where=error.where, expected=error.expected, got=error.got,
                hint=error.hint or (None if self._passes.collate else RAGGED),
            ) from error  # fmt: skip
        except Exception as error:
            got = f"{type(error).__name__}: {error}"
            hint = None if self._passes.collate else RAGGED
            raise DataError("Collating a batch failed.", got=got, hint=hint) from error

    def skip(self) -> bool:
        """Pass over a batch; return whether there was one."""
        return bool(self._take())

    def _take(self) -> list[Any]:
        items = list(itertools.islice(self._items, self._passes.batch_size))
        self.has_ended = len(items) < self._passes.batch_size
        return [] if self._passes.drop_last and self.has_ended else items


class _Shards(IterableDataset[Parcel]):
    """The batches of one worker's shard."""

    def __init__(self, data: Iterable[Any], passes: Passes) -> None:
        self._data, self._passes = data, passes

    def __iter__(self) -> Iterator[Parcel]:
        windows: Iterator[Batch] | None = None

        def fetch() -> Batch:
            nonlocal windows
            try:
                windows = windows or Windows(self._data, self._passes)
                return next(windows)
            except (StopIteration, DataError):
                raise
            except Exception as error:
                raise failed(error) from error

        while True:
            try:
                parcel = packed(fetch)
            except StopIteration:
                return
            yield parcel
            if parcel.error is not None:
                return


def failed(error: Exception) -> DataError:
    """Return what is said about an error that came from an iterable.

    >>> print(failed(KeyError("x")))
    The data could not be iterated over.
      got: KeyError: 'x'
    """
    return DataError("The data could not be iterated over.", got=f"{type(error).__name__}: {error}")


def checked(batch: Batch) -> Batch:
    """Return a batch, which holds a tensor and agrees in length.

    Raises:
        DataError: it does not.

    >>> checked(["a", "b"])
    Traceback (most recent call last):
        ...
    trainfn.errors.DataError: The batch holds no tensor with a batch dimension.
      expected: a tensor, tuple or dict of tensors whose first dimension counts examples
      got: 0: str, 1: str
    """
    batch_length(batch)
    return batch
