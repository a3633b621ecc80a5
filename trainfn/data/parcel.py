"""``Parcel``: what a ``DataLoader`` passes on for a batch, so that an error arrives as it was raised.

A DataLoader remakes a worker's exception from its text alone; here it travels as a value.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.data import get_worker_info

from trainfn.batch import Batch
from trainfn.errors import TrainfnError
from trainfn.tree import map_leaves


class Parcel:
    """A batch, or the error that came instead of it."""

    def __init__(self, batch: Batch, error: TrainfnError | None = None, cause: BaseException | None = None) -> None:
        self.batch, self.error, self.cause = batch, error, cause

    def open(self) -> Batch:
        """Return the batch, or raise the error."""
        if self.error is not None:
            raise self.error from self.cause
        return self.batch

    def pin_memory(self) -> Parcel:
        """Return the parcel with its batch in page-locked memory; the DataLoader's thread calls this."""
        return Parcel(pinned(self.batch), self.error, self.cause)


def pinned(batch: Batch) -> Batch:
    """Return a batch with what it has on the host in page-locked memory."""

    def pin(leaf: Any) -> Any:
        on_host = not isinstance(leaf, Tensor) or leaf.device.type == "cpu"
        return leaf.pin_memory() if on_host and hasattr(leaf, "pin_memory") else leaf

    return map_leaves(pin, batch)


def packed(fetch: Callable[[], Batch]) -> Parcel:
    """Return what ``fetch`` returns, or the error of the house that it raises, with the worker that it came from.

    >>> packed(lambda: 3).open()
    3
    """
    try:
        return Parcel(fetch())
    except TrainfnError as error:
        cause, worker = error.__cause__, get_worker_info()
        if worker is not None:
            where = f"{'' if error.where is None else f'{error.where}, '}in data worker {worker.id}"
            error = type(error)(error.what, where=where, expected=error.expected, got=error.got, hint=error.hint)
        if cause is not None and worker is not None:
            # A traceback cannot be pickled, and an exception of the data set's own class may not be.
            cause = RuntimeError("in a data worker:\n" + "".join(traceback.format_exception(cause)))
        return Parcel(None, error, cause)


def unchanged(parcel: Any) -> Any:
    """Return what was given: the collate function of a DataLoader that passes parcels on."""
    return parcel
