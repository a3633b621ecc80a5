"""``Stream``: batches of an iterable, where the position is in the data and no number finds a batch.

A :class:`trainfn.data.Loader` makes batch n from n. A stream only has a next batch: which one that is, its data know
(``state_dict()``), or nothing does, and then the pass is read again from its beginning. See :mod:`trainfn.data.reader`.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from typing import Any

import torch
from torch import Tensor

from trainfn.batch import Batch
from trainfn.data.collators import Collate, choose_collator
from trainfn.data.parcel import pinned
from trainfn.data.passes import Passes, is_loader
from trainfn.data.reader import Place, Reader
from trainfn.data.source import bits, kind_of
from trainfn.errors import ConfigError, DataError
from trainfn.tree import batch_length, digest, map_leaves, named_leaves

_UNKNOWN = 2**62  # examples, and batches an epoch: more than there will ever be
_SPANS = 1024  # of the last batches, it is known which examples they were


class Stream:
    """Batches of an iterable, one after another, pass after pass.

    Args:
        data: an iterable of examples (an ``IterableDataset``, a generator function, any object with ``__iter__``), or
            of batches (a ``DataLoader`` or what is used like one, :class:`trainfn.data.Batched`).
        batch_size: examples a batch; batches that come whole are taken as they are.
        seed: what random draws of the data are derived from.
        drop_last: leave out the last batch of a pass where it would be short.
        workers: processes that make batches of examples; see :mod:`trainfn.data.passes`.
        timeout: seconds to wait for a batch from workers; None for ever.
        pin: put batches into page-locked memory.
        collate: makes a batch of a list of items, or finishes batches that come whole.
        keep: how many of the last batches :meth:`batch` still has.

    Attributes:
        endless: False; it is not a function of numbers.
        examples, batches_per_epoch: unknown, and so beyond all bounds; the second may be set.
        is_whole: whether its data yield batches.

    >>> stream = Stream(iter("abc"), batch_size=2, collate=lambda items: torch.tensor([ord(item) for item in items]))
    >>> [batch.tolist() for batch in stream.batches(0, 2)], stream.indices(1)
    ([[97, 98], [99]], tensor([2]))
    """

    def __init__(
        self,
        data: Any,
        *,
        batch_size: int = 1,
        seed: int = 0,
        drop_last: bool = False,
        workers: int = 0,
        timeout: float | None = None,
        pin: bool = False,
        collate: str | Collate | None = None,
        keep: int = 1,
    ) -> None:
        self.endless, self.examples, self.batches_per_epoch = False, _UNKNOWN, _UNKNOWN
        self.batch_size, self.seed, self.drop_last, self.shuffle = batch_size, seed, drop_last, False
        self.is_whole = is_loader(data)
        self.workers = getattr(data, "num_workers", 0) if self.is_whole else workers
        own = 0 if self.is_whole else workers
        passes = Passes(data, batch_size, drop_last, own, timeout, choose_collator(collate))
        self._reader = Reader(passes, seed=seed, workers=self.workers)
        if self._reader.is_one_shot and own:
            raise ConfigError(
                "An iterator cannot be shared by data workers.",
                got=f"workers={workers}, {self._reader.kind}",
                hint="workers=0, or a data set that can be iterated over again",
            )
        self._pin, self._keep = pin and torch.accelerator.is_available(), keep
        self._cursor = 0
        self._ahead: tuple[Place, Batch] | None = None  # the first batch, which was looked at before the run
        self._kept: dict[int, Batch] = {}
        self._spans: dict[int, tuple[int, int, int]] = {}

    @property
    def title(self) -> str:
        """What it is, for people."""
        reader = self._reader
        if reader.owner is not None:
            resume = f"its position is in {kind_of(reader.owner)}.state_dict()"
        else:
            resume = "a resume reads it again" if not reader.is_one_shot else "it can be read once, and not resumed"
        return f"a stream of {'batches' if self.is_whole else 'examples'}, {reader.kind}; {resume}"

    def epoch(self, cursor: int) -> int:
        """Return the number of the pass that batch ``cursor`` came in; of the current one, if that is not known.

        Where ``batches_per_epoch`` is set to a number, so many are an epoch, whatever a pass is.
        """
        if self.batches_per_epoch < _UNKNOWN:
            return cursor // self.batches_per_epoch
        return self._spans.get(cursor, (self._reader.place.epoch, 0, 0))[0]

    def count(self, start: int, stop: int) -> int:
        """Return how many examples were in batches ``start`` to ``stop - 1``, as far as they are remembered."""
        return sum(self._spans[number][2] for number in range(start, stop) if number in self._spans)

    def indices(self, cursor: int) -> Tensor:
        """Return which examples of its pass batch ``cursor`` was made of, int64; none, if that is long ago."""
        _, first, count = self._spans.get(cursor, (0, 0, 0))
        return torch.arange(first, first + count)

    def batch(self, cursor: int) -> Batch:
        """Return the first batch before it is handed out, or one of the last ``keep`` that were.

        Raises:
            DataError: any other one; or as for :meth:`batches`.

        >>> stream = Stream(iter(range(5)), batch_size=2)
        >>> stream.batch(0), next(stream.batches(0))
        (tensor([0, 1]), tensor([0, 1]))
        """
        if cursor in self._kept:
            return self._kept[cursor]
        if cursor != 0 or self._cursor != 0:
            expected = f"one of the last {self._keep}"
            raise DataError("A batch of a stream can be had once.", where=f"batch {cursor}", expected=expected)
        self._ahead = self._read(0)
        self._kept[0] = self._ahead[1]
        return self._ahead[1]

    def batches(self, start: int = 0, stop: int | None = None) -> Generator[Batch, None, None]:
        """Return an iterator over the batches from ``start``, which is where the stream is, up to ``stop``.

        Closing it leaves the stream where it is.

        Raises:
            DataError: (from the iterator) the stream is elsewhere; it has ended and cannot be begun again; its data
                raised something, or yield what makes no batch.
        """
        if start != self._cursor:
            raise DataError("A stream goes on from where it is.", expected=f"batch {self._cursor}", got=f"{start}")
        return self._going_on(sys.maxsize if stop is None else stop)

    def one_pass(self) -> Generator[Batch, None, None]:
        """Return an iterator over one whole pass from its beginning, or over its first ``batches_per_epoch``.

        >>> stream = Stream([[1, 2], [3, 4]], batch_size=2)
        >>> [len(list(stream.one_pass())) for _ in range(2)]
        [1, 1]
        """
        if self._ahead is None:
            self.seek(0, {})
        found: tuple[Place, Batch] | None = self._ahead or self._read(0)
        self._ahead = None
        while found is not None:
            self._cursor += 1
            yield found[1]
            found = None if self._cursor >= self.batches_per_epoch else self._reader.read(self._cursor, again=False)
        self._reader.drop()

    def sample(self, most: int) -> Iterator[Batch]:
        """Yield what can be looked at without going through the data: the first batch."""
        yield self.batch(0)

    def position(self, cursor: int) -> dict[str, Any]:
        """Return the position after batch ``cursor - 1``, as JSON data; that has to be the last one handed out."""
        assert cursor == self._cursor, f"the stream is at {self._cursor}, and asked for {cursor}"
        return {"epoch": 0, "batches": 0} if self._ahead is not None else self._reader.position()

    def check_position(self) -> None:
        """Raise now what saving a position would raise later.

        Raises:
            DataError: the data's state is no JSON data.
        """
        self.batch(0)
        if self._reader.owner is not None:
            self._reader.said()

    def seek(self, cursor: int, position: dict[str, Any]) -> None:
        """Go to a position that :meth:`position` has returned, before batch ``cursor`` is read.

        Raises:
            DataError: the data can be iterated over once only, and that has begun.
        """
        self._reader.seek(cursor, position)
        self._cursor, self._ahead = cursor, None

    def fingerprint(self) -> str:
        """Return 16 hex digits that tell this data from other data, as far as that is known of a stream.

        Of one that keeps its own state: the kinds of its data and of its fields. Of any other: its first batch, whose
        bits are the same for the same seed and batch size, and how many workers take turns.
        """
        known: dict[str, Any] = {"kind": self._reader.name, "workers": str(max(self.workers, 1))}
        first = self.batch(0)
        if self._reader.owner is not None:
            known["fields"] = [(name, str(getattr(leaf, "dtype", ""))) for name, leaf in named_leaves(first)]
        else:
            known["first"] = map_leaves(bits, first)
        return digest({"stream": known})[:16]

    def _going_on(self, stop: int) -> Generator[Batch, None, None]:
        try:
            while self._cursor < stop:
                place, batch = self._ahead or self._read(self._cursor)
                self._ahead = None
                self._note(place, batch)
                self._cursor += 1
                yield batch
            self._reader.park()
        except DataError:
            self._reader.drop()  # an error's traceback would keep workers alive
            raise

    def _read(self, cursor: int) -> tuple[Place, Batch]:
        found = self._reader.read(cursor)
        assert found is not None
        return (found[0], pinned(found[1])) if self._pin else found

    def _note(self, place: Place, batch: Batch) -> None:
        self._spans[self._cursor] = (place.epoch, place.examples, batch_length(batch))
        self._kept[self._cursor] = batch
        self._spans.pop(self._cursor - _SPANS, None)
        self._kept = {number: kept for number, kept in self._kept.items() if number > self._cursor - self._keep}
