"""Signals that set a flag: the loop acts on it between steps, when the state is whole and can be saved.

SIGTERM (a cluster that ends a job) and SIGINT (Ctrl-C) are listened to; SIGUSR1 (which SLURM sends ahead of a time
limit, ``--signal=USR1@120``) only where the caller has said what to do about it. A second SIGINT or SIGTERM is not
listened to: it interrupts at once, or ends the process.

Handlers can be installed by the main thread only; elsewhere nothing is listened to, and signals do what they did.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

OnSignal = Callable[[signal.Signals, Path | None], object]
"""What the caller does about a signal: takes the signal and the checkpoint; True is for "go on", after SIGUSR1."""


class Interrupted(KeyboardInterrupt):
    """A run was ended by SIGINT, between two steps, with everything saved.

    Attributes:
        result: the :class:`trainfn.FitResult` so far.
    """

    result: Any = None


class Terminated(SystemExit):
    """A run was ended by SIGTERM (or SIGUSR1), between two steps, with everything saved. The exit status is 143 (138).

    Attributes:
        result: the :class:`trainfn.FitResult` so far.
    """

    result: Any = None


class Listener:
    """What has been heard.

    Attributes:
        heard: the first signal, or None.
    """

    def __init__(self) -> None:
        self.heard: signal.Signals | None = None

    def take(self) -> signal.Signals | None:
        """Return what has been heard, once."""
        heard, self.heard = self.heard, None
        return heard


@contextlib.contextmanager
def listening(*, usr1: bool = False) -> Iterator[Listener]:
    """Listen to SIGTERM and SIGINT, and to SIGUSR1 if asked; put the handlers that were there back at the end.

    A signal that is ignored (as SIGINT is under ``nohup``), or handled outside Python, is left so.

    >>> with listening() as listener:
    ...     signal.raise_signal(signal.SIGTERM)
    ...     listener.heard
    <Signals.SIGTERM: 15>
    """
    listener, owner = Listener(), os.getpid()
    if threading.current_thread() is not threading.main_thread():
        yield listener
        return
    before: dict[int, Any] = {}

    def hear(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            return  # a forked data worker: its parent stops it
        listener.heard = signal.Signals(number)
        if number == signal.SIGUSR1:
            return
        # The next one is not for us. PyTorch's SIGCHLD handler would raise in mid-step because a data worker, which a
        # terminal or a cluster signals as well, has ended; no more batches are needed.
        for other, action in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
            if other in before:
                signal.signal(other, action)
        before.setdefault(signal.SIGCHLD, signal.getsignal(signal.SIGCHLD))
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    wanted: list[signal.Signals] = [signal.SIGTERM, signal.SIGINT, *([signal.SIGUSR1] if usr1 else [])]
    try:
        for one in wanted:
            if signal.getsignal(one) not in (signal.SIG_IGN, None):  # None: not Python's
                before[one] = signal.signal(one, hear)
        yield listener
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


def leave(number: signal.Signals, said: str, result: object) -> NoReturn:
    """Raise what ends a run that was told to end: a KeyboardInterrupt for SIGINT, else a SystemExit of 128 + number.

    An interpreter that a KeyboardInterrupt ends tells its parent so, which a shell shows as 130.
    """
    error: Interrupted | Terminated
    error = Interrupted(said) if number == signal.SIGINT else Terminated(128 + number)
    error.result = result
    raise error
