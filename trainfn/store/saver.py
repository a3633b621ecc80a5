"""``Saver``: the checkpoints of a run, written beside the training, one at a time, and pruned when they are safe.

``save`` copies the state's tensors to the host, which is all that training waits for: the next step may write into the
memory of this state. Serialising, hashing, writing and pruning are done on a thread. What goes wrong there is raised by
the next call of any method, never lost; so is what goes wrong while the run is being left, be it by an error.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor

from trainfn.errors import CheckpointError, warn
from trainfn.state import TrainState
from trainfn.store.checkpoint import CheckpointWarning, RunPath, save, step_name
from trainfn.store.disk import Place
from trainfn.store.retention import Entry, Retention, prune
from trainfn.tree import map_leaves


class Saver:
    """Saves the states of one run. Its methods are called by one thread, the one that trains.

    Attributes:
        last: the newest checkpoint that is known to be safe, or None.

    Args:
        run: the run directory.
        retention: which checkpoints to keep.
        background: save on a thread; if False, ``save`` returns when the checkpoint is safe.
        on_error: ``"stop"`` raises what went wrong; ``"warn"`` warns of it and goes on without that checkpoint. Of
            the kinds of :class:`trainfn.errors.CheckpointError` only: anything else is raised.
        last: the checkpoint that the run was resumed from.

    >>> import tempfile, trainfn
    >>> state = trainfn.init(torch.nn.Linear(2, 1), trainfn.optim.sgd(lr=0.1))
    >>> with tempfile.TemporaryDirectory() as run:
    ...     with Saver(run) as saver:
    ...         saver.save(state)       # from here on, the state may be consumed
    ...     saver.last.name
    'step_00000000'
    """

    def __init__(
        self,
        run: RunPath,
        retention: Retention | None = None,
        *,
        background: bool = True,
        on_error: Literal["stop", "warn"] = "stop",
        last: Path | None = None,
    ) -> None:
        self.last = last
        self._run, self._retention = Path(run), retention or Retention()
        self._place = Place(self._run)
        self._background, self._on_error = background, on_error
        self._known: dict[int, Entry] = {}
        self._job: _Job | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.drain()
        except Exception as failure:
            if error is None:
                raise
            error.add_note(f"Besides, the last checkpoint was not saved: {failure}")

    @property
    def newest(self) -> Path | None:
        """The checkpoint that is being written, or else the last one."""
        return self.last if self._job is None else self._job.target

    def save(self, state: TrainState, **known: Any) -> None:
        """Save a state as it is now, having waited for the save before.

        Args:
            state: read, never written to; free to be consumed when this returns.
            **known: as for :func:`trainfn.save`.

        Raises:
            CheckpointError: of this save, if it is not in the background; else of the one before.
        """
        self.drain()
        work = functools.partial(self._write, known=known)
        target = self._run / step_name(state.cursor)
        self._job = _Job(work, _copied(state) if self._background else state, target)
        if self._background:
            self._job.start()
        else:
            self._job.run()
            self.check()

    def check(self) -> None:
        """Raise what went wrong in a save that has ended; costs nothing while one is running.

        Raises:
            CheckpointError: the save failed.
        """
        if self._job is None or not self._job.ended:
            return
        job, self._job = self._job, None
        job.join()
        if job.error is None:
            self.last = job.target
        elif self._on_error == "warn" and isinstance(job.error, CheckpointError):
            warn(f"A checkpoint was not saved, and the run goes on: {job.error}", CheckpointWarning)
        else:
            raise job.error

    def drain(self) -> Path | None:
        """Wait for the save that is under way, if one is; return the newest checkpoint that is safe.

        Raises:
            CheckpointError: the save failed.
        """
        if self._job is not None:
            self._job.join()
            self.check()
        return self.last

    def _write(self, state: TrainState, known: dict[str, Any]) -> None:
        self._place.check()
        save(state, self._run, **known)
        prune(self._run, self._retention, newest=state.cursor, known=self._known)


class _Job:
    """One save: what it works on, what came of it, and the thread that it may run on.

    The thread is no daemon: an interpreter that ends in the middle waits for it.
    """

    def __init__(self, work: Callable[[TrainState], None], state: TrainState, target: Path) -> None:
        self.target = target
        self.error: BaseException | None = None
        self.ended = False
        self._work, self._state = work, state
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self.run, name="trainfn-saver")
        self._thread.start()

    def run(self) -> None:
        try:
            self._work(self._state)
        except BaseException as error:  # raised again, by the thread that trains
            self.error = error
        finally:
            del self._work, self._state  # a whole copy of the state
            self.ended = True

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join()


def _copied(state: TrainState) -> TrainState:
    def copied(leaf: Any) -> Any:
        return leaf.detach().to("cpu", copy=True) if isinstance(leaf, Tensor) else leaf

    with torch.no_grad():
        return map_leaves(copied, state)
