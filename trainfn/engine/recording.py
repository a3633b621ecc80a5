"""Recording on a GPU: streams, events and ``torch.cuda.CUDAGraph``, behind the few verbs that a capture needs.

What decides (:mod:`trainfn.engine.cudagraph`) knows only these verbs, so that it runs where there is no GPU, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Protocol, cast

import torch
from torch import Tensor


class Mark(Protocol):
    """A moment on the device; of ``torch.cuda.Event``, what is used here."""

    def query(self) -> bool: ...

    def elapsed_time(self, end_event: Any) -> float: ...


class Recording(Protocol):
    """What records and replays: :class:`Cuda`, or what a test puts in its place."""

    device: torch.device

    def generators(self) -> list[torch.Generator]:
        """Return the host's generator, then the device's."""

    def aside(self) -> AbstractContextManager[None]:
        """Run what is inside on the stream that records, after all before it and before all after it."""

    def record(self, body: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """Record what ``body`` launches; return what launches it again, and the memory of its result."""

    def mark(self) -> Mark:
        """Return a mark of this moment on the current stream."""


class Cuda:
    """Recording on a GPU. All recordings share one pool of memory: no two are ever replayed at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device if device.index is not None else torch.device("cuda", torch.cuda.current_device())
        self._side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._pool: Any = None

    def generators(self) -> list[torch.Generator]:
        return [torch.default_generator, torch.cuda.default_generators[self.device.index]]

    @contextmanager
    def aside(self) -> Iterator[None]:
        # Memory that is taken here is given back to this stream, and it only ever runs after waiting for the other one.
        current = torch.cuda.current_stream(self.device)
        self._side.wait_stream(current)
        try:
            with torch.cuda.stream(self._side):
                yield
        finally:
            current.wait_stream(self._side)

    def record(self, body: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.device(self.device):
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            try:
                # Other threads (that pin batches, that save) may go on talking to CUDA meanwhile.
                with torch.cuda.graph(graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local"):
                    result = body()
            except BaseException:
                torch.cuda.set_stream(current)  # torch.cuda.graph does not, if the end of a capture fails, too
                self._mend()
                raise
        return graph.replay, result

    def mark(self) -> Mark:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return cast(Mark, event)

    def _mend(self) -> None:
        """Undo what a failed end of a capture leaves: an allocator and a generator that believe it still goes on."""
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(self.device.index, self._pool)
        with suppress(RuntimeError):
            generator = torch.cuda.default_generators[self.device.index]
            generator.graphsafe_set_state(generator.clone_state())
