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
from typing import Any, NoReturn, TypeVar

from trainfn.faults import comes_from_data

T = TypeVar("T")

OnSignal = Callable[[signal.Signals, Path | None], object]
"""What the caller does about a signal: takes the signal and the checkpoint; True is for "go on", after SIGUSR1."""


class Listener:
    """What has been heard.

    Attributes:
        heard: the first signal, or None.
    """

    def __init__(self) -> None:
        self.heard: signal.Signals | None = None


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
        # The next one is not for us.
        for other, action in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
            if other in before:
                signal.signal(other, action)

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


def until_told(states: Iterator[T], listener: Listener) -> Iterator[T]:
    """Yield the states; end early where the next batch does not come and a signal has been heard.

    A cluster signals the data workers as well. When they end before the step that was under way, to wait for the next
    batch fails, while the last state is whole. An error of the step itself is raised: it may have spoilt the state.
    """
    try:
        yield from states
    except Exception as error:
        if listener.heard is None or not comes_from_data(error.__traceback__):
            raise


def leave(number: signal.Signals, said: str, result: object) -> NoReturn:
    """Raise what ends a run that was told to end: KeyboardInterrupt for SIGINT, else a SystemExit of 128 + number.

    Both have the run's ``result`` so far as an attribute. They are not of classes of our own, because an interpreter
    that ends by a plain KeyboardInterrupt tells its parent that a signal ended it, which a shell shows as 130.

    >>> try:
    ...     leave(signal.SIGTERM, "stopped", result=3)
    ... except SystemExit as error:
    ...     error.code, error.result
    (143, 3)
    """
    error: Any = KeyboardInterrupt(said) if number == signal.SIGINT else SystemExit(128 + number)
    error.result = result
    raise error
