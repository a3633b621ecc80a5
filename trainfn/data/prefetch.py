"""``prefetched``: the next batch on its way to a GPU while the step over the last one runs.

    host    |fetch 1|launch 1|fetch 2|launch 2|
    copies          |batch 1|        |batch 2|
    steps                   |step 1 ---------|step 2 ---------|

A copy on the stream of the steps would begin when they have ended. One on a stream of its own begins as soon as the
batch is there, and only the step that reads the batch waits for it. A batch is fetched after the step before it has
been launched: while the device works, the host is free; the other way round a slow data set would keep the device idle.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Protocol

import torch
from torch import Tensor

from trainfn.data.source import Batch
from trainfn.tree import leaves, map_leaves


class Lane(Protocol):
    """A way for batches to the device: :class:`CopyStream`, or what a test puts in its place."""

    def send(self, batch: Batch) -> tuple[Batch, Any]:
        """Begin to copy a batch; return the copy, and what tells when it is there."""

    def receive(self, batch: Batch, arrival: Any) -> Batch:
        """Make what the current stream does next wait for the copy."""


def prefetched(batches: Generator[Batch, None, None], lane: Lane) -> Generator[Batch, None, None]:
    """Yield the same batches, on the lane's device; no call waits for the device.

    Closing it closes ``batches``.

    >>> class Straight:
    ...     def send(self, batch):
    ...         return batch, None
    ...     def receive(self, batch, arrival):
    ...         return batch
    >>> list(prefetched((number for number in range(3)), Straight()))
    [0, 1, 2]
    """
    try:
        for batch in batches:
            yield lane.receive(*lane.send(batch))
    finally:
        batches.close()


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with its tensors on ``device``; copies from pinned memory do not block.

    >>> to_device({"x": torch.ones(1), "n": 3}, torch.device("cpu"))
    {'x': tensor([1.]), 'n': 3}
    """
    if device.type == "cpu":
        return batch
    return map_leaves(lambda leaf: leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf, batch)


class CopyStream:
    """Copies to a GPU on a stream of their own, from page-locked memory (``Loader(pin=True)``) without blocking."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def send(self, batch: Batch) -> tuple[Batch, Any]:
        with torch.cuda.stream(self._stream):
            return to_device(batch, self._device), self._stream.record_event()

    def receive(self, batch: Batch, arrival: Any) -> Batch:
        current = torch.cuda.current_stream(self._device)
        current.wait_event(arrival)
        for leaf in leaves(batch):
            if isinstance(leaf, Tensor) and leaf.is_cuda:
                leaf.record_stream(current)  # its memory is the copies' again only after the step has read it
        return batch
