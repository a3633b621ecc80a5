"""``Loader``: batches by number. Batch ``cursor`` is a pure function of (data, settings, cursor).

The epoch of a batch is ``cursor // batches_per_epoch``, and its examples are a slice of ``order(..., epoch=epoch)``. To
start at any batch is therefore to count from another number; nothing is replayed. What a
``torch.utils.data.DataLoader`` iterates over here is those numbers, so its workers stay alive from epoch to epoch, and
each of them finds out by itself which examples a number means.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from trainfn.data.collators import Collate
from trainfn.data.grouping import order_by_length
from trainfn.data.order import order
from trainfn.data.parcel import Parcel, packed, unchanged
from trainfn.data.source import Batch, Items, Source, Tensors, is_function, make_source
from trainfn.data.workers import POLL, delivered
from trainfn.errors import ConfigError
from trainfn.tree import digest, leaves, map_leaves, split

# The order is computed for a block of batches at a time: about this many positions, at most this many batches.
_BLOCK_POSITIONS = 16_384
_BLOCK_BATCHES = 512
_ALIGNMENT = 64  # bytes: where PyTorch begins a tensor on a CPU
_GATHERED_BYTES = 2**18  # of a CPU's second-level cache: the batches of tensors that are gathered at a time


class Loader:
    """Shuffled batches of a data set, by number, going through epochs without end.

    Tensors are gathered several batches ahead: what is written into them meanwhile is seen late.

    Args:
        data: a tensor or NumPy array, a tuple or dict of them that agree in their first dimension, or a map-style
            data set (``__len__``, ``__getitem__``). Batches keep the form. Or a function ``batch(index)``, whose
            batches are taken as they are, in order: ``batch_size`` and ``shuffle`` do not matter then.
        batch_size: examples a batch; the last batch of an epoch is shorter unless ``drop_last``.
        seed: what the order, and any random draw of the data set's items, is derived from, in [0, 2**63).
        shuffle: a new order every epoch; the data set's own order if False.
        drop_last: leave out the last batch of an epoch when it would be short.
        workers: processes that fetch batches; 0 fetches in this one. The batches are the same.
        timeout: seconds to wait for a batch from the workers; None for ever.
        pin: put batches into page-locked memory, for faster copies, where there is an accelerator.
        collate: makes a batch of a list of items: a function, a :class:`trainfn.data.Collator`, or the name of one;
            items are stacked if None.
        group_by_length: put items of like length in one batch; see :mod:`trainfn.data.grouping`. Each item is looked at
            once for that, unless the data set has an attribute ``lengths``.

    Attributes:
        endless: whether the batches come from a function; each counts as an example then.
        examples: how many examples the data set has.
        batches_per_epoch: how many batches go through all of them.
        restarts: whether each epoch begins at the first example; a function goes on with the next batch instead.

    Raises:
        DataError: the data is of an unsupported kind, empty, or its tensors disagree in length.
        ConfigError: a setting is out of range or contradicts another.

    >>> loader = Loader({"x": torch.arange(10)}, batch_size=4, seed=1)
    >>> loader.examples, loader.batches_per_epoch
    (10, 3)
    >>> [batch["x"].tolist() for batch in loader.batches(0, 4)]
    [[0, 4, 3, 8], [1, 2, 9, 6], [5, 7], [1, 4, 2, 5]]
    """

    def __init__(
        self,
        data: object,
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        workers: int = 0,
        timeout: float | None = None,
        pin: bool = False,
        collate: str | Collate | None = None,
        group_by_length: bool = False,
    ) -> None:
        self.endless = is_function(data)
        self.restarts = not self.endless
        if self.endless:
            batch_size, shuffle = 1, False  # its examples are batches
        _check(batch_size=(batch_size, 1), workers=(workers, 0), seed=(seed, 0))
        self._source: Source = make_source(data, collate)
        self.examples = len(self._source)
        if drop_last and self.examples < batch_size:
            raise ConfigError(
                "An epoch would have no batch.",
                expected=f"batch_size <= {self.examples}, the number of examples, with drop_last=True",
                got=f"batch_size={batch_size}",
                hint="pass drop_last=False or a smaller batch_size",
            )
        self.batches_per_epoch = self.examples // batch_size if drop_last else -(-self.examples // batch_size)
        self.batch_size, self.seed, self.shuffle, self.drop_last = batch_size, seed, shuffle, drop_last
        self.workers, self.timeout, self.pin = workers, timeout, pin
        self._width = min(batch_size, self.examples)
        self._lengths = self._measured() if group_by_length else None
        self._block_batches = max(1, min(_BLOCK_BATCHES, _BLOCK_POSITIONS // self._width))
        self._block: tuple[int, Tensor] = (-1, torch.empty(0))

    @property
    def is_grouped(self) -> bool:
        """Whether examples of like length are in one batch."""
        return self._lengths is not None

    def epoch(self, cursor: int) -> int:
        """Return the number of the epoch that batch ``cursor`` belongs to.

        >>> Loader(torch.arange(10), batch_size=4).epoch(3)
        1
        """
        _check(cursor=(cursor, 0))
        return cursor // self.batches_per_epoch

    def indices(self, cursor: int) -> Tensor:
        """Return which examples batch ``cursor`` is made of, int64 (examples in the batch,).

        >>> Loader(torch.arange(10), batch_size=4, shuffle=False).indices(2)
        tensor([8, 9])
        """
        _check(cursor=(cursor, 0))
        block, row = self._find(cursor)
        return block[row, : self._examples_in(cursor)].clone()

    def batch(self, cursor: int) -> Batch:
        """Return batch ``cursor``, fetched in this process.

        Raises:
            DataError: the data set or the collate function failed; the message names the batch and its examples.

        >>> Loader((torch.arange(10), torch.ones(10)), batch_size=4, shuffle=False).batch(1)
        (tensor([4, 5, 6, 7]), tensor([1., 1., 1., 1.]))
        """
        return self._source.fetch(self.indices(cursor), seed=self.seed, cursor=cursor)

    def batches(self, start: int = 0, stop: int | None = None) -> Generator[Batch, None, None]:
        """Return an iterator over the batches numbered start, start + 1, ..., without end or up to ``stop``.

        The global random generators are as they were whenever a batch is handed out. Workers end with the iterator:
        when it is exhausted, closed or forgotten.

        Raises:
            ConfigError: a number is negative.
            DataError: (from the iterator) as for :meth:`batch`; or a worker has died, or hangs.

        >>> loader = Loader(torch.arange(10), batch_size=4)
        >>> one, another = next(loader.batches(5)), loader.batch(5)
        >>> bool((one == another).all())
        True
        """
        stop = sys.maxsize if stop is None else stop
        _check(start=(start, 0), stop=(stop, 0))
        return self._stream(range(start, stop))

    def one_pass(self) -> Generator[Batch, None, None]:
        """Return an iterator over the batches of the first epoch."""
        return self.batches(0, self.batches_per_epoch)

    def count(self, start: int, stop: int) -> int:
        """Return how many examples are in batches ``start`` to ``stop - 1``; none in those that a function makes.

        >>> Loader(torch.arange(10), batch_size=4).count(1, 4)
        10
        """

        def before(cursor: int) -> int:  # the last batch of an epoch may be short
            epochs, rest = divmod(cursor, self.batches_per_epoch)
            each = min(self.batches_per_epoch * self.batch_size, self.examples)
            return epochs * each + min(rest * self.batch_size, each)

        return 0 if self.endless else before(stop) - before(start)

    def sample(self, most: int) -> Iterator[Batch]:
        """Yield batches from all over the data, at least two if there are two, with ``most`` examples or so.

        >>> [batch.tolist() for batch in Loader(torch.arange(100), batch_size=5, shuffle=False).sample(10)]
        [[0, 1, 2, 3, 4], [95, 96, 97, 98, 99]]
        """
        number = min(8, max(2, most // self.batch_size)) if not self.endless else 2
        last = 1 if self.endless else self.batches_per_epoch - 1
        for cursor in sorted({round(last * at / max(number - 1, 1)) for at in range(number)}):
            yield self.batch(cursor)

    def position(self, cursor: int) -> dict[str, Any]:
        """Return what a checkpoint keeps to find batch ``cursor`` again: nothing, its number is enough."""
        return {}

    def check_position(self) -> None:
        """Do nothing: there is no position that could not be saved."""

    def seek(self, cursor: int, position: dict[str, Any]) -> None:
        """Do nothing: any batch is found by its number."""

    def fingerprint(self) -> str:
        """Return 16 hex digits that tell this data from other data: its size, form, and first, middle and last example.

        Not affected by the loader's settings. Data that differs in other examples only has the same fingerprint.

        >>> x = torch.arange(10)
        >>> Loader(x, batch_size=4).fingerprint() == Loader(x.clone(), batch_size=5).fingerprint()
        True
        >>> Loader(x, batch_size=4).fingerprint() == Loader(x + 1, batch_size=4).fingerprint()
        False
        """
        few = sorted({0, self.examples // 2, self.examples - 1})
        return digest({"examples": self.examples, "few": self._source.sample(few)})[:16]

    def _gathered(self, numbers: range) -> Iterator[Batch]:
        """Yield batches of tensors, several gathered at a time: a call costs more than a few rows."""
        start = numbers.start
        while start < numbers.stop:
            first = self.batch(start)
            yield first
            start += 1
            block, row = self._find(start)
            sizes = [leaf.numel() * leaf.element_size() for leaf in leaves(first)]
            # Full ones of one block of the order and one epoch; a short one is a first one.
            left = self.examples // self._width - start % self.batches_per_epoch
            count = min(_GATHERED_BYTES // max(sum(sizes), 1), block.shape[0] - row, numbers.stop - start, left)
            if count > 0:
                indices = block[row : row + count].reshape(-1)
                parts = split(self._source.fetch(indices, seed=self.seed, cursor=start), [self._width] * count)
                # The last bits of a product depend on where in memory a matrix begins: as a batch of its own would.
                is_full = self._examples_in(start - 1) == self._width
                is_aligned = is_full and all(each % _ALIGNMENT == 0 for each in sizes)
                yield from parts if is_aligned else (map_leaves(torch.clone, part) for part in parts)
                start += count

    def _examples_in(self, cursor: int) -> int:
        return min(self._width, self.examples - cursor % self.batches_per_epoch * self.batch_size)

    def _find(self, cursor: int) -> tuple[Tensor, int]:
        """Return the block of the order that batch ``cursor`` is in, and its row there."""
        number, row = divmod(cursor, self._block_batches)
        if self._block[0] != number:
            self._block = (number, self._make_block(number))
        return self._block[1], row

    def _make_block(self, number: int) -> Tensor:
        """Return the examples of a block of batches, (batches, width); the row of a short batch ends in repetitions."""
        first = number * self._block_batches
        batches = torch.arange(first, first + self._block_batches).unsqueeze(1)  # (batches, 1)
        starts = (batches % self.batches_per_epoch if self.restarts else batches) * self.batch_size
        positions = starts + torch.arange(self._width)  # (batches, width)
        positions.clamp_(max=self.examples - 1)
        if not self.shuffle:
            return positions
        epochs = batches // self.batches_per_epoch
        if self._lengths is None:
            return order(positions, self.examples, seed=self.seed, epoch=epochs)
        used = min(self.examples, self.batches_per_epoch * self.batch_size)
        for epoch in torch.unique(epochs).tolist():
            rows = (epochs == epoch).squeeze(1)
            positions[rows] = order_by_length(
                positions[rows], self._lengths, batch_size=self._width, seed=self.seed, epoch=epoch, used=used
            )
        return positions

    def _measured(self) -> Tensor:
        if not isinstance(self._source, Items) or not self.shuffle:
            raise ConfigError(
                "These examples cannot be grouped by length.",
                where="group_by_length",
                expected="a data set of items, and shuffle=True: the groups are drawn at random",
                got="shuffle=False" if not self.shuffle else "data that comes in tensors or batches, all of one length",
            )
        return self._source.lengths()

    def _stream(self, numbers: range) -> Generator[Batch, None, None]:
        if not self.workers and not self.pin:  # a DataLoader's own work, 50 us a batch, is of no use then
            yield from self._gathered(numbers) if isinstance(self._source, Tensors) else map(self.batch, numbers)
            return
        parcels = DataLoader(
            _Parcels(self),
            sampler=numbers,
            batch_size=None,
            collate_fn=unchanged,
            num_workers=self.workers,
            timeout=POLL if self.workers else 0,
            pin_memory=self.pin and torch.accelerator.is_available(),
            generator=torch.Generator(),  # an iterator draws a seed for its workers when it starts
        )
        with contextlib.closing(delivered(iter(parcels), numbers, limit=self.timeout)) as arriving:
            for parcel in arriving:
                yield parcel.open()


class _Parcels(Dataset[Parcel]):
    """A loader's batches by number, as the data set that the DataLoader reads."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __getitem__(self, cursor: int) -> Parcel:
        return packed(lambda: self._loader.batch(cursor))


def _check(**settings: tuple[int, int]) -> None:
    wrong = {
        name: (value, least)
        for name, (value, least) in settings.items()
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**63
    }
    if wrong:
        raise ConfigError(
            "A setting of the loader is out of range.",
            expected=", ".join(f"{name}: an int >= {least}" for name, (_, least) in wrong.items()),
            got=", ".join(f"{name}={value!r}" for name, (value, _) in wrong.items()),
        )
