"""``delivered``: what data workers fetch, in order; and an error that says so where one of them dies or hangs.

PyTorch tells of a worker's death by a handler of SIGCHLD that raises wherever the main thread is: in the middle of a
step, whose state is then neither the old one nor the new one. Here the main thread asks, once a second while it waits
for a batch, and the handler rests; so a run learns of it between two steps, with a state that can be saved.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

from trainfn.errors import DataError

POLL = 1
"""Seconds between two looks at the workers; the ``timeout`` of the DataLoader."""


def delivered(iterator: Iterator[Any], numbers: Iterable[int], *, limit: float | None) -> Generator[Any, None, None]:
    """Yield what the iterator of a ``DataLoader`` yields. Its workers end with it: nobody else is to hold it.

    Args:
        iterator: of a loader with ``timeout=POLL``, if it has workers and that is ours to say; others ask less often.
        numbers: of the batches that it delivers, for messages; it may end before them.
        limit: seconds to wait for one of them; None for ever.

    Raises:
        DataError: a worker has died, or no batch has come within ``limit``.
    """
    workers: Sequence[Any] = getattr(iterator, "_workers", ())
    with _undisturbed(), _Watch(workers, limit) as watch:
        try:
            for number in numbers:
                try:
                    parcel = _await(iterator, workers, number, watch)
                except StopIteration:
                    return
                yield parcel
        except BaseException:
            shut_down = getattr(iterator, "_shutdown_workers", None)
            if shut_down is not None:  # now: an error's traceback keeps the iterator alive
                shut_down()
            raise
        finally:
            del iterator  # the last reference: this is what shuts the workers down


class _Watch:
    """A thread that kills the workers when one batch is waited for longer than ``limit``; none, if there is none.

    A batch lies in memory whose descriptor is asked for from the worker, without a timeout: where the worker is frozen,
    that call ends only with the worker.

    Attributes:
        since: when the wait for a batch began; None between two waits.
        hung: whether it has killed them.
    """

    def __init__(self, workers: Sequence[Any], limit: float | None) -> None:
        self.since: float | None = None
        self.hung = False
        self.limit, self._workers, self._over = limit, workers, threading.Event()
        self._thread = threading.Thread(target=self._look, name="trainfn-watch", daemon=True)

    def __enter__(self) -> _Watch:
        if self.limit is not None and self._workers:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _look(self) -> None:
        assert self.limit is not None
        while not self._over.wait(min(self.limit / 4, 0.25)):
            since = self.since
            if since is not None and time.monotonic() - since >= self.limit:
                self.hung = True
                for worker in self._workers:
                    worker.kill()
                return


def _await(iterator: Iterator[Any], workers: Sequence[Any], number: int, watch: _Watch) -> Any:
    watch.since = time.monotonic()
    where = f"while batch {number} was waited for"
    try:
        while True:
            try:
                return next(iterator)
            except (RuntimeError, EOFError, OSError) as error:  # the last two from a connection that has ended
                if str(error).startswith("DataLoader timed out"):
                    continue
                if watch.hung:
                    raise DataError(
                        "The data workers hang.",
                        where=where,
                        expected=f"a batch within {watch.limit:g} s",
                        got=f"none, though {len(workers)} workers were alive; they have been ended",
                        hint="look for items that wait for a lock, a network or a process (with workers=0 they hang in "
                        "this process, where a debugger can look), or pass a longer worker_timeout",
                    ) from error
                if dead := _dead(workers):
                    raise DataError(
                        "A data worker has died.",
                        where=where,
                        got=", ".join(dead),
                        hint="memory that ran out is the usual reason: fewer workers, smaller items, more of /dev/shm; "
                        "with workers=0 they are fetched in this process, where an error shows itself",
                    ) from error
                raise
    finally:
        watch.since = None


def _dead(workers: Sequence[Any]) -> list[str]:
    """Return which workers have ended, and how; one may only just be ending, and its connection ended first."""
    until = time.monotonic() + POLL
    while time.monotonic() < until:
        dead = [f"worker {index} {_fate(worker)}" for index, worker in enumerate(workers) if not worker.is_alive()]
        if dead:
            return dead
        time.sleep(0.01)
    return []


def _fate(worker: Any) -> str:
    code = worker.exitcode
    named = code is not None and -code in set(signal.Signals)
    return f"(process {worker.pid}) was ended by {signal.Signals(-code).name if named else f'exit status {code}'}"


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Let PyTorch's handler of SIGCHLD rest."""
    handler = signal.getsignal(signal.SIGCHLD)
    module = getattr(handler, "__module__", "")
    if module != "torch.utils.data._utils.signal_handling" or threading.current_thread() != threading.main_thread():
        yield
        return
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # where another thread lets go of the iterator
            signal.signal(signal.SIGCHLD, handler)
